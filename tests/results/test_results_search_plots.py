"""Comparisons of searches: numbers against brute force, and that the picture is drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest

from autodet.results.intervals import mean_interval
from autodet.results.plots import to_png
from autodet.results.search_plots import best_found, curves, draw_searches, evaluations_until, reaching, regrets

BUDGET = 5
Runs = Mapping[tuple[str, int], Sequence[float | None]]
RUNS: Runs = {
    ("slow", 0): [0.1, None, 0.3, 0.2, 0.4],
    ("slow", 1): [None, 0.2, 0.2, 0.2, 0.2],
    ("quick", 0): [0.4, 0.5],  # ends early: nothing left
    ("quick", 1): [0.2, 0.3, 0.5, 0.1, 0.1],
}


def frame(runs: Runs) -> pd.DataFrame:
    rows = [(name, seed, n, ap) for (name, seed), aps in runs.items() for n, ap in enumerate(aps, 1)]
    return pd.DataFrame(rows, columns=["searcher", "seed", "evaluation", "ap"]).astype({"ap": float})


@pytest.fixture
def best() -> pd.DataFrame:
    return best_found(frame(RUNS), BUDGET)


def test_the_best_stays_until_a_better_one_comes(best: pd.DataFrame) -> None:
    assert best["slow"][0].tolist() == [0.1, 0.1, 0.3, 0.3, 0.4]
    assert best["slow"][1].fillna(-1).tolist() == [-1, 0.2, 0.2, 0.2, 0.2]
    assert best["quick"][0].tolist() == [0.4, 0.5, 0.5, 0.5, 0.5]
    assert best.index.tolist() == [1, 2, 3, 4, 5]


def test_curves_and_regrets_are_means_over_seeds(best: pd.DataFrame) -> None:
    data = curves(best)
    row = data[(data["searcher"] == "slow") & (data["evaluation"] == 3)].iloc[0]
    assert (row["ap"], row["low"], row["high"]) == pytest.approx(mean_interval([0.3, 0.2]))
    assert len(data) == 2 * BUDGET and list(dict.fromkeys(data["searcher"])) == ["slow", "quick"]
    table = regrets(best, 0.6, [1, 5])
    assert table["regret"].tolist() == pytest.approx([0.5, 0.3, 0.3, 0.1])  # slow's second seed knows nothing after 1
    last = table.iloc[1]
    assert (last["regret"], last["low"], last["high"]) == pytest.approx(mean_interval([0.2, 0.4]))


def test_evaluations_until_the_target(best: pd.DataFrame) -> None:
    until = evaluations_until(best, 0.3)
    assert list(until.columns) == ["slow", "quick"]
    assert until["slow"].fillna(-1).tolist() == [3, -1] and until["quick"].tolist() == [1, 2]
    summary = reaching(until, BUDGET).set_index("searcher")
    assert summary["reached"].to_dict() == {"slow": 0.5, "quick": 1.0}
    assert summary["mean"].to_dict() == {"slow": 4.0, "quick": 1.5}  # the one that did not counts 5
    assert summary.loc["slow", "low"] == pytest.approx(mean_interval([3, 5])[1])


def test_quartiles_are_those_of_all_seeds_and_may_be_infinite() -> None:
    until = pd.DataFrame({"s": [7.0, 3.0, math.nan, 9.0, math.nan]})
    row = reaching(until, 10).iloc[0]
    assert (row["lower"], row["median"], row["upper"]) == (7, 9, math.inf)
    assert row["mean"] == pytest.approx((7 + 3 + 10 + 9 + 10) / 5)


def test_random_search_agrees_with_its_closed_form() -> None:
    """Of N formulas, k good ones, drawn without repetition: the first good one comes after (N + 1) / (k + 1)."""
    total, good, seeds = 60, 3, 3000
    rng = random.Random(0)
    aps = [0.9] * good + [0.1] * (total - good)
    runs: Runs = {("random", seed): rng.sample(aps, total) for seed in range(seeds)}
    until = evaluations_until(best_found(frame(runs), total), 0.9)
    row = reaching(until, total).iloc[0]
    assert row["low"] < (total + 1) / (good + 1) < row["high"] and row["reached"] == 1


@pytest.mark.parametrize("names", [["slow"], ["slow", "quick"]])
def test_the_picture_is_drawn(best: pd.DataFrame, names: list[str]) -> None:
    part = best[names]
    figure = draw_searches(curves(part), evaluations_until(part, 0.3), 0.5, 0.3, 0.01)
    assert to_png(figure).startswith(b"\x89PNG") and len(figure.axes) == 2
    steps = np.asarray(figure.axes[1].lines[0].get_ydata())
    assert steps.tolist() == [0, 0, 0, 0.5, 0.5, 0.5]
    single = best_found(frame({("slow", 0): [0.1, 0.3]}), 2)  # one seed has no interval
    assert to_png(draw_searches(curves(single), evaluations_until(single, 0.3), 0.5, 0.3, 0.01))
