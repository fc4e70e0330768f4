"""Adding channels that copy others: the detections stay the same (Net2WiderNet, Chen et al. 2016)."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from autodet.detectors import DetectorSpec
from autodet.detectors.channels import body_counts, channel_groups, producers
from autodet.morphism.morph import Morph, MorphError, Weights
from autodet.morphism.pruning import with_inner, with_width

NOISE = 0.05  # of a copied channel's filter, relative to the filter's own root mean square [ours]


def widen_inner(spec: DetectorSpec, weights: Weights, rng: random.Random, stage: int, block: int, width: int) -> Morph:
    """More channels between the convolutions of one block. stage: 1–4; block: from 0."""
    return _widened(spec, *with_inner(spec, stage, block, width), rng)


def widen_stage(spec: DetectorSpec, weights: Weights, rng: random.Random, stage: int, width: int) -> Morph:
    """More channels of all outputs of a stage; a stem that is added to them grows with them."""
    return _widened(spec, with_width(spec, stage, width), [f"layer{stage}"], rng)


def break_ties(morph: Morph, state: dict[str, Tensor], rng: random.Random) -> None:
    """Add noise to the filters of copied channels, in place: equal ones would get equal gradients for ever."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    made = producers(channel_groups(morph.spec))
    for group, picks in morph.picks.items():
        copies = torch.bincount(picks)[picks] > 1
        for name in made[group] if bool(copies.any()) else ():
            filters = state[name]
            size = filters.pow(2).flatten(1).mean(1).sqrt().view(-1, *(1,) * (filters.dim() - 1))
            noise = torch.randn(filters.shape, generator=generator) * size * NOISE
            filters[copies] += noise[copies]


def _widened(spec: DetectorSpec, child: DetectorSpec, groups: list[str], rng: random.Random) -> Morph:
    before, after = body_counts(spec.body), body_counts(child.body)
    picks = {}
    for group in groups:
        if after[group] <= before[group]:
            raise MorphError(f"Expected more than the {before[group]} channels of {group}, found {after[group]}.")
        copied = [rng.randrange(before[group]) for _ in range(after[group] - before[group])]
        picks[group] = torch.tensor([*range(before[group]), *copied])
    return Morph(spec, child, picks)
