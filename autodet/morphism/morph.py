"""A change of architecture: the child's spec, and where each of its tensors comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autodet.detectors import DetectorSpec, build
from autodet.detectors.channels import channel_groups, select
from autodet.detectors.dims import Groups, group_of, made_axis, size_of

Weights = Mapping[str, Tensor]  # by the names of a detector's state dict


class MorphError(ValueError):
    """An action that a detector cannot undergo, with the reason."""


@dataclass(frozen=True)
class Morph:
    """What becomes of a detector's tensors.

    picks: group of channels → numbers of the parent's channels that the child's are, in order; one that is named twice
    is copied, and what reads it shares its weights among the copies (Net2Net, Chen et al. 2016). sources: beginning of
    the child's names → that of the parent's, where they differ. fresh: tensors that no parent has.
    """

    parent: DetectorSpec
    spec: DetectorSpec
    picks: Mapping[str, Tensor] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    fresh: Weights = field(default_factory=dict)

    def weights(self, parent: Weights) -> dict[str, Tensor]:
        """The child's whole state dict, which shares no memory with the parent's."""
        names = list(_skeleton(self.spec).state_dict())
        return self._carried(names, parent, self.fresh, self._shared)

    def moments(self, parent: Weights) -> dict[str, Tensor]:
        """An optimiser's moments, by the names of their parameters; those of fresh parameters are zero."""
        names = [name for name, _ in _skeleton(self.spec).named_parameters()]
        silent = {name: torch.zeros_like(value) for name, value in self.fresh.items()}
        return self._carried(names, parent, silent, lambda value, _: value)

    def _carried(
        self, names: list[str], parent: Weights, fresh: Weights, shared: Callable[[Tensor, Groups], Tensor]
    ) -> dict[str, Tensor]:
        groups = channel_groups(self.parent)
        found = {}
        for name in names:
            source = self.source_of(name)
            dims = groups.get(source, ())
            picked = fresh[name] if name in fresh else shared(select(parent[source], dims, self.picks), dims)
            found[name] = picked.clone()
        return found

    def source_of(self, name: str) -> str:
        """The parent's name of a tensor of the child."""
        for begin, source in self.sources.items():
            if name.startswith(begin):
                return source + name.removeprefix(begin)
        return name

    def _shared(self, value: Tensor, dims: Groups) -> Tensor:
        """Divide what reads copied channels by the number of their copies."""
        axis = 1 - made_axis(dims)
        read = dims[axis] if len(dims) > 1 else None
        if read is None or group_of(read) not in self.picks:
            return value
        picks = self.picks[group_of(read)]
        copies = torch.bincount(picks)[picks].repeat_interleave(size_of(read))
        shape = [1] * value.dim()
        shape[axis] = -1
        return value / copies.to(value).view(shape)


def _skeleton(spec: DetectorSpec) -> nn.Module:
    with torch.device("meta"):
        return build(spec).model


def kept(importance: Tensor, count: int) -> Tensor:
    """Numbers of the most important channels, in the order in which they are."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values
