"""What an upgrade needs before it can search: a base detector, a pool of teachers, a distillation formula."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import cast

import search_distiller
import torch
import train_teacher_pool
from joint_presets import JointPreset
from options import placement_arguments
from pool_presets import pool_preset_of
from runs import all_threads, read_search, say_epoch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from autodet.atomic import atomic_write_json
from autodet.data import read_dataset
from autodet.detectors import (
    Detector,
    DetectorSpec,
    build,
    is_detector_file,
    load_any_detector,
    load_detector,
    save_detector,
)
from autodet.detectors.spec import COCO_LABELS
from autodet.distill import Formula, why_incomparable
from autodet.joint.examine import UserCost
from autodet.ledger import is_run
from autodet.morphism.labels import keep_labels
from autodet.morphism.morph import Morph
from autodet.morphism.settings import thaw_norms
from autodet.object_store import named
from autodet.teachers import Member, TeacherPool
from autodet.teachers.pool import MANIFEST, MEMBERS, PoolError, read_manifest, read_members
from autodet.training import Task, Workbench, train_plain
from autodet.working_copy import move, read_path

BASE = "base.safetensors"
STAGES = "stages.json"
COCO_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by COCO's raw ids
TICK = 5.0  # seconds; of a killed sitting no more are lost
HARDLY = 0.01  # AP of a base that is probably not read as it was trained
LONGEST_NAME = 200  # characters; a formula may have more than a file's name can
Labels = Sequence[tuple[int, str]]


class Stages:
    """Seconds that each stage of a run took, over all its sittings."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STAGES
        self.seconds: dict[str, float] = json.loads(self._path.read_text()) if self._path.exists() else {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Announce a stage and add its time, also where it is interrupted or killed."""
        logging.info("\n— %s —", name)
        started, before, ended = time.monotonic(), self.seconds.get(name, 0.0), threading.Event()

        def note() -> None:
            self.seconds[name] = round(before + time.monotonic() - started, 1)
            atomic_write_json(self._path, self.seconds)

        def keep_noting() -> None:
            while not ended.wait(TICK):
                note()

        clock = threading.Thread(target=keep_noting, daemon=True)
        clock.start()
        try:
            yield
        finally:
            ended.set()
            clock.join()
            note()


def given_base(options: argparse.Namespace, labels: Labels) -> Detector | None:
    """The user's detector for the data's categories, checked before anything starts; None where one will be trained."""
    if options.base is None:
        return None
    if options.data is None:
        raise ValueError(f"--base {options.base} without --data: name the folder of the images that it is for.")
    if options.base_size is not None and is_detector_file(options.base):
        raise ValueError(f"--base-size {options.base_size}: --base {options.base} says its size itself, leave it out.")
    detector = load_any_detector(options.base, labels, options.base_size)
    known = {id: COCO_NAMES[id] if (id, name) in COCO_LABELS else name for id, name in detector.spec.labels}
    for id, name in labels:
        if known.get(id, "").lower() != name.lower():
            raise ValueError(
                f"--base {options.base} knows the labels {list(known.items())[:5]}, the data has {(id, name)}. "
                "Fine-tune it on the data first: train_detector.py, or your own training; where names alone differ, "
                "call the data's categories as the base does."
            )
    if detector.spec.labels != tuple(labels):
        detector = morphed(detector, keep_labels(detector.spec, detector.model.state_dict(), labels))
    return thawed(detector)


def base_stage(
    options: argparse.Namespace,
    preset: JointPreset,
    given: Detector | None,
    data: Path,
    labels: Labels,
    folder: Path,
    stages: Stages,
) -> Path:
    """The base as a file of ours whose norms learn: the user's, or one trained here with the preset's recipe."""
    path = folder / BASE
    if path.exists():
        return path
    task = Task(
        data=str(data),
        cache=str(options.cache.resolve()),
        student=preset.preset.teacher.with_labels(labels) if given is None else given.spec,
        settings=preset.preset.teaching,
        fixed_batches=False,
        weights=str((folder / "base").resolve()),
        seed=options.seed,
        device=preset.preset.device,
        threads=all_threads(preset.preset),
    )
    if given is not None:
        with stages.timed("base"):
            say_accuracy(given, task)
        save_detector(path, given, {"source": str(options.base)})
        return path
    with stages.timed("base"):
        move(train_plain(task, folder / "base", say_epoch("base")), path)
        if task.device == "cuda":
            torch.cuda.empty_cache()  # of which pool and trials need a share
    return path


def say_accuracy(given: Detector, task: Task) -> None:
    """What a given base reaches on this data, before hours are spent on it."""
    given.model.to(task.device)
    metrics = Workbench(task).measure(given)
    ap, masks = metrics.ap or 0.0, "" if metrics.mask_ap is None else f", masks {metrics.mask_ap:.3f},"
    given.model.to("cpu")
    logging.info("AP %.3f%s on %s", ap, masks, task.split)
    if ap < HARDLY:
        logging.warning(
            "The base finds hardly anything here. If it should: was it trained at --base-size %d, with labels in the "
            "order of the data's category ids, and with torchvision's own anchors? A model that was built otherwise "
            "becomes a file with all of that by autodet.adapt and save_detector.",
            given.spec.min_size,
        )


def thawed(detector: Detector) -> Detector:
    """The same detections from norms that can learn, where they were frozen."""
    if detector.spec.norm != "frozen":
        return detector
    return morphed(detector, thaw_norms(detector.spec, detector.model.state_dict(), Random(0)))


def morphed(detector: Detector, morph: Morph) -> Detector:
    """What becomes of a detector, in evaluation mode."""
    child = build(morph.spec)
    child.model.load_state_dict(morph.weights(detector.model.state_dict()))
    child.model.eval()
    return child


def pool_identity(named: Path | None, labels: Labels, founders: int, data: Path) -> dict[str, str]:
    """What pins a given pool, checked before anything starts; nothing where one will be trained."""
    if named is None:
        return {}
    manifest = read_manifest(_pool_folder(named))
    if founders:
        read_members(_pool_folder(named))
    theirs = [tuple(label) for label in manifest["spec"]["labels"]]
    if theirs != list(labels):
        raise PoolError(f"--pool {named} knows the labels {theirs[:5]}, the data has {list(labels)[:5]}.")
    seen = manifest.get("notes", {}).get("data")
    if founders and seen is not None and seen != read_dataset(data)["train"].annotations_hash:
        logging.warning(
            "--pool %s was trained on other images than this data's train split. If images of val or test are among "
            "them, its members look better than they are: give --founders 0, or train a pool on this split.",
            named,
        )
    return {"pool": str(manifest["weights"])}


def pool_stage(
    options: argparse.Namespace, preset: JointPreset, base: Path, data: Path, folder: Path, stages: Stages
) -> Path:
    """The folder of the given pool, or of one trained here for images of the base's size."""
    if options.pool is not None:
        return _pool_folder(options.pool).resolve()
    run = folder / "teachers"
    if not (run / "pool" / MEMBERS).exists():
        with stages.timed("pool of teachers"):
            arguments = pool_arguments(options, preset, base, data, run)
            _checked(train_teacher_pool.main(arguments), folder)
    return (run / "pool").resolve()


def pool_arguments(options: argparse.Namespace, preset: JointPreset, base: Path, data: Path, run: Path) -> list[str]:
    """The command line of train_teacher_pool.py for a base."""
    placement = pool_placement(options)
    if is_run(run):
        return ["--resume", str(run), "--address", options.address, *placement]
    spec = load_detector(base)[0].spec
    pool = pool_preset_of(options.preset, spec.family)
    space = replace(pool.space, sizes=preset.pool_sizes(spec))
    found = ["--preset", options.preset, "--family", spec.family, "--data", str(data), "--cache", str(options.cache)]
    found += ["--seed", str(options.seed), "--output", str(run), "--address", options.address, *placement]
    found += ["--space", str(space), "--members", str(preset.members)]
    found += ["--max-size", str(spec.at_size(space.largest.size).max_size)]
    return found if preset.schedule is None else [*found, "--schedule", preset.schedule]


def pool_placement(options: argparse.Namespace) -> list[str]:
    """What the pool's workers take. On a cluster as many as there are, since machines may be lost; a whole GPU each."""
    placement = argparse.Namespace(**(vars(options) | {"gpus_per_trial": None}))
    if options.workers is not None and options.address == "auto":
        placement.workers = f"1-{options.workers}"
    return placement_arguments(placement)


def formula_stage(
    options: argparse.Namespace,
    preset: JointPreset,
    base: Path,
    pool: Path,
    data: Path,
    folder: Path,
    stages: Stages,
) -> Formula:
    """The given formula, or one searched here for students that go on from the base, as the search's children do.

    The teacher is the pool's largest member for images of the base's size. No formula at all where none was better than
    going on without a teacher.
    """
    if (given := given_formula(options)) is not None:
        return given
    run = folder / "distiller"
    if not (run / "found.json").exists():
        with stages.timed("distillation formula"):
            spec = load_detector(base)[0].spec
            inputs = searched_inputs(preset, spec, TeacherPool.open(pool).spec_of(largest_for(spec, pool)))
            arguments = ["--resume", str(run), "--address", options.address]
            if not is_run(run):
                arguments = ["--preset", options.preset, "--family", spec.family, "--data", str(data)]
                arguments += ["--cache", str(options.cache), "--seed", str(options.seed), "--output", str(run)]
                arguments += ["--address", options.address, "--teacher", f"{pool}:{largest_for(spec, pool)}"]
                arguments += ["--start", str(base)]
                arguments += ["--no-inherit", "--proxy-epochs", str(preset.child.epochs)]
                arguments += ["--proxy-rate", str(preset.child.lr), "--fraction", str(preset.fraction)]
                arguments += ["--inputs", *inputs, "--budget-per-input", str(preset.per_input)]
                arguments += ["--weights-budget", str(preset.weights), "--no-students"]
                arguments += ["--normalise" if options.normalise else "--no-normalise"]
            _checked(search_distiller.main([*arguments, *placement_arguments(options)]), folder)
    found = json.loads((run / "found.json").read_text())
    if found["control"] is not None and found["ap"] <= found["control"]:
        logging.info(
            "No formula was better than going on without a teacher (AP %.3f, best formula %.3f): children get none.",
            *(found["control"], found["ap"]),
        )
        return Formula(())
    return Formula.parse(found["formula"])


def searched_inputs(preset: JointPreset, base: DetectorSpec, teacher: DetectorSpec) -> list[str]:
    """The preset's knowledge inputs that the base can be compared on with a teacher; ValueError where there is none."""
    reasons = {name: why_incomparable(name, base, teacher) for name in preset.inputs_of(base.family)}
    found = [name for name, reason in reasons.items() if reason is None]
    if not found:
        raise ValueError(f"No formula can be searched for the base and the pool: {reasons}. Name one by --formula.")
    return found


def largest_for(base: DetectorSpec, pool: Path) -> Member:
    """A pool's largest member, for images of the base's size where the pool has such."""
    return TeacherPool.open(pool).space.at_size(base.min_size).largest


def usable_formula(formula: Formula, base: Path, pool: Path) -> Formula:
    """The terms that the base can be compared on with the pool; ValueError where there were terms and none is."""
    student = load_detector(base)[0].spec
    teacher = TeacherPool.open(pool).spec_of(largest_for(student, pool))
    reasons = {term: why_incomparable(term.input, student, teacher) for term in formula.terms}
    for term, reason in reasons.items():
        if reason is not None:
            logging.info("Left out of the formula: %s: %s", term.input, reason)
    found = Formula(tuple(term for term, reason in reasons.items() if reason is None))
    if formula.terms and not found.terms:
        raise ValueError(f"--formula {formula}: nothing in it can be compared between the base and the pool.")
    return found


def given_formula(options: argparse.Namespace) -> Formula | None:
    """The user's formula: a text, a file with one, or what a run of search_distiller.py found."""
    if options.formula is None:
        return None
    place = read_path(options.formula) if len(options.formula) < LONGEST_NAME else None
    if place is None or not place.exists():
        return Formula.parse(options.formula)
    return read_search(place).found if place.is_dir() else Formula.parse(place.read_text().strip())


def user_cost(named: str) -> UserCost:
    """``FILE.py:FUNCTION`` → the function."""
    file, _, name = named.rpartition(":")
    if not (Path(file).is_file() and file.endswith(".py")):
        raise ValueError(f"--cost {named}: expected FILE.py:FUNCTION, and there is no Python file {file!r}.")
    description = importlib.util.spec_from_file_location("user_cost", file)
    assert description is not None and description.loader is not None
    module = importlib.util.module_from_spec(description)
    try:
        description.loader.exec_module(module)
    except Exception as error:  # the user's own code, of which anything may come
        raise ValueError(f"--cost {named}: {file} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--cost {named}: {file} has no function {name!r}.")
    return cast(UserCost, getattr(module, name))


def _pool_folder(named: Path) -> Path:
    return named / "pool" if (named / "pool" / MANIFEST).exists() else named


def _checked(code: int, folder: Path) -> None:
    if code:
        raise KeyboardInterrupt(f"go on with --resume {named(folder)}")
