"""What a formula computes on: tensors with a kind, and how an operation of the language is described.

Rows are dimension 0: images for maps (patches after ``patch``, instances for ``instance``), regions for vectors and
boxes. Every rule asks the kind through ``axes`` and ``accepts``, never by comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = "int | float"
ParamValue: TypeAlias = "int | float | str"
PAIR = "pair"  # the axis of a two-outcome distribution: first half of the channels log p, second half log(1 - p)
_DIMENSIONS = {"n": (0,), "c": (1,), "hw": (2, 3), "chw": (1, 2, 3), "nhw": (0, 2, 3)}


@dataclass(frozen=True)
class Kind:
    """What the numbers are: spatial (N×C×H×W) or not (R×C), with channels or one plane, a distribution or plain.

    boxes: R×4 xyxy, which only distances take: what a transform would make of them is no box any more.
    """

    spatial: bool
    distribution: bool
    channels: bool = True
    boxes: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that an operation may name. Each has one name: a plane has hw but no chw."""
        if self.boxes:
            return ()
        if not self.spatial:
            return ("n", "c")
        return ("n", "c", "hw", "chw", "nhw") if self.channels else ("n", "hw", "nhw")

    def __str__(self) -> str:
        if self.boxes:
            return "list of boxes"
        shape = ("map" if self.channels else "plane") if self.spatial else "vector"
        return f"distribution over a {shape}" if self.distribution else shape


MAP = Kind(spatial=True, distribution=False)
PLANE = Kind(spatial=True, distribution=False, channels=False)
VECTOR = Kind(spatial=False, distribution=False)
BOXES = Kind(spatial=False, distribution=False, channels=False, boxes=True)


@dataclass(frozen=True, eq=False)
class Value:
    """One side of a comparison on one level.

    data: N×C×H×W (map; C = 1 for a plane), R×C (vector) or R×4 (boxes). A distribution holds **log**-probabilities,
    and ``axis`` says what they sum to one over (an axis, or ``pair``); None for plain numbers.
    weights: one per row, on the data's device, such that a weighted sum over rows is the mean over images: 1/N for
    maps, 1/(N·R_i) for the R_i regions of image i; an image without regions counts as zero. So the result is the same
    however the images of a batch are split over workers.
    """

    data: Tensor
    kind: Kind
    axis: str | None
    weights: Tensor

    def plain(self) -> Tensor:
        """The numbers themselves: probabilities for a distribution."""
        return self.data.exp() if self.kind.distribution else self.data


def map_value(data: Tensor) -> Value:
    """A plain map N×C×H×W whose images weigh the same."""
    return Value(data, MAP, None, data.new_full((len(data),), 1.0 / max(len(data), 1)))


def vector_value(data: Tensor, rows_per_image: list[int]) -> Value:
    """Plain vectors R×C, where the first ``rows_per_image[0]`` rows belong to the first image and so on."""
    if sum(rows_per_image) != len(data):
        raise ValueError(f"Expected {sum(rows_per_image)} rows (the sum of rows_per_image), found {len(data)}.")
    return Value(data, VECTOR, None, region_weights(rows_per_image, data))


def region_weights(rows_per_image: Sequence[int], like: Tensor) -> Tensor:
    """1/(N·R_i) for each of the R_i rows of image i, on the device of ``like`` and at least in its precision."""
    images = max(1, len(rows_per_image))
    weights = [1.0 / (images * count) for count in rows_per_image for _ in range(count)]
    return torch.tensor(weights, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def dimensions(axis: str) -> tuple[int, ...]:
    """The tensor dimensions that an axis stands for: n, c, hw, chw or nhw."""
    return _DIMENSIONS[axis]


@dataclass(frozen=True)
class Param:
    """A parameter of an operation.

    default: None where it must be given. searched: the values that the grammar samples (an axis: every axis of the
    kind). low, high: the numbers that the language accepts, inclusive. axes: where not every axis makes sense.
    """

    name: str
    type: Literal["axis", "int", "float"]
    default: ParamValue | None = None
    searched: tuple[Number, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    axes: tuple[str, ...] = tuple(_DIMENSIONS)

    def normalised(self, value: ParamValue) -> ParamValue:
        """The value in its one type; ValueError says what was expected."""
        if self.type == "axis":
            if value in self.axes:
                return value
            raise ValueError(f"expected an axis ({', '.join(self.axes)}), found {value!r}")
        wanted = "a whole number" if self.type == "int" else "a number"
        expected = f"expected {wanted} from {self.low:g} to {self.high:g}, found {value!r}"
        if isinstance(value, (str, bool)) or not self.low <= value <= self.high:
            raise ValueError(expected)
        if self.type == "float":
            return float(value)
        if int(value) != value:
            raise ValueError(expected)
        return int(value)

    def options(self, kind: Kind) -> tuple[ParamValue, ...]:
        """What the grammar chooses from on this kind."""
        return tuple(axis for axis in kind.axes if axis in self.axes) if self.type == "axis" else self.searched


AXIS = Param("axis", "axis")


@dataclass(frozen=True)
class Operation:
    """What transforms and distances have in common.

    accepts: whether the operation is defined on a kind. axis: the axis it always works on, where that is no parameter.
    batch_rows: rows it needs to mean anything when it works along n alone: two for a length or a sum; three where a
    mean or range is taken out, because two rows then become ±1 whatever they were.
    """

    function: Callable[..., Any]
    accepts: Callable[[Kind], bool]
    params: tuple[Param, ...] = ()
    axis: str | None = None
    batch_rows: int = 2


def has_channels(kind: Kind) -> bool:
    """Plain map or vector."""
    return kind.channels and not kind.distribution


def is_map(kind: Kind) -> bool:
    """Plain map with channels."""
    return kind.spatial and kind.channels and not kind.distribution


def is_spatial(kind: Kind) -> bool:
    """Plain map or plane."""
    return kind.spatial and not kind.distribution


def is_plain(kind: Kind) -> bool:
    """Plain map, plane or vector."""
    return not kind.distribution and not kind.boxes


def is_distribution(kind: Kind) -> bool:
    """Log-probabilities."""
    return kind.distribution


def is_boxes(kind: Kind) -> bool:
    """R×4 xyxy."""
    return kind.boxes


def has_axes(kind: Kind) -> bool:
    """Anything but boxes."""
    return not kind.boxes


def is_any(kind: Kind) -> bool:
    """Every kind."""
    return True
