"""Which dimensions of a detector's tensors are the same channels.

The outputs of a stage's blocks are added up, so they share one set of channels with the shortcut, and all that reads
the stage (the next one, the pyramid's lateral convolution) sees these channels as its inputs. Slicing, sorting and
pruning channels all need this table, and nothing else about the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autodet.detectors.arch import STAGES, Arch
from autodet.detectors.build import FAMILY_OF
from autodet.detectors.dims import Dim, Groups, Named, group_of, made_axis, normed, pyramid_dim, size_of
from autodet.detectors.spec import BODY_STRIDES, DetectorSpec

BODY, FPN = "backbone.body.", "backbone.fpn."


def channel_groups(spec: DetectorSpec) -> dict[str, Groups]:
    """Names of a detector's tensors, as in the plain model's state dict → the groups of their dimensions.

    A group is named after the layer that makes it (``conv1``, ``layer2.0.conv1``, ``rpn.0``), a stage's outputs after
    the stage (``layer2``), the pyramid's maps before and after its last convolutions ``inner`` and ``outer``. A stem as
    wide as a first stage without a projection belongs to ``layer1``. In convolutions of several groups the inner
    channels are left out: a part of them is not the first ones. Tensors without any such dimension are left out.
    """
    groups = {BODY + name: dims for name, dims in _body_groups(spec.body)}
    groups |= dict(_pyramid_groups(spec))
    return groups | dict(FAMILY_OF[spec.family].head_groups(spec))


def channel_counts(spec: DetectorSpec) -> dict[str, int]:
    """Channels of each group; of a group that only goes in blocks, the number of blocks."""
    pyramid = dict.fromkeys(("inner", "outer"), spec.neck_groups or spec.neck_width)
    return body_counts(spec.body) | pyramid | FAMILY_OF[spec.family].head_counts(spec)


def body_counts(arch: Arch) -> dict[str, int]:
    """Channels of each group of a body."""
    counts = {} if _stem_group(arch) != "conv1" else {"conv1": arch.stem}
    for number, stage in enumerate(arch.stages, 1):
        counts[f"layer{number}"] = stage.width
        for index, inner in enumerate(stage.inner):
            for conv in _inner_convs(arch):
                counts[f"layer{number}.{index}.{conv}"] = inner
    return counts


def first_channels(dims: int, groups: Groups, counts: Mapping[str, int]) -> tuple[slice, ...]:
    """An index of the first channels of each group, as many as ``counts`` says, in a tensor of a larger detector."""
    every = (*groups, *(None,) * (dims - len(groups)))
    return tuple(slice(None) if dim is None else slice(0, counts[group_of(dim)] * size_of(dim)) for dim in every)


def select(tensor: Tensor, groups: Groups, channels: Mapping[str, Tensor]) -> Tensor:
    """The channels with the given numbers of each group that ``channels`` names, in that order."""
    for axis, dim in enumerate(groups):
        if dim is not None and group_of(dim) in channels:
            size, numbers = size_of(dim), channels[group_of(dim)].to(tensor.device)
            places = (numbers[:, None] * size + torch.arange(size, device=tensor.device)).flatten()
            tensor = tensor.index_select(axis, places)
    return tensor


def producers(groups: Mapping[str, Groups]) -> dict[str, list[str]]:
    """Group → names of the weights whose outputs it is."""
    made: dict[str, list[str]] = {}
    for name, dims in groups.items():
        outputs = dims[made_axis(dims)] if len(dims) > 1 else None
        if outputs is not None:
            made.setdefault(group_of(outputs), []).append(name)
    return made


def norm_after(weight: str) -> str | None:
    """The name of the batch norm on a weight of the body, without ``.weight``; None elsewhere.

    ``conv1.weight`` → ``bn1``, ``downsample.0.weight`` → ``downsample.1``.
    """
    if not weight.startswith(BODY):
        return None
    convolution = weight.removesuffix(".weight")
    if convolution.endswith("downsample.0"):
        return convolution[:-1] + "1"
    stem, _, last = convolution.rpartition("conv")
    return f"{stem}bn{last}"


def _body_groups(arch: Arch) -> Named:
    stem = _stem_group(arch)
    yield from normed("conv1", stem, None, "bn1")
    before = stem
    for number, stage in enumerate(arch.stages, 1):
        outputs = f"layer{number}"
        for index in range(stage.depth):
            block = f"{outputs}.{index}."
            inputs: str | None = before
            for conv in _inner_convs(arch):
                inner = f"{block}{conv}" if arch.groups == 1 else None
                yield from normed(f"{block}{conv}", inner, inputs, f"{block}{conv.replace('conv', 'bn')}")
                inputs = inner
            if arch.is_deformable(number):  # the offsets read what their convolution reads
                yield f"{block}conv2.conv_offset.weight", (None, f"{block}conv1" if arch.groups == 1 else None)
            last = "2" if arch.block == "basic" else "3"
            yield from normed(f"{block}conv{last}", outputs, inputs, f"{block}bn{last}")
            if index == 0 and (number > 1 or stem == "conv1"):
                yield from normed(f"{block}downsample.0", outputs, before, f"{block}downsample.1")
            before = outputs


def _pyramid_groups(spec: DetectorSpec) -> Named:
    inner, outer = pyramid_dim(spec, "inner"), pyramid_dim(spec)
    for index, stride in enumerate(spec.body_levels):
        lateral, last = f"{FPN}inner_blocks.{index}", f"{FPN}layer_blocks.{index}"
        yield from _pyramid_layer(spec, lateral, ".0", inner, f"layer{BODY_STRIDES.index(stride) + 1}")
        yield from _pyramid_layer(spec, last, ".0", outer, inner)
    if spec.top != "pool":
        own = ".0" if spec.neck_groups else ""
        read = f"layer{STAGES}" if spec.top == "body" else outer
        yield from _pyramid_layer(spec, f"{FPN}extra_blocks.p6", own, read=read, made=outer)
        yield from _pyramid_layer(spec, f"{FPN}extra_blocks.p7", own, read=outer, made=outer)


def _pyramid_layer(spec: DetectorSpec, layer: str, convolution: str, made: Dim, read: Dim) -> Named:
    """A convolution with a bias, or without one and a group norm after it."""
    yield f"{layer}{convolution}.weight", (made, read)
    if not spec.neck_groups:
        yield f"{layer}{convolution}.bias", (made,)
        return
    yield f"{layer}.1.weight", (made,)
    yield f"{layer}.1.bias", (made,)


def _inner_convs(arch: Arch) -> tuple[str, ...]:
    return ("conv1",) if arch.block == "basic" else ("conv1", "conv2")


def _stem_group(arch: Arch) -> str:
    """A block between equal widths adds its input to its output: then the stem's channels are stage 1's."""
    return "layer1" if arch.stem == arch.stages[0].width else "conv1"
