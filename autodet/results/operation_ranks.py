"""Which transforms and distances win: candidates ranked within their run and knowledge input.

Runs and inputs differ in AP by more than operations do, so an AP counts as its percentile among the candidates of its
run and input. An association, not an effect: a search breeds what did well, so candidates are relatives.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from autodet.results.guidance import alone
from autodet.results.intervals import mean_interval, student_t_quantile
from autodet.results.wording import TermText, operation_name, terms_of

SLOTS = {
    "A": ("satt", "catt", "batt", "mask"),
    "B": ("pool", "patch", "affine", "mean"),
}
"""The grammar's slots of transforms; every other transform is in C."""
SLOT_NAMES = {"A": "attention or mask", "B": "scale", "C": "normalise or reshape", "distance": "distance"}
NONE = "none"
WORTH = {"failed": -1.0, "stopped": 0.0, "completed": 1.0}
FEW = 5  # below this many candidates a mean says next to nothing
LEAST = 3  # candidates for an interval: that of two spans everything, or nothing where they happen to agree


def operations(frame: pd.DataFrame) -> pd.DataFrame:
    """Each operation of each slot, `none` for an empty slot; best first within a slot.

    Columns: slot (A, B, C, distance), operation (parameters left out), count (candidates with it), groups (runs and
    inputs in which some candidates have it and others have not; only these count), percentile (mean, 0–100) with low,
    high (95 % t-interval over candidates, cut to 0–100), without (mean of the other candidates of these groups),
    difference (with minus without) with difference_low, difference_high (95 %, Welch's). Intervals are NaN below
    `LEAST` candidates.
    """
    ranked = percentiles(alone(frame))
    uses = [(row.Index, *use) for row in ranked.itertuples() for use in sorted(slots_of(str(row.formula)))]
    used = pd.DataFrame(uses, columns=["index", "slot", "operation"])
    table = [
        (*key, *_row(ranked, ranked.index.isin(rows["index"]))) for key, rows in used.groupby(["slot", "operation"])
    ]
    columns = ["slot", "operation", "count", "groups", "percentile", "low", "high"]
    columns += ["without", "difference", "difference_low", "difference_high"]
    data = pd.DataFrame([row for row in table if row[2]], columns=columns)
    return data.sort_values(["slot", "percentile", "operation"], ascending=[True, False, True], ignore_index=True)


def percentiles(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with columns `group` (run and input) and `percentile` (0–100) of AP in it, but groups of equals.

    100 · (rank − ½) / n, ties sharing their mean rank, so that every group has the mean 50. A stopped candidate, whose
    AP is of another length, lies below all completed ones, and a failed one below those.
    """
    rows = rows.assign(group=rows["run"] + "\n" + rows["input"])
    worth = rows["status"].map(WORTH).astype("float64")
    score = worth.where(rows["status"] != "completed", 1 + rows["ap"])
    by_group = score.groupby(rows["group"])
    percentile = 100 * (by_group.rank() - 0.5) / by_group.transform("count")
    return rows.assign(percentile=percentile)[by_group.transform("nunique") > 1]


def slots_of(formula: str) -> set[tuple[str, str]]:
    """(slot, operation) for every slot of every term of a formula's text."""
    return {use for term in terms_of(formula) for use in _uses(term)}


def _uses(term: TermText) -> set[tuple[str, str]]:
    names = [operation_name(operation) for operation in term.transforms]
    filled = {(next((slot for slot, own in SLOTS.items() if name in own), "C"), name) for name in names}
    empty = {(slot, NONE) for slot in "ABC"} - {(slot, NONE) for slot, _ in filled}
    return filled | empty | {("distance", operation_name(term.distance))}


def _row(ranked: pd.DataFrame, having: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[float, ...]:
    share = pd.Series(having, ranked.index).groupby(ranked["group"]).transform("mean")
    mixed = (share > 0) & (share < 1)
    values = ranked.loc[mixed & having, "percentile"].tolist()
    others = ranked.loc[mixed & ~having, "percentile"].tolist()
    groups = ranked.loc[mixed, "group"].nunique()
    middle, low, high = mean_interval(values)
    if len(values) < LEAST:
        low = high = math.nan
    else:
        low, high = max(0.0, low), min(100.0, high)
    return (len(values), groups, middle, low, high, mean_interval(others)[0], *difference_interval(values, others))


def difference_interval(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Difference of two means and its 95 % interval (Welch 1947); the ends are NaN unless both have `LEAST` values."""
    if not first or not second:
        return math.nan, math.nan, math.nan
    middle = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < LEAST:
        return middle, math.nan, math.nan
    errors = [float(np.var(side, ddof=1)) / len(side) for side in (first, second)]
    if sum(errors) == 0:
        return middle, middle, middle
    freedom = sum(errors) ** 2 / sum(e**2 / (len(s) - 1) for e, s in zip(errors, (first, second), strict=True))
    half = student_t_quantile(0.975, max(1, math.floor(freedom))) * math.sqrt(sum(errors))  # rounded down: wider
    return middle, middle - half, middle + half
