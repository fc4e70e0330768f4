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
import sys
from pathlib import Path

from finishing import finish
from joint_presets import joint_preset_of
from joint_runs import (
    SEARCHES,
    joint_task,
    keep_base,
    limits,
    make_search,
    recorded_base_ms,
    run_search,
    warn_of_another_machine,
)
from options import (
    INTERRUPTED,
    absolute,
    common_options,
    data_options,
    main_of,
    new_folder,
    parsed,
    placement_options,
    positive,
    recorded,
    source,
)
from runs import check_device, checked_labels, data_folder, start_or_resume
from upgrading import (
    BASE,
    Stages,
    base_stage,
    formula_stage,
    given_base,
    given_formula,
    pool_identity,
    pool_stage,
    usable_formula,
    user_cost,
)

from autodet.detectors import Detector, load_detector
from autodet.distill import Formula
from autodet.joint import Examiner, JointBench
from autodet.joint.examine import MOST_ROUNDS
from autodet.ledger import Ledger
from autodet.object_store import named
from autodet.runtime.cluster import check_address, ray_running
from autodet.search.joint_settings import COSTS, TEACHERS
from autodet.working_copy import fetch_changed

RECORDED = (
    *("preset", "family", "data", "cache", "base", "base_size", "latency_target", "limit", "pool", "formula"),
    *("normalise", "search", "teachers", "founders", "inherit", "formula_rate", "epochs", "front", "cost", "seed"),
    "cpus_per_trial",
)
EXTENDABLE = ("workers", "gpus_per_trial", "budget")


def main(argv: list[str] | None = None) -> int:
    """Check everything, prepare, search, finish."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "upgrade-detector")
    check_address(options.address)
    check(options)
    data = data_folder(options, joint_preset_of(options.preset, options.family).preset)
    labels = checked_labels(data)
    fetch_changed(folder / BASE)
    given = None if (folder / BASE).exists() else given_base(options, labels)
    preset = joint_preset_of(options.preset, family_of(folder, given, options.family)).placed(options)
    milliseconds = None if options.cost is None else user_cost(options.cost)
    config = {
        "script": "upgrade_detector",
        "options": recorded(options, (*RECORDED, *EXTENDABLE)),
        "child": preset.child.to_json(),
        **pool_identity(options.pool, labels, options.founders, data),
    }
    with start_or_resume(folder, config, [f"options.{name}" for name in EXTENDABLE]) as ledger:
        stages = Stages(folder)
        if milliseconds is None:
            warn_of_another_machine(ledger)
        with ray_running(options.address, cpus=preset.preset.workers * preset.preset.threads):
            base = base_stage(options, preset, given, data, labels, folder, stages)
            pool = None if options.teachers == "none" else pool_stage(options, preset, base, data, folder, stages)
            formula = Formula(())
            if pool is not None:
                formula = formula_stage(options, preset, base, pool, data, folder, stages)
                formula = usable_formula(formula, base, pool)
            task = joint_task(options, preset, data, base, pool, folder)
            with stages.timed("search"):
                base_ms = recorded_base_ms(ledger)
                rounds = min(MOST_ROUNDS, preset.rounds)
                examiner = Examiner(JointBench(task), keep_base(task, base), milliseconds, base_ms, rounds)
                search = make_search(options, preset, task, examiner, formula, pool)
                finished = run_search(ledger, search, task, folder, preset.preset)
            if not finished:
                print(f"Not finished. Go on with: --resume {named(folder)}", file=sys.stderr)
                return INTERRUPTED
    with stages.timed("report"):
        base_epochs = None if options.base else preset.preset.teaching.epochs
        finish(folder, search, task, examiner, preset.rounds, base_epochs)
    if (locks := task.locks()) is not None:
        locks.remove()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed run are the recorded ones, except budget, workers and address."""
    parser = common_options(__doc__ or "")
    data_options(parser)
    placement_options(parser)
    add = parser.add_argument
    add("--base", type=source, help="a detector file, or a state dict of torchvision or mmdetection (default: train)")
    add("--base-size", type=positive, metavar="PIXELS", help="shorter side that a state dict was trained at (800)")
    add(
        "--latency-target",
        help="share of the base's latency as 0.6, or milliseconds as 12ms: the most accurate detector within it is"
        " handed back (default: none, and the fastest one that is as accurate on val as the base)",
    )
    add(
        "--limit",
        action="append",
        default=None,
        metavar="NAME<=X",
        help="macs_g<=X or params_m<=X; as with a target, the most accurate detector within it is handed back",
    )
    add("--pool", type=source, help="of teachers, by train_teacher_pool.py (default: train one)")
    add(
        "--formula",
        type=formula_text,
        help="what teachers teach by: a formula, or a run of search_distiller.py (default: search one)",
    )
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
        "--founders",
        type=count,
        help="members of the pool that children may descend from as well as from the base (default: the preset's; 0 in"
        " a control)",
    )
    add(
        "--inherit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="children start from their parents' weights; without, as a control, from fresh ones",
    )
    add("--formula-rate", type=float, default=0.0, help="how often a child changes the formula as well (default: 0)")
    add("--front", choices=COSTS, default="latency_ratio", help="the cost of the front (default: latency_ratio)")
    add(
        "--cost",
        type=absolute,
        metavar="FILE.py:FUNCTION",
        help="your own measurement: a torchvision model → milliseconds",
    )
    return parsed(parser, argv, "upgrade_detector", RECORDED, EXTENDABLE)


def formula_text(named: str) -> str:
    """The text of a formula, wherever it stands, as an option's type; what is none stays, for ``check`` to refuse."""
    try:
        return str(given_formula(argparse.Namespace(formula=named)))
    except (ValueError, OSError):
        return named


def count(text: str) -> int:
    """A whole number of at least 0, as an option's type."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text}")
    return value


def family_of(folder: Path, given: Detector | None, named: str) -> str:
    """The base's family, whose recipes are used: of the run's own base, of a given one, or of one to be trained."""
    if (folder / BASE).exists():
        return load_detector(folder / BASE)[0].spec.family
    return named if given is None else given.spec.family


def check(options: argparse.Namespace) -> None:
    """Find mistakes that would show hours later.

    The number of founders is recorded, in place of the preset's.
    """
    limits(options, base_ms=1.0)
    given_formula(options)
    if options.founders is None:
        ours = options.search == "joint" and options.teachers == "searched" and options.inherit
        options.founders = joint_preset_of(options.preset, options.family).founders if ours else 0
    check_device(options.preset, joint_preset_of(options.preset, options.family).preset.device)
    if options.teachers != "searched" and options.search in ("pipeline", "random"):
        raise ValueError(f"--search {options.search} has teachers of its own: leave --teachers out.")
    if options.teachers == "none" and (options.pool or options.founders or options.formula or options.formula_rate):
        raise ValueError("--teachers none needs no --pool, --founders, --formula or --formula-rate: leave them out.")
    if options.search == "pipeline" and options.resume is not None and options.budget is not None:
        before = Ledger.open(options.resume).config["options"]["budget"]
        if options.budget != (before or joint_preset_of(options.preset, options.family).budget):
            raise ValueError(f"--budget {options.budget}: a pipeline's phases cannot be extended from {before}.")
    if options.search == "pipeline" and options.budget is not None and options.budget < 3:
        raise ValueError(f"--budget {options.budget}: a pipeline has three phases, of a child each at least.")
    if not 0 <= options.formula_rate <= 1:
        raise ValueError(f"--formula-rate {options.formula_rate}: expected a share from 0 to 1.")


if __name__ == "__main__":
    raise SystemExit(main_of(main))
