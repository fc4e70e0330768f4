"""Labels beside the dots of a picture that cover neither each other nor the dots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib import patheffects
from matplotlib.axes import Axes

GLYPH = (0.62, 1.3)  # width of a character and height of a line in units of the font's size
DOT = 4.0  # pixels from a dot's middle that labels keep free
DISTANCES = (7.0, 15.0, 26.0)  # pixels between a dot's middle and its label

Corner = tuple[float, float]
Lines = Sequence[Sequence[Corner]]


class Label(NamedTuple):
    """A text for the dot at (x, y), in the data's units; size in points."""

    text: str
    x: float
    y: float
    colour: str
    size: float = 8.0


def place_labels(
    dots: Sequence[Corner],
    sizes: Sequence[Corner],
    width: float,
    height: float,
    others: Sequence[Corner] = (),
    lines: Sequence[Corner] = (),
) -> list[Corner | None]:
    """Lower left corners of the labels of some dots, in order of importance; None where there is no free place.

    dots: (x, y); sizes: width and height of their labels; others: dots without labels; lines: points along lines, which
    are covered only where there is no other place; all in pixels of a picture of width × height. The nearest free place
    wins; right and left come before above and below.
    """
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in (*dots, *others)]
    corners: list[Corner | None] = []
    for (x, y), (w, h) in zip(dots, sizes, strict=True):
        places = [(a, b, a + w, b + h) for a, b in _places((x, y), (w, h))]
        inside = [place for place in places if min(place) >= 0 and place[2] <= width and place[3] <= height]
        free = [place for place in inside if not any(_overlap(place, other) for other in taken)]
        clear = [place for place in free if not any(_overlap(place, (*point, *point)) for point in lines)]
        chosen = next(iter(clear or free), None)
        taken += [chosen] if chosen else []
        corners.append(chosen[:2] if chosen else None)
    return corners


def _places(dot: Corner, size: Corner) -> list[Corner]:
    (x, y), (w, h) = dot, size
    places = []
    for d in DISTANCES:
        near = 0.7 * d  # along both axes
        places += [(x + d, y - h / 2), (x - d - w, y - h / 2), (x - w / 2, y + d), (x - w / 2, y - d - h)]
        places += [(a, b) for a in (x + near, x - near - w) for b in (y + near, y - near - h)]
    return places


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def write_labels(axes: Axes, labels: Sequence[Label], others: Sequence[Corner] = (), lines: Lines = ()) -> None:
    """Write labels, the most important first, into finished axes; those without a free place are left out.

    others: dots (x, y) that no label may cover; lines: corners of lines that none should; in the data's units.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # only then the layout is known
    pixel = figure.dpi / 72
    left, bottom = axes.bbox.x0, axes.bbox.y0

    def pixels(x: float, y: float) -> Corner:
        across, up = axes.transData.transform((x, y))
        return float(across - left), float(up - bottom)

    dots = [pixels(label.x, label.y) for label in labels]
    sizes = [(GLYPH[0] * len(label.text) * label.size * pixel, GLYPH[1] * label.size * pixel) for label in labels]
    along = [point for line in lines for point in _along([pixels(x, y) for x, y in line])]
    free = [pixels(x, y) for x, y in others]
    corners = place_labels(dots, sizes, axes.bbox.width, axes.bbox.height, free, along)
    for label, dot, corner in zip(labels, dots, corners, strict=True):
        if corner is not None:
            _write(axes, label, ((corner[0] - dot[0]) / pixel, (corner[1] - dot[1]) / pixel))


def _along(corners: Sequence[Corner]) -> list[Corner]:
    """Points along a line of so many corners, `DOT` pixels from one another."""
    points = []
    for (x, y), (a, b) in itertools.pairwise(corners):
        steps = max(1, round(math.hypot(a - x, b - y) / DOT))
        points += [(x + (a - x) * i / steps, y + (b - y) * i / steps) for i in range(steps + 1)]
    return points


def _write(axes: Axes, label: Label, offset: Corner) -> None:
    text = axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=offset,
        textcoords="offset points",
        color=label.colour,
        fontsize=label.size,
        va="bottom",
        parse_math=False,
        path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
    )
    text.set_in_layout(False)
