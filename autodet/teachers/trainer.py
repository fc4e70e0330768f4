"""Training a pool: steps of several members on shared weights, by one worker or many.

A step is a list of units, each a member on a part of the batch. Units are dealt to the workers, which add up their
gradients alone and then with one all-reduce: the sum over members of the mean over images. The list depends on the
seed, the step and the settings, never on the workers, so any number of them gives the same pool.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autodet.data import Batch, Loader
from autodet.data.loader import BatchKey
from autodet.detectors import Detector
from autodet.detectors.channels import body_counts, channel_groups
from autodet.distill.distiller import Distiller
from autodet.distill.formula import Formula
from autodet.distill.inputs import parts_of
from autodet.distill.outputs import DetectorOutput, answer_to
from autodet.distill.teacher import answer_of
from autodet.morphism.importance import importance_order
from autodet.teachers.elastic import ElasticDetector, copies_of, sliced
from autodet.teachers.schedule import Schedule, members_of_step
from autodet.teachers.sorting import sort_channels
from autodet.teachers.space import Member, PoolSpace
from autodet.teachers.statistics import measure_statistics
from autodet.training.loop import Clock, Epoch, Trainer, step_seed
from autodet.training.settings import TrainSettings

PRESENT = "present"  # under this name, the share of the images whose steps trained a role


class Workers(Protocol):
    """The processes that train one pool together."""

    rank: int
    count: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all workers, in place."""
        ...

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor by the first worker's, in place."""
        ...

    def merged(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums by name over all workers; a name need not be everywhere."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process that does everything."""

    rank: int = 0
    count: int = 1

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over one."""

    def broadcast(self, tensor: Tensor) -> None:
        """The first one's own."""

    def merged(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums over one."""
        return dict(values)


@dataclass(frozen=True)
class PoolSettings:
    """How members are trained together, beside the recipe of ``TrainSettings``, whose epochs are the schedule's.

    formula: what the largest member teaches the others in the same step, with plain weights. parts: into how many parts
    a batch is split for each member; with as many parts as workers each worker runs all members on its part, with one
    part each worker runs other members on the whole batch.
    """

    schedule: Schedule
    formula: Formula
    parts: int = 1

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"PoolSettings.parts is {self.parts}, expected at least 1.")


@dataclass(frozen=True)
class Unit:
    """A member on a part of a batch (positions in it). share: of the batch's images, the weight of the unit's mean."""

    member: Member
    part: range
    share: float
    role: str  # largest, smallest or random


class PoolTrainer(Trainer):
    """``Trainer`` whose steps train several members. Checkpoints and seeds work as there.

    Norm statistics are not tracked: each member's are measured when it is taken from the pool.
    """

    def __init__(
        self,
        detector: Detector,
        space: PoolSpace,
        loader: Loader,
        settings: TrainSettings,
        pool: PoolSettings,
        seed: int,
        workers: Workers | None = None,
        checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> None:
        if settings.epochs != pool.schedule.epochs:
            raise ValueError(f"The recipe has {settings.epochs} epochs, the schedule {pool.schedule.epochs}.")
        for module in detector.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # each worker sees other members: tracked statistics would differ
        self.space, self.pool, self.workers = space, pool, workers or Alone()
        self.history: list[dict[str, Any]] = []  # of the epochs done; in the checkpoint, so that none counts twice
        super().__init__(detector, loader, settings, seed, None, checkpoint, device)
        self.elastic = ElasticDetector(detector, space)  # now that the weights are where and as they will stay
        # By input size; a formula that is impossible at one is refused here.
        self._distillers = {size: self._distiller(replace(space.smallest, size=size)) for size in space.sizes}

    def _train_epoch(self) -> Epoch:
        self._agree()
        if self.epoch == self.pool.schedule.sorted_at:
            self._sort()
        epoch = super()._train_epoch()
        sums = self.workers.merged(epoch.losses)
        # A mean over the images of the steps that trained the role, not over all.
        losses = {
            name: value / sums[f"{name.split('/')[0]}/{PRESENT}"]
            for name, value in sums.items()
            if not name.endswith(f"/{PRESENT}")
        }
        return Epoch(epoch.number, losses, epoch.images, epoch.seconds)

    def _agree(self) -> None:
        """All workers take the first one's weights, which differ by nothing, or by rounding on unlike machines."""
        for module in [self.detector.model] + ([self.averaged] if self.averaged is not None else []):
            for tensor in module.state_dict().values():
                if tensor.device.type == self.device.type:  # NCCL takes none from elsewhere, such as a counter
                    self.workers.broadcast(tensor)

    def member(self, member: Member) -> Detector:
        """A copy of a member with the weights to evaluate and keep, without norm statistics of its own."""
        groups = channel_groups(self.detector.spec)
        return sliced(self.elastic.spec_of(member), groups, copies_of(self.model.state_dict()))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values."""
        return super().state() | {"history": json.dumps(self.history)}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the training that goes on from it must have in common."""
        pool = {"space": str(self.space), "schedule": str(self.pool.schedule), "formula": str(self.pool.formula)}
        return super().identity() | pool | {"parts": self.pool.parts}

    def restored(self, state: dict[str, Any]) -> None:
        """Take over the history of a checkpoint."""
        self.history = json.loads(state["history"])

    def units(self, step: int, key: BatchKey) -> list[Unit]:
        """What a step trains, in the order in which it is dealt to the workers."""
        phase = self.pool.schedule.phase_at(step // self.steps_per_epoch)
        rng = random.Random(step_seed(self.seed, step))
        count = len(key.indices)
        edges = [round(count * part / self.pool.parts) for part in range(self.pool.parts + 1)]
        parts = [range(low, high) for low, high in pairwise(edges) if high > low]
        smallest = self.space.opened(phase.open).smallest
        units = []
        for member in members_of_step(self.space, phase, rng):
            role = "largest" if member == self.space.largest else "smallest" if member == smallest else "random"
            units += [Unit(member, part, len(part) / count, role) for part in parts]
        return units

    def _accumulate(self, step: int, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        self.elastic.gradient.zero_()
        batch = self._moved(batch)  # once, not for every unit
        taught = _Taught(self)
        sandwich = self.pool.schedule.phase_at(step // self.steps_per_epoch).sandwich
        units = self.units(step, batch.key)
        totals: dict[str, Tensor] = {}
        for index, unit in enumerate(units):
            if index % self.workers.count != self.workers.rank:
                continue
            seed = step_seed(step_seed(self.seed, step), index)
            part = _part_of(batch, unit.part)
            with self._autocast():
                losses = self._unit_losses(unit, part, taught if sandwich else None, seed)
            total = torch.stack([loss.float() for loss in losses.values()]).sum() * unit.share
            clock.tick("forward")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
                total.backward()  # type: ignore[no-untyped-call]
            clock.tick("backward")
            like = sum(other.role == unit.role and other.part == unit.part for other in units)
            for name, loss in (losses | {PRESENT: torch.ones((), device=self.device)}).items():
                key = f"{unit.role}/{name}"
                totals[key] = totals.get(key, torch.zeros((), device=self.device)) + loss.detach() * unit.share / like
        self.workers.all_reduce(self.elastic.gradient)
        clock.tick("step")
        return totals

    def _unit_losses(self, unit: Unit, part: Batch, taught: _Taught | None, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        detector = self.elastic.activate(unit.member)
        inputs = self._preprocessed(detector, part)
        features = detector.features(inputs)
        dense = detector.dense(inputs, features)
        losses = detector.losses(inputs, features, dense)
        if taught is None or not self.pool.formula.terms:
            return losses
        if unit.member == self.space.largest:
            with torch.no_grad():
                taught.answers[unit.part] = answer_of(detector, part, inputs, features, dense, taught.parts)
            return losses
        theirs = taught(unit.part, part)
        ours = answer_to(theirs, detector, part, inputs, features, dense)
        torch.manual_seed(step_seed(seed, 0))  # the teacher's pass may have drawn, and runs on some workers only
        return losses | dict(self._distillers[unit.member.size](ours, theirs))

    def _distiller(self, member: Member) -> Distiller:
        distiller = Distiller(self.pool.formula, self.elastic.spec_of(member), self.detector.spec)
        return distiller.to(self.device).eval()

    def _sort(self) -> None:
        """Put channels in the first worker's order of importance: on unlike machines others may differ by rounding."""
        measure_statistics(self.detector, self.loader)
        order = importance_order(self.detector.model.state_dict(), self.detector.spec)
        order = {group: order[group] for group in body_counts(self.detector.spec.body) if group in order}  # what varies
        for channels in order.values():
            self.workers.broadcast(channels)
        copies = [self.averaged.module] if self.averaged is not None else []
        sort_channels(self.detector.model, self.detector.spec, order, self.optimizer, *copies)


class _Taught:
    """The largest member's answers in one step, each computed once on a worker."""

    def __init__(self, trainer: PoolTrainer) -> None:
        self.trainer = trainer
        self.parts = parts_of(term.input for term in trainer.pool.formula.terms)
        self.answers: dict[range, DetectorOutput] = {}

    def __call__(self, part: range, batch: Batch) -> DetectorOutput:
        """The answer on a part of the batch; where another worker trains the largest member, a pass without gradient.

        The model stays in training mode, so that both ways see the batch's own norm statistics and give the same.
        """
        if part not in self.answers:
            trainer = self.trainer
            with torch.no_grad():
                inputs = trainer._preprocessed(trainer.detector, batch)
                features = trainer.detector.features(inputs)
                dense = trainer.detector.dense(inputs, features) if self.parts - {"features"} else None
                self.answers[part] = answer_of(trainer.detector, batch, inputs, features, dense, self.parts)
        return self.answers[part]


def _part_of(batch: Batch, part: range) -> Batch:
    """Some of a batch's images."""
    if len(part) == len(batch.images):
        return batch
    chosen = slice(part.start, part.stop)
    key = BatchKey(batch.key.indices[chosen], batch.key.flipped[chosen])
    return Batch(key, batch.images[chosen], batch.targets[chosen])
