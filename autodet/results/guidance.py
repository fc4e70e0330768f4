"""What several runs teach together: which inputs help alone, what the searches cost, what transfers.

Every function takes the frame of `facts.read_runs` and gives tables; AP is 0–1 in them. `operation_ranks` has the table
of transforms and distances. Associations within what was searched: budgets are finite and seeds decide part of it.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pandas as pd

from autodet.results.frame import ARM, paired_differences
from autodet.results.gains import FRESH, NO_GAIN, gain_over_control
from autodet.results.intervals import mean_interval, spearman
from autodet.results.wording import terms_of

SECOND_HAND = ("global", "instance", "fg-bg", "localization", "logits")
"""DetKDS's ranking of the inputs, best first, as others tell it: the paper itself was not at hand."""
ENDED = ("completed", "stopped", "failed")
NO_SEARCH = ("weights", "compare", "tune", "students", "long")
"""Phases whose formulas were not looked for from scratch: the weight phase favours inputs that did well before."""
BASELINE, FOUND, TRANSFERRED = "inherit-only", "found", "from "


def alone(frame: pd.DataFrame) -> pd.DataFrame:
    """The ended candidates of the searches whose formula has one knowledge input, with that as column `input`.

    One row per formula and run, its first one: replicates would count the lucky ones several times.
    """
    rows = frame[frame["status"].isin(ENDED) & ~frame["phase"].isin(NO_SEARCH)]
    rows = rows[~rows["origin"].isin(["replicate", "control"])]
    names = [_only_input(str(formula)) for formula in rows["formula"]]
    rows = rows.assign(input=pd.Series(names, rows.index, dtype="string")).dropna(subset=["input"])
    rows = rows.sort_values(["run", "replicate", "id"])
    return rows.drop_duplicates(["run", *ARM]).sort_index()


def _only_input(formula: str) -> str | None:
    inputs = {term.input for term in terms_of(formula)}
    return inputs.pop() if len(inputs) == 1 else None


def inputs_alone(frame: pd.DataFrame) -> pd.DataFrame:
    """Each knowledge input by itself, a row per run and input, best first within a run.

    Columns: run, pair, data, input, candidates (formulas that ended), completed, best, top3 (mean of the best three,
    or of as many as there are), median (AP of completed ones, first seeds), rank (by top3, 1 is best, of `of` inputs),
    then `gains.Gain` of the best formula over the control without distillation, and the formula. AP is NaN, and the
    rank the last, where nothing completed.
    """
    columns = ["run", "pair", "data", "input", "candidates", "completed", "best", "top3", "median"]
    columns += ["gain", "low", "high", "pairs", "basis", "formula"]
    table = [_input_row(frame, rows) for _, rows in alone(frame).groupby(["run", "input"], sort=False)]
    data = pd.DataFrame(table, columns=columns)
    data.insert(9, "rank", data.groupby("run")["top3"].rank(ascending=False, na_option="bottom"))
    data.insert(10, "of", data.groupby("run")["input"].transform("count"))
    order = {name: place for place, name in enumerate(dict.fromkeys(data["run"]))}
    return data.sort_values(
        ["run", "rank", "input"], key=lambda c: c.map(order) if c.name == "run" else c, ignore_index=True
    )


def _input_row(frame: pd.DataFrame, rows: pd.DataFrame) -> tuple[Any, ...]:
    completed = rows[rows["status"] == "completed"].sort_values("ap", ascending=False, kind="stable")
    about = (*rows.iloc[0][["run", "pair", "data", "input"]], len(rows), len(completed))
    if completed.empty:
        return (*about, math.nan, math.nan, math.nan, *NO_GAIN, "")
    first, ap = completed.iloc[0], completed["ap"]
    chosen_by = {int(first["replicate"])} if len(completed) > 1 else None  # the only one was not chosen
    run = frame[frame["run"] == first["run"]]
    gain = gain_over_control(run, str(first["formula"]), bool(first["inherit"]), chosen_by)
    return (*about, ap.iloc[0], ap.head(3).mean(), ap.median(), *gain, first["formula"])


def input_ranks(inputs: pd.DataFrame) -> pd.DataFrame:
    """The inputs over runs, best mean rank first, from `inputs_alone`.

    Columns: input, runs, rank (mean of the ranks within runs), gain (mean over runs with fresh seeds), low, high (95 %
    t-interval over runs, NaN for one), family (the input's name in `SECOND_HAND`), second_hand (its place there, 1–5).
    """
    table = []
    for name, rows in inputs.groupby("input", sort=False):
        family = family_of(str(name))
        place = SECOND_HAND.index(family) + 1 if family in SECOND_HAND else math.nan
        gain = mean_interval(rows.loc[rows["basis"] == FRESH, "gain"].tolist())
        table.append((name, len(rows), rows["rank"].mean(), *gain, family, place))
    columns = ["input", "runs", "rank", "gain", "low", "high", "family", "second_hand"]
    return pd.DataFrame(table, columns=columns).sort_values(["rank", "input"], ignore_index=True)


def second_hand_agreement(ranks: pd.DataFrame) -> tuple[float, int, float]:
    """Spearman's correlation of our mean ranks with `SECOND_HAND`, over how many families, and what chance does.

    That is the share of all orders of these families whose correlation is at least as high. A family such as `logits`
    counts with its best input. NaN below two families.
    """
    best = ranks.dropna(subset=["second_hand"]).groupby("family")[["rank", "second_hand"]].min()
    ours, theirs = best["rank"].tolist(), best["second_hand"].tolist()
    correlation = spearman(ours, theirs)
    orders = [spearman(ours, order) >= correlation - 1e-9 for order in permutations(theirs)]
    chance = math.nan if math.isnan(correlation) else sum(orders) / len(orders)
    return correlation, len(best), chance


def family_of(name: str) -> str:
    """`logits` of `logits.roi`; `fg-bg` of `fg` and `bg`, which DetKDS searches as one."""
    family = name.partition(".")[0]
    return "fg-bg" if family in ("fg", "bg", "fg_bg") else family


def transfers(frame: pd.DataFrame) -> pd.DataFrame:
    """Formulas found by other runs in the comparisons of this pair and data: arms `from <run>` of phase `compare`.

    Columns: run, pair, data, arm, ap (mean), pairs, difference to inherit-only with low, high (paired, 95 %), own (the
    difference of what was found for this pair itself), home (the formula's difference where it was found, if a
    comparison of that is among the runs), formula. NaN where there is no such arm.
    """
    table = []
    compared = frame[(frame["phase"] == "compare") & (frame["status"] == "completed")]
    differences = {str(run): _differences(rows) for run, rows in compared.groupby("run", sort=False)}
    home = {
        row.formula: row.difference for rows in differences.values() for row in rows.itertuples() if row.arm == FOUND
    }
    for run, rows in differences.items():
        about = compared[compared["run"] == run].iloc[0]
        own = rows.loc[rows["arm"] == FOUND, "difference"].mean()
        for row in rows[rows["arm"].str.startswith(TRANSFERRED)].itertuples():
            measured = (row.mean, row.pairs, row.difference, row.low, row.high, own, home.get(row.formula, math.nan))
            table.append((run, about["pair"], about["data"], row.arm, *measured, row.formula))
    columns = ["run", "pair", "data", "arm", "ap", "pairs", "difference", "low", "high", "own", "home", "formula"]
    return pd.DataFrame(table, columns=columns)


def _differences(rows: pd.DataFrame) -> pd.DataFrame:
    """`frame.paired_differences` with the arms' formulas; nothing without the baseline."""
    if BASELINE not in set(rows["group"]):
        return pd.DataFrame(columns=["arm", "mean", "pairs", "difference", "low", "high", "formula"])
    return paired_differences(rows, BASELINE).assign(
        formula=lambda d: d["arm"].map(rows.groupby("group")["formula"].first())
    )
