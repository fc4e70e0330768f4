"""Every transform against its formula written out, and the promises that the typing makes about all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodet.distill.formula import Op
from autodet.distill.transforms import ROOT_EPS, TRANSFORMS
from autodet.distill.values import MAP, PAIR, PLANE, VECTOR, Kind, ParamValue, Value, map_value, vector_value

AXES = [("n", (0,)), ("c", (1,)), ("hw", (2, 3)), ("chw", (1, 2, 3)), ("nhw", (0, 2, 3))]
DTYPES = (torch.float32, torch.float64)


def random_map(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def apply(name: str, value: Value, **params: ParamValue) -> Value:
    arguments = Op(name, tuple(params.items())).arguments()
    extra = {"generator": torch.Generator().manual_seed(0)} if TRANSFORMS[name].random else {}
    result = TRANSFORMS[name].function(value, **arguments, **extra)
    assert isinstance(result, Value)
    return result


def value_of(kind: Kind, dtype: torch.dtype = torch.float64, rows: int = 3) -> Value:
    if kind == VECTOR:
        return vector_value(random_map(rows, 5, dtype=dtype), [1, rows - 1])
    value = map_value(random_map(rows, 5 if kind.channels else 1, 6, 7, dtype=dtype))
    return Value(value.data, kind, None, value.weights)


def every_choice(kind: Kind) -> list[Op]:
    """Each transform that the kind accepts, with every axis and its defaults or first searched values."""
    ops = []
    for name, spec in TRANSFORMS.items():
        if spec.accepts(kind):
            axes = [o for p in spec.params if p.type == "axis" for o in p.options(kind)] or [""]
            fixed = [(p.name, p.default if p.default is not None else p.searched[0]) for p in spec.params if p.searched]
            ops += [Op(name, (*([("axis", axis)] if axis else []), *fixed)) for axis in axes]
    return ops


def attention_of(energy: Tensor, dim: int, t: float) -> Tensor:
    return (energy.shape[dim] * torch.softmax(energy / t, dim)).sqrt()


def test_attentions_equal_the_published_formula() -> None:
    X = random_map(3, 4, 5, 6)
    size = X.abs()
    spatial = attention_of(size.mean(1).flatten(1), 1, 0.7).view(3, 1, 5, 6)
    channel = attention_of(size.mean((2, 3)), 1, 0.5).view(3, 4, 1, 1)
    batch = attention_of(size.mean((1, 2, 3)), 0, 0.5).view(3, 1, 1, 1)
    torch.testing.assert_close(apply("satt", map_value(X), t=0.7).data, X * spatial)
    torch.testing.assert_close(apply("catt", map_value(X)).data, X * channel)
    torch.testing.assert_close(apply("batt", map_value(X)).data, X * batch)
    rows = random_map(4, 3)
    torch.testing.assert_close(apply("catt", vector_value(rows, [4])).data, rows * attention_of(rows.abs(), 1, 0.5))


def test_attention_is_finite_where_its_softmax_underflows() -> None:
    X = torch.zeros(1, 2, 2, 2)
    X[0, :, 0, 0] = 1e4
    X.requires_grad_()
    result = apply("satt", map_value(X)).data
    (gradient,) = torch.autograd.grad(result.sum(), X)
    assert result.isfinite().all()
    assert gradient.isfinite().all()


def test_mask_keeps_the_share_of_positions_and_all_channels_of_each() -> None:
    X = random_map(2, 3, 10, 10).abs() + 1
    kept = apply("mask", map_value(X)).data != 0
    assert kept.flatten(2).sum(2).eq(35).all()
    assert (kept == kept[:, :1]).all()
    assert not (kept[0] == kept[1]).all()
    assert apply("mask", map_value(X[:, :, :1, :1])).data.count_nonzero() == 6  # never an empty map


def test_pool_is_the_maximum_of_windows_that_may_be_partial() -> None:
    X = random_map(1, 2, 5, 3)
    rows, columns = [(0, 2), (2, 4), (4, 5)], [(0, 2), (2, 3)]
    expected = torch.stack([torch.stack([X[:, :, a:b, c:d].amax((2, 3)) for c, d in columns], -1) for a, b in rows], -2)
    torch.testing.assert_close(apply("pool", map_value(X), k=2).data, expected)
    torch.testing.assert_close(apply("pool", map_value(X[..., :2, :1]), k=4).data[..., 0, 0], X[..., :2, 0].amax(2))


def test_patch_cuts_rows_of_p_by_p_whose_weights_still_sum_to_one() -> None:
    X = random_map(2, 3, 4, 6)
    result = apply("patch", map_value(X), p=2)
    cuts = [X[i, :, y : y + 2, x : x + 2] for i in range(2) for y in (0, 2) for x in (0, 2, 4)]
    torch.testing.assert_close(result.data, torch.stack(cuts))
    torch.testing.assert_close(result.weights, torch.full((12,), 1 / 12, dtype=X.dtype))
    small = apply("patch", map_value(X[..., :1, :1]), p=4).data
    torch.testing.assert_close(small, X[..., :1, :1].expand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("affine", lambda x: (x + 1) / 2),
        ("log", lambda x: torch.where(x > 0, 1, -1) * torch.log(1 + x.abs())),
        ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
        ("tanh", lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x))),
        ("abs", lambda x: torch.where(x > 0, x, -x)),
    ],
)
def test_pointwise_transforms(name: str, expected: Callable[[Tensor], Tensor]) -> None:
    X = random_map(2, 3, 4, 5)
    torch.testing.assert_close(apply(name, map_value(X)).data, expected(X))


def test_power_root_and_mean() -> None:
    X = random_map(2, 3, 4, 5)
    torch.testing.assert_close(apply("power", map_value(X), p=3).data, X * X * X)
    torch.testing.assert_close(apply("mean", map_value(X), axis="c", p=2).data[:, 0], (X * X).sum(1) / 3)
    torch.testing.assert_close(apply("mean", map_value(X), axis="hw").data, X.sum((2, 3)) / 20)
    big = X.sign() * (X.abs() + 100)
    torch.testing.assert_close(apply("root", map_value(big)).data, big.sign() * big.abs().sqrt(), atol=1.1e-2, rtol=0)
    zero = torch.zeros(1, 1, requires_grad=True)
    slopes = torch.autograd.grad(apply("root", vector_value(zero, [1])).data.sum(), zero)
    assert slopes[0].abs().item() <= 0.5 / ROOT_EPS**0.5


@pytest.mark.parametrize(("axis", "dims"), AXES)
def test_normalisations_along_every_axis(axis: str, dims: tuple[int, ...]) -> None:
    X = random_map(3, 4, 5, 6)
    torch.testing.assert_close(apply("norm", map_value(X), axis=axis).data, X / (X * X).sum(dims, keepdim=True).sqrt())
    exps = torch.exp(X / 2)
    soft = exps / exps.sum(dims, keepdim=True)
    distribution = apply("softmax", map_value(X), axis=axis, t=2.0)
    torch.testing.assert_close(distribution.data.exp(), soft)
    torch.testing.assert_close(distribution.plain(), soft)
    torch.testing.assert_close(apply("log_softmax", map_value(X), axis=axis, t=2.0).data, soft.log())
    low, high = X.amin(dims, keepdim=True), X.amax(dims, keepdim=True)
    torch.testing.assert_close(apply("minmax", map_value(X), axis=axis).data, (X - low) / (high - low))
    std = X.std(dims, correction=0, keepdim=True)
    expected = (X - X.mean(dims, keepdim=True)) / std
    torch.testing.assert_close(apply("standardize", map_value(X), axis=axis).data, expected)


@pytest.mark.parametrize("name", ["norm", "minmax", "standardize"])
def test_a_constant_or_dead_vector_becomes_zero_without_a_gradient(name: str) -> None:
    X = torch.full((2, 3, 40, 40), 0.0 if name == "norm" else 123.456, requires_grad=True)
    result = apply(name, map_value(X), axis="hw").data
    (gradient,) = torch.autograd.grad((result - 1).square().sum(), X)
    assert result.eq(0).all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1


def test_gram_is_the_inner_product_of_channels() -> None:
    X = random_map(2, 3, 4, 5)
    expected = torch.tensor([[[(X[n, i] * X[n, j]).mean() for j in range(3)] for i in range(3)] for n in range(2)])
    torch.testing.assert_close(apply("gram", map_value(X)).data, expected.flatten(1).to(X))


def test_bernoulli_holds_both_outcomes_even_for_extreme_logits() -> None:
    logits = torch.tensor([[0.3, -300.0, 300.0]])
    result = apply("bernoulli", vector_value(logits, [1]), t=2.0)
    assert result.axis == PAIR
    success, failure = result.data.chunk(2, dim=1)
    torch.testing.assert_close(success.exp() + failure.exp(), torch.ones(1, 3))
    torch.testing.assert_close(success, F.logsigmoid(logits / 2))
    torch.testing.assert_close(failure[0, 2], torch.tensor(-150.0))


@pytest.mark.parametrize("kind", [MAP, PLANE, VECTOR], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_transform_keeps_its_promises(kind: Kind, dtype: torch.dtype) -> None:
    for op in every_choice(kind):
        value = value_of(kind, dtype)
        before = value.data.clone()
        result = apply(op.name, value, **op.arguments())
        assert result.kind == TRANSFORMS[op.name].produces(kind, op.arguments()), op
        assert result.data.ndim == (4 if result.kind.spatial else 2), op
        assert result.kind.channels or result.data.shape[1] == 1 or result.axis == PAIR, op
        assert result.data.dtype == dtype, op
        assert result.data.isfinite().all(), op
        torch.testing.assert_close(result.weights.sum(), torch.ones((), dtype=dtype))
        assert len(result.weights) == len(result.data), op
        assert torch.equal(value.data, before), f"{op} changed its input"


@pytest.mark.parametrize("kind", [MAP, PLANE, VECTOR], ids=str)
def test_identity_values_and_idempotence_are_true(kind: Kind) -> None:
    value = value_of(kind)
    for name, spec in TRANSFORMS.items():
        if spec.accepts(kind) and spec.identity is not None:
            parameter, neutral = spec.identity
            torch.testing.assert_close(apply(name, value, **{parameter: neutral}).data, value.data)
        if spec.accepts(kind) and spec.idempotent:
            once = apply(name, value)
            torch.testing.assert_close(apply(name, once).data, once.data)
