"""Which dimensions of a detector's tensors are the same channels.

The outputs of a stage's blocks are added up, so they share one set of channels with the shortcut, and all that reads
the stage (the next one, the pyramid's lateral convolution) sees these channels as its inputs. Slicing, sorting and
pruning channels all need this table, and nothing else about the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from autodet.detectors.arch import STAGES, Arch
from autodet.detectors.spec import BODY_STRIDES, DetectorSpec

Groups = tuple[str | None, ...]  # a tensor's dimensions → the group of channels that each is, None for all others
BODY, FPN = "backbone.body.", "backbone.fpn."


def channel_groups(spec: DetectorSpec) -> dict[str, Groups]:
    """Names of the body's tensors, and of those that read it, as in the plain model's state dict → their groups.

    A group is named after the convolution that makes it (``conv1``, ``layer2.0.conv1``), a stage's outputs after the
    stage (``layer2``). A stem as wide as a first stage without a projection belongs to ``layer1``. In convolutions of
    several groups the inner channels are left out: a part of them is not the first ones.
    """
    groups = {BODY + name: dims for name, dims in _body_groups(spec.body)}
    for index, stride in enumerate(spec.body_levels):
        groups[f"{FPN}inner_blocks.{index}.0.weight"] = (None, f"layer{BODY_STRIDES.index(stride) + 1}")
    if spec.top == "body":
        groups[f"{FPN}extra_blocks.p6.weight"] = (None, f"layer{STAGES}")
    return groups


def channel_counts(arch: Arch) -> dict[str, int]:
    """Channels of each group."""
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
    return tuple(slice(None) if group is None else slice(0, counts[group]) for group in every)


def producers(groups: Mapping[str, Groups]) -> dict[str, list[str]]:
    """Group → names of the convolutions whose outputs it is."""
    made: dict[str, list[str]] = {}
    for name, dims in groups.items():
        if len(dims) > 1 and dims[0] is not None:
            made.setdefault(dims[0], []).append(name)
    return made


def norm_after(convolution: str) -> str:
    """The name of the norm on a body's convolution, both without ``.weight``: conv1 → bn1, downsample.0 → .1."""
    if convolution.endswith("downsample.0"):
        return convolution[:-1] + "1"
    stem, _, last = convolution.rpartition("conv")
    return f"{stem}bn{last}"


def _body_groups(arch: Arch) -> Iterator[tuple[str, Groups]]:
    stem = _stem_group(arch)
    yield "conv1.weight", (stem, None)
    yield from _norm("bn1", stem)
    before = stem
    for number, stage in enumerate(arch.stages, 1):
        outputs = f"layer{number}"
        for index in range(stage.depth):
            block = f"{outputs}.{index}."
            inputs: str | None = before
            for conv in _inner_convs(arch):
                inner = f"{block}{conv}" if arch.groups == 1 else None
                yield f"{block}{conv}.weight", (inner, inputs)
                yield from _norm(norm_after(f"{block}{conv}"), inner)
                inputs = inner
            last = f"{block}{'conv2' if arch.block == 'basic' else 'conv3'}"
            yield f"{last}.weight", (outputs, inputs)
            yield from _norm(norm_after(last), outputs)
            if index == 0 and (number > 1 or stem == "conv1"):
                yield f"{block}downsample.0.weight", (outputs, before)
                yield from _norm(f"{block}downsample.1", outputs)
            before = outputs


def _norm(name: str, group: str | None) -> Iterator[tuple[str, Groups]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (group,)


def _inner_convs(arch: Arch) -> tuple[str, ...]:
    return ("conv1",) if arch.block == "basic" else ("conv1", "conv2")


def _stem_group(arch: Arch) -> str:
    """A block between equal widths adds its input to its output: then the stem's channels are stage 1's."""
    return "layer1" if arch.stem == arch.stages[0].width else "conv1"


def select(tensor: Tensor, groups: Groups, channels: Mapping[str, Tensor]) -> Tensor:
    """The channels with the given numbers of each group that ``channels`` names, in that order."""
    for dim, group in enumerate(groups):
        if group is not None and group in channels:
            tensor = tensor.index_select(dim, channels[group].to(tensor.device))
    return tensor
