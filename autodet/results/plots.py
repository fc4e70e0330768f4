"""Pictures of a run. Each is a data function, which tests check, and a drawing function, which only draws it.

matplotlib's object interface throughout: no global state, no display. AP is 0–1 in the data and ×100 in the pictures.
"""

from __future__ import annotations

import io
from itertools import cycle
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autodet.results.intervals import mean_interval, spearman
from autodet.results.wording import operation_name, terms_of

# Okabe and Ito's colours, told apart also by the colour-blind; the yellow is left out: it is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
STYLES = ("-", "--", "-.", ":")
GREY = "#777777"
DPI = 110
NO_TRANSFORM = "(none)"


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def best_so_far(frame: pd.DataFrame) -> pd.DataFrame:
    """Progress of a run: one row per candidate that has ended, in the order in which they ended.

    Columns: series ("phase" or "phase: group"), candidates (ended so far in the whole run, from 1), seconds (since the
    first was asked), status, ap, best (highest AP of a completed candidate of the series so far, NaN before the first).
    """
    ended = frame[frame["told_at"].notna()].sort_values(["told_at", "id"])
    data = pd.DataFrame(
        {
            "series": [_series(row.phase, row.group) for row in ended.itertuples()],
            "candidates": range(1, len(ended) + 1),
            "seconds": (ended["told_at"] - frame["asked_at"].min()).dt.total_seconds().to_numpy(),
            "status": ended["status"].to_numpy(),
            "ap": ended["ap"].to_numpy(),
        }
    )
    completed = data["ap"].where(data["status"] == "completed")
    # cummax leaves NaN where the candidate itself has no AP; the best of the series is what it was before.
    data["best"] = completed.groupby(data["series"]).cummax().groupby(data["series"]).ffill()
    return data


def _series(phase: Any, group: Any) -> str:
    return str(phase) if group in ("", phase) else f"{phase}: {group}"


def draw_best_so_far(data: pd.DataFrame) -> Figure:
    """Two panels, AP against candidates and against minutes: a dot a candidate, a line for the best of each series.

    Hopeless candidates would squeeze the rest into a line: they lie on the lower edge, as triangles.
    """
    figure = Figure(figsize=(10, 4.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    floor = _floor(data["ap"] * 100)
    look = cycle([(colour, style) for style in STYLES for colour in COLOURS])
    for (name, rows), (colour, style) in zip(data.groupby("series", sort=False), look, strict=False):
        for axes, x in ((left, rows["candidates"]), (right, rows["seconds"] / 60)):
            below = rows["ap"] * 100 < floor
            axes.scatter(x[~below], rows["ap"][~below] * 100, s=12, color=colour, alpha=0.45, linewidths=0)
            axes.scatter(x[below], [floor] * below.sum(), s=22, color=colour, marker="v", linewidths=0, clip_on=False)
            line = axes.step(x, rows["best"] * 100, where="post", color=colour, linestyle=style, linewidth=1.8)
        line[0].set_label(str(name))
    left.set_ylim(bottom=floor)
    label_axes(left, "candidates that have ended", "AP (dots: candidates, lines: best so far)")
    label_axes(right, "minutes since the start")
    if not data.empty:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _floor(values: pd.Series[Any]) -> float:
    """A lower limit for an axis: as far below the middle as the best is above it, three times over."""
    known = values.dropna()
    if known.empty:
        return 0.0
    middle = float(known.median())
    return max(float(known.min()), middle - 3 * max(float(known.max()) - middle, 0.5)) - 0.2


def operation_wins(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean AP of the completed candidates that use an input, transform or distance.

    Columns: kind ("input", "transform", "distance"), name (parameters left out), count, ap (mean), low, high (95 %
    t-interval, NaN for one). A candidate counts once for each name it uses. An association, not an effect: candidates
    of a search are not drawn evenly, and controls (formula `none`) are left out.
    """
    uses: dict[tuple[str, str], list[float]] = {}
    for row in frame[frame["status"] == "completed"].itertuples():
        names: set[tuple[str, str]] = set()
        for term in terms_of(str(row.formula)):
            chain = [operation_name(op) for op in term.transforms] or [NO_TRANSFORM]
            names |= {("input", term.input), ("distance", operation_name(term.distance))}
            names |= {("transform", name) for name in chain}
        for key in names:
            uses.setdefault(key, []).append(float(row.ap))  # type: ignore[arg-type]
    table = [(*key, len(values), *mean_interval(values)) for key, values in uses.items()]
    data = pd.DataFrame(table, columns=["kind", "name", "count", "ap", "low", "high"])
    return data.sort_values(["kind", "ap", "name"], ascending=[True, False, True]).reset_index(drop=True)


def draw_operation_wins(data: pd.DataFrame) -> Figure:
    """A panel each for inputs, transforms and distances; a row a name: mean AP with interval and the number of uses."""
    kinds = [kind for kind in ("input", "transform", "distance") if (data["kind"] == kind).any()]
    sizes = [int((data["kind"] == kind).sum()) for kind in kinds] or [1]
    figure = Figure(figsize=(7.5, 1.2 + 0.27 * sum(sizes) + 0.35 * len(sizes)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=[n + 0.6 for n in sizes])[:, 0]
    for axes, kind, colour in zip(panels, kinds, COLOURS, strict=False):
        rows = data[data["kind"] == kind].iloc[::-1].reset_index(drop=True)
        _intervals(axes, rows, rows["ap"], colour)
        names = [f"{name}  ({count})" for name, count in zip(rows["name"], rows["count"], strict=True)]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_title(f"{kind}s (number of candidates)", fontsize=9.5, loc="left")
    if len(data):  # an interval from two or three values may span the whole page; its ends do not matter
        low, high = data["ap"].min() * 100, data["ap"].max() * 100
        panels[-1].set_xlim(low - 0.15 * (high - low) - 0.5, high + 0.15 * (high - low) + 0.5)
    label_axes(panels[-1], "mean AP of the candidates that use it, with 95 % interval")
    return figure


def draw_rank_agreement(data: pd.DataFrame) -> Figure:
    """Scatter of `frame.rank_agreement`: proxy against long training, with Spearman's rank correlation."""
    figure = Figure(figsize=(5.2, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for inherit, colour, marker in ((True, COLOURS[0], "o"), (False, COLOURS[1], "s")):
        rows = data[data["inherit"] == inherit]
        if len(rows):
            label = "neck and head inherited" if inherit else "not inherited"
            axes.scatter(
                rows["proxy"] * 100, rows["long"] * 100, s=36, color=colour, marker=marker, label=label, zorder=3
            )
    correlation = spearman(data["proxy"].tolist(), data["long"].tolist())
    axes.set_title(f"Spearman's rank correlation {correlation:.2f} over {len(data)} formulas", fontsize=10.5)
    if data["inherit"].nunique() > 1:
        axes.legend(frameon=False, fontsize=9)
    label_axes(axes, "AP in the proxy", "AP after long training")
    return figure


def draw_comparison(data: pd.DataFrame, baseline: str) -> Figure:
    """Forest plot of `frame.paired_differences`: an arm a row, paired difference to `baseline` and interval."""
    rows = data[data["arm"] != baseline].iloc[::-1].reset_index(drop=True)
    figure = Figure(figsize=(8.2, 1.3 + 0.42 * max(1, len(rows))), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    _intervals(axes, rows, rows["difference"], COLOURS[0])
    axes.set_yticks(range(len(rows)), rows["arm"].tolist())
    axes.set_ylim(-0.6, len(rows) - 0.4)
    beside = axes.secondary_yaxis("right")
    notes = [f"{ap * 100:.1f} AP, {pairs} pairs" for ap, pairs in zip(rows["mean"], rows["pairs"], strict=True)]
    beside.set_yticks(range(len(rows)), notes)
    beside.tick_params(length=0, labelsize=9)
    beside.spines["right"].set_visible(False)
    base = data.loc[data["arm"] == baseline, "mean"].iloc[0] * 100
    label_axes(axes, f"paired difference in AP to {baseline} ({base:.1f} AP), mean with 95 % interval")
    return figure


def _intervals(axes: Axes, rows: pd.DataFrame, middle: pd.Series[Any], colour: str) -> None:
    """Dots with interval bars on rows 0, 1, …; hollow where a single value has no interval."""
    for y, (value, low, high) in enumerate(zip(middle * 100, rows["low"] * 100, rows["high"] * 100, strict=True)):
        single = pd.isna(low)
        if not single:
            axes.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(value, y, "o", color=colour, markersize=6, markerfacecolor="white" if single else colour)


def label_axes(axes: Axes, x: str, y: str | None = None) -> None:
    """Label one panel, and give all panels of its figure the grid, spines and type of every picture here."""
    axes.set_xlabel(x, fontsize=10)
    if y is not None:
        axes.set_ylabel(y, fontsize=10)
    for each in axes.figure.axes:
        each.grid(color="#e4e4e4", linewidth=0.7)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
