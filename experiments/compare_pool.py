"""Is a pool's member as good as the same detector trained alone for as many epochs?

command:   python experiments/compare_pool.py --run RUN [--members 12] [--seeds 2] [--split test] [--also RUN ...]
hardware:  as the training that RUN holds (its preset, data and recipe are used)
time:      members times seeds times epochs of plain training; with preset cpu about half an hour a seed
expected:  a table of members: AP in the pool and alone, their gap; mean gap and Kendall's τ with 95 % intervals

RUN is a finished run of train_teacher_pool.py. Members are a spread of those that it measured. With --seeds 2 each is
trained alone twice: how well these two agree is the most that one can ask of the pool. --also names further pools, of
other schedules or seeds, in which the same members are measured. Stop and go on with --resume FOLDER; a finished
comparison can be resumed with more seeds and pools.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
import pandas as pd
from options import absolute, common_options, main_of, new_folder, parsed, positive, recorded, source
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
from autodet.working_copy import read_path

RECORDED = ("run", "members", "split", "seed")
EXTENDABLE = ("workers", "also", "seeds")
TRAINING = "alone, training"  # begins the names of the columns of single trainings
RESAMPLES = 2000  # of the bootstrap over members

Values = npt.NDArray[np.float64]


def main(argv: list[str] | None = None) -> int:
    """Train members alone, measure both, print."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "compare-pool")
    pool, task = TeacherPool.open(options.run / "pool"), pool_task_of(options.run)
    members = spread(read_members(options.run / "pool"), options.members)
    also = other_pools([read_path(run) for run in options.also or ()], pool)
    benches = {m.size: Workbench(replace(task.task, student=pool.spec_of(m), split=options.split)) for m in members}
    config = {"script": "compare_pool", "options": recorded(options, (*RECORDED, *EXTENDABLE))}
    config["members"] = [str(member) for member in members]
    with start_or_resume(folder, config, [f"options.{name}" for name in EXTENDABLE]):
        alone = {
            f"{index:02d}" + (f"-{seed}" if seed else ""): replace(
                task.task, student=pool.spec_of(member), seed=task.task.seed + options.seed + seed
            )
            for seed in range(options.seeds or 1)
            for index, member in enumerate(members)
        }
        workers = options.workers or 2
        with ray_running(options.address, cpus=workers * task.task.threads):
            files = list(train_side_by_side(alone, folder / "alone", float(task.task.device == "cuda")).values())
        trained = {member: files[index :: len(members)] for index, member in enumerate(members)}
        table = measured({"pool": pool, **also}, benches, trained)
    atomic_write_bytes(folder / "members.csv", table.to_csv(index=False).encode())
    save_picture(folder / "members.png", draw_against_alone(table, ["pool", *also]))
    print_table(table, options.split, ["pool", *also])
    print(f"\n{folder / 'members.csv'}\n{folder / 'members.png'}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed comparison are the recorded ones."""
    parser = common_options(__doc__ or "")
    add = parser.add_argument
    add("--run", type=source, help="a finished run of train_teacher_pool.py")
    add("--members", type=positive, default=12, help="how many are also trained alone (default: 12)")
    add("--seeds", type=positive, help="trainings of each member alone (default: 1)")
    add("--also", nargs="+", type=absolute, metavar="RUN", help="further pools, in which the members are measured too")
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


def other_pools(runs: Sequence[Path], pool: TeacherPool) -> dict[str, TeacherPool]:
    """Name of the run → its pool; PoolError where two have one name or a pool has other members."""
    found = {run.name: TeacherPool.open(run / "pool") for run in runs}
    if len(found) < len(runs) or {"pool", "alone", "member", "gap"} & set(found):
        raise PoolError(f"--also: expected folders of different names, found {', '.join(map(str, runs))}.")
    for name, other in found.items():
        if (other.space, other.spec) != (pool.space, pool.spec):
            raise PoolError(
                f"--also {name}: its members are {other.space}, expected {pool.space}, with the same labels."
            )
        if any(other.notes.get(name) != pool.notes.get(name) for name in ("data", "images")):
            raise PoolError(f"--also {name}: it was trained on other images than the pool of --run.")
    return found


def measured(
    pools: Mapping[str, TeacherPool], benches: Mapping[int, Workbench], alone: Mapping[Member, Sequence[Path]]
) -> pd.DataFrame:
    """A row a member: AP (0–1) in each pool and alone, on the benches' split; ``alone`` is the mean over its trainings.

    benches: by input size. alone: the files of each member's trainings.
    """
    rows = []
    for member, files in alone.items():
        bench = benches[member.size]
        row: dict[str, str | float] = {"member": str(member)}
        for name, pool in pools.items():
            taken = pool.take(member, bench.train_loader, Path(bench.task.cache), bench.task.device)
            row[name] = bench.measure(taken).ap or 0.0
        aps = []
        for file in files:
            detector, _ = load_detector(file)
            detector.model.to(bench.task.device)
            aps.append(bench.measure(detector).ap or 0.0)
        row |= {"alone": fmean(aps)} | {f"{TRAINING} {index}": ap for index, ap in enumerate(aps, start=1)}
        rows.append(row)
        logging.info("%s", "  ".join(f"{name} {value}" for name, value in row.items()))
    table = pd.DataFrame(rows)
    table["gap"] = table["alone"] - table["pool"]
    return table


def print_table(table: pd.DataFrame, split: str, pools: Sequence[str]) -> None:
    """The rows; of each pool the mean gap and Kendall's τ, with intervals over members; how far the first is ahead."""
    trainings = [name for name in table.columns if name.startswith(TRAINING)]
    points = table if len(trainings) > 1 else table.drop(columns=trainings)  # of one, the mean says it already
    points = points.assign(**{name: (100 * points[name]).round(1) for name in points.columns if name != "member"})
    print(f"AP on {split}, points\n{points.to_string(index=False)}\n")
    for name in pools:
        gap = mean_interval((100 * (table["alone"] - table[name])).tolist())
        tau = rank_correlation(table[name].to_numpy(), table["alone"].to_numpy())
        print(
            f"{name}: mean gap (alone minus pool) {_with_interval(gap, '+.2f')} points,"
            f" Kendall's τ {_with_interval(tau, '.2f')}"
        )
    for one, other in itertools.combinations(trainings, 2):
        tau = rank_correlation(table[one].to_numpy(), table[other].to_numpy())
        print(f"two trainings alone ({one}, {other}): Kendall's τ {_with_interval(tau, '.2f')}")
    for name in pools[1:]:
        ahead = mean_interval((100 * (table["pool"] - table[name])).tolist())
        print(f"pool minus {name}: {_with_interval(ahead, '+.2f')} points")


def rank_correlation(ours: Values, theirs: Values) -> tuple[float, float, float]:
    """Kendall's τ and the 95 % interval of its bootstrap over members; NaN where all are tied."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(ours), size=len(ours)) for _ in range(RESAMPLES)]
    taus = np.array([kendall(ours[draw].tolist(), theirs[draw].tolist()) for draw in draws])
    taus = taus[np.isfinite(taus)]
    low, high = np.percentile(taus, (2.5, 97.5)) if len(taus) else (np.nan, np.nan)
    return kendall(ours.tolist(), theirs.tolist()), float(low), float(high)


def _with_interval(found: tuple[float, float, float], form: str) -> str:
    mean, low, high = (format(value, form) for value in found)
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    raise SystemExit(main_of(main))
