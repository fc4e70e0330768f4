"""Adding, removing and moving residual blocks, and layers of the heads."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from autodet.detectors import DetectorSpec, build
from autodet.detectors.channels import BODY
from autodet.morphism.importance import block_importance
from autodet.morphism.morph import Morph, MorphError, Weights
from autodet.morphism.pruning import stage_of, with_stage


def add_block(spec: DetectorSpec, weights: Weights, rng: random.Random, stage: int) -> Morph:
    """One more block at a stage's end, as wide inside as the one before it; the detections stay the same.

    The scale and shift of its last norm are zero, so that it adds nothing to its shortcut until it is trained.
    """
    if spec.norm == "frozen":
        raise MorphError("A block whose last norm is frozen at zero never learns: convert the detector's norms first.")
    before = stage_of(spec.body, stage)
    after = replace(before, inner=(*before.inner, before.inner[-1]))
    child = with_stage(spec, stage, after)
    return Morph(spec, child, fresh=_silent_block(child, rng, stage, before.depth))


def remove_block(spec: DetectorSpec, weights: Weights, rng: random.Random, stage: int) -> Morph:
    """One block less of a stage: the one that adds the least to its shortcut. The first one stays."""
    before = stage_of(spec.body, stage)
    if before.depth == 1:
        raise MorphError(f"Stage {stage} has one block, which halves the resolution or changes the width.")
    importance = block_importance(weights, spec)
    gone = min(range(1, before.depth), key=lambda block: (importance[stage, block], -block))
    after = replace(before, inner=(*before.inner[:gone], *before.inner[gone + 1 :]))
    moved = {_block(stage, block): _block(stage, block + 1) for block in range(gone, before.depth - 1)}
    return Morph(spec, with_stage(spec, stage, after), sources=moved)


def move_boundary(spec: DetectorSpec, weights: Weights, rng: random.Random, stage: int, other: int) -> Morph:
    """One block less of a stage, one more of a neighbour: where one ends and the other begins moves by a block.

    The block starts anew there, silent as an added one, since its weights fit no other width and resolution.
    """
    if abs(stage - other) != 1:
        raise MorphError(f"Expected neighbouring stages, found {stage} and {other}.")
    removed = remove_block(spec, weights, rng, stage)
    added = add_block(removed.spec, removed.weights(weights), rng, other)
    return replace(removed, spec=added.spec, fresh=added.fresh)


def remove_head_layer(spec: DetectorSpec, weights: Weights, rng: random.Random) -> Morph:
    """The last convolution of each of the heads' towers less; of a Faster R-CNN that of its proposals' head."""
    depth = spec.rpn_depth if spec.two_stage else spec.head_depth
    if depth == 1:
        raise MorphError("The heads have one layer.")
    child = replace(spec, rpn_depth=depth - 1) if spec.two_stage else replace(spec, head_depth=depth - 1)
    return Morph(spec, child)


def _silent_block(child: DetectorSpec, rng: random.Random, stage: int, block: int) -> dict[str, Tensor]:
    """Fresh weights of one block of a child, the last norm's zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(63))
        state = build(child).model.state_dict()
    begin = _block(stage, block)
    fresh = {name: value for name, value in state.items() if name.startswith(begin)}
    last = "bn2" if child.body.block == "basic" else "bn3"
    for part in ("weight", "bias"):
        fresh[f"{begin}{last}.{part}"].zero_()
    return fresh


def _block(stage: int, block: int) -> str:
    return f"{BODY}layer{stage}.{block}."
