"""Pictures of a joint search, from records alone: the front and its growth, the teachers, and the derived detector.

AP is 0–1 in the data and ×100 in the pictures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autodet.records import Record
from autodet.results.derived_plots import draw_architectures, draw_lineage
from autodet.results.labels import Label, write_labels
from autodet.results.lineage import (
    COST,
    base_of,
    evaluated,
    front,
    gain_of,
    hypervolume_progress,
    lineage,
    parent_of,
    teacher_of,
)
from autodet.results.plots import COLOURS, DPI, GREY, label_axes

__all__ = ["draw_architectures", "draw_front", "draw_hypervolume", "draw_lineage", "draw_teachers", "teacher_gains"]

BLUE, ORANGE, GREEN = COLOURS[0], COLOURS[1], COLOURS[2]
DOTS = (COLOURS[4], COLOURS[3], COLOURS[5], GREY)  # of a search's phases, in their order
INK = "#222222"
POINTS = 100  # AP in pictures: points
TEACHER_ROWS = 14
TEACHER_CHARACTERS = 40  # of a teacher's name in a line

AXES = {"latency_ratio": "latency, ratio to the base", "macs_g": "MACs (10⁹)", "params_m": "parameters (10⁶)"}

Point = tuple[float, float]  # cost, AP
Seen = tuple[float, float, Record]


def draw_front(
    records: Sequence[Record],
    derived: int | None = None,
    target: float | None = None,
    points: Mapping[str, Point] | None = None,
    by: str = COST,
) -> Figure:
    """AP against a cost: completed candidates, their front, and the derived detector's lineage, numbered.

    derived: number of the candidate; target: a cost to mark; points: name → (cost, AP of 0–1) of detectors beside the
    search; by: the cost, one of `AXES`. What is far below all of these lies on the lower edge, as triangles.
    """
    figure = Figure(figsize=(7.6, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    path = evaluated([] if derived is None else lineage(records, derived), by)
    found, named = evaluated(records, by), dict(points or {})
    first = base_of(records)
    base = evaluated([] if first is None else [first], by)
    marked = [(cost, ap) for cost, ap, _ in [*path, *base]] + list(named.values())
    floor = _floor([ap for _, ap, _ in found], [ap for _, ap in marked])
    seen = _draw_candidates(axes, [each for each in found if each[2] is not first], floor)
    steps = _draw_steps(axes, evaluated(front(records, by), by), max((cost for cost, _, _ in found), default=0.0))
    labels = _draw_marked(axes, path, base, named)
    if target is not None:
        axes.axvline(target, color=GREY, linestyle=":", linewidth=1.4, label=f"target ratio {target:g}")
    _frame_points(axes, [*seen, *marked], floor, target)
    label_axes(axes, AXES[by], "AP")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    walk = [(cost, POINTS * ap) for cost, ap, _ in path]
    upright = [] if target is None else [(target, y) for y in axes.get_ylim()]
    write_labels(axes, labels, [(cost, POINTS * ap) for cost, ap in seen], [steps, walk, upright])
    return figure


def _floor(aps: Sequence[float], marked: Sequence[float]) -> float:
    """The lowest AP of an axis: as far below the middle as the best is above it, twice over, but all marked ones."""
    if not aps:
        return min(marked, default=0.0)
    middle = float(pd.Series(aps).median())
    low = max(min(aps), middle - 2 * max(max(aps) - middle, 0.01))
    return min([low, *marked])


def _draw_candidates(axes: Axes, found: Sequence[Seen], floor: float) -> list[Point]:
    """A light dot a completed candidate, a colour a phase; returns those that are not below the floor."""
    phases = list(dict.fromkeys(record.phase for _, _, record in found))
    for place, phase in enumerate(phases):
        colour = DOTS[min(place, len(DOTS) - 1)]
        of_phase = [(cost, ap) for cost, ap, record in found if record.phase == phase]
        above = [(cost, POINTS * ap) for cost, ap in of_phase if ap >= floor]
        below = [(cost, POINTS * floor) for cost, ap in of_phase if ap < floor]
        label = "candidates" if len(phases) == 1 else f"candidates: {phase}"
        look: dict[str, Any] = {"color": colour, "alpha": 0.55, "linewidths": 0}
        axes.scatter(*_columns(above), s=26, label=label, zorder=2, **look)
        axes.scatter(*_columns(below), s=30, marker="v", clip_on=False, zorder=2, **look)
    return [(cost, ap) for cost, ap, _ in found if ap >= floor]


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _draw_steps(axes: Axes, best: Sequence[Seen], end: float) -> list[Point]:
    """The best AP that a cost allows, up to a cost; returns the line's corners."""
    if best:
        costs, aps = _columns([(cost, POINTS * ap) for cost, ap, _ in best])
        axes.step([*costs, end], [*aps, aps[-1]], where="post", color=BLUE, linewidth=1.3, label="front", zorder=3)
        return [(x, ap) for low, high, ap in zip(costs, [*costs[1:], end], aps, strict=True) for x in (low, high)]
    return []


def _draw_marked(axes: Axes, path: Sequence[Seen], base: Sequence[Seen], named: Mapping[str, Point]) -> list[Label]:
    """Lineage, base, derived and named detectors; returns their labels, the most important first."""
    labels: list[Label] = []
    steps = [(cost, POINTS * ap, record.id) for cost, ap, record in path]
    if steps:
        x, y = [cost for cost, _, _ in steps], [ap for _, ap, _ in steps]
        axes.plot(x, y, "-o", color=ORANGE, linewidth=1.1, markersize=4, alpha=0.9, label="lineage", zorder=4)
        axes.plot(x[-1], y[-1], "*", color=ORANGE, markersize=15, markeredgecolor="white", zorder=6)
        labels.append(Label(f"derived ({steps[-1][2]})", x[-1], y[-1], ORANGE, 9.5))
    for cost, ap, _ in base:
        axes.plot(cost, POINTS * ap, "s", color=INK, markersize=8, markeredgecolor="white", zorder=5)
        labels.append(Label("base", cost, POINTS * ap, INK, 9.5))
    for name, (cost, ap) in named.items():
        axes.plot(cost, POINTS * ap, "D", color=GREEN, markersize=7, markeredgecolor="white", zorder=5)
        labels.append(Label(name, cost, POINTS * ap, GREEN, 9.0))
    return labels + [Label(str(id), cost, ap, ORANGE, 7.5) for cost, ap, id in reversed(steps[1:-1])]


def _frame_points(axes: Axes, points: Sequence[Point], floor: float, target: float | None) -> None:
    """Limits that leave room for labels; the lower edge stays where the triangles lie."""
    if not points:
        return
    costs = [cost for cost, _ in points] + ([] if target is None else [target])
    wide = 0.06 * (max(costs) - min(costs)) + 0.02
    high = max(ap for _, ap in points)
    axes.set_xlim(min(costs) - wide, max(costs) + wide)
    axes.set_ylim(POINTS * floor - 0.4, POINTS * (high + 0.08 * (high - floor)) + 0.4)


def draw_hypervolume(records: Sequence[Record], by: str = COST) -> Figure:
    """The front's hypervolume against the candidates that have ended; a dot where it grew."""
    figure = Figure(figsize=(7.2, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    data = hypervolume_progress(records, by)
    values = POINTS * data["hypervolume"].astype("float64")
    grew = values > values.cummax().shift(fill_value=0.0)
    axes.step(data["candidates"], values, where="post", color=BLUE, linewidth=1.6)
    axes.plot(data["candidates"][grew], values[grew], "o", color=BLUE, markersize=4)
    label_axes(axes, "candidates that have ended", f"hypervolume of the front\n(AP × {AXES[by]})")
    return figure


def teacher_gains(records: Sequence[Record]) -> pd.DataFrame:
    """What children gained on their parents. Columns: teacher, id, gain (AP of 0–1); a row a completed child.

    An association, not an effect of the teacher: parents, actions and training differ as well.
    """
    known = {record.id: record for record in records}
    rows = []
    for record in records:
        parent = parent_of(record)
        gain = None if parent is None else gain_of(record, known.get(parent))
        if gain is not None:
            rows.append((teacher_of(record), record.id, gain))
    return pd.DataFrame(rows, columns=["teacher", "id", "gain"]).astype({"gain": "float64"})


def draw_teachers(records: Sequence[Record], derived: int | None = None) -> Figure:
    """AP gain over the parent, a row a teacher, the best median on top: a dot a child, the lineage's steps numbered.

    Only the teachers that were chosen most often have rows of their own. Great losses lie on the left edge.
    """
    gains = teacher_gains(records)
    steps = set() if derived is None else {record.id for record in lineage(records, derived)}
    rows = _teacher_rows(gains, steps)
    height = sum(0.16 * (1 + name.count("\n")) + 0.18 for name in rows)
    figure = Figure(figsize=(7.6, 1.1 + max(0.5, height)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    floor = _floor(gains["gain"].tolist(), gains[gains["id"].isin(steps)]["gain"].tolist())
    labels = []
    axes.axvline(0, color=GREY, linewidth=1)
    for y, (_, of_teacher) in enumerate(rows.items()):
        shown = of_teacher["gain"].clip(lower=floor) * POINTS
        below = of_teacher["gain"] < floor
        axes.scatter(shown[~below], [y] * int((~below).sum()), s=24, color=COLOURS[4], alpha=0.55, linewidths=0)
        axes.scatter(shown[below], [y] * int(below.sum()), s=26, color=COLOURS[4], alpha=0.55, marker="<", linewidths=0)
        axes.plot([POINTS * of_teacher["gain"].median()] * 2, [y - 0.3, y + 0.3], color=BLUE, linewidth=1.6)
        chosen = of_teacher["id"].isin(steps)
        axes.plot(shown[chosen], [y] * int(chosen.sum()), "o", color=ORANGE, markersize=5.5)
        labels += [Label(str(id), x, y, ORANGE) for id, x in zip(of_teacher["id"][chosen], shown[chosen], strict=True)]
    axes.set_yticks(range(len(rows)), list(rows), parse_math=False)
    axes.set_ylim(-0.6, max(1, len(rows)) - 0.4)
    label_axes(axes, "AP gain over the parent")
    axes.tick_params(axis="y", labelsize=8)
    write_labels(axes, labels)
    return figure


def _teacher_rows(gains: pd.DataFrame, steps: set[int]) -> dict[str, pd.DataFrame]:
    """Name with the number of children → its rows, the best median last; the rarest teachers as one, the first."""
    counts = gains["teacher"].value_counts()
    on_path = gains["teacher"][gains["id"].isin(steps)].unique().tolist()
    kept = list(dict.fromkeys([*on_path, *counts.index]))[:TEACHER_ROWS]
    groups = {name: gains[gains["teacher"] == name] for name in kept}
    ordered = sorted(groups, key=lambda name: float(groups[name]["gain"].median()))
    rows = {_wrapped(f"{name}  ({len(groups[name])})"): groups[name] for name in ordered}
    others = gains[~gains["teacher"].isin(kept)]
    if len(others):
        name = f"{others['teacher'].nunique()} other teachers  ({len(others)})"
        return {name: others, **rows}
    return rows


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, TEACHER_CHARACTERS))
