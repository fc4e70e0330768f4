"""Changes that leave all weights as they are: what any user could set without searching. And norms that learn."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from autodet.detectors import DetectorSpec
from autodet.detectors.channels import BODY
from autodet.morphism.morph import Morph, MorphError, Weights

EPS = 1e-5  # of a batch norm that learns: without any, a channel that is constant in a batch divides by zero


def resize(spec: DetectorSpec, weights: Weights, rng: random.Random, pixels: int) -> Morph:
    """Another shorter side of the images, in pixels; anchors follow in proportion."""
    if pixels == spec.min_size or pixels < 1:
        raise MorphError(f"Expected another size than {spec.min_size} and at least 1 pixel, found {pixels}.")
    return Morph(spec, spec.at_size(pixels))


def keep_proposals(spec: DetectorSpec, weights: Weights, rng: random.Random, count: int) -> Morph:
    """Another number of regions that the second stage looks at in an image at evaluation; training keeps its own.

    As many are taken of each level before NMS, as torchvision's own defaults do.
    """
    if not spec.two_stage:
        raise MorphError(f"A {spec.family} has no second stage, and no proposals.")
    before, _ = spec.proposals_before_nms
    if count == spec.proposals[1] or count < 1:
        raise MorphError(f"Expected another number than {spec.proposals[1]} and at least 1, found {count}.")
    return Morph(spec, replace(spec, proposals=(spec.proposals[0], count), proposals_before_nms=(before, count)))


def with_settings_of(spec: DetectorSpec, other: DetectorSpec) -> DetectorSpec:
    """A detector with what actions may have changed of another and any user could: image size and proposals.

    Anchors and the longer side go with the detector's own, which need not be the other's.
    """
    sized = spec if spec.min_size == other.min_size else spec.at_size(other.min_size)
    if not (spec.two_stage and other.two_stage):
        return sized
    counts = (spec.proposals[0], other.proposals[1]), (spec.proposals_before_nms[0], other.proposals_before_nms[1])
    return replace(sized, proposals=counts[0], proposals_before_nms=counts[1])


def thaw_norms(spec: DetectorSpec, weights: Weights, rng: random.Random) -> Morph:
    """Frozen norms become batch norms, which learn and can be measured anew; the detections stay the same.

    torchvision's frozen norms have no eps; what an eps adds to the deviation goes into the scale.
    """
    if spec.norm != "frozen":
        raise MorphError("The detector's norms learn already.")
    fresh = {}
    for name, variance in weights.items():
        if name.startswith(BODY) and name.endswith(".running_var"):
            norm = name.removesuffix(".running_var")
            scale = ((variance + EPS) / (variance + spec.norm_eps)).sqrt()
            fresh[f"{norm}.weight"] = weights[f"{norm}.weight"] * scale
            fresh[f"{norm}.num_batches_tracked"] = variance.new_zeros((), dtype=torch.int64)
    return Morph(spec, replace(spec, norm="batch", norm_eps=EPS), fresh=fresh)
