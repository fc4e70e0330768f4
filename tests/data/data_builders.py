"""Tiny COCO folders for the tests of the data room."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Document = dict[str, Any]
WIDTH, HEIGHT = 40, 30
SHARED = Path(__file__).parents[3] / "shared" / "data"


def document(split: str) -> Document:
    """Three images 40×30: the first with two objects, the second with one and a crowd, the third empty."""
    images = [
        {"id": 10 * number, "file_name": f"{split}_{number}.jpg", "width": WIDTH, "height": HEIGHT}
        for number in (1, 2, 3)
    ]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 600, 600]}
    annotations = [
        annotation(1, 10, 3, [2, 3, 10, 20], area=150, segmentation=[[2, 3, 12, 3, 12, 23, 2, 23]]),
        annotation(2, 10, 7, [20.5, 4, 8, 6]),
        annotation(4, 20, 7, [0, 0, 20, 30], iscrowd=1, segmentation=crowd),
        annotation(9, 20, 3, [15, 15, 10, 10]),
    ]
    return {"images": images, "annotations": annotations, "categories": [category(7, "cat"), category(3, "dog")]}


def annotation(id_: int, image: int, category_id: int, box: list[float], **more: Any) -> Document:
    return {"id": id_, "image_id": image, "category_id": category_id, "bbox": box, **more}


def category(id_: int, name: str) -> Document:
    return {"id": id_, "name": name}


def write_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 0) -> None:
    """A noisy picture of `size` (width, height) in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_split(
    root: Path, split: str, edit: Callable[[Document], object] = lambda content: None, layout: str = "plain"
) -> Path:
    """Write one split, its document changed by `edit`; images are those of the unchanged document."""
    content = document(split)
    beside = root / ("valid" if split == "val" else split)
    path, folder = {
        "plain": (root / f"{split}.json", root / "images"),
        "coco": (root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"),
        "beside": (beside / "_annotations.coco.json", beside),
    }[layout]
    for number, image in enumerate(content["images"]):
        write_image(folder / image["file_name"], seed=number)
    edit(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path
