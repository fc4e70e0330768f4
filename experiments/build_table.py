"""What is every formula of a small grid worth?

command:   python experiments/build_table.py --run RUN [--epochs 6] [--size 96] [--fraction 0.1] [--grid FILE]
hardware:  as the search that RUN holds (its preset, data, teacher and student are used)
time:      as many trainings of the proxy as the grid has formulas, 440 by default, and --replicated ones again; at
           15 s a training and two workers about an hour
expected:  table.csv in the run's folder, or where --table says, for compare_searchers.py; how far seeds spread AP

The table lets searches be compared in seconds. Formulas are trained in an order that does not depend on what they are;
the replicates are those of the first ones of this order. Stop and go on with --resume FOLDER.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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
from runs import SearchRun, read_search, run_list, start_or_resume

import autodet
from autodet.data import read_dataset
from autodet.detectors import load_detector
from autodet.distill import comparable_inputs
from autodet.ledger import Ledger
from autodet.object_store import named
from autodet.runtime.cluster import ray_running
from autodet.search import Candidate
from autodet.search.grid import Grid, GridInput
from autodet.search.table_file import read_table, write_table
from autodet.search.tabular import Table, by_hash
from autodet.training import Task

RECORDED = ("run", "grid", "epochs", "size", "fraction", "replicates", "seed")
EXTENDABLE = ("workers", "replicated")
REPLICATED = 40
FRESH_SEEDS = 3000  # far from those that the search chose by
PATHS = ("data", "cache", "teacher", "weights")  # of a task: they mean nothing elsewhere

GRID = Grid(
    (
        GridInput(
            "global", ("pearson(nhw)", "softmax(hw, t=4) | kl", "l2", "catt > pool(2) > norm(c) | l1"), (2.0, 20.0)
        ),
        GridInput("fg", ("l2", "pearson(nhw)", "norm(c) | l2"), (2.0, 20.0)),
        GridInput("logits.dense", ("bernoulli | kl", "l2", "softmax(hw) | kl"), (2.0, 20.0)),
    )
)
"""440 formulas. Heavy and light, of the feature map's two parts that differ most and of the dense head."""


def main(argv: list[str] | None = None) -> int:
    """Train the grid, and write the table."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "build-table")
    source = read_search(options.run)
    grid = Grid.from_json(Path(options.grid).read_text()) if options.grid else GRID
    check_inputs(grid, source)
    task = cheaper(source.task, options)
    replicated = REPLICATED if options.replicated is None else options.replicated
    candidates = trainings(grid, source.inherit, replicated, options.replicates)
    config = {"script": "build_table", "options": recorded(options, (*RECORDED, *EXTENDABLE))}
    config["grid"] = json.loads(grid.to_json())
    workers = options.workers or source.preset.workers
    print(f"{grid.count} formulas, {len(candidates)} trainings", file=sys.stderr)
    with (
        start_or_resume(folder, config, [f"options.{name}" for name in EXTENDABLE]),
        ray_running(options.address, cpus=workers * source.preset.threads),
    ):
        records = run_list(
            [(c, "grid") for c in candidates], task, folder / "trainings", workers, "table", source.preset.gpus
        )
    if records is None:
        print(f"Not finished. Go on with: --resume {named(folder)}", file=sys.stderr)
        return INTERRUPTED
    path = options.table or folder / "table.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, records, provenance(source, task, grid))
    print_summary(path, read_table(path))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed build are the recorded ones."""
    parser = common_options(__doc__ or "")
    add = parser.add_argument
    add("--run", type=source, help="a finished run of search_distiller.py")
    add("--grid", type=absolute, help="a grid as JSON (default: the 440 formulas in this script)")
    add("--epochs", type=positive, help="of a training (default: the run's proxy's)")
    add("--size", type=positive, help="shorter side of the images in pixels (default: the run's proxy's)")
    add("--fraction", type=share, help="share of the training images (default: the run's proxy's)")
    add("--replicated", type=int, help=f"formulas that are trained several times (default: {REPLICATED})")
    add("--replicates", type=positive, default=3, help="trainings of each of these (default: 3)")
    add("--table", type=Path, help="where the table goes (default: table.csv in the run's folder)")
    options = parsed(parser, argv, "build_table", RECORDED, EXTENDABLE)
    if options.run is None:
        parser.error("--run RUN is needed: a finished run of search_distiller.py")
    if options.replicated is not None and options.replicated < 0:
        parser.error(f"--replicated {options.replicated}: expected a whole number of at least 0")
    return options


def check_inputs(grid: Grid, source: SearchRun) -> None:
    """ValueError where the run's pair cannot be compared on all of the grid's inputs."""
    known = comparable_inputs(source.task.student, load_detector(Path(str(source.task.teacher)))[0].spec)
    missing = [name for name in grid.names if name not in known]
    if missing:
        raise ValueError(
            f"The pair of {source.folder} cannot be compared on {', '.join(missing)}, only on {', '.join(known)}. "
            "Give a grid of these with --grid."
        )


def cheaper(task: Task, options: argparse.Namespace) -> Task:
    """The run's proxy with the epochs, image size and share of the images that were asked for."""
    epochs = options.epochs or task.settings.epochs
    checks = task.checks if options.epochs is None else (epochs // 2, 3 * epochs // 4)
    return replace(
        task,
        student=task.student.at_size(options.size) if options.size else task.student,
        settings=replace(task.settings, epochs=epochs),
        fraction=options.fraction or task.fraction,
        checks=tuple(sorted({epoch for epoch in checks if 0 < epoch < epochs})),
        seed=FRESH_SEEDS + options.seed,
    )


def trainings(grid: Grid, inherit: bool, replicated: int, replicates: int) -> list[Candidate]:
    """Every formula once, then the first ones again."""
    formulas = by_hash(grid.formulas())
    once = [Candidate(formula, inherit) for formula in formulas]
    return once + [Candidate(f, inherit, number) for number in range(1, replicates) for f in formulas[:replicated]]


def provenance(source: SearchRun, task: Task, grid: Grid) -> dict[str, Any]:
    """What the table was made of. Files by name and hash, since their places mean nothing elsewhere."""
    splits = read_dataset(Path(task.data))
    return {
        "data": Path(task.data).name,
        "data_sha256": {name: splits[name].annotations_hash for name in ("train", task.split)},
        "teacher_sha256": hashlib.sha256(Path(str(task.teacher)).read_bytes()).hexdigest(),
        "preset": Ledger.open(source.folder).config["options"]["preset"],
        "task": {name: value for name, value in json.loads(task.to_json()).items() if name not in PATHS},
        "inherit": source.inherit,
        "grid": json.loads(grid.to_json()),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"autodet": autodet.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "command": command(sys.argv),
    }


def command(words: Sequence[str]) -> str:
    """The command line, paths by their names alone."""
    return " ".join(["python", f"experiments/{Path(words[0]).name}", *(Path(word).name for word in words[1:])])


def print_summary(path: Path, table: Table) -> None:
    """The table's size, its best formulas, and how far seeds spread AP."""
    print(f"\n{path}: {len(table.aps)} formulas, {len(table.rows)} trainings, AP in points (0–100)")
    known = {formula: ap for formula, ap in table.aps.items() if ap is not None}
    for formula in sorted(known, key=known.__getitem__, reverse=True)[:5]:
        print(f"  {100 * known[formula]:6.2f}  {formula}")
    between, within, count = table.spreads()
    print(f"standard deviation between formulas {100 * between:.2f}, of seeds {100 * within:.2f} ({count} formulas)")


if __name__ == "__main__":
    raise SystemExit(main_of(main))
