"""Pictures of what several runs teach together; the data functions are in `guidance` and `operation_ranks`."""

from __future__ import annotations

import math
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autodet.results.guidance import input_ranks
from autodet.results.operation_ranks import FEW, SLOT_NAMES
from autodet.results.plots import COLOURS, DPI, GREY, label_axes

MARKERS = ("o", "s", "D", "^", "v", "P")
LANE = 0.17  # inches between the runs of one input
INPUT_INCHES = 0.2
AS_OTHERS = f"(50: as good as the others; grey: fewer than {FEW} candidates; hollow: no interval)"


def draw_inputs(data: pd.DataFrame) -> Figure:
    """Dot plot of `guidance.inputs_alone`: an input a band, in order of mean rank; a run a lane with its own colour.

    Gain in AP points (0–100) over the students without distillation, with its interval; hollow where there is none.
    """
    known = data[data["gain"].notna()]
    order = [name for name in input_ranks(data)["input"] if name in set(known["input"])]
    runs = known["run"].drop_duplicates().tolist()
    height = 1.4 + len(order) * (INPUT_INCHES + LANE * len(runs)) + 0.2 * len(runs)
    figure = Figure(figsize=(8.2, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    look = cycle([(colour, marker) for marker in MARKERS for colour in COLOURS])
    step = LANE / (INPUT_INCHES + LANE * len(runs))
    for lane, (run, (colour, marker)) in enumerate(zip(runs, look, strict=False)):
        rows = known[known["run"] == run]
        shift = (lane - (len(runs) - 1) / 2) * step
        places = [order.index(name) + shift for name in rows["input"]]
        _intervals(axes, rows[["gain", "low", "high"]] * 100, places, colour, marker)
        axes.plot([], [], marker, color=colour, label=str(run))
    for edge in range(1, len(order)):
        axes.axhline(edge - 0.5, color="#bbbbbb", linewidth=0.7)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(max(1, len(order)) - 0.5, -0.5)
    _limit(axes, known[["gain", "low", "high"]] * 100)
    label_axes(axes, "AP points gained over the students without distillation, 95 % interval (hollow: none)")
    axes.grid(False, axis="y")
    if len(runs):
        figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=1 if len(runs) > 4 else 2)
    return figure


def draw_operations(data: pd.DataFrame) -> Figure:
    """Dot plot of `operation_ranks.operations`, a panel a slot: mean percentile of AP with its interval.

    Numbers of candidates stand beside the names; operations of fewer than `FEW` candidates are grey.
    """
    slots = [slot for slot in SLOT_NAMES if (data["slot"] == slot).any()]
    sizes = [int((data["slot"] == slot).sum()) for slot in slots] or [1]
    figure = Figure(figsize=(7.5, 1.2 + 0.27 * sum(sizes) + 0.35 * len(sizes)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=[n + 0.6 for n in sizes])[:, 0]
    for axes, slot, colour in zip(panels, slots, COLOURS, strict=False):
        rows = data[data["slot"] == slot].reset_index(drop=True)
        axes.axvline(50, color=GREY, linewidth=1)
        for few, shade in ((False, colour), (True, "#aaaaaa")):
            part = rows[(rows["count"] < FEW) == few]
            _intervals(axes, part[["percentile", "low", "high"]], [float(place) for place in part.index], shade, "o")
        names = [f"{name}  ({count})" for name, count in zip(rows["operation"], rows["count"], strict=True)]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        title = SLOT_NAMES[slot] if slot == "distance" else f"slot {slot}, {SLOT_NAMES[slot]}"
        axes.set_title(f"{title}  (number of candidates)", fontsize=9.5, loc="left")
        axes.set_xlim(0, 100)
    label_axes(panels[-1], f"mean percentile of AP within run and input, 95 % interval\n{AS_OTHERS}")
    return figure


def _intervals(axes: Axes, values: pd.DataFrame, places: list[float], colour: str, marker: str) -> None:
    """Dots with bars; columns: middle, low, high. Hollow where there is no interval."""
    for place, (middle, low, high) in zip(places, values.to_numpy(), strict=True):
        single = math.isnan(low)
        if not single:
            axes.plot([low, high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
        face = "white" if single else colour
        axes.plot(middle, place, marker, color=colour, markersize=6, markerfacecolor=face, zorder=3)


def _limit(axes: Axes, values: pd.DataFrame) -> None:
    """The axis holds all dots, and intervals as far as twice their range beside them: the ends of wide ones do not
    matter, and would squeeze the rest."""
    if values.empty:
        return
    least, most = min(0.0, values["gain"].min()), max(0.0, values["gain"].max())
    room = 2 * max(most - least, 0.5)
    ends = values[["gain", "low", "high"]].stack()
    low, high = max(ends.min(), least - room), min(ends.max(), most + room)
    margin = 0.06 * (high - low) + 0.1
    axes.set_xlim(min(low, 0) - margin, max(high, 0) + margin)
