"""Which channels a tensor's dimensions are: the words in which families say it of their heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from autodet.detectors.spec import DetectorSpec


class Blocks(NamedTuple):
    """A dimension in which each channel of a group is ``size`` neighbouring places.

    A fully connected layer sees roi_size² of them of each channel; of a group norm only all channels of a group can go.
    """

    group: str
    size: int


Dim = str | Blocks | None


class Transposed(tuple[Dim, ...]):
    """The dimensions of a transposed convolution's weight: what it reads comes first, what it makes second."""


Groups = tuple[Dim, ...]  # a tensor's dimensions → the group of channels that each is, None for all others
Named = Iterator[tuple[str, Groups]]  # names of tensors and their dimensions
TOWERS = ("classification", "regression")


def pyramid_dim(spec: DetectorSpec, group: str = "outer", places: int = 1) -> Dim:
    """The pyramid's channels before (``inner``) or after its last convolutions, each of ``places`` in a dimension."""
    size = places * (spec.neck_width // spec.neck_groups if spec.neck_groups else 1)
    return Blocks(group, size) if size > 1 else group


def group_of(dim: str | Blocks) -> str:
    """The name of a dimension's group."""
    return dim.group if isinstance(dim, Blocks) else dim


def size_of(dim: str | Blocks) -> int:
    """Places of each channel in a dimension."""
    return dim.size if isinstance(dim, Blocks) else 1


def made_axis(groups: Groups) -> int:
    """The dimension of a weight that is its layer's outputs; the other one of the first two is what it reads."""
    return 1 if isinstance(groups, Transposed) else 0


def biased(layer: str, outputs: Dim, inputs: Dim) -> Named:
    """A layer with a bias."""
    yield f"{layer}.weight", (outputs, inputs)
    yield f"{layer}.bias", (outputs,)


def normed(convolution: str, outputs: Dim, inputs: Dim, norm: str) -> Named:
    """A convolution without a bias, and the batch norm on it."""
    yield f"{convolution}.weight", (outputs, inputs)
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{norm}.{part}", (outputs,)


def tower_groups(spec: DetectorSpec, tower: str, nested: bool, responses: tuple[str, ...]) -> Named:
    """A tower of a one-stage head, ``head.<tower>_head``, and the layers that read it.

    nested: its layers are numbered in pairs of convolution and norm, as torchvision's RetinaNet has them; otherwise in
    one row, of three a convolution, as its FCOS.
    """
    head = f"head.{tower}_head."
    outputs = pyramid_dim(spec)
    for index in range(spec.head_depth):
        inputs, made = outputs, f"{tower}.{index}"
        outputs = Blocks(made, spec.neck_width // spec.head_groups) if spec.head_groups else made
        conv, norm = (f"{index}.0", f"{index}.1") if nested else (str(3 * index), str(3 * index + 1))
        yield f"{head}conv.{conv}.weight", (outputs, inputs)
        if not (nested and spec.head_groups):  # before a norm these convolutions have no bias
            yield f"{head}conv.{conv}.bias", (outputs,)
        if spec.head_groups:
            yield f"{head}conv.{norm}.weight", (outputs,)
            yield f"{head}conv.{norm}.bias", (outputs,)
    for name in responses:
        yield f"{head}{name}.weight", (None, outputs)


def tower_counts(spec: DetectorSpec) -> dict[str, int]:
    """Channels of each group of the towers; of those that go with a norm's group, the number of groups."""
    width = spec.head_groups or spec.neck_width
    return {f"{tower}.{index}": width for tower in TOWERS for index in range(spec.head_depth)}
