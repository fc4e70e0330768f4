"""Small elastic detectors of every family and body kind, which the tests of the pool share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from detector_cases import small_spec, stirred

from autodet.detectors import Detector
from autodet.teachers.space import PoolSpace

# Basic blocks with a tied stem; with a stem of its own; bottlenecks; grouped ones, whose inner width is fixed.
SPACES = {
    "tied": "basic-=:8..16/8x1..2-8..16/8x1..3(4..12/4)-16x1..2-16..24/8x1@48,64",
    "own stem": "basic-4..8/4:16x1..2-16..24/8x1..2-16x1(8..16/8)-24x1@64",
    "bottleneck": "bottleneck-8..16/8:32..64/32x1..2-32x1(4..8/4)-48..64/16x1..2(8)-64x1@64",
    "grouped": "bottleneck[g2]-8:16..24/8x1..2(8)-32x1(4)-32..48/16x1(8)-32x2(8)@64",
}


def space_of(name: str) -> PoolSpace:
    return PoolSpace.parse(SPACES[name])


def largest_detector(family: str, space: PoolSpace, **changes: Any) -> Detector:
    """The detector of a space's largest member, with weights and statistics as if trained."""
    spec = small_spec(family, **changes)
    return stirred(replace(spec, body=space.largest.body))
