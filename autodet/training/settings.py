"""How a detector is trained: one value, printed and stored beside every result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

Optimizer = Literal["sgd", "adamw"]
Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class TrainSettings:
    """A recipe.

    lr: height of a half cosine that falls to zero over all epochs; the first ``warmup`` steps rise to it linearly.
    ema: decay of the averaged weights that are evaluated and kept, 0 for none. precision: ``bf16`` runs forward and
    losses under autocast. channels_last: memory format of convolutions; off by default, since it gains 5 % on a CPU and
    torch 2.15 crashes there in the backward pass of a body with 8 channels. Turn it on for GPUs.
    """

    epochs: int
    batch_size: int = 16
    optimizer: Optimizer = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup: int = 20
    clip_norm: float = 10.0
    ema: float = 0.0
    flip: float = 0.5
    precision: Precision = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TrainSettings.{name} is {getattr(self, name)}, expected a positive number.")
        for name in ("weight_decay", "momentum", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"TrainSettings.{name} is {getattr(self, name)}, expected a number of at least 0.")
        for name, known in (("optimizer", get_args(Optimizer)), ("precision", get_args(Precision))):
            if getattr(self, name) not in known:
                raise ValueError(f"TrainSettings.{name} is {getattr(self, name)!r}, expected {' or '.join(known)}.")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"TrainSettings.flip is {self.flip}, expected a probability in [0, 1].")
        if not 0 <= self.ema < 1:
            raise ValueError(
                f"TrainSettings.ema is {self.ema}, expected a decay in [0, 1), such as 0.99, or 0 for none."
            )

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step (0-based) out of ``steps``: half a cosine, times the linear warm-up."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def make_optimizer(modules: Iterable[nn.Module], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters; no weight decay on norms and biases (vectors)."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
