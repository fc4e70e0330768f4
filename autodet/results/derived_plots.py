"""Pictures of a derived detector: how it came about, step by step, and what became of the base's architecture.

Both are lists of text and bars rather than plots: their axes count inches from the figure's upper left corner.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from autodet.detectors import DetectorSpec
from autodet.records import Record
from autodet.results.lineage import actions_of, cost_of, gain_of, lineage, parent_of, teacher_of
from autodet.results.plots import COLOURS, DPI, GREY

BLUE, ORANGE = COLOURS[0], COLOURS[1]
INK, PALE = "#222222", "#c4c4c4"
LINE = 0.17  # inches between lines of text
TEXT: dict[str, Any] = {"va": "center", "parse_math": False}

# Of a lineage's picture, in inches.
LINEAGE_WIDTH = 8.8
SPINE = 1.25
STUB = 0.13  # between siblings
MOST_STUBS = 6
ACTION, TEACHER, AP, GAIN, RATIO, EPOCHS = 1.65, 4.5, 7.25, 7.7, 8.2, 8.7
ACTION_CHARACTERS, TEACHER_CHARACTERS = 40, 34

# Of an architecture's picture, in inches.
PANEL, PANEL_WIDTH = (0.15, 4.35), 4.0
BAR, BAR_WIDTH, BAR_HEIGHT = 0.8, 2.0, 0.16  # begin within the panel, of the widest, of the outer bar
HIDDEN = ("family", "body", "labels", "min_size", "max_size", "proposals", "neck_width", "head_width", "head_depth")
VALUE_CHARACTERS = 32


def draw_lineage(records: Sequence[Record], derived: int) -> Figure:
    """The derived detector's ancestors, the base on top: what was changed, who taught, AP, latency ratio, epochs.

    Left of each step are its siblings, children of the same parent that were not taken further: grey dots, hollow where
    they did not complete. Gains in AP are over the parent, epochs of the whole lineage.
    """
    path = lineage(records, derived)
    lines = [max(1, len(_action_lines(record)), len(_teacher_lines(record))) for record in path]
    heights = [0.15 + LINE * count for count in lines]
    figure, axes = _canvas(LINEAGE_WIDTH, 0.45 + sum(heights))
    _lineage_head(axes)
    middle, before = 0.45, None
    for record, height in zip(path, heights, strict=True):
        middle += height / 2
        if before is not None:
            axes.plot([SPINE, SPINE], [before, middle], color=ORANGE, linewidth=1.4, zorder=1)
        _draw_siblings(axes, _siblings(records, record), before, middle)
        _draw_step(axes, record, path, middle)
        before, middle = middle, middle + height / 2
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose only axes count inches, downwards, and are not shown."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def _lineage_head(axes: Axes) -> None:
    style: dict[str, Any] = {**TEXT, "fontsize": 8.5, "color": GREY}
    axes.text(SPINE, 0.2, "siblings, step", ha="right", **style)
    axes.text(ACTION, 0.2, "what was changed", **style)
    axes.text(TEACHER, 0.2, "teacher", **style)
    for x, name in ((AP, "AP"), (GAIN, "gain"), (RATIO, "ratio"), (EPOCHS, "epochs")):
        axes.text(x, 0.2, name, ha="right", **style)
    axes.plot([0.1, LINEAGE_WIDTH - 0.1], [0.36, 0.36], color=PALE, linewidth=0.8)


def _draw_step(axes: Axes, record: Record, path: Sequence[Record], y: float) -> None:
    """One line of the list; the base and the derived detector are set bold."""
    ends = record in (path[0], path[-1])
    style: dict[str, Any] = {**TEXT, "fontsize": 9, "color": INK, "weight": "bold" if ends else "normal"}
    axes.plot(SPINE, y, "o", color=ORANGE, markersize=9 if ends else 7, zorder=3)
    axes.text(SPINE + 0.12, y, str(record.id), **{**style, "fontsize": 8, "color": ORANGE})
    _write_lines(axes, ACTION, y, _action_lines(record), {**style, "fontsize": 8.5})
    _write_lines(axes, TEACHER, y, _teacher_lines(record), {**style, "fontsize": 8, "weight": "normal"})
    parent = next((other for other in path if other.id == parent_of(record)), None)
    gain, ratio = gain_of(record, parent), cost_of(record)
    axes.text(AP, y, "–" if record.ap is None else f"{100 * record.ap:.1f}", ha="right", **style)
    axes.text(GAIN, y, "" if gain is None else f"{100 * gain:+.1f}", ha="right", **{**style, "color": GREY})
    axes.text(RATIO, y, "–" if ratio is None else f"{ratio:.2f}", ha="right", **style)
    axes.text(EPOCHS, y, str((record.student or {}).get("epochs", "–")), ha="right", **style)


def _write_lines(axes: Axes, x: float, y: float, lines: Sequence[str], style: dict[str, Any]) -> None:
    for number, line in enumerate(lines):
        axes.text(x, y + LINE * (number - (len(lines) - 1) / 2), line, **style)


def _action_lines(record: Record) -> list[str]:
    """A line an action, broken where it is too long."""
    actions = actions_of(record).split(" > ")
    return [line for action in actions for line in textwrap.wrap(action, ACTION_CHARACTERS, subsequent_indent="   ")]


def _teacher_lines(record: Record) -> list[str]:
    name = teacher_of(record)
    return ["–"] if name == "none" else textwrap.wrap(name, TEACHER_CHARACTERS)


def _siblings(records: Sequence[Record], record: Record) -> list[Record]:
    """The other children of a candidate's parent."""
    parent = parent_of(record)
    return [r for r in records if parent is not None and parent_of(r) == parent and r.id != record.id]


def _draw_siblings(axes: Axes, siblings: Sequence[Record], before: float | None, y: float) -> None:
    if before is None or not siblings:
        return
    shown = siblings[:MOST_STUBS]
    end = SPINE - 0.2 - STUB * (len(shown) - 1)
    axes.plot([SPINE, SPINE - 0.12, end], [before, y, y], color=PALE, linewidth=0.9, zorder=0)
    for place, record in enumerate(shown):
        face = PALE if record.status == "completed" else "white"
        x = SPINE - 0.2 - STUB * place
        axes.plot(x, y, "o", markersize=5, markerfacecolor=face, markeredgecolor=PALE, zorder=2)
    if len(siblings) > len(shown):
        axes.text(end - 0.1, y, f"+{len(siblings) - len(shown)}", ha="right", fontsize=7, color=GREY, **TEXT)


def draw_architectures(base: str, derived: str, titles: tuple[str, str] = ("base", "derived")) -> Figure:
    """Two detectors' specs side by side: a bar a block, then neck, head, image size, and so on.

    Light bars are output widths, dark ones inner widths, in channels and on one scale. What differs from the base is
    orange; blocks are compared by their place in the stage.
    """
    specs = DetectorSpec.parse(base), DetectorSpec.parse(derived)
    bodies = [_blocks(spec) for spec in specs]
    places = sorted({*bodies[0], *bodies[1]})
    settings = [settings_of(spec, other) for spec, other in (specs, specs[::-1])]
    names = list(dict.fromkeys([*settings[0], *settings[1]]))
    wrapped = [{name: textwrap.wrap(s.get(name, "–"), VALUE_CHARACTERS) for name in names} for s in settings]
    heights = [0.08 + LINE * max(len(side[name]) for side in wrapped) for name in names]
    stages = len({stage for stage, _ in places})
    top = 0.85 + 0.21 * len(places) + 0.12 * stages
    figure, axes = _canvas(sum(PANEL) + PANEL_WIDTH, top + 0.15 + sum(heights) + 0.1)
    unit = BAR_WIDTH / max(width for body in bodies for pair in body.values() for width in pair)
    _architecture_head(axes, titles)
    for x, body, side in zip(PANEL, bodies, wrapped, strict=True):
        _draw_body(axes, x, body, bodies[0], places, unit)
        _draw_settings(axes, x, top + 0.1, side, wrapped[0], heights)
    return figure


Blocks = dict[tuple[int, int], tuple[int, int]]


def _blocks(spec: DetectorSpec) -> Blocks:
    """(stage, block) → (output width, inner width), in channels; the stem is stage 0 and has one width."""
    found: Blocks = {(0, 0): (spec.body.stem, 0)}
    for number, stage in enumerate(spec.body.stages, 1):
        found |= {(number, block): (stage.width, inner) for block, inner in enumerate(stage.inner)}
    return found


def settings_of(spec: DetectorSpec, other: DetectorSpec) -> dict[str, str]:
    """What a detector is beside its body, in words: what searches change, and whatever else differs from another's."""
    found = {"neck width": str(spec.neck_width)}
    if spec.two_stage:
        found |= {"head width": str(spec.head_width), "proposals": str(spec.proposals[1])}
    else:
        found["head depth"] = str(spec.head_depth)
    found["image size"] = f"{spec.min_size}, longer side to {spec.max_size}"
    for field in fields(spec):
        mine, theirs = getattr(spec, field.name), getattr(other, field.name)
        if field.name not in HIDDEN and mine != theirs:
            found[field.name.replace("_", " ")] = str(mine).strip("()")
    return found


def _architecture_head(axes: Axes, titles: tuple[str, str]) -> None:
    for x, title in zip(PANEL, titles, strict=True):
        axes.text(x, 0.22, title, fontsize=10.5, weight="bold", color=INK, **TEXT)
    note = "light: output width, dark: inner width, in channels; orange: not as in the base"
    axes.text(PANEL[0], 0.5, note, fontsize=8.5, color=GREY, **TEXT)


def _draw_body(
    axes: Axes, x: float, body: Blocks, base: Blocks, places: Sequence[tuple[int, int]], unit: float
) -> None:
    """A bar for each place; a dashed frame where the other body has a block and this one has none."""
    y, stage = 0.75, -1
    for place in places:
        if place[0] != stage:
            stage = place[0]
            y += 0.12
            axes.text(x, y, f"stage {stage}" if stage else "stem", fontsize=9, color=INK, **TEXT)
        changed = body.get(place) != base.get(place)
        if place in body:
            _draw_block(axes, x + BAR, y, body[place], unit, changed)
        else:
            outline = Rectangle((x + BAR, y - BAR_HEIGHT / 2), 0.5, BAR_HEIGHT, fill=False, edgecolor=GREY)
            outline.set_linestyle(":")
            axes.add_patch(outline)
            axes.text(x + BAR + 0.56, y, "no block", fontsize=7.5, color=ORANGE if changed else GREY, **TEXT)
        y += 0.21


def _draw_block(axes: Axes, x: float, y: float, widths: tuple[int, int], unit: float, changed: bool) -> None:
    outer, inner = widths
    light, dark = ("#f3c9ad", ORANGE) if changed else ("#c3dcee", BLUE)
    axes.add_patch(Rectangle((x, y - BAR_HEIGHT / 2), outer * unit, BAR_HEIGHT, facecolor=light, linewidth=0))
    axes.add_patch(Rectangle((x, y - BAR_HEIGHT / 4), inner * unit, BAR_HEIGHT / 2, facecolor=dark, linewidth=0))
    text = f"{outer}, inner {inner}" if inner else str(outer)
    weight = "bold" if changed else "normal"
    axes.text(
        x + max(widths) * unit + 0.07, y, text, fontsize=8, color=ORANGE if changed else INK, weight=weight, **TEXT
    )


def _draw_settings(
    axes: Axes,
    x: float,
    y: float,
    side: dict[str, list[str]],
    base: dict[str, list[str]],
    heights: Sequence[float],
) -> None:
    axes.plot([x, x + PANEL_WIDTH - 0.3], [y, y], color=PALE, linewidth=0.8)
    for (name, lines), height in zip(side.items(), heights, strict=True):
        changed = lines != base[name]
        style: dict[str, Any] = {**TEXT, "fontsize": 8.5, "color": ORANGE if changed else INK}
        axes.text(x, y + height / 2, name, **style)
        _write_lines(axes, x + 1.45, y + height / 2, lines, {**style, "weight": "bold" if changed else "normal"})
        y += height
