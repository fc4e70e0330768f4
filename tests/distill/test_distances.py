"""Every distance against its formula written out; the traps of similarity, negative and non-finite losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from autodet.distill.distances import DISTANCES
from autodet.distill.formula import Op
from autodet.distill.transforms import bernoulli, softmax
from autodet.distill.values import (
    BOXES,
    MAP,
    VECTOR,
    Kind,
    ParamValue,
    Value,
    map_value,
    region_weights,
    vector_value,
)

AXES = [("c", (1,)), ("hw", (2, 3)), ("chw", (1, 2, 3)), ("n", (0,)), ("nhw", (0, 2, 3))]
SHAPES = [(1, 1, 1, 1), (1, 4, 3, 5), (3, 2, 8, 8)]


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=dtype), torch.randn(*shape, generator=generator, dtype=dtype)


def distance(name: str, student: Value, teacher: Value, **params: ParamValue) -> Tensor:
    result = DISTANCES[name].function(student, teacher, **Op(name, tuple(params.items())).arguments())
    assert isinstance(result, Tensor)
    return result if result.ndim == 0 else (result * student.weights).sum()


def on_maps(name: str, S: Tensor, T: Tensor, **params: ParamValue) -> Tensor:
    return distance(name, map_value(S), map_value(T), **params)


def test_element_distances_are_means() -> None:
    S, T = pair(2, 3, 4, 5)
    gap = (S - T).abs()
    torch.testing.assert_close(on_maps("l1", S, T), gap.sum() / 120)
    torch.testing.assert_close(on_maps("l2", S, T), (gap * gap).sum() / 120)
    huber = torch.where(gap < 0.5, gap * gap / (2 * 0.5), gap - 0.25)
    torch.testing.assert_close(on_maps("smooth_l1", S, T, beta=0.5), huber.mean())


def test_regions_are_averaged_within_their_image_first_and_an_image_without_counts_as_zero() -> None:
    S, T = pair(5, 3)
    expected = ((S - T).abs()[:1].mean() + (S - T).abs()[1:].mean()) / 2
    torch.testing.assert_close(distance("l1", vector_value(S, [1, 4]), vector_value(T, [1, 4])), expected)
    torch.testing.assert_close(distance("l1", vector_value(S, [1, 0, 4]), vector_value(T, [1, 0, 4])), expected * 2 / 3)


@pytest.mark.parametrize(("axis", "dims"), AXES)
def test_kl_is_the_divergence_from_student_to_teacher_in_log_space(axis: str, dims: tuple[int, ...]) -> None:
    S, T = pair(3, 4, 2, 5)
    p_s, p_t = (x.exp() / x.exp().sum(dims, keepdim=True) for x in (S, T))
    expected = (p_t * (p_t / p_s).log()).sum(dims).mean()
    ours = distance("kl", softmax(map_value(S), axis, 1.0), softmax(map_value(T), axis, 1.0))
    torch.testing.assert_close(ours, expected)
    reverse = (p_s * (p_s / p_t).log()).sum(dims).mean()
    assert not torch.isclose(ours, reverse)


def test_kl_equals_torch_on_rows() -> None:
    S, T = pair(6, 4)
    ours = distance("kl", softmax(vector_value(S, [6]), "c", 2.0), softmax(vector_value(T, [6]), "c", 2.0))
    expected = F.kl_div((S / 2).log_softmax(1), (T / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(ours, expected)


def test_kl_of_two_outcomes_is_the_binary_divergence() -> None:
    S, T = pair(2, 3, 4, 5)
    p, q = T.sigmoid(), S.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(distance("kl", bernoulli(map_value(S), 1.0), bernoulli(map_value(T), 1.0)), expected)
    both = distance("l1", bernoulli(map_value(S), 1.0), bernoulli(map_value(T), 1.0))
    torch.testing.assert_close(both, 2 * (p - q).abs().mean())


@pytest.mark.parametrize("make", [lambda v: softmax(v, "c", 1.0), lambda v: bernoulli(v, 1.0)], ids=["softmax", "pair"])
def test_kl_survives_extreme_logits(make: object) -> None:
    assert callable(make)
    S = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    T = torch.tensor([[-500.0, 500.0, 0.0]])
    loss = distance("kl", make(vector_value(S, [1])), make(vector_value(T, [1])))
    (gradient,) = torch.autograd.grad(loss, S)
    assert loss.item() > 300
    assert gradient.isfinite().all()


def test_element_distances_of_distributions_compare_probabilities() -> None:
    S, T = pair(2, 3, 4, 5)
    p_s, p_t = S.flatten(2).softmax(2), T.flatten(2).softmax(2)
    S_hw, T_hw = softmax(map_value(S), "hw", 1.0), softmax(map_value(T), "hw", 1.0)
    torch.testing.assert_close(distance("l1", S_hw, T_hw), (p_s - p_t).abs().sum(2).mean())
    torch.testing.assert_close(distance("l2", S_hw, T_hw), (p_s - p_t).square().sum(2).mean())


@pytest.mark.parametrize(("axis", "dims"), AXES)
def test_cosine_and_pearson(axis: str, dims: tuple[int, ...]) -> None:
    S, T = pair(3, 4, 2, 5)
    rest = [d for d in range(4) if d not in dims]
    rows_s, rows_t = (x.permute(*rest, *dims).reshape(math.prod(x.shape[d] for d in rest), -1) for x in (S, T))
    torch.testing.assert_close(on_maps("cosine", S, T, axis=axis), (1 - F.cosine_similarity(rows_s, rows_t)).mean())
    r = [np.corrcoef(a.numpy(), b.numpy())[0, 1] for a, b in zip(rows_s, rows_t, strict=True)]
    torch.testing.assert_close(on_maps("pearson", S, T, axis=axis), torch.tensor(1 - np.mean(r)))


def test_minimising_cosine_turns_the_student_towards_the_teacher() -> None:
    S, T = pair(1, 4, 3, 3)
    S.requires_grad_()
    (gradient,) = torch.autograd.grad(on_maps("cosine", S, T), S)
    closer = F.cosine_similarity(S - 0.1 * gradient, T, dim=1).mean()
    assert closer > F.cosine_similarity(S, T, dim=1).mean()
    torch.testing.assert_close(on_maps("cosine", -T, T), torch.tensor(2.0, dtype=T.dtype))


def test_cosine_and_pearson_of_dead_vectors_are_zero_with_a_calm_gradient() -> None:
    T = torch.zeros(2, 4, 3, 3)
    S = torch.zeros(2, 4, 3, 3, requires_grad=True)
    for name, params in (("cosine", {"axis": "c"}), ("pearson", {"axis": "hw"})):
        loss = on_maps(name, S, T + (name == "pearson"), **params)
        (gradient,) = torch.autograd.grad(loss, S)
        assert loss.item() == 0
        assert gradient.eq(0).all()


def test_crosscorr_squares_one_minus_the_correlation_of_each_element() -> None:
    S, T = pair(6, 2, 2, 2)
    flat_s, flat_t = S.flatten(1).numpy(), T.flatten(1).numpy()
    r = [np.corrcoef(flat_s[:, j], flat_t[:, j])[0, 1] for j in range(8)]
    torch.testing.assert_close(on_maps("crosscorr", S, T), torch.tensor(np.mean((1 - np.array(r)) ** 2)))


def windows(S: Tensor, T: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each window of both maps with the squared dynamic range of its image's teacher."""
    for image in range(S.shape[0]):
        squared = (T[image].max() - T[image].min()) ** 2
        for channel in range(S.shape[1]):
            for y in range(S.shape[2] - size + 1):
                for x in range(S.shape[3] - size + 1):
                    cut = (image, channel, slice(y, y + size), slice(x, x + size))
                    yield S[cut], T[cut], squared


def test_ssim_equals_the_sum_over_windows() -> None:
    S, T = pair(2, 2, 5, 4)
    values = []
    for s, t, squared in windows(S, T, 3):
        c1, c2 = 0.01**2 * squared, 0.03**2 * squared
        covariance = ((s - s.mean()) * (t - t.mean())).mean()
        top = (2 * s.mean() * t.mean() + c1) * (2 * covariance + c2)
        bottom = (s.mean() ** 2 + t.mean() ** 2 + c1) * (s.var(correction=0) + t.var(correction=0) + c2)
        values.append(1 - top / bottom)
    torch.testing.assert_close(on_maps("ssim", S, T, window=3), torch.stack(values).mean())


def boxes_value(*rows: tuple[float, float, float, float]) -> Value:
    data = torch.tensor(rows, dtype=torch.float64)
    return Value(data, BOXES, None, region_weights([len(rows)], data))


def test_iou_and_giou_equal_torchvisions() -> None:
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(2, 50, 2, generator=generator, dtype=torch.float64) / 2
    sizes = 0.1 + torch.rand(2, 50, 2, generator=generator, dtype=torch.float64) / 2
    S, T = torch.cat([corners, corners + sizes], dim=2)
    student, teacher = (Value(side, BOXES, None, region_weights([50], side)) for side in (S, T))
    overlaps = box_iou(S, T).diagonal()
    assert overlaps.eq(0).any() and overlaps.gt(0.3).any()
    floor = 1e-4  # AREA_FLOOR against the smallest boxes here
    torch.testing.assert_close(DISTANCES["iou"].function(student, teacher), 1 - overlaps, rtol=0, atol=floor)
    expected = 1 - generalized_box_iou(S, T).diagonal()
    torch.testing.assert_close(DISTANCES["giou"].function(student, teacher), expected, rtol=0, atol=floor)
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    weighted = Value(S, BOXES, None, weights)
    torch.testing.assert_close(distance("giou", weighted, teacher), (weights * expected).sum(), rtol=1e-4, atol=0)


def test_only_giou_draws_boxes_together_that_do_not_meet() -> None:
    student, teacher = boxes_value((0, 0, 1, 1)), boxes_value((3, 0, 4, 1))
    student.data.requires_grad_()
    (still,) = torch.autograd.grad(distance("iou", student, teacher), student.data)
    (drawn,) = torch.autograd.grad(distance("giou", student, teacher), student.data)
    assert still.abs().max() < 1e-6
    assert drawn[0, 2] < 0 and drawn.isfinite().all()  # a step against the gradient moves the right side right


def test_boxes_without_area_or_with_crossed_corners_are_judged_calmly() -> None:
    strange = [(1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 2.0), (3.0, 3.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)]
    for one, other in itertools.product(strange, repeat=2):
        student, teacher = boxes_value(one), boxes_value(other)
        student.data.requires_grad_()
        for name in ("iou", "giou"):
            loss = distance(name, student, teacher)
            (gradient,) = torch.autograd.grad(loss, student.data)
            assert 0 <= loss <= 2 and gradient.isfinite().all(), (name, one, other)
            assert one != other or loss == 0, (name, one)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_distance_is_zero_and_smooth_enough_at_equality(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float
) -> None:
    data = pair(*shape, dtype=dtype)[0] + offset
    for name, spec in DISTANCES.items():
        if spec.accepts(BOXES) and not spec.accepts(MAP):
            continue
        options = [axis for p in spec.params if p.type == "axis" for axis in p.options(MAP)]
        for axis in options or [""]:
            S = data.clone().requires_grad_()
            student, teacher = map_value(S), map_value(data)
            if not spec.accepts(MAP):
                student, teacher = softmax(student, "c", 1.0), softmax(teacher, "c", 1.0)
            params: dict[str, ParamValue] = {"axis": axis} if axis else {}
            loss = distance(name, student, teacher, **params)
            (gradient,) = torch.autograd.grad(loss, S)
            assert loss.item() == pytest.approx(0, abs=1e-6), (name, axis)
            assert gradient.isfinite().all(), (name, axis)


@pytest.mark.parametrize("kind", [MAP, VECTOR], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_every_distance_is_finite_and_never_negative(kind: Kind, dtype: torch.dtype, scale: float) -> None:
    shape = (3, 4, 5, 6) if kind == MAP else (7, 4)
    first, second = pair(*shape, dtype=dtype)
    for gap in (1e-6, 1.0):  # nearly equal sides show cancellation
        S = (scale * (first + gap * second)).requires_grad_()
        T = scale * first
        plain = [map_value(X) if kind == MAP else vector_value(X, [7]) for X in (S, T)]
        for name, spec in DISTANCES.items():
            sides = plain if spec.accepts(kind) else [softmax(value, "c", 1.0) for value in plain]
            if spec.accepts(sides[0].kind):
                params: dict[str, ParamValue] = {"axis": "c"} if name == "pearson" else {}
                loss = distance(name, sides[0], sides[1], **params)
                assert math.isfinite(loss.item()) and loss.item() >= 0, (name, loss)
                assert torch.autograd.grad(loss, S, retain_graph=True)[0].isfinite().all(), name
