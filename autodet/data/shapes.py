"""Generated data set "shapes": five forms among clutter, written as a COCO folder in seconds.

The class is the form alone: colour, texture, rotation and size say nothing about it. Objects hide one another and leave
the image; strokes and blobs that belong to no class lie behind and, as thin strokes, in front of them. Boxes and masks
are those of the visible part, of which every object keeps at least 30 %.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from autodet.atomic import atomic_write_json
from autodet.data.drawing import FORMS, Array, Rng, contrasting_colour, distractor, draw_form, stroke, texture
from autodet.data.lock import file_lock

VERSION = 2  # raise when the pictures change
CATEGORY_IDS = {"disc": 1, "square": 2, "triangle": 4, "star": 7, "ring": 9}  # gaps on purpose, as in COCO
MANIFEST = "shapes.json"

MIN_VISIBLE = 0.3  # of an object's area
EMPTY_IMAGES = 0.08  # share of images without objects
DIAMETERS = (24.0, 110.0)  # pixels, in an image whose shorter side is 192
REFERENCE_SIDE = 192
MEAN_OBJECTS, MAX_OBJECTS = 7.0, 14
PLACEMENTS = 12  # tries before an object is given up
OVERLAP = 0.35  # share of objects placed next to another one
NOISE = 6.0  # standard deviation of the pixel noise
JPEG_QUALITY = 92

Mask = npt.NDArray[np.bool_]


def write_shapes(
    root: Path, n_train: int, n_val: int, n_test: int = 0, size: tuple[int, int] = (256, 192), seed: int = 0
) -> Path:
    """Write train.json, val.json, test.json (unless n_test is 0) and images/ into `root`, and return `root`.

    `size` is (width, height) in pixels. The content depends on the arguments alone (and the version of Pillow's JPEG
    encoder). A complete data set of the same arguments is left as it is, one of other arguments is replaced. Raises
    FileExistsError where `root` holds anything else.
    """
    root = Path(root)
    counts = {"train": n_train, "val": n_val, "test": n_test}
    manifest = {"generator": "shapes", "version": VERSION, "counts": counts, "size": list(size), "seed": seed}
    if min(n_train, n_val) < 1 or n_test < 0 or min(size) < 32:
        raise ValueError(f"expected n_train ≥ 1, n_val ≥ 1, n_test ≥ 0 and sides of at least 32 pixels: {manifest}")
    with file_lock(root.parent / f".{root.name}.lock"):
        if _is_complete(root, manifest):
            return root
        if root.exists() and any(root.iterdir()) and not (root / MANIFEST).is_file():
            raise FileExistsError(f"{root} holds something other than generated shapes: choose another folder")
        # Built beside its place and moved there as a whole, so that an interrupted run leaves nothing that looks done.
        partial = root.parent / f".{root.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "images").mkdir(parents=True)
        for number, (split, count) in enumerate(counts.items()):
            if count:
                _write_split(partial, split, count, size, [seed, number])
        atomic_write_json(partial / MANIFEST, manifest)
        shutil.rmtree(root, ignore_errors=True)
        partial.rename(root)
    return root


def _is_complete(root: Path, manifest: dict[str, Any]) -> bool:
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    counts = manifest["counts"]
    files = [root / f"{split}.json" for split, count in counts.items() if count]
    images = sum(1 for _ in (root / "images").glob("*.jpg"))
    return bool(found == manifest) and all(file.is_file() for file in files) and images == sum(counts.values())


def _write_split(root: Path, split: str, count: int, size: tuple[int, int], entropy: list[int]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        # The first image has objects, since a split without annotations would be refused.
        scene = draw_scene(np.random.default_rng([*entropy, number]), size, empty=None if number > 1 else False)
        name = f"{split}_{number:05d}.jpg"
        Image.fromarray(scene.pixels).save(root / "images" / name, quality=JPEG_QUALITY)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for shape, visible in scene.objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(shape, visible)})
    categories = [{"id": id_, "name": name} for name, id_ in CATEGORY_IDS.items()]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(document), encoding="utf-8")


def _annotation(shape: str, visible: Mask) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(visible.astype(np.uint8)))
    return {
        "category_id": CATEGORY_IDS[shape],
        "bbox": [float(value) for value in coco_mask.toBbox(code)],
        "area": float(visible.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(visible.shape), "counts": code["counts"].decode("ascii")},
    }


@dataclass
class Scene:
    """Pixels uint8 H×W×3, and per object its class and the mask H×W of its visible part."""

    pixels: npt.NDArray[np.uint8]
    objects: list[tuple[str, Mask]]


def draw_scene(rng: Rng, size: tuple[int, int], empty: bool | None = None) -> Scene:
    """One picture of `size` (width, height). `empty` says whether it has no objects; None leaves that to luck."""
    width, height = size
    unit = min(size) / REFERENCE_SIDE
    canvas = texture(rng, height, width)
    for _ in range(rng.integers(3, 8)):
        _paint(rng, canvas, distractor(rng, size, unit))
    if empty is None:
        empty = bool(rng.random() < EMPTY_IMAGES)
    objects: list[_Object] = []
    wanted = 0 if empty else min(MAX_OBJECTS, 1 + rng.poisson(MEAN_OBJECTS - 1))
    for _ in range(wanted):
        _add_object(rng, canvas, objects, unit)
    while not empty and not objects:
        _add_object(rng, canvas, objects, unit)
    for _ in range(rng.integers(0, 3)):
        cover = stroke(rng, size, unit)
        if _may_cover(cover >= 0.5, objects):
            _paint(rng, canvas, cover)
            _hide(cover >= 0.5, objects)
    noisy = canvas + rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(NOISE)
    return Scene(np.clip(noisy, 0, 255).astype(np.uint8), [(o.shape, o.visible) for o in objects])


@dataclass
class _Object:
    shape: str
    total: float  # area in pixels with nothing hidden, also what lies outside the image
    visible: Mask
    centre: tuple[float, float]  # x, y


def _add_object(rng: Rng, canvas: Array, objects: list[_Object], unit: float) -> None:
    """Paint one object where it hides no other too much; give up after PLACEMENTS tries."""
    height, width = canvas.shape[:2]
    shape = str(rng.choice(list(FORMS)))
    low, high = (math.log(diameter * unit) for diameter in DIAMETERS)
    diameter = math.exp(rng.uniform(low, high))
    patch = draw_form(rng, shape, diameter)
    for _ in range(PLACEMENTS):
        if objects and rng.random() < OVERLAP:
            near = objects[rng.integers(len(objects))].centre
            angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 0.7) * diameter
            centre = (near[0] + distance * math.cos(angle), near[1] + distance * math.sin(angle))
        else:
            centre = (rng.uniform(0, width), rng.uniform(0, height))
        cover = _placed(patch, centre, (height, width))
        candidate = _Object(shape, float((patch >= 0.5).sum()), cover >= 0.5, centre)
        if _is_visible(candidate) and _may_cover(candidate.visible, objects):
            _hide(candidate.visible, objects)
            _paint(rng, canvas, cover, contrasting_colour(rng, shape, canvas[candidate.visible].mean(axis=0)))
            objects.append(candidate)
            return


def _is_visible(candidate: _Object) -> bool:
    return float(candidate.visible.sum()) >= max(MIN_VISIBLE * candidate.total, 1.0)


def _may_cover(cover: Mask, objects: list[_Object]) -> bool:
    """Whether all objects stay visible enough under `cover`."""
    return all((o.visible & ~cover).sum() >= max(MIN_VISIBLE * o.total, 1.0) for o in objects)


def _hide(cover: Mask, objects: list[_Object]) -> None:
    for o in objects:
        o.visible &= ~cover


def _paint(rng: Rng, canvas: Array, cover: Array, mean: Array | None = None) -> None:
    """Blend a texture (around the colour `mean`) into `canvas` H×W×3 by `cover` H×W in [0, 1], in place."""
    rows, columns = np.flatnonzero(cover.any(axis=1)), np.flatnonzero(cover.any(axis=0))
    if rows.size:
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        part = canvas[box]
        part += cover[box][..., None] * (texture(rng, part.shape[0], part.shape[1], mean) - part)


def _placed(patch: Array, centre: tuple[float, float], shape: tuple[int, int]) -> Array:
    """Coverage of the whole image (`shape` = H, W) by a square patch around `centre` (x, y)."""
    side = patch.shape[0]
    left, top = round(centre[0] - side / 2), round(centre[1] - side / 2)
    cover = np.zeros(shape, dtype=np.float32)
    y0, y1, x0, x1 = max(top, 0), min(top + side, shape[0]), max(left, 0), min(left + side, shape[1])
    if y0 < y1 and x0 < x1:
        cover[y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    return cover
