"""Putting the channels that matter first, without changing what the detector computes.

Members keep the first channels of each group, so before the widths open, the largest member's channels are sorted by
importance (the L1 norm of the weights that make a channel; Joint-DetNAS and OFA sort once as well).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autodet.detectors import DetectorSpec
from autodet.detectors.channels import channel_groups, select
from autodet.detectors.dims import Groups, group_of


def sort_channels(
    model: nn.Module,
    spec: DetectorSpec,
    order: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    *copies: nn.Module,
) -> None:
    """Put a detector's channels in an order, in place; its outputs stay the same.

    order: as ``importance_order`` gives it, any permutation of each group. The optimiser's moments move with their
    weights, as do the weights of ``copies``, such as averaged ones.
    """
    groups = channel_groups(spec)
    for parameter_of in (model, *copies):
        for name, tensor in parameter_of.state_dict().items():
            _reorder(tensor, groups.get(name, ()), order)
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for value in moments.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                _reorder(value, groups.get(name, ()), order)


def _reorder(tensor: Tensor, groups: Groups, order: Mapping[str, Tensor]) -> None:
    if any(dim is not None and group_of(dim) in order for dim in groups):
        tensor.copy_(select(tensor, groups, order))
