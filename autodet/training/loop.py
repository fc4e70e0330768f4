"""The one training loop. Every script and every candidate of a search trains through ``Trainer``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from autodet.data import Batch, Loader
from autodet.detectors import Dense, Detector, Features, Inputs
from autodet.training.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint
from autodet.training.settings import TrainSettings, make_optimizer
from autodet.working_copy import discard, fetch

_Tensors = list[Tensor] | tuple[Tensor, ...]


class Diverged(RuntimeError):  # noqa: N818 - says what happened
    """A loss or a gradient stopped being finite; the message says which and when."""


class ExtraLosses(Protocol):
    """Losses beside the detector's own, distillation for example."""

    @property
    def module(self) -> nn.Module:
        """What is trained and stored with the losses."""
        ...

    def __call__(self, batch: Batch, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """Named scalars, already weighted."""
        ...


@dataclass(frozen=True)
class Epoch:
    """One epoch's report. seconds: time by part (data, forward, backward, step, other), all on this process's clock."""

    number: int  # epochs done so far, from 1
    losses: Mapping[str, float]  # means over the epoch's images
    images: int
    seconds: Mapping[str, float]

    @property
    def images_per_second(self) -> float:
        """Training speed over the whole epoch."""
        return self.images / max(1e-9, sum(self.seconds.values()))

    @property
    def overhead(self) -> float:
        """Share of the time spent outside forward, backward and step."""
        return (self.seconds["data"] + self.seconds["other"]) / max(1e-9, sum(self.seconds.values()))


@dataclass
class Clock:
    """Adds the time since the last tick to a named part."""

    parts: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("data", "forward", "backward", "step", "other"), 0.0)
    )
    last: float = field(default_factory=time.perf_counter)

    def tick(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now


class Trainer:
    """State of one training: the detector, its optimiser, averaged weights and position. Resumes from ``checkpoint``.

    Randomness of a step comes from (seed, step) alone, so a resumed training continues bit for bit in one process.
    """

    def __init__(
        self,
        detector: Detector,
        loader: Loader,
        settings: TrainSettings,
        seed: int,
        extra: ExtraLosses | None = None,
        checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.detector, self.loader, self.settings, self.seed = detector, loader, settings, seed
        self.extra, self.checkpoint, self.device = extra, checkpoint, torch.device(device)
        format_ = torch.channels_last if settings.channels_last else torch.contiguous_format
        detector.model.to(self.device).to(memory_format=format_)
        modules = [detector.model] + ([extra.module.to(self.device)] if extra else [])
        self.optimizer = make_optimizer(modules, settings)
        self.averaged = _averaged(detector.model, settings.ema) if settings.ema else None
        self.steps_per_epoch = len(loader.keys(0))
        self.epoch = 0
        if checkpoint is not None:
            self._go_on(checkpoint)

    @property
    def model(self) -> nn.Module:
        """The weights to evaluate and keep: the averaged ones where there are any."""
        return self.averaged.module if self.averaged is not None else self.detector.model

    def epochs(self) -> Iterator[Epoch]:
        """Train, one epoch a turn; stop asking to stop.

        An epoch enters the checkpoint once its report has been taken in and the next is asked for: a kill in between
        repeats the epoch and its report, and never loses a report.
        """
        while self.epoch < self.settings.epochs:
            report = self._train_epoch()
            self.epoch += 1
            yield report
            if self.checkpoint is not None:
                self.save(self.checkpoint)

    def _train_epoch(self) -> Epoch:
        self.detector.model.train()
        clock, totals, images = Clock(), dict[str, Tensor](), 0
        for index, batch in enumerate(self.loader.batches(self.epoch)):
            clock.tick("data")
            step = self.epoch * self.steps_per_epoch + index
            losses = self.step(step, batch, clock)
            for name, loss in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + loss.detach() * len(batch.images)
            images += len(batch.images)
            clock.tick("other")
        means = {name: float(total) / images for name, total in totals.items()}
        return Epoch(self.epoch + 1, means, images, clock.parts)

    def step(self, step: int, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Train on one batch. step: its number since the training's beginning, which decides rate and randomness."""
        torch.manual_seed(step_seed(self.seed, step))
        rate = self.settings.rate(step, self.settings.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clock.tick("other")
        losses = self._accumulate(step, batch, clock)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm, foreach=True)
        if not torch.isfinite(norm):
            raise Diverged(f"The gradient's norm is {float(norm)} at step {step}. Lower the rate or weight.")
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.detector.model)
        clock.tick("step")
        return losses

    def _accumulate(self, step: int, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Leave a step's gradient in the parameters and return its losses."""
        with self._autocast():
            losses = self._losses(batch)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        clock.tick("forward")
        if not torch.isfinite(total):
            bad = {name: float(loss.detach()) for name, loss in losses.items() if not torch.isfinite(loss)}
            raise Diverged(
                f"The loss is no longer finite at step {step}: {bad or float(total)}. Lower the rate or weight."
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        clock.tick("backward")
        return losses

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        inputs = self._preprocessed(self.detector, batch)
        features = self.detector.features(inputs)
        dense = self.detector.dense(inputs, features)
        losses = self.detector.losses(inputs, features, dense)
        return losses | self.extra(batch, inputs, features, dense) if self.extra else losses

    def _preprocessed(self, detector: Detector, batch: Batch) -> Inputs:
        batch = self._moved(batch)
        inputs = detector.preprocess(batch.images, batch.targets)
        if self.settings.channels_last:
            inputs.images.tensors = inputs.images.tensors.contiguous(memory_format=torch.channels_last)
        return inputs

    def _moved(self, batch: Batch) -> Batch:
        """The batch on the training's device; the same tensors where it is there already."""
        images = [image.to(self.device, non_blocking=True) for image in batch.images]
        targets = [{key: value.to(self.device) for key, value in target.items()} for target in batch.targets]
        return Batch(batch.key, images, targets)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.settings.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def save(self, path: Path) -> None:
        """Write all that a resumed training needs; an interrupted write leaves the former file in place."""
        save_checkpoint(path, self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values."""
        return {
            **self.identity(),
            "epoch": self.epoch,
            "model": self.detector.model.state_dict(),
            "extra": self.extra.module.state_dict() if self.extra else {},
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else {},
        }

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the training that goes on from it must have in common."""
        return {"seed": self.seed, "settings": self.settings.to_json()}

    def _go_on(self, checkpoint: Path) -> None:
        """From where the training was left, on this machine or another; from the start where that cannot be read."""
        fetch(checkpoint)
        if not checkpoint.exists():
            return
        try:
            self.load(checkpoint)
        except DamagedCheckpoint as error:  # a disk's fault: it is written in one step
            logging.warning("%s That is done now.", error)
            discard(checkpoint)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; ValueError names the file where it is another training's or unreadable."""
        state = load_checkpoint(path, self.device)
        for name, ours in self.identity().items():
            if state.get(name) != ours:
                raise ValueError(
                    f"{path} is of a training with {name} {state.get(name)}, not {ours}: give another folder."
                )
        try:
            self.detector.model.load_state_dict(state["model"])
            if self.extra:
                self.extra.module.load_state_dict(state["extra"])
        except RuntimeError as error:
            raise ValueError(f"{path} is of another detector or formula ({error}): give another folder.") from error
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.epoch = int(state["epoch"])
        self.restored(state)

    def restored(self, state: dict[str, Any]) -> None:
        """Called with a checkpoint's state once it has been taken over; for what a kind of training adds to it."""


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and norm statistics; the first steps average over what there is."""

    def update(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        rate = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, rate)
        else:
            torch._foreach_copy_(averaged, current)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def step_seed(seed: int, step: int) -> int:
    """One generator seed from two numbers, far apart for neighbouring steps (splitmix64's constants)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)
