"""What the pictures of "shapes" are made of: forms, clutter of no class, and textures. All random choices come from
the generator given."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SUPERSAMPLING = 4
COLOUR_SPREAD = 30.0  # standard deviation of an object's colour around its form's
MIN_CONTRAST = 40.0  # distance in RGB between an object's mean colour and what it covers

Rng = np.random.Generator
Array = npt.NDArray[np.float32]

# Forms


def _regular(corners: int, inner: float | None = None) -> Array:
    """Corners N×2 on the unit circle; with `inner` every second one lies on a circle of that radius."""
    angles = np.arange(corners) * (2 * math.pi / corners)
    radii = np.ones(corners)
    if inner is not None:
        radii[1::2] = inner
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1).astype(np.float32)


# Outline and, for the ring, the radius of the hole.
FORMS: dict[str, tuple[Array, float]] = {
    "disc": (_regular(48), 0.0),
    "square": (_regular(4), 0.0),
    "triangle": (_regular(3), 0.0),
    "star": (_regular(10, inner=0.45), 0.0),
    "ring": (_regular(48), 0.55),
}


# Colour helps to find an object, and tells three groups apart; within a group, form alone decides.
COLOURS: dict[str, Array] = {
    shape: np.array(colour, dtype=np.float32)
    for shape, colour in {
        "disc": (205, 70, 60),
        "ring": (205, 70, 60),
        "square": (60, 90, 205),
        "triangle": (60, 90, 205),
        "star": (80, 170, 60),
    }.items()
}


def draw_form(rng: Rng, shape: str, diameter: float) -> Array:
    """Coverage P×P in [0, 1] of a form, turned and slightly stretched at random."""
    outline, hole = FORMS[shape]
    turn, axis, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0, math.pi), rng.uniform(0.8, 1.0)
    transform = _rotation(axis) @ np.diag([1.0, stretch]) @ _rotation(turn) * (diameter / 2)
    side = math.ceil(diameter) + 2
    shift = side / 2 + rng.uniform(-0.5, 0.5, 2)
    image = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for scale, fill in ((1.0, 255), (hole, 0)):
        if scale:
            points = (outline * scale @ transform.T + shift) * SUPERSAMPLING
            draw.polygon([(float(x), float(y)) for x, y in points], fill=fill)
    return _coverage(image, SUPERSAMPLING)


def _coverage(image: Image.Image, times: int) -> Array:
    """A drawing of `times` the size as the share in [0, 1] of every pixel that is covered."""
    return np.asarray(image.reduce(times), dtype=np.float32) / np.float32(255)


def _rotation(angle: float) -> npt.NDArray[np.float64]:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


# Clutter


def stroke(rng: Rng, size: tuple[int, int], unit: float) -> Array:
    """Coverage H×W of a thin line of up to three bends across the image."""
    image, draw, place = _sketch(rng, size)
    points = [place() for _ in range(rng.integers(2, 5))]
    draw.line(points, fill=255, width=max(1, round(rng.uniform(0.7, 2.5) * unit * 2)), joint="curve")
    return _coverage(image, 2)


def _arc(rng: Rng, size: tuple[int, int], unit: float) -> Array:
    """Coverage H×W of an open arc: a ring's texture without its form."""
    image, draw, place = _sketch(rng, size)
    (x, y), start = place(), rng.uniform(0, 360)
    across, down = rng.uniform(15, 120, 2) * unit * 2
    width = max(1, round(rng.uniform(1.5, 6) * unit * 2))
    draw.arc((x, y, x + across, y + down), start, start + rng.uniform(40, 170), fill=255, width=width)
    return _coverage(image, 2)


def _blob(rng: Rng, size: tuple[int, int], unit: float) -> Array:
    """Coverage H×W of a long irregular polygon, no member of any class."""
    image, draw, place = _sketch(rng, size)
    centre = np.array(place())
    corners = int(rng.integers(4, 8))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    radii = rng.uniform(0.5, 1.0, corners) * rng.uniform(8, 45) * unit * 2
    points = np.stack([radii * np.cos(angles), 0.35 * radii * np.sin(angles)], axis=1)
    turned = points @ _rotation(rng.uniform(0, math.pi)).T + centre
    draw.polygon([(float(x), float(y)) for x, y in turned], fill=255)
    return _coverage(image, 2)


def _sketch(
    rng: Rng, size: tuple[int, int]
) -> tuple[Image.Image, ImageDraw.ImageDraw, Callable[[], tuple[float, float]]]:
    """An empty image of twice the size, its pen, and a function that draws a random point of it."""
    image = Image.new("L", (size[0] * 2, size[1] * 2))
    return image, ImageDraw.Draw(image), lambda: (rng.uniform(0, size[0] * 2), rng.uniform(0, size[1] * 2))


DISTRACTORS = (stroke, _arc, _blob)


def distractor(rng: Rng, size: tuple[int, int], unit: float) -> Array:
    return DISTRACTORS[rng.integers(len(DISTRACTORS))](rng, size, unit)


# Textures: patterns H×W in [0, 1] that mix two colours


def _plain(rng: Rng, height: int, width: int) -> Array:
    return np.full((height, width), rng.random(), dtype=np.float32)


def _gradient(rng: Rng, height: int, width: int) -> Array:
    ramp = _along(rng.uniform(0, 2 * math.pi), height, width)
    scaled: Array = (ramp - ramp.min()) / max(np.ptp(ramp), np.float32(1))
    return scaled


def _stripes(rng: Rng, height: int, width: int) -> Array:
    period, phase = rng.uniform(4, 24), rng.uniform(0, 2 * math.pi)
    wave = np.sin(_along(rng.uniform(0, 2 * math.pi), height, width) * np.float32(2 * math.pi / period) + phase)
    pattern: Array = np.clip(0.5 + rng.uniform(0.5, 3) * wave, 0, 1).astype(np.float32)
    return pattern


def _blotches(rng: Rng, height: int, width: int) -> Array:
    cell = rng.uniform(4, 32)
    coarse = rng.random((math.ceil(height / cell) + 1, math.ceil(width / cell) + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


PATTERNS = (_plain, _gradient, _stripes, _blotches)


def _along(angle: float, height: int, width: int) -> Array:
    """The coordinate H×W in pixels along a direction."""
    y, x = np.ogrid[0:height, 0:width]
    coordinate: Array = (x * math.cos(angle) + y * math.sin(angle)).astype(np.float32)
    return coordinate


def texture(rng: Rng, height: int, width: int, mean: Array | None = None) -> Array:
    """Colours H×W×3 in 0–255, around `mean` (RGB) or a random muted colour."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))](rng, height, width)
    centre = rng.uniform(80, 175) + rng.uniform(-25, 25, 3) if mean is None else mean
    amplitude = rng.normal(0, 45, 3).astype(np.float32)
    colours: Array = centre + (pattern[..., None] - np.float32(0.5)) * amplitude
    return colours


def contrasting_colour(rng: Rng, shape: str, covered: Array) -> Array:
    """A colour (RGB) near the form's own that can be told from the one it will cover."""
    colour = COLOURS[shape] + rng.normal(0, COLOUR_SPREAD, 3)
    while np.linalg.norm(colour - covered) < MIN_CONTRAST:
        colour = COLOURS[shape] + rng.normal(0, COLOUR_SPREAD, 3)
    return np.clip(colour, 0, 255).astype(np.float32)
