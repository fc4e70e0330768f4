"""Runs: starting or resuming one, the data and teacher it needs, lists of trainings, and finished searches."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from presets import Preset, preset_of

import autodet
from autodet.atomic import atomic_write_json
from autodet.data import DatasetError, read_dataset, write_shapes
from autodet.detectors import DetectorSpec
from autodet.distill import Formula
from autodet.ledger import Ledger, localised, portable
from autodet.object_store import named
from autodet.records import Record
from autodet.runtime.tune_search import run_session
from autodet.search import Ask, Best, Candidate, FixedList, Session
from autodet.teachers.task import PoolTask
from autodet.training import Task, train_plain

CPU_FACTS = Path("/proc/cpuinfo")


def start_or_resume(folder: Path, config: Mapping[str, Any], extendable: Sequence[str] = ()) -> Ledger:
    """The ledger of a run, opened for writing."""
    if (folder / "config.json").exists():
        return Ledger.resume(folder, config, extendable)
    facts = {"command": sys.argv, "autodet": autodet.__version__, "torch": torch.__version__, "host": platform.node()}
    return Ledger.create(folder, config, facts | {"processor": processor()})


def processor() -> str:
    """The model of this machine's CPU, and of its GPU."""
    lines = CPU_FACTS.read_text().splitlines() if CPU_FACTS.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([*models[:1], *gpus]) or platform.machine()


def check_device(name: str, device: str) -> None:
    """ValueError where a preset needs a GPU and this machine has none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--preset {name} needs a GPU on this machine as well, where detectors are timed.")


def data_folder(options: argparse.Namespace, preset: Preset) -> Path:
    """The user's data, or generated shapes of the preset's number and size."""
    if options.data is not None:
        return Path(options.data).resolve()
    if getattr(options, "address", "local") == "auto":
        logging.warning("Generated data lie in --cache: on several machines give --data, or a --cache that all share.")
    train, val, test = preset.shapes
    size = (preset.student.max_size, preset.student.min_size)
    name = f"shapes-{train}-{val}-{test}-{size[0]}x{size[1]}"
    return write_shapes(Path(options.cache).resolve() / name, train, val, test, size=size, seed=0)


def checked_labels(data: Path) -> tuple[tuple[int, str], ...]:
    """Check the whole data set; the detector's labels, which are its categories in order of their ids."""
    return tuple((category.id, category.name) for category in read_dataset(data)["train"].categories)


def for_data(spec: DetectorSpec, data: Path) -> DetectorSpec:
    """A detector for the classes of a data set, which is checked as a whole; DatasetError where it learns masks and
    the data lacks some."""
    train = read_dataset(data)["train"]
    if spec.masks and train.mask_problem is not None:
        raise DatasetError(train.mask_problem)
    return spec.with_labels([(category.id, category.name) for category in train.categories])


def trained_teacher(preset: Preset, task: Task, folder: Path) -> Path:
    """The file of a teacher trained here with the preset's recipe on all cores, once."""
    finished = sorted((folder / "teacher").glob("*.safetensors"))
    return (
        finished[0]
        if finished
        else train_plain(teacher_task(preset, task, folder), folder / "teacher", say_epoch("teacher"))
    )


def teacher_task(preset: Preset, task: Task, folder: Path) -> Task:
    """The training of the preset's teacher on the whole of a task's data."""
    return Task(
        data=task.data,
        cache=task.cache,
        student=preset.teacher.with_labels(task.student.labels),
        settings=preset.teaching,
        fixed_batches=False,
        weights=str((folder / "teacher").resolve()),
        seed=task.seed,
        device=preset.device,
        threads=all_threads(preset),
    )


@dataclass(frozen=True)
class SearchRun:
    """What other scripts take from a run of search_distiller.py. found: its formula, where the search has finished."""

    folder: Path
    preset: Preset
    task: Task  # the proxy's, with the teacher
    student: DetectorSpec  # at its own image size, which the proxy's may not be
    inherit: bool
    full_fraction: float
    evaluations_per_input: int
    found: Formula


def save_search(folder: Path, task: Task, found: Best, control: float | None) -> None:
    """task.json and found.json, from which ``read_search`` rebuilds. control: mean AP without distillation."""
    atomic_write_json(folder / "task.json", portable(json.loads(task.to_json()), folder))
    values = {"formula": str(found.formula), "ap": found.ap, "runs": found.runs, "control": control}
    atomic_write_json(folder / "found.json", values)


def all_threads(preset: Preset) -> int:
    """What a training that runs alone on this machine uses: of all that run side by side, as many as there are here."""
    return max(1, min(preset.workers * preset.threads, os.cpu_count() or 1))


def read_search(folder: Path) -> SearchRun:
    """A finished run of search_distiller.py; ValueError where it is another's, or has not finished."""
    config = Ledger.open(folder).config
    if config.get("script") != "search_distiller":
        raise ValueError(f"{folder} is a run of {config.get('script')}, expected one of search_distiller.")
    if not (folder / "found.json").exists():
        raise ValueError(f"{folder} has not finished. Finish it first: search_distiller.py --resume {named(folder)}")
    options = config["options"]
    preset = preset_of(options["preset"], options["family"], options["teacher_family"])
    preset = preset.placed(options.get("cpus_per_trial"), options.get("gpus_per_trial"))
    fraction = options["full_fraction"]
    return SearchRun(
        folder=folder,
        preset=preset,
        task=Task.from_json(json.dumps(localised(json.loads((folder / "task.json").read_text()), folder))),
        student=DetectorSpec.parse(config["student"]),
        inherit=bool(options["inherit"]),
        full_fraction=preset.full_fraction if fraction is None else float(fraction),
        evaluations_per_input=int(config["search"]["budget_per_input"]),
        found=Formula.parse(json.loads((folder / "found.json").read_text())["formula"]),
    )


def pool_task_of(run: Path) -> PoolTask:
    """The training of a pool; ValueError where the run is another script's."""
    config = Ledger.open(run).config
    if config.get("script") != "train_teacher_pool":
        raise ValueError(f"{run} is a run of {config.get('script')}, expected one of train_teacher_pool.")
    return PoolTask.from_json(json.dumps(config["task"]))


def full_task(
    source: SearchRun, seed: int, split: Literal["val", "test"] = "val", fraction: float | None = None
) -> Task:
    """The full schedule of a search's preset, for the same pair on the same data."""
    fraction = source.full_fraction if fraction is None else fraction
    task = replace(source.task, student=source.student, settings=source.preset.full, checks=())
    return replace(task, fraction=fraction, split=split, seed=seed)


def run_list(
    candidates: Sequence[tuple[Candidate, str]], task: Task, folder: Path, workers: int, phase: str, gpus: float
) -> list[Record] | None:
    """Train a list of (candidate, arm) as a run of its own inside another's folder; None if interrupted.

    Starts or resumes; Ray must be running. Each training's record is in ``folder``'s ledger. gpus: that each takes.
    """
    arms = [[arm, candidate.to_json()] for candidate, arm in candidates]
    config = {"script": phase, "task": json.loads(task.to_json()), "arms": arms}
    with start_or_resume(folder, config, extendable=("arms",)) as ledger:
        session = Session(ledger, FixedList(candidates, phase), say_candidate(len(candidates)))
        run_session(session, task, folder, workers, gpus_per_trial=gpus)
        return ledger.write_views() if session.finished else None


def say_candidate(budget: int) -> Callable[[Ask, Mapping[str, Any]], None]:
    """One line a finished candidate."""

    def say(ask: Ask, told: Mapping[str, Any]) -> None:
        ap = "–" if told["ap"] is None else f"{told['ap']:.3f}"
        masks = (told.get("metrics") or {}).get("mask_ap")
        ap += "" if masks is None else f", masks {masks:.3f}"
        cause = f"  ({told['cause']})" if told["status"] == "failed" else ""
        place = ask.phase if ask.phase == ask.group else f"{ask.phase}/{ask.group}"
        text = (ask.id + 1, budget, place, told["status"], ap, ask.candidate.formula, cause)
        logging.info("[%d of ≤%d] %s %s  AP %s  %s%s", *text)

    return say


def say_epoch(name: str) -> Callable[[Any, float | None], None]:
    """A line an epoch."""

    def say(epoch: Any, ap: float | None) -> None:
        losses = " ".join(f"{key.removeprefix('loss_')} {value:.3f}" for key, value in epoch.losses.items())
        measured = "" if ap is None else f"  AP {ap:.3f}"
        logging.info("%s epoch %d: %s  %.1f images/s%s", name, epoch.number, losses, epoch.images_per_second, measured)

    return say
