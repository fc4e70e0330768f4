"""Does divide and conquer find good formulas sooner than evolution of whole formulas, random search, and Optuna's TPE?

command:   python experiments/compare_searchers.py [--table CSV] [--seeds 100] [--budget 80] [--half first|second|all]
hardware:  two cores; nothing is trained, results are looked up in a table of build_table.py
time:      under two minutes
expected:  best AP so far by evaluations, regret, evaluations until the best 1 % of the formulas is reached; the paired
           difference between divide and conquer and TPE; a picture and a CSV of the table beside it

Each search runs with every seed, without controls, replicates and finals, so that an evaluation is one training for
all. No search pays for asking what it knows (`searchers.tpe`). --half: only a half of the combinations (the single
formulas are in both), so that a search can be tuned on one half and judged on the other.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import pandas as pd
from options import main_of, positive
from searchers import SEARCHERS

from autodet.atomic import atomic_write_bytes
from autodet.results.intervals import mean_interval
from autodet.results.plots import to_png
from autodet.results.search_plots import best_found, curves, draw_searches, evaluations_until, reaching, regrets
from autodet.search.table_file import read_table
from autodet.search.tabular import TOP, Half, Table

TABLE = Path(__file__).parent / "tables" / "bccd.csv"
OURS, RIVAL = "divide, predicted", "TPE"


def main(argv: list[str] | None = None) -> int:
    """Run all searches on the table, and compare them."""
    options = parse(argv)
    table = read_table(options.table).half(options.half)
    budget = min(options.budget, len(table.aps))
    print_facts(options.table, table, budget)
    evaluations = run_all(table, options.seeds, budget, options.workers)
    best = best_found(evaluations, budget)
    until = evaluations_until(best, table.threshold())
    budgets = sorted({max(1, budget // part) for part in (8, 4, 2, 1)})
    regret = regrets(best, table.best, budgets)
    summary = reaching(until, budget)
    print_tables(summary, regret)
    print_differences(best, until, budgets, budget)
    options.output.mkdir(parents=True, exist_ok=True)
    wide = regret.pivot(index="searcher", columns="evaluations", values="regret").add_prefix("regret_after_")
    atomic_write_bytes(
        options.output / "searchers.csv", summary.merge(wide, on="searcher").to_csv(index=False).encode()
    )
    figure = draw_searches(curves(best), until, table.best, table.threshold(), TOP)
    atomic_write_bytes(options.output / "searchers.png", to_png(figure))
    print(f"\n{options.output / 'searchers.png'}, {options.output / 'searchers.csv'}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    add = parser.add_argument
    add("--table", type=Path, default=TABLE, help="a table of build_table.py (default: experiments/tables/bccd.csv)")
    add("--seeds", type=positive, default=100, help="runs of each search (default: 100)")
    add("--budget", type=positive, default=80, help="evaluations of each run (default: 80)")
    add("--half", choices=get_args(Half), default="all", help="which combinations may be asked for (default: all)")
    add("--workers", type=positive, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    add("--output", type=Path, default=Path("runs/compare-searchers"), help="folder of the results")
    return parser.parse_args(argv)


def run_all(table: Table, seeds: int, budget: int, workers: int) -> pd.DataFrame:
    """One row for each searcher, seed and evaluation, as `search_plots` wants them."""
    jobs = list(product(SEARCHERS, range(seeds)))
    run = partial(run_one, table, budget)
    if workers == 1:
        results = [run(job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers) as pool:
            results = list(pool.map(run, jobs, chunksize=max(1, len(jobs) // (8 * workers))))
    rows = [
        (searcher, seed, number, ap)
        for (searcher, seed), aps in zip(jobs, results, strict=True)
        for number, ap in enumerate(aps, start=1)
    ]
    frame = pd.DataFrame(rows, columns=["searcher", "seed", "evaluation", "ap"])
    return frame.astype({"ap": float})


def run_one(table: Table, budget: int, job: tuple[str, int]) -> list[float | None]:
    """The evaluations of one searcher and seed."""
    searcher, seed = job
    return SEARCHERS[searcher](table, seed, budget)


def print_facts(path: Path, table: Table, budget: int) -> None:
    """What is searched, and how much of the differences between formulas may be chance."""
    between, within, count = table.spreads()
    good = sum(ap is not None and ap >= table.threshold() for ap in table.aps.values())
    chance = (len(table.aps) + 1) / (good + 1)
    print(f"{path}: {len(table.aps)} formulas, AP in points (0–100), budget {budget} evaluations")
    print(f"best {100 * table.best:.2f}, best {TOP:.0%} ({good} formulas) from {100 * table.threshold():.2f}")
    print(f"standard deviation between formulas {100 * between:.2f}, of seeds {100 * within:.2f} ({count} formulas)")
    print(f"random search without a budget reaches the best {TOP:.0%} after {chance:.0f} evaluations on average")


def print_tables(summary: pd.DataFrame, regret: pd.DataFrame) -> None:
    """How soon each search reaches the target, and what it lacks at each budget."""
    title = f"evaluations until the best {TOP:.0%}"
    print(f"\n{title:28} {'mean*':>6} {'95 % interval':>16} {'quartiles':>18} {'reached':>8}")
    for row in summary.to_dict("records"):
        interval = f"[{row['low']:.1f}, {row['high']:.1f}]"
        quartiles = " ".join(f"{row[name]:5.0f}" for name in ("lower", "median", "upper"))
        print(f"{row['searcher']:28} {row['mean']:6.1f} {interval:>16} {quartiles:>18} {row['reached']:8.0%}")
    print("* those that did not reach it count with the whole budget")
    points = regret.assign(**{name: 100 * regret[name] for name in ("regret", "low", "high")})
    print(f"\n{'regret in AP points after':28}" + "".join(f"{budget:>20}" for budget in points["evaluations"].unique()))
    for searcher, rows in points.groupby("searcher", sort=False):
        values = (f"{r['regret']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in rows.to_dict("records"))
        print(f"{searcher!s:28}" + "".join(f"{value:>20}" for value in values))


def print_differences(best: pd.DataFrame, until: pd.DataFrame, budgets: Sequence[int], budget: int) -> None:
    """Our search against the rival, seed by seed."""
    print(f"\n{OURS} minus {RIVAL}, paired by seed, with 95 % interval:")
    mean, low, high = difference(until.fillna(budget))
    print(f"  evaluations until the best {TOP:.0%}: {mean:+.1f} [{low:+.1f}, {high:+.1f}]")
    for number in budgets:
        after = pd.DataFrame({name: 100 * best[name].loc[number] for name in (OURS, RIVAL)})
        mean, low, high = difference(after)
        print(f"  best AP after {number} evaluations: {mean:+.2f} [{low:+.2f}, {high:+.2f}]")


def difference(values: pd.DataFrame) -> tuple[float, float, float]:
    """Mean over the rows (seeds) of our column minus the rival's, with its 95 % t-interval."""
    return mean_interval((values[OURS] - values[RIVAL]).dropna().tolist())


if __name__ == "__main__":
    raise SystemExit(main_of(main))
