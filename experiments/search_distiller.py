"""Which distillation formula suits this teacher and this student?

command:   python experiments/search_distiller.py [--data DIR] [--teacher FILE] [--preset smoke|demo|cpu|gpu]
hardware:  smoke, demo and cpu: two cores; gpu: one or more GPUs
time:      smoke about 30 s, demo under 5 minutes, cpu under 60 minutes
expected:  a folder with the found formula, the distilled student's weights, summary.csv, pictures and report.html

Stop it at any moment (Ctrl-C, SIGTERM, kill -9) and go on with --resume RUN. The method is DetKDS's divide and
conquer (ICML 2024): formulas of each input evolve first, then they are combined. Combining by prediction, the default,
is ours; --conquer evolution is DetKDS's way. Budgets and recipes are ours.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

from options import (
    INTERRUPTED,
    common_options,
    data_options,
    main_of,
    new_folder,
    parsed,
    placement_options,
    positive,
    recorded,
    share,
    source,
)
from pictures import save_student_pictures
from presets import Preset, preset_of
from runs import (
    check_device,
    data_folder,
    for_data,
    run_list,
    save_search,
    say_candidate,
    start_or_resume,
    trained_teacher,
)
from teachers import member_identity, named_teacher, named_teacher_spec

from autodet.detectors import DetectorSpec, load_detector
from autodet.detectors.spec import FAMILIES
from autodet.distill import INPUTS, PUBLISHED, why_incomparable
from autodet.object_store import named
from autodet.results.report import write_report
from autodet.runtime.cluster import check_address, ray_running
from autodet.runtime.tune_search import run_session
from autodet.search import (
    EMPTY,
    AskTell,
    Best,
    Candidate,
    DivideAndConquer,
    Prediction,
    Session,
    flat_evolution,
    random_search,
)
from autodet.training import Task, Workbench

RECORDED = (
    *("preset", "family", "teacher_family", "data", "cache", "teacher", "teacher_size", "student", "start", "seed"),
    *("inputs", "inherit", "normalise", "search", "conquer", "proxy_size", "proxy_epochs", "proxy_rate", "fraction"),
    *("full_fraction", "students", "cpus_per_trial"),
)
STARTING_WEIGHT = 10.0  # of a normalised published formula: tuned, they ended between 5 and 50
EXTENDABLE = ("workers", "gpus_per_trial", "budget_per_input", "weights_budget")


def main(argv: list[str] | None = None) -> int:
    """Check everything, search, train the students, report."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "search-distiller")
    check_address(options.address)
    preset = adjusted(preset_of(options.preset, options.family, options.teacher_family), options)
    preset = preset.placed(options.cpus_per_trial, options.gpus_per_trial)
    check_device(options.preset, preset.device)
    task = full_size_task(preset, options)
    proxy = replace(task, student=task.student.at_size(options.proxy_size)) if options.proxy_size else task
    inputs = chosen_inputs(options.inputs, proxy.student, teacher_spec(preset, task, options))
    workers = options.workers or preset.workers
    config = {
        "script": "search_distiller",
        "options": recorded(options, (*RECORDED, *EXTENDABLE)),
        "search": asdict(preset.search),
        "recipes": {"proxy": asdict(preset.proxy), "full": asdict(preset.full), "teaching": asdict(preset.teaching)},
        "student": str(task.student),
        **({} if options.teacher is None else member_identity(options.teacher)),
    }
    extendable = [*(f"options.{name}" for name in EXTENDABLE), "search.budget_per_input", "search.weights_budget"]
    with start_or_resume(folder, config, extendable) as ledger:
        if options.teacher is not None:
            teacher = named_teacher(options.teacher, task, options.teacher_size, folder)
        else:
            teacher = trained_teacher(preset, task, folder)
        task, proxy = (replace(each, teacher=str(teacher.resolve())) for each in (task, proxy))
        search = make_search(preset, proxy, inputs, options)
        with ray_running(options.address, cpus=workers * preset.threads):
            session = Session(ledger, search, say_candidate(search.budget))
            run_session(session, proxy, folder, workers, gpus_per_trial=preset.gpus)
            ledger.write_views()
            if not session.finished:
                print(f"Not finished. Go on with: --resume {named(folder)}", file=sys.stderr)
                return INTERRUPTED
            found = search.best()
            if found is None:
                raise ValueError(f"No candidate completed; the causes are in {folder / 'summary.csv'}.")
            without = list(search.history.control(options.inherit).values())
            save_search(folder, proxy, found, fmean(without) if without else None)
            print(f"\nFound: {found.formula}\n  AP {found.ap:.4f} over {found.runs} runs of the proxy")
            if not options.students:
                print(f"\nReport: {write_report(folder)}")
                return 0
            students = train_students(found, task, preset, options.inherit, folder / "students", workers)
    if students is None:
        return INTERRUPTED
    save_student_pictures(folder, task, students)
    print(f"\nReport: {write_report(folder)}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed run are the recorded ones, except budgets, workers and address."""
    parser = common_options(__doc__ or "")
    data_options(parser)
    placement_options(parser)
    add = parser.add_argument
    add(
        "--teacher",
        type=source,
        help="a file of train_detector.py, a state dict of torchvision or mmdetection, or of train_teacher_pool.py"
        " POOL, POOL:<member>, POOL:latency_ms<=30 (default: train one with the preset's recipe)",
    )
    add("--teacher-family", choices=FAMILIES, help="of the teacher that is trained (default: the student's)")
    add("--teacher-size", type=positive, metavar="PIXELS", help="shorter side that a state dict was trained at (800)")
    add("--inputs", nargs="+", choices=tuple(INPUTS), help="knowledge inputs (default: all that the pair has)")
    add("--student", help="a detector file, or a DetectorSpec's text, whose structure to use (default: the preset's)")
    add("--inherit", action=argparse.BooleanOptionalAction, default=True, help="start neck and head from the teacher's")
    add(
        "--start",
        type=source,
        help="a detector file that students go on from, in place of fresh weights (--no-inherit)",
    )
    add("--proxy-epochs", type=positive, help="of a candidate's training (default: the preset's)")
    add("--proxy-rate", type=float, help="learning rate of a candidate's training (default: the preset's)")
    add("--fraction", type=share, help="share of the training images for candidates (default: the preset's)")
    add(
        "--normalise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="divide each term by its median over the first steps, so that weights mean the same for all",
    )
    add("--search", choices=("divide", "flat", "random"), default="divide", help="divide and conquer, or a baseline")
    add(
        "--conquer",
        choices=("prediction", "evolution"),
        default="prediction",
        help="how divide and conquer combines the inputs: by a model of what each term adds, or as DetKDS does",
    )
    add("--budget-per-input", type=positive, help="candidates of each knowledge input (default: the preset's)")
    add("--weights-budget", type=positive, help="candidates of the weight phase (default: the preset's)")
    add(
        "--students",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train students on the full schedule with what was found",
    )
    add("--proxy-size", type=positive, help="shorter side of the proxy's images in pixels (default: the student's)")
    add(
        "--full-fraction",
        type=share,
        help="share of the training images for the final students (default: the preset's)",
    )
    return parsed(parser, argv, "search_distiller", RECORDED, EXTENDABLE)


def adjusted(preset: Preset, options: argparse.Namespace) -> Preset:
    """The preset with the budgets that were asked for."""
    search = preset.search
    if options.budget_per_input is not None:
        search = replace(search, budget_per_input=options.budget_per_input)
    if options.weights_budget is not None:
        search = replace(search, weights_budget=options.weights_budget)
    proxy = preset.proxy
    if options.proxy_epochs is not None:
        proxy, checks = replace(proxy, epochs=options.proxy_epochs), ()
        preset = replace(preset, checks=checks)
    if options.proxy_rate is not None:
        proxy = replace(proxy, lr=options.proxy_rate)
    fraction = preset.full_fraction if options.full_fraction is None else options.full_fraction
    part = preset.fraction if options.fraction is None else options.fraction
    return replace(preset, search=search, proxy=proxy, fraction=part, full_fraction=fraction)


def full_size_task(preset: Preset, options: argparse.Namespace) -> Task:
    """How a candidate is trained and judged. The teacher is filled in later: it may have to be trained first."""
    data = data_folder(options, preset)
    return Task(
        data=str(data),
        cache=str(Path(options.cache).resolve()),
        student=for_data(student_spec(options, preset), data),
        start=None if options.start is None else str(options.start.resolve()),
        settings=preset.proxy,
        fraction=preset.fraction,
        checks=preset.checks,
        normalise=options.normalise,
        seed=options.seed,
        device=preset.device,
        threads=preset.threads,
    )


def student_spec(options: argparse.Namespace, preset: Preset) -> DetectorSpec:
    """The preset's student, or the structure of the user's: a text has blanks or tabs, a path to a file has none."""
    student: str | None = options.student
    if options.start is not None:
        if options.inherit or student is not None:
            raise ValueError("--start names the student and its weights: give --no-inherit, and no --student.")
        return load_detector(options.start)[0].spec
    if student is None:
        return preset.student
    return DetectorSpec.parse(student) if len(student.split()) > 1 else load_detector(Path(student))[0].spec


def make_search(preset: Preset, task: Task, inputs: Sequence[str], options: argparse.Namespace) -> AskTell:
    """A search on these inputs; a probe refuses hopeless formulas before any training.

    Random search and flat evolution get the same controls, finals, and total budget as divide and conquer.
    """
    bench = Workbench(task)
    rules = replace(preset.search.rules, inherit=options.inherit)
    given = [published.weighted(options.normalise, STARTING_WEIGHT) for published in PUBLISHED.values()]
    admit = bench.probe(options.inherit)
    settings = replace(preset.search, rules=rules)
    model = Prediction(singles=max(2, settings.budget_per_input // 2)) if options.conquer == "prediction" else None
    divide = DivideAndConquer(inputs, options.seed, settings, admit, given, prediction=model)
    explore = divide.budget - rules.overhead
    if options.search == "random":
        return random_search(inputs, options.seed, explore, rules, admit)
    if options.search == "flat":
        return flat_evolution(inputs, options.seed, explore, preset.search.formulas, rules, admit, given)
    return divide


def teacher_spec(preset: Preset, task: Task, options: argparse.Namespace) -> DetectorSpec:
    """The teacher that will be trained, or the given one, which is read here so that a mistake shows at once."""
    if options.teacher is None:
        return preset.teacher.with_labels(task.student.labels)
    return named_teacher_spec(options.teacher, task.student, options.teacher_size)


def chosen_inputs(wanted: Sequence[str] | None, student: DetectorSpec, teacher: DetectorSpec) -> tuple[str, ...]:
    """The inputs to search: those asked for, or all that the pair can be compared on. Says why others are left out."""
    refused = {name: reason for name in INPUTS if (reason := why_incomparable(name, student, teacher)) is not None}
    impossible = [f"{name}: {refused[name]}" for name in wanted or () if name in refused]
    if impossible:
        raise ValueError(f"This pair cannot be compared on {'; '.join(impossible)}. Leave that out of --inputs.")
    for name, reason in refused.items():
        logging.info("without %s: %s", name, reason)
    return tuple(name for name in INPUTS if name not in refused and (not wanted or name in wanted))


def train_students(
    found: Best, task: Task, preset: Preset, inherit: bool, folder: Path, workers: int
) -> dict[str, Path] | None:
    """Undistilled, inherited and distilled students at the full schedule: arm → detector file. None if interrupted."""
    arms = {"undistilled": Candidate(EMPTY, False), "inherit-only": Candidate(EMPTY, True)}
    arms["found"] = Candidate(found.formula, inherit)
    weights = str((folder / "weights").resolve())
    full = replace(task, settings=preset.full, fraction=preset.full_fraction, checks=(), weights=weights)
    records = run_list([(c, name) for name, c in arms.items()], full, folder, workers, "students", preset.gpus)
    if records is None:
        return None
    for record in records:
        masks = "" if record.mask_ap is None else f", masks {record.mask_ap:.4f}"
        print(f"  {record.group:13} AP {record.ap if record.ap is None else round(record.ap, 4)}{masks}")
    lost = [f"{record.group}: {record.cause}" for record in records if record.weights is None]
    if lost:
        raise ValueError(f"Students failed ({'; '.join(lost)}). Mend the cause, delete {folder} and resume.")
    return {r.group: Path(weights) / f"{r.weights}.safetensors" for r in records if r.weights}


if __name__ == "__main__":
    raise SystemExit(main_of(main))
