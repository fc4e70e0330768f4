"""Distances of a formula: pure functions ``(student, teacher, parameters) -> Tensor``.

Each returns one loss per row, or a scalar where it compares along the rows themselves. Within a row, elements are
averaged; only along the axis that a distribution sums to one over are they added, so that a divergence is a divergence.
``terms.term_loss`` reduces rows with the value's weights. Every distance is ≥ 0, 0 at S = T, and its gradient there is
finite. No temperature factor is hidden in any: the t² that Hinton et al. (2015) multiply by belongs in the weight.
``DISTANCES`` at the end is the list; a new distance is a function and a line there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autodet.distill.transforms import centred_unit, unit
from autodet.distill.values import (
    AXIS,
    PAIR,
    Operation,
    Param,
    Value,
    dimensions,
    has_axes,
    is_any,
    is_boxes,
    is_distribution,
    is_plain,
    is_spatial,
)

AREA_FLOOR = 1e-6  # in the squared unit of the boxes: two boxes of no area agree
SSIM_RANGE_FLOOR = 1e-3  # keeps SSIM's constants above rounding on constant maps


def l1(student: Value, teacher: Value) -> Tensor:
    """|S − T|; probabilities for a distribution."""
    return _over_rows(student, (student.plain() - teacher.plain()).abs())


def l2(student: Value, teacher: Value) -> Tensor:
    """(S − T)², without a half and without a root; probabilities for a distribution."""
    return _over_rows(student, (student.plain() - teacher.plain()).square())


def smooth_l1(student: Value, teacher: Value, beta: float) -> Tensor:
    """(S − T)² / (2 beta) below beta, |S − T| − beta / 2 above (Girshick 2015)."""
    return _over_rows(student, F.smooth_l1_loss(student.plain(), teacher.plain(), reduction="none", beta=beta))


def kl(student: Value, teacher: Value) -> Tensor:
    """KL(T ‖ S) = Σ p_T (log p_T − log p_S) of log-probabilities, added along the distribution's axis."""
    divergence = teacher.data.exp() * (teacher.data - student.data)
    return _over_rows(student, divergence).clamp_min(0)  # rounding may leave −1e-8 where they agree


def cosine(student: Value, teacher: Value, axis: str) -> Tensor:
    """1 − cos(S, T) along the axis, computed as ½‖S/‖S‖ − T/‖T‖‖²: no cancellation, and 0 for two zero vectors."""
    dims = dimensions(axis)
    return _half_square(unit(student.plain(), dims), unit(teacher.plain(), dims), axis)


def pearson(student: Value, teacher: Value, axis: str) -> Tensor:
    """1 − Pearson correlation of S and T along the axis (PKD, Cao et al. 2022, for axis nhw)."""
    dims = dimensions(axis)
    return _half_square(centred_unit(student.plain(), dims), centred_unit(teacher.plain(), dims), axis)


def crosscorr(student: Value, teacher: Value) -> Tensor:
    """(1 − r)² of every element's correlation r across the batch: Barlow Twins' term on the diagonal (Zbontar 2021).

    Its term off the diagonal is left out, because it is not zero at S = T.
    """
    one = centred_unit(student.plain(), (0,)) - centred_unit(teacher.plain(), (0,))
    return (one.square().sum(0) / 2).square().mean()


def ssim(student: Value, teacher: Value, window: int) -> Tensor:
    """1 − structural similarity in uniform windows (Wang et al. 2004, eq. 13, K1 = 0.01, K2 = 0.03).

    The dynamic range is the teacher's, per image. A window larger than the map shrinks to it.
    """
    S, T = student.data, teacher.data
    span = T.amax((1, 2, 3), keepdim=True) - T.amin((1, 2, 3), keepdim=True)
    span = span.clamp_min(SSIM_RANGE_FLOOR).detach()
    size = (min(window, S.shape[2]), min(window, S.shape[3]))
    # Variances are taken around the teacher's mean: E[x²] − E[x]² loses all digits on a large offset.
    offset = T.mean((2, 3), keepdim=True)
    mean_s, mean_t = F.avg_pool2d(S - offset, size, 1), F.avg_pool2d(T - offset, size, 1)
    var_s = F.avg_pool2d((S - offset).square(), size, 1) - mean_s.square()
    var_t = F.avg_pool2d((T - offset).square(), size, 1) - mean_t.square()
    both = F.avg_pool2d((S - offset) * (T - offset), size, 1) - mean_s * mean_t
    c1, c2 = (0.01 * span).square(), (0.03 * span).square()
    mu_s, mu_t = mean_s + offset, mean_t + offset
    luminance = 1 - (mu_s - mu_t).square() / (mu_s.square() + mu_t.square() + c1)
    structure = (2 * both + c2) / (var_s.clamp_min(0) + var_t.clamp_min(0) + c2)
    return _over_rows(student, (1 - luminance * structure).clamp_min(0))


def iou(student: Value, teacher: Value) -> Tensor:
    """1 − intersection over union of boxes R×4; 0 for two boxes without area at the same place (Yu et al. 2016)."""
    overlap, union, _ = _overlaps(student.data, teacher.data)
    return 1 - (overlap + AREA_FLOOR) / (union + AREA_FLOOR)


def giou(student: Value, teacher: Value) -> Tensor:
    """1 − generalised intersection over union, between 0 and 2: has a slope where boxes do not meet (Rezatofighi et al.
    2019)."""
    overlap, union, hull = _overlaps(student.data, teacher.data)
    return 1 - (overlap + AREA_FLOOR) / (union + AREA_FLOOR) + (hull - union).clamp_min(0) / (hull + AREA_FLOOR)


def _overlaps(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of intersection, union and enclosing box of R pairs; a box whose corners are crossed has none."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = one.unbind(1), other.unbind(1)
    areas = _area(x0, y0, x1, y1) + _area(u0, v0, u1, v1)
    shared = _area(torch.maximum(x0, u0), torch.maximum(y0, v0), torch.minimum(x1, u1), torch.minimum(y1, v1))
    around = _area(torch.minimum(x0, u0), torch.minimum(y0, v0), torch.maximum(x1, u1), torch.maximum(y1, v1))
    return shared, areas - shared, around


def _area(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    return (x1 - x0).clamp_min(0) * (y1 - y0).clamp_min(0)


def _half_square(student: Tensor, teacher: Tensor, axis: str) -> Tensor:
    """½ Σ (S − T)² along the axis, averaged over what is left; a scalar where the axis holds the rows."""
    loss = (student - teacher).square().sum(dimensions(axis), keepdim=True) / 2
    return loss.mean() if 0 in dimensions(axis) else loss.flatten(1).mean(1)


def _over_rows(value: Value, loss: Tensor) -> Tensor:
    """Add along a distribution's axis, then average within each row; a scalar where the axis holds the rows."""
    if value.axis is None:
        return loss.flatten(1).mean(1)
    if value.axis == PAIR:
        return loss.flatten(1).mean(1) * 2  # the two outcomes are the two halves of the channels
    dims = dimensions(value.axis)
    added = loss.sum(dims, keepdim=True)
    return added.mean() if 0 in dims else added.flatten(1).mean(1)


@dataclass(frozen=True)
class Distance(Operation):
    """A distance of the language."""


DISTANCES: dict[str, Distance] = {
    "l1": Distance(l1, is_any),
    "l2": Distance(l2, is_any),
    "smooth_l1": Distance(smooth_l1, is_any, (Param("beta", "float", 1.0, (0.1, 1.0), 1e-3, 100),)),
    "kl": Distance(kl, is_distribution),
    "cosine": Distance(cosine, has_axes, (Param("axis", "axis", "c"),)),
    "pearson": Distance(pearson, has_axes, (AXIS,), batch_rows=3),
    "crosscorr": Distance(crosscorr, is_plain, axis="n", batch_rows=3),
    "iou": Distance(iou, is_boxes),
    "giou": Distance(giou, is_boxes),
    "ssim": Distance(ssim, is_spatial, (Param("window", "int", 7, (3, 7), 2, 31),)),
}
