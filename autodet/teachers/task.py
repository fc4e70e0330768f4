"""One training of a pool, from its data to a table of members: what a worker runs, with or without Ray."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autodet.detectors import Detector, build
from autodet.distill.formula import Formula
from autodet.teachers.schedule import Schedule
from autodet.teachers.space import Member, PoolSpace
from autodet.teachers.statistics import measure_statistics
from autodet.teachers.trainer import PoolSettings, PoolTrainer, Workers
from autodet.training import Task, Workbench

WATCHED_SEED = 0  # of the random members that are measured during the training


@dataclass(frozen=True)
class PoolTask:
    """All that a worker needs to train a pool.

    task: the data, the largest member (its student), recipe, seed and device. check_every: epochs between measurements
    of some members on the task's split; 0 for none. Members are measured after the last epoch in any case.
    """

    task: Task
    space: PoolSpace
    pool: PoolSettings
    check_every: int = 0

    def to_json(self) -> str:
        """One line of JSON."""
        values = {
            "task": json.loads(self.task.to_json()),
            "space": str(self.space),
            "schedule": str(self.pool.schedule),
            "formula": str(self.pool.formula),
            "parts": self.pool.parts,
            "check_every": self.check_every,
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> PoolTask:
        """The inverse of ``to_json``."""
        values = json.loads(text)
        schedule, formula = Schedule.parse(values["schedule"]), Formula.parse(values["formula"])
        return cls(
            Task.from_json(json.dumps(values["task"])),
            PoolSpace.parse(values["space"]),
            PoolSettings(schedule, formula, values["parts"]),
            values["check_every"],
        )


OnPoolEpoch = Callable[[PoolTrainer, Mapping[str, Any]], None]


class PoolBench:
    """A pool task's data, loaded once a process."""

    def __init__(self, task: PoolTask) -> None:
        self.task = task
        self.bench = Workbench(task.task)

    def trainer(self, workers: Workers | None = None, checkpoint: Path | None = None) -> PoolTrainer:
        """A training from the task's seed, or from a checkpoint where there is one."""
        task = self.task.task
        torch.manual_seed(task.seed)
        detector, loader = build(task.student), self.bench.train_loader
        trainer = PoolTrainer(
            detector, self.task.space, loader, task.settings, self.task.pool, task.seed, workers, None, task.device
        )
        if checkpoint is not None and checkpoint.exists():
            trainer.load(checkpoint)
        return trainer

    def train(self, trainer: PoolTrainer, on_epoch: OnPoolEpoch) -> None:
        """Train to the end. ``on_epoch`` gets the trainer and the epoch's entry in its history, and may save it."""
        last = trainer.settings.epochs
        for epoch in trainer.epochs():
            started = time.perf_counter()
            entry: dict[str, Any] = {
                "epoch": epoch.number,
                "open": trainer.pool.schedule.phase_at(epoch.number - 1).open,
                "seconds": round(sum(epoch.seconds.values()), 3),
                "images_per_second": round(epoch.images_per_second, 3),
                "losses": {name: round(value, 5) for name, value in sorted(epoch.losses.items())},
            }
            every = self.task.check_every
            if epoch.number == last or (every and epoch.number % every == 0):
                entry["ap"] = self.measure_watched(trainer)
                entry["check_seconds"] = round(time.perf_counter() - started, 3)
            trainer.history.append(entry)
            on_epoch(trainer, entry)

    def measure_watched(self, trainer: PoolTrainer) -> dict[str, float]:
        """AP (0–1) of the largest, the smallest and two random members, dealt to the workers."""
        found = {}
        for index, (name, member) in enumerate(watched_members(self.task.space).items()):
            if index % trainer.workers.count == trainer.workers.rank:
                found[name] = self.measure(trainer.member(member))
        return {name: round(ap, 5) for name, ap in trainer.workers.merged(found).items()}

    def measure(self, detector: Detector) -> float:
        """AP (0–1) of a member on the task's split, after measuring its norm statistics on training images."""
        measure_statistics(detector, self.bench.train_loader)
        detector.model.eval()
        return self.bench.measure(detector).ap or 0.0


def watched_members(space: PoolSpace) -> dict[str, Member]:
    """The members that are measured during a training."""
    rng = random.Random(WATCHED_SEED)
    return {
        "largest": space.largest,
        "smallest": space.smallest,
        "random 1": space.sample(rng),
        "random 2": space.sample(rng),
    }
