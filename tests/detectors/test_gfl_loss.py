"""The losses of Generalized Focal Loss against closed forms and computations element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, sigmoid_focal_loss

from autodet.detectors.gfl_loss import (
    distance_targets,
    distribution_focal_loss,
    expected,
    paired_iou,
    quality_focal_loss,
    side_losses,
)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def boxes(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    corner = torch.rand(count, 2, dtype=dtype) * 50
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, dtype=dtype) * 40], dim=1)


# Quality focal loss. ---


@dtypes
def test_qfl_is_equation_five_of_every_response(dtype: torch.dtype) -> None:
    logits, quality = torch.randn(3, 5, dtype=dtype) * 3, torch.rand(3, 5, dtype=dtype)
    quality[0] = 0
    for beta in (2.0, 1.5):
        found = quality_focal_loss(logits, quality, beta)
        for i in range(3):
            for j in range(5):
                y, sigma = float(quality[i, j]), 1 / (1 + math.exp(-float(logits[i, j])))
                entropy = -((1 - y) * math.log(1 - sigma) + y * math.log(sigma))
                assert float(found[i, j]) == pytest.approx(abs(y - sigma) ** beta * entropy, rel=1e-4)


def test_qfl_of_whole_numbers_is_the_focal_loss_without_alpha() -> None:
    logits, truth = torch.randn(50) * 4, (torch.rand(50) > 0.5).float()
    focal = sigmoid_focal_loss(logits, truth, alpha=-1, gamma=2)
    torch.testing.assert_close(quality_focal_loss(logits, truth), focal)


def test_qfl_is_least_where_the_score_is_the_quality() -> None:
    quality = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    exact = torch.logit(quality, eps=1e-6).requires_grad_()
    loss = quality_focal_loss(exact, quality)
    (slope,) = torch.autograd.grad(loss.sum(), exact)
    assert loss.max() < 1e-6 and slope.abs().max() < 1e-6
    for shift in (-0.5, 0.5):
        assert (quality_focal_loss(exact[1:4].detach() + shift, quality[1:4]) > 1e-4).all()


def test_qfl_of_extreme_responses_is_finite() -> None:
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = quality_focal_loss(logits, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 1e4, 1e4]))
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert slope.isfinite().all()


# Distributions. ---


@dtypes
def test_dfl_is_equation_six_of_every_side(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(20, 8, dtype=dtype), torch.rand(20, dtype=dtype) * 6.9
    found = distribution_focal_loss(logits, targets)
    for row in range(20):
        weights = [math.exp(float(x)) for x in logits[row]]
        y, i = float(targets[row]), math.floor(targets[row])
        low, high = weights[i] / sum(weights), weights[i + 1] / sum(weights)
        assert float(found[row]) == pytest.approx(-((i + 1 - y) * math.log(low) + (y - i) * math.log(high)), rel=1e-4)


def test_dfl_of_a_flat_distribution_is_the_logarithm_of_its_bins() -> None:
    torch.testing.assert_close(
        distribution_focal_loss(torch.zeros(3, 17), torch.tensor([0.0, 3.3, 15.9])), torch.full((3,), math.log(17))
    )


def test_dfl_is_least_for_the_two_bins_whose_mean_is_the_target() -> None:
    """Section 3.2: S_i = i + 1 − y and S_(i+1) = y − i, where the loss is the entropy and has no slope."""
    target = torch.tensor([2.25])
    best = torch.full((1, 6), -40.0)
    best[0, 2], best[0, 3] = math.log(0.75), math.log(0.25)
    best.requires_grad_()
    loss = distribution_focal_loss(best, target)
    (slope,) = torch.autograd.grad(loss.sum(), best)
    torch.testing.assert_close(loss, torch.tensor([-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]))
    assert slope.abs().max() < 1e-6
    mean = expected(best.detach().repeat(1, 4).view(1, 24, 1, 1))
    torch.testing.assert_close(mean, torch.full((1, 4, 1, 1), 2.25))


def test_expected_distances_of_sure_and_of_flat_distributions() -> None:
    logits = torch.zeros(2, 4, 9, 3, 5)
    logits[1, 0, 0] = logits[1, 1, 3] = logits[1, 2, 8] = 60.0
    means = expected(logits.view(2, 36, 3, 5))
    assert means.shape == (2, 4, 3, 5) and means.dtype == torch.float32
    torch.testing.assert_close(means[0], torch.full((4, 3, 5), 4.0))
    torch.testing.assert_close(means[1, :, 0, 0], torch.tensor([0.0, 3.0, 8.0, 4.0]))
    assert expected(logits.view(2, 36, 3, 5).bfloat16()).dtype == torch.float32


def test_targets_stay_between_two_bins() -> None:
    found = distance_targets(torch.tensor([-3.0, 0.0, 2.5, 7.95, 8.0, 90.0]), 8)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 2.5, 7.9, 7.9, 7.9]))
    assert distribution_focal_loss(torch.randn(6, 9), found).isfinite().all()


# Boxes. ---


@dtypes
def test_paired_overlaps_are_the_diagonal_of_all_overlaps(dtype: torch.dtype) -> None:
    one, other = boxes(30, dtype), boxes(30, dtype)
    torch.testing.assert_close(paired_iou(one, other), box_iou(one, other).diagonal())
    torch.testing.assert_close(paired_iou(one, one), torch.ones(30, dtype=dtype))
    assert paired_iou(torch.zeros(1, 4), torch.zeros(1, 4)) == 0


def test_side_losses_by_hand() -> None:
    """Two boxes of 4×4, one shifted by 2 and one by 4 pixels, of weights 1.5 and 0.5; flat distributions of 3 bins."""
    truth = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4]])
    found = torch.tensor([[2.0, 0, 6, 4], [4, 0, 8, 4]])
    giou = (1 - 8 / 24, 1 - 0 / 32)  # the enclosing boxes are covered
    box, distribution = side_losses(found, torch.zeros(2, 12), truth, torch.full((2, 4), 0.3), torch.tensor([1.5, 0.5]))
    assert float(box) == pytest.approx((1.5 * giou[0] + 0.5 * giou[1]) / 2)
    assert float(distribution) == pytest.approx(math.log(3))


def test_small_weights_are_not_made_larger() -> None:
    arguments = (boxes(2), torch.randn(2, 20), boxes(2), torch.rand(2, 4) * 3)
    tenth, hundredth, twice, fourfold = (
        torch.stack(side_losses(*arguments, torch.full((2,), weight))) for weight in (0.1, 0.01, 2.0, 4.0)
    )
    torch.testing.assert_close(tenth, 10 * hundredth)
    torch.testing.assert_close(twice, fourfold)


def test_without_objects_both_losses_are_zero_and_so_is_their_slope() -> None:
    found, logits = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 20, requires_grad=True)
    losses = side_losses(found, logits, torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0))
    assert losses[0] == losses[1] == 0
    slopes = torch.autograd.grad(losses[0] + losses[1], [found, logits])
    assert all(slope.isfinite().all() for slope in slopes)
