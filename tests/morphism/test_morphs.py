"""Actions on real detectors: pruning equals masking, adding and widening change nothing, and all weights are accounted
for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from detector_cases import assert_same_detections, batch, families, small_spec, stirred
from torch import nn

from autodet.detectors import Arch, Detector, build, detect
from autodet.detectors.channels import channel_groups
from autodet.detectors.dims import Groups, group_of, made_axis, size_of
from autodet.detectors.spec import FAMILIES
from autodet.evaluation import count_macs, count_params
from autodet.morphism.blocks import add_block, move_boundary, remove_block, remove_head_layer
from autodet.morphism.importance import block_importance, channel_importance
from autodet.morphism.morph import Morph, MorphError
from autodet.morphism.pruning import prune_head, prune_inner, prune_mask_head, prune_neck, prune_stage
from autodet.morphism.widening import widen_inner, widen_stage

# Basic blocks whose stem is added to stage 1, ones whose is not, and bottlenecks.
BODIES = {
    "tied": "basic-16:16x2-16x3(12)-24x2-24x1",
    "own stem": "basic-8:16x2-24x2-24x1(16)-24x2",
    "bottleneck": "bottleneck-8:32x2-48x2(8)-48x1(16)-64x2",
}
bodies = pytest.mark.parametrize("body", BODIES)
# Every family with one kind of body, and every kind of body with one family.
kinds = pytest.mark.parametrize(
    ("family", "body"),
    [*((family, "tied") for family in FAMILIES), ("retinanet", "own stem"), ("retinanet", "bottleneck")],
)
Action = Callable[..., Morph]

SHRINKING: list[tuple[Action, tuple[int, ...]]] = [
    (prune_inner, (2, 1, 4)),
    (prune_stage, (1, 12)),
    (prune_stage, (2, 8)),
    (prune_stage, (4, 16)),
    (prune_neck, (12,)),
]
GROWING: list[tuple[Action, tuple[int, ...]]] = [
    (add_block, (1,)),
    (add_block, (3,)),
    (widen_inner, (2, 1, 28)),
    (widen_stage, (1, 40)),
    (widen_stage, (3, 56)),
]


def told(value: Any) -> str:
    """A case's part in its test's name."""
    return getattr(value, "__name__", None) or "-".join(map(str, value))


def detector_of(family: str, body: str, **changes: Any) -> Detector:
    detector = stirred(replace(small_spec(family, **changes), body=Arch.parse(BODIES[body])))
    with torch.no_grad():
        for name, value in detector.model.state_dict().items():
            if name.endswith(".bias"):
                value.uniform_(-0.2, 0.2)  # so that a channel which is forgotten shows
    detector.model.eval()
    return detector


def carry(morph: Morph, parent: Detector) -> Detector:
    """The child with its weights; every tensor must fit."""
    child = build(morph.spec)
    child.model.load_state_dict(morph.weights(parent.model.state_dict()))
    child.model.eval()
    return child


def mask(detector: Detector, morph: Morph) -> None:
    """Silence, in place, the channels that a morph leaves out: filters, biases, and the norms after them."""
    for name, tensor in detector.model.state_dict().items():
        dims: Groups = channel_groups(detector.spec).get(name, (None,))
        axis = made_axis(dims)
        made, filters = dims[axis], tensor.transpose(0, axis) if axis else tensor
        if made is None or "running" in name or group_of(made) not in morph.picks:
            continue
        gone = set(range(len(filters) // size_of(made))) - set(morph.picks[group_of(made)].tolist())
        for channel in gone:
            filters[channel * size_of(made) : (channel + 1) * size_of(made)] = 0


@kinds
@pytest.mark.parametrize(("action", "arguments"), SHRINKING, ids=told)
def test_pruning_equals_masking(family: str, body: str, action: Action, arguments: tuple[int, ...]) -> None:
    parent = detector_of(family, body)
    images, _ = batch()
    morph = action(parent.spec, parent.model.state_dict(), random.Random(0), *arguments)
    child = carry(morph, parent)
    assert count_params(child.model) < count_params(parent.model)
    importance = channel_importance(parent.model.state_dict(), parent.spec)
    for group, picks in morph.picks.items():
        lost = set(range(len(importance[group]))) - set(picks.tolist())
        assert lost and importance[group][picks].min() >= importance[group][sorted(lost)].max()
    mask(parent, morph)
    assert_same_detections(detect(child, images), detect(parent, images))


@pytest.mark.parametrize(
    ("family", "neck_groups", "width"),
    [("faster_rcnn", 4, 12), ("mask_rcnn", 4, 8), ("fcos", 2, 8), ("reppoints", 8, 12)],
)
def test_a_neck_with_norms_is_pruned_by_their_groups(family: str, neck_groups: int, width: int) -> None:
    """The heads of one stage have 4 groups of their own: of 4 channels, where the neck's are of 8 or 2."""
    relu = small_spec(family).top == "pool"
    parent = detector_of(family, "tied", neck_groups=neck_groups, top_relu=relu)
    images, _ = batch()
    morph = prune_neck(parent.spec, parent.model.state_dict(), random.Random(0), width)
    assert len(morph.picks["outer"]) == morph.spec.neck_groups == neck_groups * width // 16
    child = carry(morph, parent)
    mask(parent, morph)
    assert_same_detections(detect(child, images), detect(parent, images))


@pytest.mark.parametrize(("action", "arguments"), SHRINKING, ids=told)
def test_a_pruned_detector_computes_less(action: Action, arguments: tuple[int, ...]) -> None:
    parent = detector_of("fcos", "tied")
    child = carry(action(parent.spec, parent.model.state_dict(), random.Random(0), *arguments), parent)
    images, _ = batch()
    assert count_macs(lambda: detect(child, images)) < count_macs(lambda: detect(parent, images))


def test_pruning_the_head_of_regions_equals_masking() -> None:
    parent = detector_of("faster_rcnn", "tied")
    images, _ = batch()
    morph = prune_head(parent.spec, parent.model.state_dict(), random.Random(0), 20)
    child = carry(morph, parent)
    mask(parent, morph)
    assert_same_detections(detect(child, images), detect(parent, images))


def test_pruning_the_mask_head_equals_masking() -> None:
    parent = detector_of("mask_rcnn", "tied")
    images, _ = batch()
    morph = prune_mask_head(parent.spec, parent.model.state_dict(), random.Random(0), 8)
    assert set(morph.picks) == {"mask.0", "mask.1", "mask.up"}
    child = carry(morph, parent)
    assert count_params(child.model) < count_params(parent.model)
    before = detect(parent, images)
    mask(parent, morph)
    expected = detect(parent, images)
    assert not all(torch.allclose(a["masks"], b["masks"]) for a, b in zip(before, expected, strict=True))
    assert_same_detections(detect(child, images), expected)


@pytest.mark.parametrize("groups", [0, 4])
def test_a_one_stage_head_with_group_norms_or_without_is_pruned_with_its_neck(groups: int) -> None:
    parent = detector_of("retinanet", "tied", head_groups=groups)
    images, _ = batch()
    morph = prune_neck(parent.spec, parent.model.state_dict(), random.Random(0), 8)
    assert morph.spec.head_groups == groups // 2
    child = carry(morph, parent)
    mask(parent, morph)
    assert_same_detections(detect(child, images), detect(parent, images))


@kinds
@pytest.mark.parametrize(("action", "arguments"), GROWING, ids=told)
def test_growing_changes_no_detection(family: str, body: str, action: Action, arguments: tuple[int, ...]) -> None:
    parent = detector_of(family, body)
    images, _ = batch()
    before = {name: value.clone() for name, value in parent.model.state_dict().items()}
    child = carry(action(parent.spec, before, random.Random(0), *arguments), parent)
    assert count_params(child.model) > count_params(parent.model)
    assert_same_detections(detect(child, images), detect(parent, images))
    assert all(torch.equal(value, before[name]) for name, value in parent.model.state_dict().items())


@families
def test_an_added_block_learns(family: str) -> None:
    parent = detector_of(family, "tied")
    child = carry(add_block(parent.spec, parent.model.state_dict(), random.Random(0), 2), parent)
    images, targets = batch()
    child.model.train()
    inputs = child.preprocess(images, targets)
    features = child.features(inputs)
    losses = child.losses(inputs, features, child.dense(inputs, features))
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    gradient = child.model.get_parameter("backbone.body.layer2.3.bn2.weight").grad
    assert gradient is not None and float(gradient.abs().sum()) > 0


@bodies
def test_the_block_that_adds_the_least_is_removed(body: str) -> None:
    """The child equals its parent with that block left out."""
    parent = detector_of("retinanet", body)
    images, _ = batch()
    stage = parent.model.get_submodule("backbone.body.layer2")
    last = "bn2" if parent.spec.body.block == "basic" else "bn3"
    depth = parent.spec.body.stages[1].depth
    with torch.no_grad():
        stage.get_submodule(f"1.{last}").get_parameter("weight").mul_(0.1)
    importance = block_importance(parent.model.state_dict(), parent.spec)
    assert importance[2, 1] == pytest.approx(float(stage.get_parameter(f"1.{last}.weight").detach().abs().mean()))
    assert min(importance, key=importance.__getitem__) == (2, 1) and (2, 0) not in importance
    child = carry(remove_block(parent.spec, parent.model.state_dict(), random.Random(0), 2), parent)
    assert child.spec.body.stages[1].depth == depth - 1
    setattr(stage, "1", nn.Identity())
    assert_same_detections(detect(child, images), detect(parent, images))


def test_moving_a_boundary_equals_removing_a_block_and_adding_a_silent_one() -> None:
    parent = detector_of("fcos", "tied")
    images, _ = batch()
    state = parent.model.state_dict()
    for stage, other in ((2, 3), (2, 1)):
        moved = carry(move_boundary(parent.spec, state, random.Random(0), stage, other), parent)
        removed = carry(remove_block(parent.spec, state, random.Random(0), stage), parent)
        assert sum(moved.spec.body.depths) == sum(parent.spec.body.depths)
        assert_same_detections(detect(moved, images), detect(removed, images))


@families
def test_a_head_loses_its_last_layer_and_keeps_the_others(family: str) -> None:
    changes = {"rpn_depth": 2} if small_spec(family).two_stage else {}
    parent = detector_of(family, "tied", **changes)
    state = parent.model.state_dict()
    child = carry(remove_head_layer(parent.spec, state, random.Random(0)), parent)
    assert all(torch.equal(value, state[name]) for name, value in child.model.state_dict().items())
    assert len(child.model.state_dict()) < len(state)
    assert detect(child, batch()[0])
    with pytest.raises(MorphError, match="The heads have one layer"):
        remove_head_layer(child.spec, child.model.state_dict(), random.Random(0))


@pytest.mark.parametrize(("action", "arguments"), [*SHRINKING, *GROWING, (remove_block, (2,))], ids=told)
def test_an_optimisers_moments_follow_their_weights(action: Action, arguments: tuple[int, ...]) -> None:
    parent = detector_of("fcos", "tied")
    moments = {name: torch.rand_like(value) for name, value in parent.model.named_parameters()}
    morph = action(parent.spec, parent.model.state_dict(), random.Random(0), *arguments)
    carried = morph.moments(moments)
    child = build(morph.spec)
    assert {name: value.shape for name, value in child.model.named_parameters()} == {
        name: value.shape for name, value in carried.items()
    }
    as_weights = morph.weights({**parent.model.state_dict(), **moments})
    for name, value in carried.items():
        if name in morph.fresh:
            assert not value.any()
        elif action not in (widen_inner, widen_stage):
            assert torch.equal(value, as_weights[name])
        else:  # a copy has its original's, undivided
            assert set(value.flatten().tolist()) <= set(moments[morph.source_of(name)].flatten().tolist())


REFUSED: list[tuple[Action, tuple[int, ...], str]] = [
    (prune_inner, (2, 1, 12), "less than the inner width of block 1 of stage 2, 12, and at least 1, found 12"),
    (prune_inner, (2, 3, 4), "Stage 2 has the blocks 0 to 2, found 3"),
    (prune_stage, (5, 4), "a stage from 1 to 4, found 5"),
    (prune_stage, (1, 0), "at least 1, found 0"),
    (prune_neck, (16,), "less than the neck's width, 16"),
    (prune_neck, (10,), "take 4 channels together: 10 is no multiple"),
    (prune_head, (8,), "as wide as its neck"),
    (widen_stage, (2, 16), "more than the 16 channels of layer2"),
    (remove_block, (4,), "Stage 4 has one block"),
    (move_boundary, (2, 4), "neighbouring stages, found 2 and 4"),
]


@pytest.mark.parametrize(("action", "arguments", "reason"), REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(
    action: Action, arguments: tuple[int, ...], reason: str
) -> None:
    parent = detector_of("fcos", "tied")
    with pytest.raises((MorphError, ValueError), match=reason):
        action(parent.spec, parent.model.state_dict(), random.Random(0), *arguments)


def test_a_stage_is_not_made_as_wide_as_a_stem_of_its_own() -> None:
    parent = detector_of("fcos", "own stem")
    with pytest.raises(MorphError, match="would lose its projection"):
        prune_stage(parent.spec, parent.model.state_dict(), random.Random(0), 1, 8)


def test_frozen_norms_and_grouped_convolutions_are_refused() -> None:
    frozen = detector_of("fcos", "tied", norm="frozen")
    with pytest.raises(MorphError, match="convert the detector's norms first"):
        add_block(frozen.spec, frozen.model.state_dict(), random.Random(0), 1)
    grouped = replace(small_spec("fcos"), body=Arch.parse("bottleneck[g2]-8:16x2(8)-32x2(8)-32x1(8)-32x2(8)"))
    parent = stirred(grouped)
    with pytest.raises(MorphError, match="several groups, whose inner widths go together"):
        prune_inner(parent.spec, parent.model.state_dict(), random.Random(0), 1, 0, 4)
    images, _ = batch()
    morph = prune_stage(parent.spec, parent.model.state_dict(), random.Random(0), 2, 24)
    child = carry(morph, parent)
    mask(parent, morph)
    assert_same_detections(detect(child, images), detect(parent, images))
