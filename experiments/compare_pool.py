"""Is a pool's member as good as the same detector trained alone for as many epochs?

command:   python experiments/compare_pool.py --run RUN [--members 12] [--split test]
hardware:  as the training that RUN holds (its preset, data and recipe are used)
time:      members times epochs of plain training; with preset cpu about an hour
expected:  a table of members: AP in the pool and alone, their gap; mean gap and Kendall's τ with 95 % intervals

RUN is a finished run of train_teacher_pool.py. Members are a spread of those that it measured. Stop and go on with
--resume FOLDER.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from options import common_options, main_of, new_folder, parsed, positive, recorded
from runs import pool_task_of, start_or_resume

from autodet.atomic import atomic_write_bytes
from autodet.detectors import load_detector
from autodet.results.intervals import kendall, mean_interval
from autodet.results.pool_plots import draw_against_alone, save_picture
from autodet.runtime.cluster import ray_running
from autodet.runtime.plain_training import train_side_by_side
from autodet.teachers import Member
from autodet.teachers.pool import PoolError, TeacherPool, read_members
from autodet.training import Workbench

RECORDED = ("run", "members", "split", "seed")
EXTENDABLE = ("workers",)
RESAMPLES = 2000  # of the bootstrap over members


def main(argv: list[str] | None = None) -> int:
    """Train members alone, measure both, print."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "compare-pool")
    pool, task = TeacherPool.open(options.run / "pool"), pool_task_of(options.run)
    members = spread(read_members(options.run / "pool"), options.members)
    benches = {m.size: Workbench(replace(task.task, student=pool.spec_of(m), split=options.split)) for m in members}
    config = {"script": "compare_pool", "options": recorded(options, (*RECORDED, *EXTENDABLE))}
    config["members"] = [str(member) for member in members]
    with start_or_resume(folder, config, [f"options.{name}" for name in EXTENDABLE]):
        alone = {
            f"{index:02d}": replace(task.task, student=pool.spec_of(member), seed=task.task.seed + options.seed)
            for index, member in enumerate(members)
        }
        workers = options.workers or 2
        with ray_running(options.address, cpus=workers * task.task.threads):
            files = train_side_by_side(alone, folder / "alone", float(task.task.device == "cuda"))
        table = measured(pool, benches, dict(zip(members, files.values(), strict=True)))
    atomic_write_bytes(folder / "members.csv", table.to_csv(index=False).encode())
    save_picture(folder / "members.png", draw_against_alone(table))
    print_table(table, options.split)
    print(f"\n{folder / 'members.csv'}\n{folder / 'members.png'}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed comparison are the recorded ones."""
    parser = common_options(__doc__ or "")
    add = parser.add_argument
    add("--run", type=Path, help="a finished run of train_teacher_pool.py")
    add("--members", type=positive, default=12, help="how many are also trained alone (default: 12)")
    add("--split", choices=("val", "test"), default="test", help="where AP is measured (default: test)")
    options = parsed(parser, argv, "compare_pool", RECORDED, EXTENDABLE)
    if options.run is None:
        parser.error("--run RUN is needed: a finished run of train_teacher_pool.py")
    return options


def spread(measured: pd.DataFrame, count: int) -> list[Member]:
    """Members at even steps of the table, which is ordered by parameters, the smallest and the largest included."""
    if count > len(measured) or count < 2:
        raise PoolError(f"--members {count}: the pool has {len(measured)} measured members; expected 2 to that many.")
    rows = np.linspace(0, len(measured) - 1, count).round().astype(int)
    return [Member.parse(str(text)) for text in measured["member"].iloc[rows]]


def measured(pool: TeacherPool, benches: Mapping[int, Workbench], alone: Mapping[Member, Path]) -> pd.DataFrame:
    """A row a member: AP (0–1) in the pool and alone, on the benches' split. benches: by input size."""
    rows = []
    for member, file in alone.items():
        bench, task = benches[member.size], benches[member.size].task
        taken = pool.take(member, bench.train_loader, Path(task.cache), task.device)
        detector, _ = load_detector(file)
        detector.model.to(task.device)
        rows.append((str(member), bench.measure(taken).ap or 0.0, bench.measure(detector).ap or 0.0))
        logging.info("%s  AP %.4f in the pool, %.4f alone", *rows[-1])
    table = pd.DataFrame(rows, columns=["member", "pool", "alone"])
    table["gap"] = table["alone"] - table["pool"]
    return table


def print_table(table: pd.DataFrame, split: str) -> None:
    """The rows, the mean gap with its t-interval, and Kendall's τ with a bootstrap interval over members."""
    points = table.assign(**{name: (100 * table[name]).round(1) for name in ("pool", "alone", "gap")})
    print(f"AP on {split}, points\n{points.to_string(index=False)}")
    mean, low, high = mean_interval([100 * gap for gap in table["gap"]])
    print(f"mean gap (alone minus pool): {mean:+.2f} [{low:+.2f}, {high:+.2f}] points")
    rng = np.random.default_rng(0)
    draws = [table.iloc[rng.integers(len(table), size=len(table))] for _ in range(RESAMPLES)]
    taus = np.array([kendall(draw["pool"].tolist(), draw["alone"].tolist()) for draw in draws])
    low, high = np.percentile(taus[np.isfinite(taus)], (2.5, 97.5)) if np.isfinite(taus).any() else (np.nan, np.nan)
    print(f"Kendall's τ: {kendall(table['pool'].tolist(), table['alone'].tolist()):.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    raise SystemExit(main_of(main))
