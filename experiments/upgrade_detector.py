"""Detector in, better and faster detector out: which student, derived from my detector, and taught by whom?

command:   python experiments/upgrade_detector.py [--base FILE --data DIR] [--latency-target 0.6|12ms]
hardware:  smoke, demo and cpu: two cores; gpu: one or more GPUs
time:      smoke about a minute, demo under 5 minutes, cpu about two hours for 200 images
expected:  derived.safetensors and derived.onnx, a table of base and derived detector, report.html

Without options: generated data, and a base detector that is trained on the spot. Stages are a base, a pool of teachers
(train_teacher_pool.py), a distillation formula (search_distiller.py), the joint search, and the report; what --base,
--pool and --formula name is taken as it is. Stop it at any moment (Ctrl-C, kill -9) and go on with --resume RUN. The
method is Joint-DetNAS's (CVPR 2021); what the paper does not publish, budgets and rates among it, is ours.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finishing import finish
from joint_presets import JointPreset, joint_preset_of
from options import INTERRUPTED, common_options, data_options, main_of, new_folder, parsed, positive, recorded
from runs import checked_labels, data_folder, start_or_resume
from upgrading import (
    Stages,
    base_stage,
    formula_stage,
    given_base,
    given_formula,
    pool_identity,
    pool_stage,
    user_cost,
)

from autodet.detectors import DetectorSpec, load_detector
from autodet.detectors.weights import weights_hash
from autodet.distill import Formula
from autodet.joint import Examiner, JointBench, JointTask
from autodet.joint.archive import remove_strays, remove_unneeded
from autodet.ledger import Ledger
from autodet.morphism.actions import actions_text
from autodet.runtime.cluster import check_address, ray_running
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
from autodet.search.joint import COSTS, TEACHERS
from autodet.teachers.pool import TeacherPool
from autodet.training import Task

RECORDED = (
    *("preset", "family", "data", "cache", "base", "base_size", "latency_target", "limit", "pool", "formula"),
    *("normalise", "search", "teachers", "inherit", "formula_rate", "epochs", "cost", "seed"),
)
EXTENDABLE = ("workers", "budget")
SEARCHES = ("joint", "no-op", "pipeline", "random")
RANDOM_ACTIONS = 8  # at most, of a child in a random search, which are all the base's own children


def main(argv: list[str] | None = None) -> int:
    """Check everything, prepare, search, finish."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "upgrade-detector")
    check_address(options.address)
    preset = joint_preset_of(options.preset, options.family)
    data = data_folder(options, preset.preset)
    labels = checked_labels(data)
    given, milliseconds = given_base(options, labels), None if options.cost is None else user_cost(options.cost)
    check(options)
    config = {
        "script": "upgrade_detector",
        "options": recorded(options, (*RECORDED, *EXTENDABLE)),
        "child": preset.child.to_json(),
        **pool_identity(options.pool, labels),
    }
    with start_or_resume(folder, config, [f"options.{name}" for name in EXTENDABLE]) as ledger:
        stages = Stages(folder)
        workers = options.workers or preset.preset.workers
        with ray_running(options.address, cpus=workers * preset.preset.threads):
            base = base_stage(options, preset, given, data, labels, folder, stages)
            pool = None if options.teachers == "none" else pool_stage(options, preset, base, data, folder, stages)
            formula = Formula(()) if pool is None else formula_stage(options, preset, base, pool, data, folder, stages)
            task = joint_task(options, preset, data, base, pool, folder)
            with stages.timed("search"):
                examiner = Examiner(JointBench(task), keep_base(task, base), milliseconds)
                search = make_search(options, preset, task, examiner, formula, pool)
                finished = run_search(ledger, search, task, folder, workers)
            if not finished:
                print(f"Not finished. Go on with: --resume {folder}", file=sys.stderr)
                return INTERRUPTED
        with stages.timed("report"):
            finish(folder, search, task, examiner)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed run are the recorded ones, except budget, workers and address."""
    parser = common_options(__doc__ or "")
    data_options(parser)
    add = parser.add_argument
    add("--base", type=Path, help="the detector: a file of ours or a torchvision state dict (default: train one)")
    add("--base-size", type=positive, metavar="PIXELS", help="shorter side that a state dict was trained at (800)")
    add("--latency-target", default="0.6", help="share of the base's latency, or milliseconds as 12ms (default: 0.6)")
    add("--limit", action="append", default=None, metavar="NAME<=X", help="also macs_g<=X or params_m<=X")
    add("--pool", type=Path, help="of teachers, by train_teacher_pool.py (default: train one)")
    add("--formula", help="what teachers teach by: a formula, or a run of search_distiller.py (default: search one)")
    add(
        "--normalise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="divide each term of the formula by its median over the first steps",
    )
    add("--budget", type=positive, help="children of the search (default: the preset's)")
    add("--epochs", type=positive, help="that a child is trained (default: the preset's)")
    add("--search", choices=SEARCHES, default="joint", help="joint search, or a control at the same budget")
    add("--teachers", choices=TEACHERS, default="searched", help="of the joint search's children, or a control")
    add(
        "--inherit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="children start from their parents' weights; without, as a control, from fresh ones",
    )
    add("--formula-rate", type=float, default=0.0, help="how often a child changes the formula as well (default: 0)")
    add("--cost", metavar="FILE.py:FUNCTION", help="your own measurement: a torchvision model → milliseconds")
    return parsed(parser, argv, "upgrade_detector", RECORDED, EXTENDABLE)


def check(options: argparse.Namespace) -> None:
    """Find mistakes that would show hours later."""
    limits(options, base_ms=1.0)
    given_formula(options)
    if options.teachers == "none" and options.search in ("pipeline", "random"):
        raise ValueError(f"--search {options.search} has teachers of its own: leave --teachers out.")
    if not 0 <= options.formula_rate <= 1:
        raise ValueError(f"--formula-rate {options.formula_rate}: expected a share from 0 to 1.")


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
    quiet = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return JointTask(task, None if pool is None else str(pool), quiet=quiet)


def keep_base(task: JointTask, base: Path) -> str:
    """Put the base among the weights that children inherit from; its hash."""
    detector, _ = load_detector(base)
    hash = weights_hash(detector.model.state_dict())
    path = task.weights_file(hash)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base.read_bytes())
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
    phases = {
        "joint": joint_phases(budget),
        "no-op": (Phase("no-op", budget, ()),),
        "pipeline": pipeline_phases(budget),
        "random": random_phases(budget),
    }[options.search]
    if options.teachers != "searched" and options.search in ("joint", "no-op"):
        phases = tuple(replace(phase, teachers=options.teachers) for phase in phases)
    settings = JointSettings(
        phases=phases,
        epochs=task.task.settings.epochs,
        limits=limits(options, examiner.base_ms),
        steps=preset.steps_for(spec),
        most_actions=RANDOM_ACTIONS if options.search == "random" else JointSettings.most_actions,
        formula=options.formula_rate,
        inherit=options.inherit,
    )
    cost = examiner.base_cost()
    base = Student(spec, (), None, examiner.base, None, options.seed, cost, 0)
    space = None if pool is None else TeacherPool.open(pool).space
    inputs = [term.input for term in formula.terms]
    formulas = GRAMMAR.whole(inputs, (), 2) if options.formula_rate else None
    return JointSearch(base, examiner, settings, options.seed, formula, space, formulas)


def limits(options: argparse.Namespace, base_ms: float) -> dict[str, float]:
    """What a derived detector may cost at most, by the names of ``RelativeCost``."""
    text = str(options.latency_target).strip()
    try:
        target = float(text.removesuffix("ms").removesuffix("%"))
        found = {"latency_ratio": target / base_ms if text.endswith("ms") else target / (100 if "%" in text else 1)}
        for each in options.limit or ():
            name, _, value = each.partition("<=")
            found[name.strip()] = float(value)
    except ValueError:
        raise ValueError(
            f"Expected --latency-target as 0.6, 60% or 12ms and --limit as macs_g<=1.5, found {text} {options.limit}."
        ) from None
    if unknown := [name for name in found if name not in COSTS]:
        raise ValueError(f"--limit {unknown[0]}: expected one of {', '.join(COSTS)}.")
    if not found["latency_ratio"] > 0:
        raise ValueError(f"--latency-target {text}: expected a number above 0.")
    return found


def run_search(ledger: Ledger, search: JointSearch, task: JointTask, folder: Path, workers: int) -> bool:
    """Run the search's children; False if interrupted."""
    session = Session(ledger, search, told_of(search, Path(str(task.task.weights))))
    remove_strays(Path(str(task.task.weights)), search)
    run_session(session, task, folder, workers, gpus_per_trial=float(task.task.device == "cuda"))
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
            "none within the limits yet"
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


if __name__ == "__main__":
    raise SystemExit(main_of(main))
