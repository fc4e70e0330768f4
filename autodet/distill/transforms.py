"""Transforms of a formula: pure functions ``(Value, parameters) -> Value``, applied alike to student and teacher.

Three slots in cascade, as in DetKDS's search space (public code): A attention or mask, B scale, C normalise or reshape.
The temperatures beside 0.5, the kept shares beside 0.35 and the operations ``mean``, ``abs`` and ``bernoulli`` are our
additions. ``TRANSFORMS`` at the end is the list; a new transform is a function and a line there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autodet.distill.values import (
    AXIS,
    PAIR,
    PLANE,
    VECTOR,
    Kind,
    Operation,
    Param,
    ParamValue,
    Value,
    dimensions,
    has_channels,
    is_map,
    is_plain,
    is_spatial,
)

EPS = 1e-6  # what is shorter than this has no direction
ROOT_EPS = 1e-4  # keeps the slope of ``root`` at zero at 50


def unit(data: Tensor, dims: tuple[int, ...], floor: Tensor | float = 0.0) -> Tensor:
    """Vectors along ``dims`` scaled to length one; those no longer than ``EPS + floor`` become zero.

    A dead vector gets no gradient: dividing by a tiny constant instead would multiply it a millionfold.
    """
    length = torch.linalg.vector_norm(data, dim=dims, keepdim=True)
    alive = length > EPS + floor
    return torch.where(alive, data / torch.where(alive, length, 1.0), 0.0)


def centred_unit(data: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``unit`` after taking out the mean; a constant vector becomes zero, not its rounding error made large."""
    length = torch.linalg.vector_norm(data.detach(), dim=dims, keepdim=True)
    return unit(data - data.mean(dims, keepdim=True), dims, 8 * torch.finfo(data.dtype).eps * length)


# Slot A: attention, mask. ---


def satt(value: Value, t: float) -> Value:
    """Spatial attention F · sqrt(HW · softmax_HW(mean_c |F| / t)); N×C×H×W (DetKDS)."""
    energy = value.data.abs().mean(1, keepdim=True)
    return replace(value, data=value.data * _attention(energy, (2, 3), t))


def catt(value: Value, t: float) -> Value:
    """Channel attention F · sqrt(C · softmax_C(mean_HW |F| / t)); on vectors the mean has one element (DetKDS)."""
    energy = value.data.abs()
    if value.kind.spatial:
        energy = energy.mean((2, 3), keepdim=True)
    return replace(value, data=value.data * _attention(energy, (1,), t))


def batt(value: Value, t: float) -> Value:
    """Batch attention F · sqrt(N · softmax_N(mean_CHW |F| / t)) (DetKDS)."""
    energy = value.data.abs().mean(tuple(range(1, value.data.ndim)), keepdim=True)
    return replace(value, data=value.data * _attention(energy, (0,), t))


def _attention(energy: Tensor, dims: tuple[int, ...], t: float) -> Tensor:
    # In log space, because the slope of a square root at an underflowed probability is infinite.
    count = math.prod(energy.shape[dim] for dim in dims)
    return torch.exp(0.5 * (_log_softmax(energy / t, dims) + math.log(max(count, 1))))


def mask(value: Value, keep: float, generator: torch.Generator | None = None) -> Value:
    """Zero all but a random share of the positions of each image, the same for all channels; at least one is kept.

    ``terms`` gives both sides the same generator state, hence the same mask (the public code drew two).
    """
    rows, _, height, width = value.data.shape
    positions = height * width
    noise = torch.rand(rows, positions, generator=generator, device=None if generator is None else generator.device)
    kept = noise.topk(max(1, round(keep * positions)), dim=1).indices
    chosen = torch.zeros_like(noise).scatter_(1, kept, 1.0).to(value.data)
    return replace(value, data=value.data * chosen.view(rows, 1, height, width))


# Slot B: scale. ---


def pool(value: Value, k: int) -> Value:
    """k×k max-pool with stride k; a partial window at the border counts, so that small maps survive (DetKDS)."""
    return replace(value, data=F.max_pool2d(value.data, k, ceil_mode=True))


def patch(value: Value, p: int) -> Value:
    """Local patches, N·(H/p)·(W/p) × C × p × p: every patch is a row of its own (DetKDS).

    The border is repeated up to a multiple of p. p = 1 is left out: normalising over the batch's positions is axis nhw.
    """
    rows, channels, height, width = value.data.shape
    padded = F.pad(value.data, (0, -width % p, 0, -height % p), mode="replicate")
    down, across = padded.shape[2] // p, padded.shape[3] // p
    cut = padded.view(rows, channels, down, p, across, p).permute(0, 2, 4, 1, 3, 5)
    weights = value.weights.repeat_interleave(down * across) / (down * across)
    return replace(value, data=cut.reshape(-1, channels, p, p), weights=weights)


def affine(value: Value) -> Value:
    """(F + 1) / 2 (DetKDS)."""
    return replace(value, data=(value.data + 1) / 2)


def mean(value: Value, axis: str, p: int) -> Value:
    """Mean of the p-th powers over channels (a plane N×1×H×W) or positions (a vector N×C).

    With p = 2 over channels it is the attention map of Zagoruyko & Komodakis (2017), up to its constant C.
    """
    powers = value.data**p
    if axis == "c":
        return replace(value, data=powers.mean(1, keepdim=True), kind=PLANE)
    return replace(value, data=powers.mean((2, 3)), kind=VECTOR)


def _mean_kind(kind: Kind, params: Mapping[str, ParamValue]) -> Kind:
    return PLANE if params["axis"] == "c" else VECTOR


# Slot C: normalise, reshape. ---


def norm(value: Value, axis: str) -> Value:
    """Divide by the L2 norm along the axis (DetKDS)."""
    return replace(value, data=unit(value.data, dimensions(axis)))


def softmax(value: Value, axis: str, t: float) -> Value:
    """The distribution softmax(F / t) along the axis, held as log-probabilities (DetKDS; CWD, Shu et al. 2021)."""
    return replace(
        value, data=_log_softmax(value.data / t, dimensions(axis)), kind=_distribution(value.kind), axis=axis
    )


def log_softmax(value: Value, axis: str, t: float) -> Value:
    """log softmax(F / t) along the axis as plain numbers, for the element distances (DetKDS)."""
    return replace(value, data=_log_softmax(value.data / t, dimensions(axis)))


def _log_softmax(data: Tensor, dims: tuple[int, ...]) -> Tensor:
    return data - data.logsumexp(dims, keepdim=True)


def _distribution(kind: Kind, params: Mapping[str, ParamValue] | None = None) -> Kind:
    return replace(kind, distribution=True)


def minmax(value: Value, axis: str) -> Value:
    """(F − min) / (max − min) along the axis; zero where the range is at most EPS (DetKDS)."""
    dims = dimensions(axis)
    low = value.data.amin(dims, keepdim=True)
    span = value.data.amax(dims, keepdim=True) - low
    alive = span > EPS
    return replace(value, data=torch.where(alive, (value.data - low) / torch.where(alive, span, 1.0), 0.0))


def standardize(value: Value, axis: str) -> Value:
    """(F − mean) / std along the axis, std of the population; zero where F is constant (PKD, Cao et al. 2022)."""
    dims = dimensions(axis)
    count = math.prod(value.data.shape[dim] for dim in dims)
    return replace(value, data=centred_unit(value.data, dims) * math.sqrt(count))


def gram(value: Value) -> Value:
    """Gram matrix of the channels, F Fᵀ / HW, flattened: N×C×H×W → N×C² (published as an idea with DetKDS)."""
    flat = value.data.flatten(2)
    return replace(value, data=(flat @ flat.transpose(1, 2) / flat.shape[2]).flatten(1), kind=VECTOR)


def power(value: Value, p: int) -> Value:
    """F to the p."""
    return replace(value, data=value.data**p)


def root(value: Value) -> Value:
    """sign(F) · sqrt|F|, moved by ROOT_EPS so that the slope at zero is finite."""
    size = (value.data.abs() + ROOT_EPS).sqrt() - math.sqrt(ROOT_EPS)
    return replace(value, data=value.data.sign() * size)


def log(value: Value) -> Value:
    """sign(F) · log(1 + |F|)."""
    return replace(value, data=value.data.sign() * value.data.abs().log1p())


def sigmoid(value: Value) -> Value:
    """1 / (1 + exp(−F))."""
    return replace(value, data=value.data.sigmoid())


def tanh(value: Value) -> Value:
    """Hyperbolic tangent."""
    return replace(value, data=value.data.tanh())


def absolute(value: Value) -> Value:
    """|F|."""
    return replace(value, data=value.data.abs())


def bernoulli(value: Value, t: float) -> Value:
    """Each logit F as a distribution over two outcomes with p = sigmoid(F / t), for sigmoid heads and objectness.

    Log p and log(1 − p) are stacked along the channels (C → 2C), because log(1 − p) cannot be had from a rounded p.
    """
    logits = value.data / t
    outcomes = torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=1)
    return replace(value, data=outcomes, kind=_distribution(value.kind), axis=PAIR)


def _same(kind: Kind, params: Mapping[str, ParamValue]) -> Kind:
    return kind


def _vector(kind: Kind, params: Mapping[str, ParamValue]) -> Kind:
    return VECTOR


@dataclass(frozen=True)
class Transform(Operation):
    """A transform of the language.

    produces: the kind that comes out. slot: where the grammar puts it; the language takes any order that the kinds
    allow. random: takes a generator. identity: a parameter value with which it does nothing. idempotent: repeating it
    does nothing.
    """

    slot: Literal["A", "B", "C"] = "C"
    produces: Callable[[Kind, Mapping[str, ParamValue]], Kind] = _same
    random: bool = False
    identity: tuple[str, ParamValue] | None = None
    idempotent: bool = False


_ATTENTION = (Param("t", "float", 0.5, (0.25, 0.5, 1.0), 0.01, 100),)
_KEEP = (Param("keep", "float", 0.35, (0.35, 0.65), 0.01, 1),)
_MEAN = (Param("axis", "axis", axes=("c", "hw")), Param("p", "int", 1, (1, 2), 1, 4))
_TEMPERATURE = Param("t", "float", 1.0, (1.0, 2.0, 4.0), 0.01, 100)
_POWER = (Param("p", "int", None, (2, 3), 1, 4),)

TRANSFORMS: dict[str, Transform] = {
    "satt": Transform(satt, is_map, _ATTENTION, slot="A"),
    "catt": Transform(catt, has_channels, _ATTENTION, slot="A"),
    "batt": Transform(batt, is_plain, _ATTENTION, axis="n", slot="A"),
    "mask": Transform(mask, is_spatial, _KEEP, slot="A", random=True, identity=("keep", 1.0)),
    "pool": Transform(pool, is_spatial, (Param("k", "int", None, (2, 4), 1, 16),), slot="B", identity=("k", 1)),
    "patch": Transform(patch, is_spatial, (Param("p", "int", None, (2, 4), 2, 16),), slot="B"),
    "affine": Transform(affine, is_plain, slot="B"),
    "mean": Transform(mean, is_map, _MEAN, slot="B", produces=_mean_kind),
    "norm": Transform(norm, is_plain, (AXIS,)),
    "softmax": Transform(softmax, is_plain, (AXIS, _TEMPERATURE), produces=_distribution),
    "log_softmax": Transform(log_softmax, is_plain, (AXIS, _TEMPERATURE)),
    "minmax": Transform(minmax, is_plain, (AXIS,), batch_rows=3),
    "standardize": Transform(standardize, is_plain, (AXIS,), batch_rows=3),
    "gram": Transform(gram, is_map, produces=_vector),
    "power": Transform(power, is_plain, _POWER, identity=("p", 1)),
    "root": Transform(root, is_plain),
    "log": Transform(log, is_plain),
    "sigmoid": Transform(sigmoid, is_plain),
    "tanh": Transform(tanh, is_plain),
    "abs": Transform(absolute, is_plain, idempotent=True),
    "bernoulli": Transform(bernoulli, is_plain, (_TEMPERATURE,), produces=_distribution),
}
