"""Detections of several detectors side by side on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from autodet.results.plots import DPI

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
TINT = 0.45  # of a mask's colour in the picture
PANEL_INCHES = 3.3
FONT_POINTS = 6.5
GLYPH = (0.62, 1.35)  # width of a character and height of a line in units of the font's size

Boxes = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """One image with what one detector (or the ground truth) sees in it.

    image: H×W×3 uint8; boxes: N×4 xyxy in its pixels; labels: N whole numbers; scores: N in 0–1, None for ground truth;
    masks: N×H×W, True inside the object, None where there are none.
    """

    title: str
    image: npt.NDArray[np.uint8]
    boxes: Boxes
    labels: npt.NDArray[np.int64]
    scores: Boxes | None = None
    masks: npt.NDArray[np.bool_] | None = None


def draw_detections(rows: Sequence[Sequence[Panel]], names: Mapping[int, str]) -> Figure:
    """A row an image, a column a detector (all rows alike, the first row's titles on top).

    names: label → name. The colour of a box and its mask tells its class (legend below) and its tag the score; with
    more classes than colours the tag also tells the class. A tag that would cover another one is left out.
    """
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(
            f"expected rows of one length ≥ 1, found lengths {[len(row) for row in rows]}; pad or drop rows"
        )
    ratios = [row[0].image.shape[0] / row[0].image.shape[1] for row in rows]
    columns = min(8, 2 * len(rows[0]))
    around = 0.45 + 0.25 * -(-len(names) // columns)  # titles, and the legend's lines
    size = (PANEL_INCHES * len(rows[0]), PANEL_INCHES * sum(ratios) + 0.08 * len(rows) + around)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=ratios)
    order = {label: i for i, label in enumerate(sorted(names))}
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            _draw_panel(axes[i, j], panel, names, order)
            if i == 0:
                axes[i, j].set_title(panel.title, fontsize=10.5)
    handles = [Line2D([], [], color=_colour(order[label]), linewidth=3, label=names[label]) for label in sorted(names)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False, fontsize=9.5
    )
    return figure


def place_tags(boxes: Boxes, sizes: Boxes, width: float, height: float) -> list[tuple[float, float] | None]:
    """Top-left corners of the tags of N boxes, in order of importance; None where there is no free place.

    boxes: N×4 xyxy; sizes: N×2, width and height of the tags; all in pixels of a width × height image. Tries above the
    box, then inside at the top, below, and at the right; tags stay in the image and never overlap.
    """
    taken: list[tuple[float, float, float, float]] = []
    corners: list[tuple[float, float] | None] = []
    for (x1, y1, x2, y2), (w, h) in zip(boxes.tolist(), sizes.tolist(), strict=True):
        places = ((x1, y1 - h), (x1, y1), (x1, y2), (x2 - w, y1 - h), (x2 - w, y2 - h))
        chosen = None
        for x, y in places:
            inside = x >= 0 and y >= 0 and x + w <= width and y + h <= height
            if inside and not any(x < r and left < x + w and y < b and top < y + h for left, top, r, b in taken):
                chosen = (x, y)
                taken.append((x, y, x + w, y + h))
                break
        corners.append(chosen)
    return corners


def tinted(panel: Panel, order: Mapping[int, int]) -> npt.NDArray[np.uint8]:
    """The panel's image, H×W×3, with every mask blended in by the colour of its class; the surest objects last.

    order: label → its class's place among the colours.
    """
    if panel.masks is None or not len(panel.masks):
        return panel.image
    pixels = panel.image.copy()
    ranks = range(len(panel.masks)) if panel.scores is None else np.argsort(panel.scores, kind="stable")
    for i in ranks:
        inside = panel.masks[i]
        colour = np.array(to_rgb(_colour(order[int(panel.labels[i])])), dtype=np.float32) * 255
        pixels[inside] = ((1 - TINT) * panel.image[inside] + TINT * colour).round()
    return pixels


def _draw_panel(axes: Axes, panel: Panel, names: Mapping[int, str], order: Mapping[int, int]) -> None:
    height, width = panel.image.shape[:2]
    axes.imshow(tinted(panel, order))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    ranks = np.arange(len(panel.boxes)) if panel.scores is None else np.argsort(-panel.scores, kind="stable")
    tags = [_tag(panel, int(i), names) for i in ranks]
    pixel = width / (PANEL_INCHES * 72)  # image pixels to a point of type
    sizes = np.array([[GLYPH[0] * len(t), GLYPH[1]] for t in tags]).reshape(-1, 2) * FONT_POINTS * pixel
    corners = place_tags(panel.boxes[ranks], sizes, width, height)
    for i, tag, (_, h), corner in zip(ranks, tags, sizes, corners, strict=True):
        colour = _colour(order[int(panel.labels[i])])
        x1, y1, x2, y2 = (float(v) for v in panel.boxes[i])
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.3))
        if tag and corner is not None:
            box: dict[str, Any] = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.9}
            ink = "black" if colour in ("#F0E442", "#E69F00", "#56B4E9") else "white"
            text = axes.text(corner[0], corner[1] + h / 2, tag, color=ink, fontsize=FONT_POINTS, va="center", bbox=box)
            text.set_in_layout(False)


def _tag(panel: Panel, index: int, names: Mapping[int, str]) -> str:
    words = [names[int(panel.labels[index])]] if len(names) > len(COLOURS) else []
    if panel.scores is not None:
        words.append(f"{panel.scores[index]:.2f}")
    return " ".join(words)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
