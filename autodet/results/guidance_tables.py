"""The tables of guidance as a person reads them: titles, notes, few columns, AP ×100."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import pandas as pd

from autodet.results import page
from autodet.results.guidance import SECOND_HAND, second_hand_agreement
from autodet.results.operation_ranks import FEW
from autodet.results.page import Number, points, range_of_points, signed_points

Tables: TypeAlias = Mapping[str, pd.DataFrame]
TITLES = {
    "runs": "The runs, what they found and what it cost",
    "inputs": "Which inputs help alone",
    "input_ranks": "Inputs over runs",
    "operations": "Which transforms and distances win",
    "transfers": "Does a formula help elsewhere",
    "phases": "Cost by phase",
}
NOTES = {
    "runs": "Hours of the candidates' trainings, on one accelerator each, or times CPU threads; without the teacher's. "
    "AP ×100 of what was found and its gain over the students without distillation: on the seeds that chose it, luck "
    "is part of it.",
    "inputs": "AP ×100 of the formulas with one input, on the first seed: best, mean of the best three, median. The "
    "rank is by the best three. Gain: the best formula minus the students without distillation, paired by seed, in AP "
    "points. With one or two pairs its 95 % interval takes the spread between seeds of all repeated formulas of the "
    "run. On the seeds that chose the formula, luck is part of the gain, and it has no interval.",
    "input_ranks": "Mean rank within runs; mean gain over runs in AP points with 95 % t-interval over runs. Runs may "
    "differ in how many inputs their pair has.",
    "operations": "Mean percentile of AP among the candidates of the same run and input (50: as good as the others); "
    "difference to candidates without the operation, Welch's 95 % interval. Stopped and failed candidates rank last. "
    f"An association: candidates are relatives. Fewer than {FEW} candidates say next to nothing.",
    "transfers": "Formulas that other runs found, at their weights: paired difference to inherit-only in AP points, "
    "95 % interval; beside it what was found for this pair itself, and the formula's difference at home.",
    "phases": "Hours as above. A candidate that was killed counts up to its last report.",
}


def section(name: str, tables: Tables) -> str:
    """A table with its note as a part of a page; nothing where it is empty."""
    table = readable(name, tables[name])
    if table.empty:
        return ""
    last = [page.paragraph(agreement(tables["input_ranks"]))] if name == "input_ranks" else []
    rows = list(table.itertuples(index=False, name=None))
    note = page.paragraph(NOTES[name], quiet=True)
    return page.section(TITLES[name], note, page.table(list(table.columns), rows), *last)


def text_of(tables: Tables) -> str:
    """The tables for a terminal."""
    parts = []
    for name, table in tables.items():
        if len(table):
            parts.append(f"{TITLES[name]}\n{readable(name, table).to_string(index=False)}")
        if name == "input_ranks" and len(table):
            parts.append(agreement(table))
    return "\n\n".join(parts)


def agreement(ranks: pd.DataFrame) -> str:
    """How our order of inputs agrees with the published one, in one sentence."""
    correlation, families, chance = second_hand_agreement(ranks)
    published = f"The published ranking, second-hand, is {' > '.join(SECOND_HAND)}."
    if families < 2 or math.isnan(correlation):
        return f"{published} Too few of these inputs were searched to compare with it."
    counted = f"{correlation:.2f} over {families} of these"
    return f"{published} Spearman's rank correlation with it: {counted}; {chance:.0%} of random orders agree as well."


def readable(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """A table as a person reads it: few columns, AP ×100, numbers as formatted text."""
    return pd.DataFrame([ROWS[name](row) for row in table.to_dict("records")])


def _inputs(row: dict[Any, Any]) -> dict[str, Any]:
    ap = {"best": points(row["best"]), "best three": points(row["top3"]), "median": points(row["median"])}
    counts = {"candidates": row["candidates"], "completed": row["completed"]}
    rank = {"rank": Number(f"{row['rank']:g} of {row['of']}")}
    return {"run": row["run"], "input": row["input"]} | counts | ap | rank | _gain(row)


def _gain(row: dict[Any, Any]) -> dict[str, Any]:
    interval = range_of_points(row["low"], row["high"])
    pairs, basis = row["pairs"], row["basis"]
    basis = f"{pairs} {basis.removesuffix('s') if pairs == 1 else basis}" if pairs else basis
    return {"gain": signed_points(row["gain"]), "95 % interval": interval, "on": basis}


def _input_ranks(row: dict[Any, Any]) -> dict[str, Any]:
    place = Number("" if pd.isna(row["second_hand"]) else f"{row['second_hand']:.0f}")
    about = {"input": row["input"], "runs": row["runs"], "mean rank": Number(f"{row['rank']:.1f}")}
    interval = range_of_points(row["low"], row["high"])
    return about | {"gain": signed_points(row["gain"]), "95 % interval": interval, "second-hand place": place}


def _operations(row: dict[Any, Any]) -> dict[str, Any]:
    about = {"slot": row["slot"], "operation": row["operation"], "candidates": row["count"]}
    means = {"percentile": _whole(row["percentile"]), "95 % interval": _between(row["low"], row["high"])}
    others = {"without": _whole(row["without"]), "difference": _whole(row["difference"], "+")}
    return about | means | others | {"its interval": _between(row["difference_low"], row["difference_high"])}


def _runs(row: dict[Any, Any]) -> dict[str, Any]:
    about = {key: row[key] for key in ("run", "pair", "data", "candidates")}
    return about | {"hours": _hours(row), "AP": points(row["ap"])} | _gain(row)


def _phases(row: dict[Any, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("run", "phase", "candidates", "completed")} | {"hours": _hours(row)}


def _hours(row: dict[Any, Any]) -> Number:
    return Number(f"{row['hours']:{'.3g' if row['hours'] < 100 else '.0f'}} {row['unit']}")


def _transfers(row: dict[Any, Any]) -> dict[str, Any]:
    about = {key: row[key] for key in ("run", "pair", "data", "arm")}
    measured = {"AP": points(row["ap"]), "pairs": row["pairs"], "difference": signed_points(row["difference"])}
    others = {"own": signed_points(row["own"]), "at home": signed_points(row["home"])}
    return about | measured | {"95 % interval": range_of_points(row["low"], row["high"])} | others


def _whole(value: Any, sign: str = "") -> Number:
    return Number("" if pd.isna(value) else f"{value:{sign}.0f}")


def _between(low: Any, high: Any) -> Number:
    return Number("" if pd.isna(low) else f"{low:.0f} to {high:.0f}")


ROWS = {
    "runs": _runs,
    "inputs": _inputs,
    "input_ranks": _input_ranks,
    "operations": _operations,
    "transfers": _transfers,
    "phases": _phases,
}
