"""The losses of Generalized Focal Loss (Li et al. 2020), pure functions of responses and targets."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

BETA: Final = 2.0  # section 4.1
BELOW_LAST: Final = 0.1  # bins that a target stays below the last one, so that one lies on either side; public code's


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = BETA) -> Tensor:
    """|y − σ|^β · cross-entropy(σ, y) of every response (eq. 5), in the shape of both.

    quality: y in [0, 1], the overlap of the predicted box with its object at the object's class, 0 everywhere else.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return (quality - logits.sigmoid()).abs().pow(beta) * entropy


def distribution_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """−((i + 1 − y) log S_i + (y − i) log S_(i+1)), i the bin below y (eq. 6), R.

    logits: R×B of the distributions S; targets: R distances y in bins, 0 ≤ y < B − 1.
    """
    below = targets.detach().long()
    chances = logits.log_softmax(1)
    share = targets - below
    low, high = (chances.gather(1, index.unsqueeze(1)).squeeze(1) for index in (below, below + 1))
    return -((1 - share) * low + share * high)


def distance_targets(distances: Tensor, reg_max: int) -> Tensor:
    """Distances in bins, kept within those that a distribution over 0, 1, …, reg_max can say."""
    return distances.clamp(0, reg_max - BELOW_LAST)


def expected(logits: Tensor) -> Tensor:
    """The means Σ i · S_i (eq. 4) of the distributions N×4B×H×W of the four sides, N×4×H×W bins in float32."""
    images, _, height, width = logits.shape
    chances = logits.view(images, 4, -1, height, width).float().softmax(2)
    bins = torch.arange(chances.shape[2], device=logits.device, dtype=torch.float32)
    return (chances * bins.view(-1, 1, 1)).sum(2)


def paired_iou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Intersection over union of box r with box r, R×4 xyxy each; 0 where both have no area."""
    low, high = torch.maximum(ours[:, :2], theirs[:, :2]), torch.minimum(ours[:, 2:], theirs[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    areas = (ours[:, 2:] - ours[:, :2]).prod(1) + (theirs[:, 2:] - theirs[:, :2]).prod(1)
    return shared / (areas - shared).clamp_min(1e-6)


def side_losses(
    boxes: Tensor, logits: Tensor, truth: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """GIoU loss and distribution focal loss of P locations with an object, weighted means.

    boxes, truth: P×4 xyxy; logits: P×4B; targets: P×4 in bins; weights: P. The sum of the weights that both are divided
    by is 1 at least, as in the public code; the four sides of a location are averaged.
    """
    total = weights.sum().clamp_min(1)
    overlap = generalized_box_iou_loss(boxes, truth, reduction="none")
    bins = logits.shape[1] // 4
    distribution = distribution_focal_loss(logits.reshape(-1, bins), targets.flatten()).view(-1, 4).mean(1)
    return (overlap * weights).sum() / total, (distribution * weights).sum() / total
