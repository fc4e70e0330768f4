"""What RepPoints (Yang et al. 2019) learns: boxes of point sets, which location learns which object, the box loss."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

NOTHING: Final = -1  # no object: background
BETWEEN: Final = -2  # neither an object nor background
HIGH, LOW = 0.5, 0.4  # overlaps from which an initial box learns its object, and below which it is background
BETA: Final = 1 / 9  # where smooth L1 turns from squares into distances, in units of the anchor (public code)
SCALE_RATE: Final = 0.01  # share of its gradient by which the scale of the deviations learns (section 3.2; public code)


def moment_box(points: Tensor, scale: Tensor) -> Tensor:
    """The box around a point set by its first two moments (section 3.2, the third transform).

    points: N×2P×H×W, of each point how far it lies down, then across. scale: two logarithms, across and down, of how
    many standard deviations (of the P points, unbiased as in the public code) a side lies from the mean; they learn at
    a hundredth of the rate. N×4×H×W x1 y1 x2 y2 in the points' units, with gradient in both.
    """
    slow = scale * SCALE_RATE + scale.detach() * (1 - SCALE_RATE)
    down, across = points[:, 0::2], points[:, 1::2]
    y, x = down.mean(1), across.mean(1)
    half_width, half_height = across.std(1) * slow[0].exp(), down.std(1) * slow[1].exp()
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=1)


def assign_nearest(anchors: Tensor, truth: Tensor, per_level: list[int]) -> Tensor:
    """The object that each location's initial points learn, R numbers; NOTHING where there is none.

    An object is learnt by the location nearest to its centre, in units of its sides, on the last level whose anchors
    (R×4, squares; per_level: how many of each) are no larger than the square root of its area, or the first level. With
    anchors of four strides that is the public code's assigner. Of several objects nearest to one location it learns the
    nearest, and the others have none. truth: G×4 xyxy.
    """
    if not len(truth):
        return anchors.new_full((len(anchors),), NOTHING, dtype=torch.int64)
    level = torch.arange(len(per_level), device=anchors.device).repeat_interleave(
        torch.tensor(per_level, device=anchors.device)
    )
    first = torch.tensor([sum(per_level[:number]) for number in range(len(per_level))], device=anchors.device)
    scale = anchors[first, 2] - anchors[first, 0]
    sides = truth[:, 2:] - truth[:, :2]
    wanted = ((scale <= sides.prod(1, keepdim=True).sqrt()).sum(1) - 1).clamp_min(0)
    away = _centres(anchors) - _centres(truth).unsqueeze(1)
    distance = (away / sides.unsqueeze(1)).norm(dim=2).masked_fill(level != wanted.unsqueeze(1), torch.inf)
    nearest = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, distance.argmin(1, keepdim=True), True)
    least, number = distance.masked_fill(~nearest, torch.inf).min(0)
    learnt: Tensor = number.masked_fill(least.isinf(), NOTHING)
    return learnt


def assign_overlapping(boxes: Tensor, truth: Tensor) -> Tensor:
    """The object that each location's class and refined points learn, R numbers; NOTHING or BETWEEN where none.

    boxes: the initial ones, R×4; truth: G×4. Each box learns the object that it overlaps most (IoU) from HIGH on, is
    background below LOW, and neither in between; but of every object the box that overlaps it most learns it in any
    case. Not so where nothing overlaps an object: the public code then gives it all boxes without any overlap.
    """
    if not len(truth):
        return boxes.new_full((len(boxes),), NOTHING, dtype=torch.int64)
    overlaps = box_iou(truth, boxes)
    best, matched = overlaps.max(0)
    matched = matched.masked_fill(best < HIGH, BETWEEN).masked_fill(best < LOW, NOTHING)
    top = overlaps.amax(1, keepdim=True)
    claimed = (overlaps == top) & (top > 0)
    last = (claimed * torch.arange(1, len(truth) + 1, device=boxes.device).unsqueeze(1)).amax(0) - 1
    return torch.where(last >= 0, last, matched)


def box_loss(boxes: Tensor, truth: Tensor, anchors: Tensor) -> Tensor:
    """Smooth L1 of the corners in units of the anchors' sides, summed over P locations; all P×4 xyxy in pixels."""
    unit = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    loss: Tensor = F.smooth_l1_loss(boxes / unit, truth / unit, reduction="sum", beta=BETA)
    return loss


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2
