"""Removing channels: the child computes what its parent does with the same channels masked."""

from __future__ import annotations

import random
from dataclasses import replace

from autodet.detectors import DetectorSpec
from autodet.detectors.arch import Arch, Stage
from autodet.detectors.channels import channel_counts
from autodet.morphism.importance import channel_importance
from autodet.morphism.morph import Morph, MorphError, Weights, kept


def prune_inner(spec: DetectorSpec, weights: Weights, rng: random.Random, stage: int, block: int, width: int) -> Morph:
    """Fewer channels between the convolutions of one block. stage: 1–4; block: from 0."""
    child, _ = with_inner(spec, stage, block, width)
    _check_smaller(
        f"the inner width of block {block} of stage {stage}", spec.body.stages[stage - 1].inner[block], width
    )
    return _pruned(spec, child, weights)


def prune_stage(spec: DetectorSpec, weights: Weights, rng: random.Random, stage: int, width: int) -> Morph:
    """Fewer channels of all outputs of a stage, and so of its shortcut and all that reads it.

    A stem that is as wide as a stage 1 of basic blocks is added to its outputs, and shrinks with it.
    """
    _check_smaller(f"the width of stage {stage}", stage_of(spec.body, stage).width, width)
    return _pruned(spec, with_width(spec, stage, width), weights)


def prune_neck(spec: DetectorSpec, weights: Weights, rng: random.Random, width: int) -> Morph:
    """Fewer channels of the pyramid's maps, and of the heads' convolutions, which are as wide as these."""
    _check_smaller("the neck's width", spec.neck_width, width)
    if width % spec.neck_step:
        raise MorphError(f"Group norms take {spec.neck_step} channels together: {width} is no multiple of that.")
    head, neck = (groups * width // spec.neck_width for groups in (spec.head_groups, spec.neck_groups))
    return _pruned(spec, replace(spec, neck_width=width, head_groups=head, neck_groups=neck), weights)


def prune_head(spec: DetectorSpec, weights: Weights, rng: random.Random, width: int) -> Morph:
    """Fewer channels of the two layers that look at a region."""
    if not spec.two_stage:
        raise MorphError(f"A {spec.family}'s head is as wide as its neck: prune that.")
    _check_smaller("the head's width", spec.head_width, width)
    return _pruned(spec, replace(spec, head_width=width), weights)


def prune_mask_head(spec: DetectorSpec, weights: Weights, rng: random.Random, width: int) -> Morph:
    """Fewer channels of the layers that give a region its mask."""
    if not spec.masks:
        raise MorphError(f"A {spec.family} without a mask branch has no mask head.")
    _check_smaller("the mask head's width", spec.mask_width, width)
    return _pruned(spec, replace(spec, mask_width=width), weights)


def with_inner(spec: DetectorSpec, stage: int, block: int, width: int) -> tuple[DetectorSpec, list[str]]:
    """The spec with another inner width of a block, and the groups of channels that it is the width of."""
    if spec.body.groups > 1:
        raise MorphError(f"{spec.body} has convolutions of several groups, whose inner widths go together.")
    before = stage_of(spec.body, stage)
    if not 0 <= block < before.depth:
        raise MorphError(f"Stage {stage} has the blocks 0 to {before.depth - 1}, found {block}.")
    after = replace(before, inner=(*before.inner[:block], width, *before.inner[block + 1 :]))
    numbers = (1,) if spec.body.block == "basic" else (1, 2)
    return with_stage(spec, stage, after), [f"layer{stage}.{block}.conv{number}" for number in numbers]


def with_width(spec: DetectorSpec, stage: int, width: int) -> DetectorSpec:
    """The spec with another width of a stage's outputs, and of a stem that is added to them."""
    before = stage_of(spec.body, stage)
    child = with_stage(spec, stage, replace(before, width=width))
    if stage == 1 and spec.body.stem == before.width:
        return replace(child, body=replace(child.body, stem=width))
    if stage == 1 and spec.body.stem == width:
        raise MorphError(f"A stage 1 as wide as the stem, {width}, would lose its projection: choose another width.")
    return child


def with_stage(spec: DetectorSpec, number: int, stage: Stage) -> DetectorSpec:
    """The spec with another stage of a number, 1–4."""
    stages = spec.body.stages
    return replace(spec, body=replace(spec.body, stages=(*stages[: number - 1], stage, *stages[number:])))


def stage_of(body: Arch, number: int) -> Stage:
    """The stage of a number, 1–4; MorphError where there is none."""
    if not 1 <= number <= len(body.stages):
        raise MorphError(f"Expected a stage from 1 to {len(body.stages)}, found {number}.")
    return body.stages[number - 1]


def _pruned(spec: DetectorSpec, child: DetectorSpec, weights: Weights) -> Morph:
    """The most important channels of every group that has fewer in the child."""
    importance, before, after = channel_importance(weights, spec), channel_counts(spec), channel_counts(child)
    fewer = [group for group, count in after.items() if count < before[group]]
    return Morph(spec, child, {group: kept(importance[group], after[group]) for group in fewer})


def _check_smaller(what: str, now: int, wanted: int) -> None:
    if not 0 < wanted < now:
        raise MorphError(f"Expected less than {what}, {now}, and at least 1, found {wanted}.")
