"""The joint search of an upgrade: from options to a search, run to its end with a line a child."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from joint_presets import JointPreset
from presets import Preset
from runs import processor

from autodet.atomic import atomic_write_bytes
from autodet.detectors import DetectorSpec, load_detector, save_detector
from autodet.detectors.weights import weights_hash
from autodet.distill import Formula
from autodet.joint import Examiner, JointBench, JointTask
from autodet.joint.archive import remove_strays, remove_unneeded
from autodet.ledger import Ledger
from autodet.morphism.actions import actions_text
from autodet.pareto import Point, front
from autodet.records import records_from
from autodet.runtime.tune_search import run_session
from autodet.search import (
    GRAMMAR,
    Ask,
    JointSearch,
    JointSettings,
    Phase,
    Session,
    Student,
    joint_phases,
    pipeline_phases,
    random_phases,
)
from autodet.search.joint import every_term
from autodet.teachers import Member
from autodet.teachers.pool import TeacherPool, read_members
from autodet.training import Task

PHASES: dict[str, Callable[[int], tuple[Phase, ...]]] = {
    "joint": joint_phases,
    "no-op": lambda budget: (Phase("no-op", budget, ()),),
    "pipeline": pipeline_phases,
    "random": random_phases,
}
SEARCHES = tuple(PHASES)
LIMITS = ("macs_g", "params_m")
RANDOM_ACTIONS = 8  # at most, of a child in a random search, which are all the base's own children


def joint_task(
    options: argparse.Namespace, preset: JointPreset, data: Path, base: Path, pool: Path | None, folder: Path
) -> JointTask:
    """How children are trained and judged."""
    settings = preset.child if options.epochs is None else replace(preset.child, epochs=options.epochs)
    task = Task(
        data=str(data),
        cache=str(options.cache.resolve()),
        student=load_detector(base)[0].spec,
        settings=settings,
        fixed_batches=False,
        normalise=options.normalise,
        weights=str((folder / "weights").resolve()),
        seed=options.seed,
        device=preset.preset.device,
        threads=preset.preset.threads,
    )
    return JointTask(task, None if pool is None else str(pool), quiet=locks_name(folder))


def locks_name(folder: Path) -> str:
    """What a run's locks are named by on every machine (see ``Quiet``)."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def pool_students(folder: Path, count: int, task: JointTask, examiner: Examiner) -> list[Student]:
    """The most accurate of the pool's measured members that none is better than at fewer MACs.

    Their lineages begin with the pool's own epochs.
    """
    if not count:
        return []
    bench, pool, table = JointBench(task), TeacherPool.open(folder), read_members(folder)
    epochs = int(pool.notes["recipe"]["epochs"])
    points = front(Point(row, *map(float, table.loc[row, ["macs_g", "ap"]])) for row in table.index)
    found = []
    for point in sorted(points, key=lambda point: -point.ap)[:count]:
        member = Member.parse(str(table.loc[point.id, "member"]))
        loader = bench.bench(pool.spec_of(member)).train_loader
        taken = pool.take(member, loader, Path(task.task.cache), task.task.device)
        hash = weights_hash(taken.model.state_dict())
        save_detector(task.weights_file(hash), taken, {"member": str(member), "pool": pool.hash})
        found.append(Student(taken.spec, (), None, hash, None, 0, examiner.cost(taken), epochs))
    return found


def keep_base(task: JointTask, base: Path) -> str:
    """Put the base among the weights that children inherit from; its hash."""
    detector, _ = load_detector(base)
    hash = weights_hash(detector.model.state_dict())
    path = task.weights_file(hash)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, base.read_bytes())
    return hash


def make_search(
    options: argparse.Namespace,
    preset: JointPreset,
    task: JointTask,
    examiner: Examiner,
    formula: Formula,
    pool: Path | None,
) -> JointSearch:
    """The joint search, or a control with as many children of as many epochs."""
    spec: DetectorSpec = task.task.student
    budget = options.budget or preset.budget
    phases = PHASES[options.search](budget)
    if options.search in ("joint", "no-op"):
        if not formula.terms:  # who teach by nothing are none
            phases = tuple(replace(phase, teachers="none") for phase in phases)
        elif options.teachers != "searched":
            phases = tuple(replace(phase, teachers=options.teachers) for phase in phases)
    settings = JointSettings(
        phases=phases,
        epochs=task.task.settings.epochs,
        limits=limits(options, examiner.base_ms),
        aim="cost" if options.latency_target is None and not options.limit else "accuracy",
        cost=options.front,
        steps=preset.steps_for(spec),
        most_actions=RANDOM_ACTIONS if options.search == "random" else JointSettings.most_actions,
        formula=options.formula_rate if formula.terms else 0.0,  # there is nothing to change
        inherit=options.inherit,
    )
    cost = examiner.base_cost()
    base = Student(spec, (), None, examiner.base, None, options.seed, cost, 0)
    space = None if pool is None else TeacherPool.open(pool).space
    inputs = [term.input for term in formula.terms]
    formulas = GRAMMAR.whole(inputs, (), 2) if settings.formula else None
    founders = [] if pool is None else pool_students(pool, options.founders, task, examiner)
    comparable = every_term if pool is None else JointBench(task).comparable
    return JointSearch(base, examiner, settings, options.seed, formula, space, formulas, founders, comparable)


def limits(options: argparse.Namespace, base_ms: float) -> dict[str, float]:
    """What a derived detector may cost at most, by the names of ``RelativeCost``."""
    target = options.latency_target
    found = {"latency_ratio": 1.0 if target is None else _ratio(str(target), base_ms)}
    for each in options.limit or ():
        name, _, value = (part.strip() for part in each.partition("<="))
        if value and name not in LIMITS:
            raise ValueError(f"--limit {each}: expected {' or '.join(LIMITS)}; of latency it is --latency-target.")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"Expected --limit as macs_g<=1.5, found {each}.") from None
        if not (math.isfinite(found[name]) and found[name] > 0):
            raise ValueError(f"--limit {each}: expected a number above 0.")
    return found


def _ratio(target: str, base_ms: float) -> float:
    """``0.6``, ``60%`` or ``12ms`` → the share of the base's latency."""
    target = target.strip()
    try:
        value = float(target.removesuffix("ms").removesuffix("%"))
    except ValueError:
        raise ValueError(f"Expected --latency-target as 0.6, 60% or 12ms, found {target}.") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"--latency-target {target}: expected a number above 0.")
    if target.endswith("ms"):
        return value / base_ms
    share = value / 100 if target.endswith("%") else value
    if share > 1:
        raise ValueError(f"--latency-target {target}: expected a share of at most 1, as 0.6 or 60%, or ms, as 12ms.")
    return share


def recorded_base_ms(ledger: Ledger) -> float | None:
    """What the base took when the search began, so that a target in milliseconds means the same in every sitting."""
    base = next((record.student for record in records_from(ledger.events()) if record.student is not None), None)
    return None if base is None else float(base["cost"]["latency_ms"])


def warn_of_another_machine(ledger: Ledger) -> None:
    """Say so where a run goes on on a machine of another kind than the one that its candidates were timed on."""
    before, now = ledger.about["about"].get("processor"), processor()
    if before is not None and before != now:
        logging.warning(
            "Latencies of this run were measured on %s, those to come will be on %s: as shares of the base's they need "
            "not agree, and a target in ms means the former. Go on where it began, or start anew here.",
            *(before, now),
        )


def run_search(ledger: Ledger, search: JointSearch, task: JointTask, folder: Path, preset: Preset) -> bool:
    """Run the search's children; False if interrupted."""
    session = Session(ledger, search, told_of(search, Path(str(task.task.weights))))
    remove_strays(Path(str(task.task.weights)), search)
    run_session(session, task, folder, preset.workers, gpus_per_trial=preset.gpus)
    ledger.write_views()
    return session.finished


def told_of(search: JointSearch, weights: Path) -> Callable[[Ask, Mapping[str, Any]], None]:
    """After each child: a line for the user, and weights that nothing needs any more removed."""
    started, begun = time.monotonic(), [0]

    def told(ask: Ask, payload: Mapping[str, Any]) -> None:
        begun[0] += 1
        remove_unneeded(weights, search)
        student, best = search.student(ask.id), search.best()
        left = (search.budget - len(search.ends)) * (time.monotonic() - started) / begun[0] / 60
        ap = "failed" if payload["ap"] is None else f"{payload['ap']:.3f}"
        found = (
            f"none {'within the limits' if search.settings.aim == 'accuracy' else 'as accurate as the base'} yet"
            if best is None
            else f"best {best.ap:.3f} at {search.student(best.id).cost.latency_ratio:.0%} of the base's latency"
        )
        logging.info(
            "[%d of %d] AP %s at %.0f%%, %s; %s; about %.0f min left%s",
            *(len(search.ends), search.budget, ap, 100 * student.cost.latency_ratio),
            *(
                actions_text(student.actions),
                found,
                left,
                f"  ({payload['cause']})" if payload["status"] == "failed" else "",
            ),
        )

    return told
