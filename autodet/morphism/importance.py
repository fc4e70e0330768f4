"""How much channels and blocks matter, read off their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autodet.detectors import DetectorSpec
from autodet.detectors.channels import BODY, channel_groups, norm_after, producers
from autodet.detectors.dims import Groups, made_axis, size_of


def channel_importance(state: Mapping[str, Tensor], spec: DetectorSpec) -> dict[str, Tensor]:
    """Group of channels → how much each channel matters, a vector of numbers ≥ 0.

    The L1 norm of a channel's filter, times the scale of the batch norm after it over the norm's standard deviation,
    since a norm makes the filter's own size meaningless; summed over all layers whose outputs are added up or feed the
    same heads, and over the channels of a group norm's group, which stay together [ours].
    """
    groups = channel_groups(spec)
    return {
        group: torch.stack([_filter_sizes(state, name, groups[name], spec.norm_eps) for name in weights]).sum(0)
        for group, weights in producers(groups).items()
    }


def importance_order(state: Mapping[str, Tensor], spec: DetectorSpec) -> dict[str, Tensor]:
    """Group of channels → channel numbers, most important first; equal ones keep their order."""
    importance = channel_importance(state, spec)
    return {group: values.argsort(descending=True, stable=True) for group, values in importance.items()}


def block_importance(state: Mapping[str, Tensor], spec: DetectorSpec) -> dict[tuple[int, int], float]:
    """(stage 1–4, block from 0) → how much a block adds to its shortcut: the mean size of its last norm's scale.

    A stage's first block is left out, as it changes resolution or width. (Joint-DetNAS's criterion is not published;
    ours is that of network slimming, Liu et al. 2017.)
    """
    last = "bn2" if spec.body.block == "basic" else "bn3"
    return {
        (stage, block): float(state[f"{BODY}layer{stage}.{block}.{last}.weight"].abs().mean())
        for stage, depth in enumerate(spec.body.depths, 1)
        for block in range(1, depth)
    }


def _filter_sizes(state: Mapping[str, Tensor], name: str, groups: Groups, eps: float) -> Tensor:
    axis = made_axis(groups)
    outputs, sizes, norm = groups[axis], state[name].abs().transpose(0, axis).flatten(1).sum(1), norm_after(name)
    if norm is not None:
        sizes = sizes * state[f"{norm}.weight"].abs() / (state[f"{norm}.running_var"] + eps).sqrt()
    return sizes.view(-1, 1 if outputs is None else size_of(outputs)).sum(1)
