"""Comparing searches: curves, regrets, evaluations until a target; each a data function, and one drawing.

The data is one row for each searcher, seed and evaluation:

    searcher, seed, evaluation (1, 2, …), ap (0–1, NaN where the training failed)

Rows of a searcher and seed may end before the budget, where nothing was left to evaluate or nothing left to gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from autodet.results.intervals import mean_interval
from autodet.results.plots import COLOURS, DPI, GREY, label_axes

SCALE = 100  # AP in pictures and printed tables: points


def best_found(evaluations: pd.DataFrame, budget: int) -> pd.DataFrame:
    """Best AP after 1 to `budget` evaluations: a row for each of them, a column for each (searcher, seed).

    NaN before the first training that completed; after a search's end its best stays.
    """
    table = evaluations.pivot(index="evaluation", columns=["searcher", "seed"], values="ap")
    return table.reindex(range(1, budget + 1)).cummax().ffill()


def curves(best: pd.DataFrame) -> pd.DataFrame:
    """Mean over the seeds of the best so far. Columns: searcher, evaluation, ap, low, high (95 % t-interval)."""
    rows = []
    for searcher in searchers(best):
        for evaluation, values in best[searcher].iterrows():
            rows.append((searcher, evaluation, *mean_interval(values.dropna().tolist())))
    return pd.DataFrame(rows, columns=["searcher", "evaluation", "ap", "low", "high"])


def regrets(best: pd.DataFrame, optimum: float, budgets: Sequence[int]) -> pd.DataFrame:
    """Simple regret, `optimum` minus the best found, after each budget: mean over seeds with 95 % t-interval.

    Columns: searcher, evaluations, regret, low, high.
    """
    rows: list[tuple[str | int | float, ...]] = []
    for searcher in searchers(best):
        for budget in budgets:
            values = (optimum - best[searcher].loc[budget]).dropna().tolist()
            rows.append((searcher, budget, *mean_interval(values)))
    return pd.DataFrame(rows, columns=["searcher", "evaluations", "regret", "low", "high"])


def evaluations_until(best: pd.DataFrame, target: float) -> pd.DataFrame:
    """Evaluations until `target` was reached: a row a seed, a column a searcher; NaN where it was not."""
    reached = best >= target
    first = reached.idxmax().where(reached.any()).astype(float)
    return pd.DataFrame({name: first[name] for name in searchers(best)})


def reaching(until: pd.DataFrame, budget: int) -> pd.DataFrame:
    """How soon each searcher reaches the target. Columns: searcher, seeds, reached (share of the seeds), lower,
    median, upper (quartiles; infinite where not reached), mean, low, high.

    The mean is restricted at the budget: a run that does not reach the target counts as if it had with its last
    evaluation, which flatters slow searches. With 95 % t-interval.
    """
    rows = []
    for searcher, values in until.items():
        # "lower": an order statistic, since there is no middle between a number and infinity
        quartiles = values.fillna(math.inf).quantile([0.25, 0.5, 0.75], interpolation="lower")
        restricted = mean_interval(values.fillna(budget).tolist())
        rows.append((searcher, len(values), values.notna().mean(), *quartiles, *restricted))
    columns = ["searcher", "seeds", "reached", "lower", "median", "upper", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def searchers(best: pd.DataFrame) -> list[str]:
    """The names in a table of `best_found`, in its order."""
    return list(dict.fromkeys(best.columns.get_level_values("searcher")))


def draw_searches(curves: pd.DataFrame, until: pd.DataFrame, optimum: float, target: float, share: float) -> Figure:
    """Left the mean best AP so far with its interval, right the share of the seeds that have reached the target.

    share: of all formulas, that the target stands for.
    """
    figure = Figure(figsize=(10, 4.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    budget = int(curves["evaluation"].max())
    for (name, rows), colour in zip(curves.groupby("searcher", sort=False), COLOURS, strict=False):
        x = rows["evaluation"]
        left.fill_between(x, rows["low"] * SCALE, rows["high"] * SCALE, color=colour, alpha=0.18, linewidth=0)
        left.plot(x, rows["ap"] * SCALE, color=colour, linewidth=1.8, label=str(name))
        known = until[str(name)]
        shares = [float(known.le(evaluation).mean()) for evaluation in range(budget + 1)]
        right.step(range(budget + 1), shares, where="post", color=colour, linewidth=1.8)
    left.axhline(optimum * SCALE, color=GREY, linewidth=1)
    left.axhline(target * SCALE, color=GREY, linewidth=1, linestyle=":")
    left.set_ylim(bottom=_floor(curves) * SCALE)
    right.set_ylim(0, 1.02)
    label_axes(
        left, "evaluations", f"best AP so far, mean with 95 % interval\n(grey: best of all; dotted: best {share:.0%})"
    )
    label_axes(right, "evaluations", f"share of the seeds that have reached the best {share:.0%}")
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


def _floor(curves: pd.DataFrame) -> float:
    """The lowest mean after the fifth evaluation: the first ones would squeeze the rest into a line."""
    later = curves[curves["evaluation"] >= min(5, curves["evaluation"].max())]
    return float(later["ap"].min())
