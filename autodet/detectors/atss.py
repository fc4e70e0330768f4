"""Adaptive training sample selection (ATSS, Zhang et al. 2020, algorithm 1): which locations learn which object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torchvision.ops import box_iou

CANDIDATES: Final = 9  # locations a level that an object may take (section 3.3)
INSIDE: Final = 0.01  # pixels from a box's sides that a location has at least; the public code's


def assign(anchors: Tensor, boxes: Tensor, per_level: Sequence[int], candidates: int = CANDIDATES) -> Tensor:
    """The object that each location learns, A numbers of rows of ``boxes``, −1 for none.

    anchors: A×4 xyxy, one a location, level by level; per_level: how many each level has; boxes: G×4 xyxy in the same
    pixels. An object's candidates are the locations nearest to its centre, up to ``candidates`` of each level. Those
    that lie inside it and whose anchor overlaps it by the candidates' mean plus standard deviation at least are its
    own; a location that several objects want learns the one that its anchor overlaps most. Locations in the padding
    take part, which the public code leaves out: few are so near to an object.
    """
    if not len(boxes):
        return anchors.new_full((len(anchors),), -1, dtype=torch.int64)
    overlaps = box_iou(anchors, boxes)  # A×G
    nearest = _nearest(anchors, boxes, per_level, candidates)  # C×G
    of_candidates = overlaps.gather(0, nearest)
    # The deviation is the sample's, as in the public code; a single candidate has none.
    least = of_candidates.mean(0) + of_candidates.std(0, correction=min(1, len(nearest) - 1))
    own = (of_candidates >= least) & (_margins(anchors, boxes) > INSIDE).gather(0, nearest)
    wanted = torch.full_like(overlaps, -1).scatter(0, nearest, torch.where(own, of_candidates, -1))
    best, index = wanted.max(1)
    return torch.where(best >= 0, index, -1)


def _nearest(anchors: Tensor, boxes: Tensor, per_level: Sequence[int], count: int) -> Tensor:
    """Rows of the anchors that are each level's nearest to every box's centre, C×G."""
    gaps = (anchors[:, None, :2] + anchors[:, None, 2:] - boxes[:, :2] - boxes[:, 2:]).square().sum(2)  # A×G
    found, start = [], 0
    for level in torch.split(gaps, list(per_level)):
        found.append(level.topk(min(count, len(level)), dim=0, largest=False).indices + start)
        start += len(level)
    return torch.cat(found)


def _margins(anchors: Tensor, boxes: Tensor) -> Tensor:
    """How far inside each box every location lies, A×G pixels; below zero outside."""
    centres = (anchors[:, None, :2] + anchors[:, None, 2:]) / 2
    return torch.cat([centres - boxes[:, :2], boxes[:, 2:] - centres], dim=2).amin(2)
