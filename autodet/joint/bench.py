"""Trains and judges the candidates of a joint search: weights from the parent, a teacher from the pool."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from autodet.data import read_resized
from autodet.detectors import Detector, DetectorSpec, build, load_detector
from autodet.detectors.weights import WeightsError, load_weights, metadata_of
from autodet.distill.formula import Formula
from autodet.distill.inputs import comparable_inputs, why_incomparable
from autodet.distill.teacher import Teacher
from autodet.evaluation import Quiet
from autodet.morphism.actions import are_exact, derive, keep_weights
from autodet.search import Candidate, Student
from autodet.teachers import Member, TeacherPool
from autodet.teachers.elastic import Take, copies_of
from autodet.teachers.pool import WEIGHTS, read_manifest
from autodet.teachers.statistics import measure_statistics
from autodet.training import Outcome, Task, Workbench
from autodet.training.task import OnEpoch, Pace

Fetch = Callable[[str, Path], Take]  # a hash and the file that has it → copies of its tensors
TEACHERS_AT_HAND = 4
TIMED = 4  # images; one alone may have an odd shape, or next to nothing on it
GENTLE = 0.2  # of the recipe's learning rate, for a child that keeps all weights: more only unsettles them [ours]
LOCKS = Path("/tmp")  # of every process of a machine, whatever its own folder for temporary files is


@dataclass(frozen=True)
class JointTask:
    """All that a worker needs to evaluate candidates of a joint search.

    task: the data, the recipe of a child's training, the folder of weights, and the base (its student). pool: a folder
    that this machine can read, None for a search without teachers. quiet: name of the run's locks (see ``Quiet``), None
    where nothing is timed meanwhile.
    """

    task: Task
    pool: str | None = None
    quiet: str | None = None

    @property
    def threads(self) -> int:
        """CPU threads of a training."""
        return self.task.threads

    def weights_file(self, hash: str) -> Path:
        """Where a candidate's weights are."""
        return Path(str(self.task.weights)) / f"{hash}.safetensors"

    def locks(self) -> Quiet | None:
        """The run's locks on this machine."""
        return None if self.quiet is None else Quiet(LOCKS / f"autodet-quiet-{self.quiet}")

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"task": json.loads(self.task.to_json()), "pool": self.pool, "quiet": self.quiet})

    @classmethod
    def from_json(cls, text: str) -> JointTask:
        """The inverse of ``to_json``."""
        values = json.loads(text)
        return cls(Task.from_json(json.dumps(values["task"])), values["pool"], values["quiet"])


def from_file(hash: str, path: Path) -> Take:
    """A ``Fetch`` that reads the file into this process."""
    return copies_of(load_weights(path)[0])


class JointBench:
    """A joint task's data, pool and latest teachers, loaded once a process. fetch: where weights are had from."""

    def __init__(self, task: JointTask, fetch: Fetch = from_file) -> None:
        self.task, self._fetch = task, fetch
        quiet = task.locks()
        self._pace: Pace = nullcontext if quiet is None else quiet.working
        self._benches: dict[tuple[object, ...], Workbench] = {}
        self._pool: TeacherPool | None = None
        self._teachers: OrderedDict[Member, Teacher] = OrderedDict()

    def seed_of(self, candidate: Candidate) -> int:
        """What decides a candidate's random choices."""
        return _student(candidate).draw

    def evaluate(self, candidate: Candidate, folder: Path | None, on_epoch: OnEpoch | None = None) -> Outcome:
        """Train a child from its parent's weights, measure it and keep it; the base is only measured.

        One whose weights were changed is trained at the recipe's learning rate, others at `GENTLE` times it.
        Resumes from ``folder`` as ``Workbench.train`` does.
        """
        student = _student(candidate)
        bench = self.bench(student.spec)
        if student.parent is None:
            return self._measured(student, bench)
        rate = GENTLE if candidate.inherit and keep_weights(student.actions) else 1.0
        with self._pace():
            child = self.child(candidate)
        loader = bench.train_loader.dealt(student.draw)  # every child sees other batches than its parent did
        if candidate.inherit and not are_exact(student.actions):
            measure_statistics(child, loader)
        teacher = self._teacher(student.teacher, student.spec) if candidate.formula.terms else None
        extra = bench.distillation(candidate.formula, child, teacher)
        notes = {"lineage_epochs": student.epochs}
        return bench.train(child, loader, student.draw, extra, notes, folder, on_epoch, rate)

    def child(self, candidate: Candidate) -> Detector:
        """The untrained child: its parent's weights after the actions, or fresh ones where it inherits none."""
        student = _student(candidate)
        torch.manual_seed(student.draw)
        child = build(student.spec)
        if candidate.inherit:
            spec, state = self.derived(student)
            if spec != student.spec:
                raise WeightsError(f"The actions lead to {spec}, the search recorded {student.spec}: other weights?")
            child.model.load_state_dict(state)
        child.model.to(self.task.task.device)
        return child

    def derived(self, student: Student) -> tuple[DetectorSpec, dict[str, Tensor]]:
        """Spec and weights of a parent's child."""
        spec, weights = self.parent(student.weights)
        return derive(student.actions, spec, weights, Random(student.draw))

    def parent(self, hash: str) -> tuple[DetectorSpec, dict[str, Tensor]]:
        """Spec and weights of a candidate that was kept; WeightsError where its file is gone."""
        path = self.task.weights_file(hash)
        spec = DetectorSpec.from_json((metadata_of(path) or {})["spec"])
        take = self._fetch(hash, path)
        with torch.device("meta"):
            names = list(build(spec).model.state_dict())
        return spec, {name: take(name, ()) for name in names}

    def bench(self, spec: DetectorSpec) -> Workbench:
        """Data for images of a detector's size, with its numbers of the categories."""
        key = (spec.min_size, spec.max_size, spec.labels)
        if key not in self._benches:
            task = replace(self.task.task, student=spec, teacher=None)
            self._benches[key] = Workbench(task, self._pace)
        return self._benches[key]

    def images(self, spec: DetectorSpec) -> list[Tensor]:
        """Images to time a detector on, on its device: a few of the split, at the detector's size.

        They are read from their files: what a child of another image size costs is asked more often than such a child
        is trained, and decoding all images of a data set at that size takes long, and room on the disk.
        """
        every = self.bench(self.task.task.student).eval_set.images
        chosen = every[:: max(1, len(every) // TIMED)][:TIMED]
        found = [read_resized(image.path, spec.min_size, spec.max_size) for image in chosen]
        return [image.to(self.task.task.device).to(torch.float32) / 255 for image in found]

    def _measured(self, student: Student, bench: Workbench) -> Outcome:
        started = time.perf_counter()
        detector, _ = load_detector(self.task.weights_file(student.weights))
        detector.model.to(self.task.task.device)
        metrics = bench.measure(detector)
        return Outcome(metrics, 0, time.perf_counter() - started, student.weights, {"lineage_epochs": student.epochs})

    def _teacher(self, member: Member | None, student: DetectorSpec) -> Teacher | None:
        """A member as a teacher; the latest few stay at hand."""
        if member is None:
            return None
        if member not in self._teachers:
            pool, task = self.pool(), self.task.task
            loader = self.bench(pool.spec_of(member)).train_loader
            detector = pool.take(member, loader, Path(task.cache), task.device)
            self._teachers[member] = Teacher(detector, comparable_inputs(student, detector.spec))
        self._teachers.move_to_end(member)
        if len(self._teachers) > TEACHERS_AT_HAND:
            self._teachers.popitem(last=False)
        return self._teachers[member]

    def comparable(self, formula: Formula, student: DetectorSpec, teacher: Member) -> Formula:
        """The terms that a student can be compared on with a member, which may see images at another size."""
        spec = self.pool().spec_of(teacher)
        return Formula(tuple(term for term in formula.terms if why_incomparable(term.input, student, spec) is None))

    def pool(self) -> TeacherPool:
        """The pool of teachers."""
        if self._pool is None:
            folder = Path(str(self.task.pool))
            manifest = read_manifest(folder)
            self._pool = TeacherPool.of_manifest(manifest, self._fetch(manifest["weights"], folder / WEIGHTS))
        return self._pool


def _student(candidate: Candidate) -> Student:
    if candidate.student is None:
        raise ValueError(f"expected a candidate of a joint search, found {candidate}")
    return candidate.student
