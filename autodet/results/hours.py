"""What runs cost, phase by phase, beside what they found."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from autodet.results.frame import found_arm
from autodet.results.gains import NO_GAIN, Gain, gain_over_control
from autodet.results.guidance import FOUND

WHOLE = "all"


def costs(frame: pd.DataFrame) -> pd.DataFrame:
    """Device-hours of every run of `facts.read_runs`: a row per phase, then one for the whole with what it found.

    Columns: run, pair, data, phase (`all` for the whole), candidates, completed, hours, unit, and for the whole: ap
    (0–1, mean over runs) of the formula that the run found, or that a comparison holds as arm `found`, and its
    `gains.Gain`. Hours are the candidates' seconds of training and evaluation: times CPU threads (`core-hours`), on one
    accelerator each (`GPU-hours`), or of training alone where the run does not say its device. The teacher's training
    is not among them; what a killed training had done since its last report is lost.
    """
    table: list[tuple[Any, ...]] = []
    for _, rows in frame.groupby("run", sort=False):
        table += [_row(part, str(phase)) for phase, part in rows.groupby("phase", sort=False)]
        table.append(_row(rows, WHOLE, *_found(rows)))
    columns = ["run", "pair", "data", "phase", "candidates", "completed", "hours", "unit"]
    return pd.DataFrame(table, columns=[*columns, "ap", "gain", "low", "high", "pairs", "basis", "formula"])


def _row(rows: pd.DataFrame, phase: str, ap: float = math.nan, gain: Gain = NO_GAIN, formula: str = "") -> Any:
    first, completed = rows.iloc[0], int((rows["status"] == "completed").sum())
    hours, unit = device_hours(rows)
    return (first["run"], first["pair"], first["data"], phase, len(rows), completed, hours, unit, ap, *gain, formula)


def device_hours(rows: pd.DataFrame) -> tuple[float, str]:
    """Hours and their unit, of rows that share a device."""
    device = str(rows["device"].iloc[0])
    threads = rows["threads"] if device == "cpu" else 1
    unit = {"cpu": "core-hours", "": "training hours"}.get(device, "GPU-hours")
    return float((rows["seconds"] * threads).sum()) / 3600, unit


def _found(rows: pd.DataFrame) -> tuple[float, Gain, str] | tuple[()]:
    """AP, gain and text of what a run found. A search chose it by all of its seeds, a comparison by none."""
    best: Any = found_arm(rows[~rows["phase"].isin(["tune", "long"])])
    arm = rows[(rows["group"] == FOUND) & (rows["status"] == "completed")]
    if len(arm):
        best = arm.iloc[0].copy()
        best["ap"] = arm["ap"].mean()
    if best is None:
        return ()
    chosen_by = None if (rows["phase"] == "compare").all() else {int(number) for number in rows["replicate"]}
    gain = gain_over_control(rows, str(best["formula"]), bool(best["inherit"]), chosen_by)
    return float(best["ap"]), gain, str(best["formula"])
