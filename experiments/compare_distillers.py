"""Is the found formula better than the published ones, at the same schedule and over several seeds?

command:   python experiments/compare_distillers.py --run RUN [--split test] [--seeds 5] [--transfer OTHER [OTHER ...]]
hardware:  as the search that RUN holds (its preset, data, teacher and student are used)
time:      with preset cpu about 20 minutes to tune the published formulas' weights, 20 to 30 to compare
expected:  a table of arms: mean AP, difference to inherit-only with a 95 % interval over paired seeds; report.html

First the weight of each published formula is tuned with the search's own proxy, on the validation split, with as many
evaluations as the search gave to each of its terms (--tune 0 keeps the published ones). Then every arm is trained on
the full schedule with the same seeds, and measured on the split asked for. Stop and go on with --resume FOLDER.

--transfer adds an arm for each other finished search: its formula, at the weights it was found with, on this pair and
data. Does what was found for one pair help another?
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from options import (
    INTERRUPTED,
    absolute,
    common_options,
    main_of,
    new_folder,
    parsed,
    positive,
    recorded,
    share,
    source,
)
from runs import SearchRun, full_task, read_search, run_list, start_or_resume
from transfer import transferred

from autodet.distill import PUBLISHED, Formula
from autodet.distill.grammar import WEIGHTS
from autodet.ledger import Ledger
from autodet.object_store import named
from autodet.records import Record
from autodet.results.frame import mask_columns, paired_differences, read_run
from autodet.results.report import write_report
from autodet.runtime.cluster import ray_running
from autodet.search import EMPTY, Candidate
from autodet.working_copy import read_path

RECORDED = ("run", "rivals", "formula", "transfer", "tune", "split", "fraction", "seed")
EXTENDABLE = ("workers", "seeds")
BASELINE = "inherit-only"
FOUND = "found"
FRESH_SEEDS = 1000  # far from those that the search chose by


def main(argv: list[str] | None = None) -> int:
    """Tune the rivals, compare all arms, report."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "compare-distillers")
    source = read_search(options.run)
    found = Formula.parse(options.formula) if options.formula else source.found
    config = {"script": "compare_distillers", "options": recorded(options, (*RECORDED, *EXTENDABLE))}
    moved = transferred([read_path(folder) for folder in options.transfer], source)
    config |= {"found": str(found), "transferred": {arm: str(formula) for arm, formula in moved.items()}}
    extendable = [f"options.{name}" for name in EXTENDABLE]
    workers = options.workers or source.preset.workers
    with (
        start_or_resume(folder, config, extendable),
        ray_running(options.address, cpus=workers * source.preset.threads),
    ):
        tuned = tune_rivals(options, source, folder / "tune", workers)
        arms = None if tuned is None else tuned | {FOUND: found} | moved
        finished = arms is not None and compare(options, source, folder / "compare", arms, workers)
    if not finished:
        print(f"Not finished. Go on with: --resume {named(folder)}", file=sys.stderr)
        return INTERRUPTED
    print_table(folder / "compare")
    print(f"Report: {write_report(folder / 'compare')}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed comparison are the recorded ones."""
    parser = common_options(__doc__ or "")
    add = parser.add_argument
    add("--run", type=source, help="a finished run of search_distiller.py")
    add("--formula", help="compare this formula instead of the one that the run found")
    other = "formulas of these finished searches become arms too"
    add("--transfer", nargs="+", type=absolute, default=[], metavar="RUN", help=other)
    add("--rivals", nargs="*", default=["detkds", "fitnets", "pkd", "cwd"], choices=sorted(PUBLISHED), help="published")
    add("--tune", type=int, help="evaluations for each rival's weight (default: as many as the run gave to each input)")
    add("--seeds", type=positive, help="paired seeds (default: the preset's)")
    add("--split", choices=("val", "test"), default="test", help="where AP is measured (default: test)")
    add("--fraction", type=share, help="share of the training images (default: the run's full schedule)")
    options = parsed(parser, argv, "compare_distillers", RECORDED, EXTENDABLE)
    if options.run is None:
        parser.error("--run RUN is needed: a finished run of search_distiller.py")
    return options


def tune_rivals(
    options: argparse.Namespace, source: SearchRun, folder: Path, workers: int
) -> dict[str, Formula] | None:
    """Each rival with the weight that is best by the mean over replicates of the proxy. None if interrupted."""
    evaluations = source.evaluations_per_input if options.tune is None else options.tune
    replicates = math.ceil(evaluations / len(WEIGHTS))
    plain = {name: PUBLISHED[name].weighted(source.task.normalise) for name in options.rivals}
    if replicates < 1:
        return plain
    variants = {name: [scaled(formula, weight) for weight in WEIGHTS] for name, formula in plain.items()}
    candidates = [
        (Candidate(formula, source.inherit, replicate), name)
        for replicate in range(replicates)
        for name, formulas in variants.items()
        for formula in formulas
    ]
    records = run_list(candidates, source.task, folder, workers, "tune", source.preset.gpus)
    if records is None:
        return None
    best = {name: max(formulas, key=lambda f: mean_ap(records, f)) for name, formulas in variants.items()}
    for name, formula in best.items():
        print(f"tuned {name}: {formula}  (AP {mean_ap(records, formula):.4f} on val, proxy, {replicates} seeds)")
    return best


def compare(
    options: argparse.Namespace, source: SearchRun, folder: Path, formulas: Mapping[str, Formula], workers: int
) -> bool:
    """Train and measure every arm with every seed; False if interrupted."""
    task = full_task(source, seed=FRESH_SEEDS + options.seed, split=options.split, fraction=options.fraction)
    arms = {"undistilled": (EMPTY, False), BASELINE: (EMPTY, True)} | {
        name: (formula, source.inherit) for name, formula in formulas.items()
    }
    arms = without_twins(arms)
    seeds = range(options.seeds or source.preset.seeds)
    # Seed by seed, so that an interrupted comparison holds complete pairs.
    candidates = [(Candidate(f, inherit, seed), name) for seed in seeds for name, (f, inherit) in arms.items()]
    return run_list(candidates, task, folder, workers, "compare", source.preset.gpus) is not None


def without_twins(arms: Mapping[str, tuple[Formula, bool]]) -> dict[str, tuple[Formula, bool]]:
    """The arms without those that would repeat an earlier one: a search may find a published formula."""
    first: dict[tuple[str, bool], str] = {}
    for name, (formula, inherit) in arms.items():
        twin = first.setdefault((formula.key, inherit), name)
        if twin != name:
            print(f"{name} is the same formula as {twin} and is not trained twice: {formula}")
    return {name: arms[name] for name in first.values()}


def scaled(formula: Formula, factor: float) -> Formula:
    """All weights times a factor."""
    return Formula(tuple(replace(term, weight=term.weight * factor) for term in formula.terms))


def mean_ap(records: Sequence[Record], formula: Formula) -> float:
    """Mean AP of a formula's completed runs, 0 without any."""
    values = [r.ap for r in records if r.formula == str(formula) and r.ap is not None]
    return fmean(values) if values else 0.0


def print_table(folder: Path) -> None:
    """Arms by their paired difference to inherit-only, in AP points (0–100); the APs of masks where there are any."""
    table = paired_differences(read_run(folder), BASELINE)
    masks = mask_columns(table)
    width = max(14, *table["arm"].str.len())
    heading = "".join(f" {name:>6}" for name in ("AP", *("masks" for _ in masks)))
    print(f"\n{'arm':{width}}{heading} {'runs':>5}   difference to {BASELINE}, 95 % interval")
    for row in table.to_dict("records"):
        values: dict[str, Any] = {str(key): value for key, value in row.items()}
        difference, low, high = (100 * values[name] for name in ("difference", "low", "high"))
        text = "" if values["arm"] == BASELINE else f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"
        means = "".join(f" {100 * values[name]:6.2f}" for name in ("mean", *masks))
        print(f"{values['arm']:{width}}{means} {values['runs']:5}   {text}")
    for name, formula in {r.group: r.formula for r in Ledger.open(folder).write_views()}.items():
        print(f"  {name}: {formula}")


if __name__ == "__main__":
    raise SystemExit(main_of(main))
