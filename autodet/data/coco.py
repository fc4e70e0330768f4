"""COCO data sets in memory: where the files lie, what a split holds, and the ground truth for the evaluation.

Three layouts are recognised: `DIR/<split>.json` with `DIR/images/`; COCO's own
`DIR/annotations/instances_<split>2017.json` with `DIR/<split>2017/` (also 2014, and without a year); and that of
labelling tools, `DIR/<split>/_annotations.coco.json` beside the images (`valid` for val).
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodet.data.checks import (
    ANNOTATION_FIELDS,
    CATEGORY_FIELDS,
    IMAGE_FIELDS,
    Entry,
    Problems,
    by_id,
    check_annotations,
    check_image_files,
    checked_entries,
    load_document,
)
from autodet.data.masks import mask_problem

log = logging.getLogger(__name__)

MIN_SIDE = 1.0  # pixels; a box narrower than this after clipping teaches nothing and is dropped from training
ROUNDING = 0.011  # pixels; COCO rounds boxes to two decimals, which is no reason for a warning


@dataclass(frozen=True)
class Category:
    """A class of objects; `id` is the data set's own and may leave gaps."""

    id: int
    name: str


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its N annotations, in pixels of the file with its EXIF orientation applied.

    `boxes` are clipped to the image; `given_boxes` and `areas` are as the file has them, for the evaluation.
    `trainable` is False for crowds and for boxes below MIN_SIDE. A segmentation is a list of polygons, an RLE
    (dict with size and counts), or None.
    """

    id: int
    file_name: str  # relative to the image folder
    path: Path
    width: int
    height: int
    boxes: npt.NDArray[np.float32]  # N×4 xyxy
    given_boxes: npt.NDArray[np.float64]  # N×4 xywh
    areas: npt.NDArray[np.float64]  # N, square pixels
    category_ids: npt.NDArray[np.int64]  # N
    crowd: npt.NDArray[np.bool_]  # N
    trainable: npt.NDArray[np.bool_]  # N
    segmentations: tuple[Any, ...]  # N


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """One checked split. Images without objects are kept as negatives."""

    name: str
    categories: tuple[Category, ...]  # in order of id
    images: tuple[ImageRecord, ...]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def annotations_hash(self) -> str:
        """sha256 of everything but the pixels. `ImageCache.content_hash` covers the pixels too."""
        digest = hashlib.sha256(json.dumps([[c.id, c.name] for c in self.categories]).encode())
        for image in self.images:
            rows = zip(
                image.category_ids.tolist(),
                image.given_boxes.tolist(),
                image.areas.tolist(),
                image.crowd.tolist(),
                image.segmentations,
                strict=True,
            )
            content = [image.id, image.file_name, image.width, image.height, list(rows)]
            digest.update(json.dumps(content, sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def mask_problem(self) -> str | None:
        """Why no detector can learn masks from it; None where every object used in training has one."""
        objects = (
            (f"image {image.id}, bbox [{', '.join(f'{value:g}' for value in image.given_boxes[place])}]",
             image.segmentations[place], (image.height, image.width))
            for image in self.images
            for place in np.flatnonzero(image.trainable)
        )  # fmt: skip
        return mask_problem(self.name, objects)

    def subset(self, fraction: float, seed: int) -> "CocoDataset":
        """A random part with round(fraction × images) images, at least one, in the original order.

        Deterministic; for one seed a smaller part lies within a larger one. Raises ValueError unless 0 < fraction ≤ 1.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"expected a fraction above 0 and at most 1, found {fraction}")
        count = max(1, round(fraction * len(self.images)))
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.images))[:count])
        return replace(self, images=tuple(self.images[i] for i in chosen))

    def coco_dict(self) -> dict[str, Any]:
        """Ground truth for pycocotools: all annotations as the file gives them, crowds included.

        Annotation ids count from 1, because pycocotools takes id 0 for "not matched". An area that the file lacks
        is width × height of the box.
        """
        annotations: list[dict[str, Any]] = []
        for image in self.images:
            for i, segmentation in enumerate(image.segmentations):
                entry = {
                    "id": len(annotations) + 1,
                    "image_id": image.id,
                    "category_id": int(image.category_ids[i]),
                    "bbox": image.given_boxes[i].tolist(),
                    "area": float(image.areas[i]),
                    "iscrowd": int(image.crowd[i]),
                }
                annotations.append(entry if segmentation is None else {**entry, "segmentation": segmentation})
        return {
            "info": {},
            "images": [
                {"id": i.id, "file_name": i.file_name, "width": i.width, "height": i.height} for i in self.images
            ],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


def label_of(categories: Iterable[Category]) -> dict[int, int]:
    """Category id → label 1..K in order of id; label 0 is the background."""
    return {id_: label for label, id_ in enumerate(sorted(c.id for c in categories), start=1)}


@dataclass(frozen=True)
class SplitFiles:
    annotations: Path
    images: Path


def split_candidates(root: Path, split: str) -> list[SplitFiles]:
    """Where a split may lie, in order of preference."""
    coco = [
        SplitFiles(root / "annotations" / f"instances_{split}{year}.json", root / f"{split}{year}")
        for year in ("2017", "2014", "")
    ]
    folders = [root / name for name in ((split, "valid") if split == "val" else (split,))]
    beside = [SplitFiles(folder / "_annotations.coco.json", folder) for folder in folders]
    return [SplitFiles(root / f"{split}.json", root / "images"), *coco, *beside]


def read_dataset(
    root: Path, required: Sequence[str] = ("train", "val"), optional: Sequence[str] = ("test",)
) -> dict[str, CocoDataset]:
    """Read and check the required splits and those optional ones that exist; other files are not touched.

    Raises DatasetError listing every problem of every split. Clipped and dropped boxes are counted in one warning a
    split; an image name that appears in two splits is warned of.
    """
    root = Path(root)
    problems = Problems(root)
    if not root.is_dir():
        problems.add(root, "missing data folder", "no such folder")
        problems.raise_if_any()
    parts: dict[str, _Part] = {}
    for split in (*required, *optional):
        candidates = split_candidates(root, split)
        files = next((c for c in candidates if c.annotations.is_file()), None)
        if files is not None:
            part = _read_part(files, problems)
            if part is not None:
                parts[split] = part
        elif split in required:
            looked_for = ", ".join(str(c.annotations.relative_to(root)) for c in candidates)
            problems.add(root, "missing split", f"{split} (looked for {looked_for})")
    _check_same_categories(parts, problems)
    problems.raise_if_any()
    _warn_of_shared_images(parts)
    return {split: _build(split, part) for split, part in parts.items()}


@dataclass(frozen=True)
class _Part:
    """The sound entries of one annotation file."""

    files: SplitFiles
    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]


def _read_part(files: SplitFiles, problems: Problems) -> _Part | None:
    file = files.annotations
    document = load_document(file, problems)
    if document is None:
        return None
    categories = checked_entries(file, "category", document["categories"], CATEGORY_FIELDS, problems)
    images = checked_entries(file, "image", document["images"], IMAGE_FIELDS, problems)
    annotations = checked_entries(file, "annotation", document["annotations"], ANNOTATION_FIELDS, problems)
    for kind, entries in (("no categories", document["categories"]), ("no images", document["images"])):
        if not entries:
            problems.add(file, kind, "the list is empty")
    if all(isinstance(entry, dict) and entry.get("iscrowd") for entry in document["annotations"]):
        problems.add(file, "no annotations", f"{len(document['annotations'])} annotations, all of them crowds")
    # Ids of faulty images and categories still count as known: their fault is reported once, at its place.
    known_images, known_categories = by_id(document["images"]), by_id(document["categories"])
    check_annotations(file, annotations, known_images, known_categories, problems)
    if files.images.is_dir():
        check_image_files(file, files.images, images, problems)
    elif images:
        problems.add(file, "missing image folder", str(files.images.relative_to(problems.root)))
    return _Part(files, images, annotations, categories)


def _check_same_categories(parts: dict[str, _Part], problems: Problems) -> None:
    names = [{entry["id"]: entry["name"] for entry in part.categories} for part in parts.values()]
    files = [part.files.annotations for part in parts.values()]
    for file, found in zip(files[1:], names[1:], strict=True):
        differing = sorted(id_ for id_ in names[0].keys() | found.keys() if names[0].get(id_) != found.get(id_))
        for id_ in differing:
            what = f"id {id_} is {found.get(id_)!r} here and {names[0].get(id_)!r} in {files[0].name}"
            problems.add(file, "categories differ between splits", what)


def _warn_of_shared_images(parts: dict[str, _Part]) -> None:
    for (one, first), (other, second) in itertools.combinations(parts.items(), 2):
        shared = {entry["file_name"] for entry in first.images} & {entry["file_name"] for entry in second.images}
        if shared:
            log.warning(
                "%d image file names appear in both %s and %s (%s …): if they are the same pictures, results on %s "
                "are too good",
                *(len(shared), one, other, ", ".join(sorted(shared)[:3]), other),
            )


def _build(name: str, part: _Part) -> CocoDataset:
    annotations: dict[int, list[Entry]] = {entry["id"]: [] for entry in part.images}
    for annotation in part.annotations:
        annotations[annotation["image_id"]].append(annotation)
    images = tuple(_record(part.files.images, entry, annotations[entry["id"]]) for entry in part.images)
    categories = sorted((Category(entry["id"], entry["name"]) for entry in part.categories), key=lambda c: c.id)
    clipped = sum(_clipped(image) for image in images)
    dropped = sum(int((~image.trainable & ~image.crowd).sum()) for image in images)
    if clipped or dropped:
        log.warning(
            "%s: %d boxes that leave the image were clipped; %d boxes below %g pixel in width or height were dropped "
            "from training (the evaluation keeps all boxes as given)",
            *(part.files.annotations, clipped, dropped, MIN_SIDE),
        )
    return CocoDataset(name, tuple(categories), images)


def _record(folder: Path, entry: Entry, annotations: list[Entry]) -> ImageRecord:
    given = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    limits = np.array([entry["width"], entry["height"]] * 2, dtype=np.float64)
    boxes = np.clip(np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1), 0, limits)
    crowd = np.array([a.get("iscrowd") or 0 for a in annotations], dtype=np.bool_)
    large_enough = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
    areas = [a["bbox"][2] * a["bbox"][3] if a.get("area") is None else a["area"] for a in annotations]
    return ImageRecord(
        id=entry["id"],
        file_name=entry["file_name"],
        path=folder / entry["file_name"],
        width=entry["width"],
        height=entry["height"],
        boxes=boxes.astype(np.float32),
        given_boxes=given,
        areas=np.array(areas, dtype=np.float64),
        category_ids=np.array([a["category_id"] for a in annotations], dtype=np.int64),
        crowd=crowd,
        trainable=large_enough & ~crowd,
        segmentations=tuple(a.get("segmentation") or None for a in annotations),
    )


def _clipped(image: ImageRecord) -> int:
    """Number of boxes that reach beyond the image by more than rounding."""
    low, high = image.given_boxes[:, :2], image.given_boxes[:, :2] + image.given_boxes[:, 2:]
    outside = (low < -ROUNDING) | (high > np.array([image.width, image.height]) + ROUNDING)
    return int(outside.any(axis=1).sum())
