"""A run as a pandas DataFrame, and the tables that are read off it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from autodet.ledger import Ledger, LedgerError, is_run
from autodet.records import MASK_METRIC_NAMES, METRIC_NAMES, Event, Record, records_from
from autodet.results.intervals import mean_interval

TEXT, WHOLE, REAL, TIME = "string", "int64", "float64", "time"
COLUMNS: dict[str, str] = {
    "id": WHOLE,
    "phase": TEXT,
    "group": TEXT,
    "generation": WHOLE,
    "formula": TEXT,
    "inherit": "bool",
    "replicate": WHOLE,
    "origin": TEXT,
    "status": TEXT,
    "ap": REAL,
    **{name: REAL for name in METRIC_NAMES if name != "ap"},
    "epochs": WHOLE,
    "seconds": REAL,
    "cause": TEXT,
    "seed": "Int64",
    "weights": TEXT,
    "asked_at": TIME,
    "told_at": TIME,
    "rejected": WHOLE,
    "parents": TEXT,
}
MASK_COLUMNS = dict.fromkeys(MASK_METRIC_NAMES, REAL)  # after those, of a run whose detectors give masks
EVENT_COLUMNS = {
    "number": WHOLE,
    "kind": TEXT,
    "id": WHOLE,
    "time": TIME,
    "epoch": "Int64",
    "ap": REAL,
    "verdict": TEXT,
    "status": TEXT,
    "seconds": REAL,
}
ARM = ["formula", "inherit"]


def find_runs(path: Path | str) -> list[Path]:
    """The run at `path`, or the runs in its folders and theirs. Raises LedgerError when there is none."""
    root = Path(path)
    runs = [root] if is_run(root) else []
    runs += sorted(
        config.parent
        for pattern in ("*/config.json", "*/*/config.json")
        for config in root.glob(pattern)
        if is_run(config.parent)
    )
    if not runs:
        found = "no such folder" if not root.exists() else "neither config.json with events/, nor such folders below"
        raise LedgerError(f"{root}: expected a run, or a folder of runs, found {found}; check the path")
    return runs


def read_records(path: Path | str) -> list[Record]:
    """All candidates of a run, in order of their numbers."""
    return records_from(Ledger.open(path).events())


def read_run(path: Path | str) -> pd.DataFrame:
    """One row per candidate of the run at `path`; also of a running, killed or empty run.

    Columns: `COLUMNS`, typed, then `MASK_COLUMNS` where masks were measured and plain values of the candidates' `extra`
    as `extra.NAME`. AP and AR are 0–1, NaN where unknown; seconds of training; asked_at and told_at in UTC. Raises
    LedgerError for a damaged or absent run.
    """
    return frame_of(read_records(path))


def frame_of(records: list[Record]) -> pd.DataFrame:
    """The frame of `read_run` from records."""
    return _typed([record.row() for record in records], COLUMNS)


def read_events(path: Path | str) -> pd.DataFrame:
    """One row per event of a run, columns `EVENT_COLUMNS`: learning curves are its `reported` rows."""
    return _typed([_event_row(event) for event in Ledger.open(path).events()], EVENT_COLUMNS)


def _event_row(event: Event) -> dict[str, Any]:
    row = {"number": event.number, "kind": event.kind, "id": event.id, "time": event.time}
    return row | {name: event.payload.get(name) for name in ("epoch", "ap", "verdict", "status", "seconds")}


def _typed(rows: list[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    types = MASK_COLUMNS | columns
    return pd.DataFrame({name: _column([row.get(name) for row in rows], types.get(name)) for name in names})


def _column(values: list[Any], kind: Any) -> pd.Series[Any]:
    column: pd.Series[Any] = pd.Series(values, dtype="object")
    if kind == TIME:
        stamps = pd.to_datetime(column.astype("float64"), unit="s", utc=True)
        return stamps.dt.as_unit("us")  # pandas picks a unit by content otherwise
    return column.infer_objects() if kind is None else column.astype(kind)


def best(frame: pd.DataFrame, phase: str | None = None) -> pd.Series[Any] | None:
    """The completed candidate with the highest AP (the first of equals), of one phase or all; None without any."""
    rows = frame[frame["status"] == "completed"]
    if phase is not None:
        rows = rows[rows["phase"] == phase]
    return None if rows.empty else rows.iloc[int(rows["ap"].argmax())]


def leaderboard(frame: pd.DataFrame, limit: int | None = None) -> pd.DataFrame:
    """Formulas by the mean AP of their completed runs.

    Columns: formula, inherit, ap (mean), low, high (95 % t-interval over runs, NaN for one run), runs, phase (of the
    first run), first (its number); where masks were measured, mask_ap (mean). A formula with one run owes part of its
    place to luck.
    """
    rows = frame[frame["status"] == "completed"]
    table = []
    for (formula, inherit), arm in rows.groupby(ARM, sort=False):
        mean, low, high = mean_interval(arm["ap"].tolist())
        first = arm.iloc[int(arm["id"].argmin())]
        values = (formula, bool(inherit), mean, low, high, len(arm), first["phase"], int(first["id"]))
        table.append((*values, *(float(arm[name].mean()) for name in mask_columns(frame))))
    columns = ["formula", "inherit", "ap", "low", "high", "runs", "phase", "first", *mask_columns(frame)]
    ranked = pd.DataFrame(table, columns=columns).sort_values(["ap", "first"], ascending=[False, True])
    return ranked.head(len(ranked) if limit is None else limit).reset_index(drop=True)


def mask_columns(frame: pd.DataFrame) -> list[str]:
    """The column with the AP of masks, where a frame has one."""
    return [name for name in ("mask_ap",) if name in frame]


def found_arm(frame: pd.DataFrame) -> pd.Series[Any] | None:
    """The row of `leaderboard` that a search found; None for a run without completed formulas, or a comparison.

    Once the search's phase `final` has results, only formulas with the most runs are eligible, as in the search itself.
    """
    table = leaderboard(frame[(frame["phase"] != "compare") & (frame["origin"] != "control")])
    table = table[table["formula"] != "none"]
    if table.empty:
        return None
    if ((frame["phase"] == "final") & (frame["status"] == "completed")).any():
        table = table[table["runs"] == table["runs"].max()]
    return table.iloc[0]


def paired_differences(frame: pd.DataFrame, baseline: str, value: str = "ap") -> pd.DataFrame:
    """Arms of a comparison against the arm `baseline`, paired by seed (the replicate number); best difference first.

    An arm is a `group` of the completed candidates in phase `compare` (of all candidates where there is no such phase).
    Columns: arm, runs, mean of `value`, pairs, difference (mean over pairs), low, high (95 % t-interval, NaN for one
    pair), and mask_ap (mean) where masks were measured. Runs of an arm with the same seed are averaged. Raises
    ValueError when the baseline has no completed run.
    """
    compared = frame[frame["phase"] == "compare"] if (frame["phase"] == "compare").any() else frame
    rows = compared[(compared["status"] == "completed") & compared[value].notna()]
    arms = {str(name): arm.groupby("replicate")[value].mean() for name, arm in rows.groupby("group", sort=False)}
    if baseline not in arms:
        raise ValueError(
            f"expected the baseline to be one of the arms with a completed run ({', '.join(arms) or 'there is none'}), "
            f"found {baseline!r}; name one of them"
        )
    table = []
    for name, by_seed in arms.items():
        differences = (by_seed - arms[baseline]).dropna()
        middle, low, high = mean_interval(differences.tolist())
        masks = (float(rows.loc[rows["group"] == name, column].mean()) for column in mask_columns(frame))
        table.append((name, len(by_seed), float(by_seed.mean()), len(differences), middle, low, high, *masks))
    columns = ["arm", "runs", "mean", "pairs", "difference", "low", "high", *mask_columns(frame)]
    result = pd.DataFrame(table, columns=columns).sort_values("difference", ascending=False, kind="stable")
    result.loc[result["arm"] == baseline, ["low", "high"]] = float("nan")  # a difference to itself is no estimate
    return result.reset_index(drop=True)


def rank_agreement(proxy: pd.DataFrame, long: pd.DataFrame) -> pd.DataFrame:
    """Formulas completed in both frames: formula, inherit, proxy and long (mean AP over runs), in order of `long`."""
    sides = [
        leaderboard(frame)[[*ARM, "ap"]].rename(columns={"ap": name})
        for frame, name in ((proxy, "proxy"), (long, "long"))
    ]
    joined = sides[0].merge(sides[1], on=ARM)
    return joined.sort_values("long", ascending=False).reset_index(drop=True)
