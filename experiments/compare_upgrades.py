"""What does each part of the joint search bring, at as many children of as many epochs?

command:   python experiments/compare_upgrades.py --base FILE --pool POOL --formula TEXT --data DIR [--arms joint …]
hardware:  as upgrade_detector.py
time:      arms times seeds times budget of a child's training; with preset cpu about 4 minutes a run of 18 children
expected:  a row an arm: best AP on val within the target, AP on test and latency of what is handed back, the front's
           hypervolume; differences to the first arm, paired by seed, with 95 % intervals

A child whose weights its actions keep is trained gently, at a fifth of the learning rate, since more only unsettles
them: that is every child of no-op, and those of the pipeline's distillation.

Every run is one of upgrade_detector.py in a folder of its own, ARM-SEED, with a report of its own. Base, pool and
formula are given, so that arms differ in nothing but the search. Stop and go on with --resume FOLDER; a finished
comparison can be resumed with more arms and seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import upgrade_detector
from finishing import TABLE
from joint_presets import joint_preset_of
from options import (
    INTERRUPTED,
    common_options,
    data_options,
    main_of,
    new_folder,
    parsed,
    placement_arguments,
    placement_options,
    positive,
    recorded,
    share,
    source,
)
from runs import start_or_resume

from autodet.atomic import atomic_write_bytes
from autodet.ledger import Ledger, is_run
from autodet.records import records_from
from autodet.results.intervals import mean_interval
from autodet.results.lineage import evaluated, hypervolume_progress
from autodet.runtime.cluster import ray_running

FROM_BASE = ["--founders", "0"]
ARMS = {  # controls have no founders by themselves
    "joint": FROM_BASE,
    "founders": [],  # as many as the preset has
    "pipeline": ["--search", "pipeline"],
    "random": ["--search", "random"],
    "no-op": ["--search", "no-op"],
    "no-teacher": ["--teachers", "none"],
    "largest-teacher": ["--teachers", "largest"],
    "random-teacher": ["--teachers", "random"],
    "fresh-weights": ["--no-inherit"],
    "changing-formula": ["--formula-rate", "0.3", *FROM_BASE],
}
UNTAUGHT = "no-teacher"
VALUES = {"val": "AP val", "test": "AP", "latency": "latency %", "volume": "hypervolume"}
RECORDED = (
    *("preset", "family", "data", "cache", "base", "base_size", "pool", "formula", "latency_target", "budget", "seed"),
    "cpus_per_trial",
)
EXTENDABLE = ("workers", "gpus_per_trial", "arms", "seeds")


def main(argv: list[str] | None = None) -> int:
    """Run what has not finished yet, then compare."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "compare-upgrades")
    config = {"script": "compare_upgrades", "options": recorded(options, (*RECORDED, *EXTENDABLE))}
    preset = joint_preset_of(options.preset, options.family).preset
    seeds = range(options.seed, options.seed + (options.seeds or 3))
    with start_or_resume(folder, config, [f"options.{name}" for name in EXTENDABLE]):
        workers = options.workers or preset.workers
        with ray_running(options.address, cpus=workers * preset.threads):
            for seed in seeds:  # all arms of a seed first, so that an unfinished comparison is a paired one
                for arm in options.arms or ARMS:
                    if run_once(folder / f"{arm}-{seed}", arm, seed, options):
                        return INTERRUPTED
    table = pd.DataFrame(
        [row_of(folder / f"{arm}-{seed}", arm, seed) for arm in options.arms or ARMS for seed in seeds]
    )
    atomic_write_bytes(folder / "arms.csv", table.to_csv(index=False).encode())
    print_table(table)
    print(f"\n{folder / 'arms.csv'}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed comparison are the recorded ones, except arms, seeds and workers."""
    parser = common_options(__doc__ or "")
    data_options(parser)
    placement_options(parser)
    add = parser.add_argument
    add("--base", type=source, help="the detector, as for upgrade_detector.py")
    add("--base-size", type=positive, metavar="PIXELS", help="shorter side that a state dict was trained at (800)")
    add("--pool", type=source, help="of teachers, by train_teacher_pool.py")
    add("--formula", help="what teachers teach by: a formula, or a run of search_distiller.py")
    add("--latency-target", type=share, default=0.75, help="share of the base's latency (default: 0.75)")
    add("--budget", type=positive, default=18, help="children of every run (default: 18)")
    add("--seeds", type=positive, help="runs of every arm, the first with --seed (default: 3)")
    add("--arms", nargs="+", choices=ARMS, help="the first is what others are compared with (default: all)")
    options = parsed(parser, argv, "compare_upgrades", RECORDED, EXTENDABLE)
    if None in (options.base, options.pool, options.formula):
        parser.error("--base, --pool and --formula are needed: arms must differ in nothing but the search")
    return options


def run_once(folder: Path, arm: str, seed: int, options: argparse.Namespace) -> int:
    """Start or go on with a run of upgrade_detector.py, unless it has finished; its exit code."""
    if (folder / TABLE).exists():
        return 0
    logging.info("\n=== %s, seed %d ===", arm, seed)
    return upgrade_detector.main(arguments(folder, arm, seed, options))


def arguments(folder: Path, arm: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The command line of an arm's run."""
    placement = placement_arguments(options)
    if is_run(folder):
        return ["--resume", str(folder), "--address", options.address, *placement]
    names = ["preset", "family", "data", "cache", "base", "base_size", "latency_target", "budget", "address"]
    if arm != UNTAUGHT:
        names += ["pool", "formula"]
    given = {"--" + name.replace("_", "-"): getattr(options, name) for name in names}
    found = [str(part) for name, value in given.items() if value is not None for part in (name, value)]
    return [*found, "--seed", str(seed), "--output", str(folder), *ARMS[arm], *placement]


def row_of(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """What a finished run found. AP in points; latency in % of the base's; hypervolume as in the run's report.

    AP val is that of the best within the target; missing where no candidate was within it.
    """
    final = json.loads((folder / TABLE).read_text())
    records = records_from(Ledger.open(folder).events())
    within = [100 * ap for cost, ap, _ in evaluated(records) if cost <= final["target"]]
    derived, base = final["rows"][-1], final["rows"][0]
    return {
        "arm": arm,
        "seed": seed,
        VALUES["val"]: max(within, default=None),
        VALUES["test"]: derived["AP"],
        "AP gain": derived["AP"] - base["AP"],
        VALUES["latency"]: 100 * derived["of base"],
        VALUES["volume"]: float(hypervolume_progress(records)["hypervolume"].iloc[-1]),
        "failed": sum(record.status == "failed" for record in records),
        "split": final["split"],
    }


def print_table(table: pd.DataFrame) -> None:
    """Means over seeds, and differences to the first arm, with 95 % t-intervals."""
    arms, seeds = list(dict.fromkeys(table["arm"])), table["seed"].nunique()
    split = "/".join(dict.fromkeys(table["split"]))
    print(f"\n{seeds} seeds; AP val: of the best within the target; AP, latency: on {split}, of what is handed back")
    by_arm = {arm: rows.set_index("seed") for arm, rows in table.groupby("arm")}
    rows = [
        {"arm": arm, "within": f"{by_arm[arm][VALUES['val']].notna().sum()} of {seeds}"}
        | {name: _interval(by_arm[arm][name], ".3f" if name == VALUES["volume"] else ".1f") for name in VALUES.values()}
        for arm in arms
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    print(f"\ndifference to {arms[0]}, paired by seed")
    rows = [
        {"arm": arm}
        | {
            name: _interval(by_arm[arm][name] - by_arm[arms[0]][name], "+.3f" if name == VALUES["volume"] else "+.1f")
            for name in VALUES.values()
        }
        for arm in arms[1:]
    ]
    print(pd.DataFrame(rows).to_string(index=False))


def _interval(values: pd.Series[float], form: str) -> str:
    known = values.dropna().tolist()
    if not known:
        return "–"
    mean, low, high = (format(value, form) for value in mean_interval(known))
    return mean if len(known) == 1 else f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    raise SystemExit(main_of(main))
