"""What a formula gains over the students that inherit alone, on equal seeds, and how sure that is."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from autodet.results.frame import ARM
from autodet.results.intervals import mean_interval, student_t_quantile

FRESH, CHOOSING, UNPAIRED, NO_CONTROL = "fresh seeds", "choosing seeds", "no seed in common", "no control"
OWN_SPREAD = 3  # pairs from which their own spread says something


class Gain(NamedTuple):
    """AP (0–1) above the control, 95 % interval, pairs of runs with one seed, and what it rests on.

    basis: `fresh seeds`, which did not choose the formula; `choosing seeds`, by which it was chosen among others, so
    that luck is part of it; `no seed in common` with a control, so that means are compared; `no control`. Only fresh
    seeds have an interval: the others are no fair estimates.
    """

    gain: float
    low: float
    high: float
    pairs: int
    basis: str


NO_GAIN = Gain(math.nan, math.nan, math.nan, 0, "")


def gain_over_control(run: pd.DataFrame, formula: str, inherit: bool, chosen_by: set[int] | None = None) -> Gain:
    """Of the completed candidates of one run: the formula's AP minus that of `none` with the same `inherit`.

    chosen_by: replicate numbers by whose AP the formula was chosen; None where it was not chosen by this run. The mean
    is over pairs of one seed; three and more have the t-interval of their differences. One or two say nothing about
    their own spread: there the half-width is t · s · √(2 / pairs) with `seed_spread` s of the whole run. That takes the
    sides of a pair as independent; where equal seeds go up and down together it is wider than need be.
    """
    completed = run[(run["status"] == "completed") & (run["inherit"] == inherit)]
    taught, control = (_by_seed(completed, text) for text in (formula, "none"))
    differences = (taught - control).dropna()
    fresh = differences.drop(list(chosen_by or ()), errors="ignore")
    if len(fresh):
        return Gain(*_interval(fresh, completed), len(fresh), FRESH)
    if len(differences):
        return Gain(float(differences.mean()), math.nan, math.nan, len(differences), CHOOSING)
    if len(taught) and len(control):
        return Gain(float(taught.mean() - control.mean()), math.nan, math.nan, 0, UNPAIRED)
    return NO_GAIN._replace(basis=NO_CONTROL)


def seed_spread(run: pd.DataFrame) -> tuple[float, int]:
    """Standard deviation of AP (0–1) between seeds of one formula, and its degrees of freedom.

    Pooled over all formulas, controls included, that completed more than once in a run; NaN and 0 where none did.
    """
    groups = [arm["ap"] for _, arm in run[run["status"] == "completed"].groupby(ARM) if len(arm) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return math.nan, 0
    return math.sqrt(sum(float(((values - values.mean()) ** 2).sum()) for values in groups) / freedom), freedom


def _interval(differences: pd.Series[float], run: pd.DataFrame) -> tuple[float, float, float]:
    if len(differences) >= OWN_SPREAD:
        return mean_interval(differences.tolist())
    middle, (spread, freedom) = float(differences.mean()), seed_spread(run)
    if not freedom:
        return middle, math.nan, math.nan
    half = student_t_quantile(0.975, freedom) * spread * math.sqrt(2 / len(differences))
    return middle, middle - half, middle + half


def _by_seed(rows: pd.DataFrame, formula: str) -> pd.Series[float]:
    return rows[rows["formula"] == formula].groupby("replicate")["ap"].mean()
