"""One training of one student, with or without a teacher: what a search evaluates and a comparison compares."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autodet.data import Batch, BatchPlan, CocoDataset, ImageCache, Loader, read_dataset
from autodet.detectors import (
    Dense,
    Detector,
    DetectorSpec,
    Features,
    Inputs,
    build,
    detect,
    load_detector,
    save_detector,
    steps_of,
)
from autodet.detectors.weights import load_strict, load_weights, weights_hash
from autodet.distill.distiller import Distiller
from autodet.distill.formula import Formula
from autodet.distill.inherit import inherit_neck_and_head
from autodet.distill.inputs import comparable_inputs
from autodet.distill.outputs import answer_to
from autodet.distill.probe import Probe
from autodet.distill.teacher import Teacher
from autodet.evaluation import evaluate
from autodet.records import Metrics
from autodet.training.loop import Epoch, Trainer
from autodet.training.settings import TrainSettings

SUBSET_SEED = 0  # the proxy's images and batches are the same for every candidate and replicate


@dataclass(frozen=True)
class Task:
    """All that a worker needs to train and judge students. Paths must be readable on every machine of the run.

    teacher: a detector file, or None. start: a detector file of the student's spec whose weights students start from,
    None for fresh ones. fraction: of the training images. split: on which AP is measured, after the last epoch and
    those in ``checks``. fixed_batches: batches recur (see BatchPlan), so that the teacher's outputs are kept on disk;
    arms without a teacher see the same batches. normalise: weigh terms against their own scale (see Distiller).
    weights: where students are kept, None to drop them.
    """

    data: str
    cache: str
    student: DetectorSpec
    settings: TrainSettings
    teacher: str | None = None
    start: str | None = None
    fraction: float = 1.0
    split: Literal["val", "test"] = "val"
    checks: tuple[int, ...] = ()
    fixed_batches: bool = True
    normalise: bool = True
    weights: str | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 1

    def to_json(self) -> str:
        """One line of JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(values | {"student": self.student.to_json(), "settings": asdict(self.settings)})

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The inverse of ``to_json``."""
        values: dict[str, Any] = json.loads(text)
        values["student"] = DetectorSpec.from_json(values["student"])
        values["settings"] = TrainSettings(**values["settings"])
        values["checks"] = tuple(values["checks"])
        return cls(**values)


@dataclass(frozen=True)
class Outcome:
    """A finished training. seconds: training and evaluation; notes: terms' scales, what was inherited, the best
    epoch's speed, and the last one's share of time outside forward, backward and step."""

    metrics: Metrics
    epochs: int
    seconds: float
    weights: str | None
    notes: dict[str, Any]


Pace = Callable[[], AbstractContextManager[object]]
OnEpoch = Callable[[Epoch, float | None], None]  # called after each epoch with the AP where it was measured


class Workbench:
    """A task's data and teacher, loaded once a process and used for many students."""

    def __init__(self, task: Task, pace: Pace = nullcontext) -> None:
        """pace: entered while a batch is worked on (see ``Loader``)."""
        self.task, self._pace = task, pace
        required = ("train", "val") if task.split == "val" else ("train", "val", task.split)
        splits = read_dataset(Path(task.data), required=required)
        self.train_set = splits["train"].subset(task.fraction, SUBSET_SEED)
        self.eval_set = splits[task.split]
        self.train_loader = self._loader(splits["train"], self.train_set, task.student.masks)
        self.eval_loader = self._loader(self.eval_set, self.eval_set, with_masks=False)
        self.teacher: Teacher | None = None
        if task.teacher is not None:
            detector, _ = load_detector(Path(task.teacher))
            detector.model.to(task.device)
            folder = Path(task.cache) / "teacher" if task.fixed_batches else None
            content = f"{self.train_loader.cache.path.name} {self.train_set.annotations_hash}"
            self.teacher = Teacher(detector, comparable_inputs(task.student, detector.spec), folder, content)

    def student(self, seed: int, inherit: bool) -> tuple[Detector, str | None]:
        """A student from a seed or from the task's start, and what it inherited from the teacher, if it should."""
        torch.manual_seed(seed)
        student = build(self.task.student)
        if self.task.start is not None:
            state, _ = load_weights(self.task.start)
            load_strict(student.model, state, self.task.start)
        if not inherit:
            return student, None
        if self.teacher is None:
            raise ValueError("Inheriting the neck and head needs a teacher; the task names none.")
        return student, str(inherit_neck_and_head(student, self.teacher.detector))

    def run(
        self,
        formula: Formula,
        inherit: bool,
        replicate: int,
        folder: Path | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Outcome:
        """Train one student and measure it; resumes from ``folder/checkpoint.pt`` where there is one.

        The training's seed is the task's plus the replicate, whatever the formula: equal replicates are paired.
        """
        seed = self.task.seed + replicate
        student, inherited = self.student(seed, inherit)
        extra = self.distillation(formula, student, self.teacher)
        return self.train(student, self.train_loader, seed, extra, {"inherited": inherited}, folder, on_epoch)

    def train(
        self,
        student: Detector,
        loader: Loader,
        seed: int,
        extra: Distillation | None,
        notes: Mapping[str, Any],
        folder: Path | None = None,
        on_epoch: OnEpoch | None = None,
        rate: float = 1.0,
    ) -> Outcome:
        """Train any student by the task's recipe, and measure it; else as ``run``.

        notes: kept with its weights. rate: share of the recipe's learning rate.
        """
        task, started = self.task, time.perf_counter()
        settings = replace(task.settings, lr=rate * task.settings.lr)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoint.pt" if folder is not None else None
        trainer = Trainer(student, loader, settings, seed, extra, checkpoint, task.device)
        measured = steps_of(trainer.model, student.spec)
        metrics, speed, overhead = None, 0.0, 0.0
        for epoch in trainer.epochs():
            last = epoch.number == task.settings.epochs
            metrics = self.measure(measured) if last or epoch.number in task.checks else None
            speed, overhead = max(speed, epoch.images_per_second), epoch.overhead
            if on_epoch is not None:
                on_epoch(epoch, metrics.ap if metrics else None)
        metrics = metrics or self.measure(measured)  # a training that was complete before this call
        found = {
            **notes,
            "scales": extra.distiller.scales() if extra else {},
            "images_per_second": round(speed, 2),
            "overhead": round(overhead, 4),
        }
        taught = str(extra.distiller.formula if extra else Formula(()))
        weights = self.keep(measured, found | {"formula": taught, "seed": seed, "ap": metrics.ap})
        return Outcome(metrics, trainer.epoch, time.perf_counter() - started, weights, found)

    def measure(self, detector: Detector) -> Metrics:
        """COCO metrics on the task's split; of masks too where the detector gives them and the split has them."""
        device = torch.device(self.task.device)

        def detections(batch: Batch) -> list[dict[str, Tensor]]:
            return detect(detector, [image.to(device) for image in batch.images])

        return evaluate(
            detections, self.eval_loader, self.eval_set, detector.spec.categories, self.task.settings.batch_size
        )

    def probe(self, inherit: bool = True) -> Probe:
        """Judges formulas on one full batch of the training, with an untrained student."""
        if self.teacher is None:
            raise ValueError("A probe needs a teacher; the task names none.")
        largest = max(self.train_loader.keys(0), key=lambda key: len(key.indices))  # an epoch may end with a small one
        batch = self.train_loader.load(largest)
        student, _ = self.student(self.task.seed, inherit)
        student.model.to(self.task.device).train()
        taught = self.teacher(batch)
        with torch.no_grad():
            inputs = student.preprocess([image.to(self.task.device) for image in batch.images])
            features = student.features(inputs)
            output = answer_to(taught, student, batch, inputs, features, student.dense(inputs, features))
        return Probe(student.spec, self.teacher.detector.spec, output, taught, self.task.normalise)

    def distillation(self, formula: Formula, student: Detector, teacher: Teacher | None) -> Distillation | None:
        """What a teacher adds to a student's losses; None for the formula without terms."""
        if not formula.terms:
            return None
        if teacher is None:
            raise ValueError(f"The formula '{formula}' needs a teacher; the task names none.")
        distiller = Distiller(formula, student.spec, teacher.detector.spec, self.task.normalise)
        return Distillation(distiller, teacher, student)

    def _loader(self, split: CocoDataset, used: CocoDataset, with_masks: bool) -> Loader:
        spec, settings = self.task.student, self.task.settings
        cache = ImageCache(split, spec.min_size, spec.max_size, Path(self.task.cache) / "images")
        plan = BatchPlan(settings.batch_size, SUBSET_SEED, settings.flip, fixed=self.task.fixed_batches)
        return Loader(cache, used, spec.label_map, plan, with_masks, self._pace)

    def keep(self, detector: Detector, notes: Mapping[str, Any]) -> str | None:
        """Write a detector into the task's folder of weights, and return the hash it is named by; None without one."""
        if self.task.weights is None:
            return None
        name = weights_hash(detector.model.state_dict())
        Path(self.task.weights).mkdir(parents=True, exist_ok=True)
        save_detector(Path(self.task.weights) / f"{name}.safetensors", detector, notes)
        return name


class Distillation:
    """The losses that a teacher adds to a student's training step."""

    def __init__(self, distiller: Distiller, teacher: Teacher, student: Detector) -> None:
        self.distiller = distiller
        self.module: nn.Module = distiller
        self._student = student
        inputs = {term.input for term in distiller.formula.terms}
        self._teacher = teacher.asked_for(inputs)

    def __call__(self, batch: Batch, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """Named, weighted distillation losses of one step."""
        taught = self._teacher(batch)
        return dict(self.distiller(answer_to(taught, self._student, batch, inputs, features, dense), taught))


def train_plain(task: Task, folder: Path, on_epoch: OnEpoch | None = None) -> Path:
    """Train the task's detector without a teacher and return its file; resumes from ``folder``."""
    if task.weights is None:
        raise ValueError("A plain training keeps its detector: give the task a folder for weights.")
    torch.set_num_threads(task.threads)
    outcome = Workbench(task).run(Formula(()), inherit=False, replicate=0, folder=folder, on_epoch=on_epoch)
    return Path(task.weights) / f"{outcome.weights}.safetensors"
