"""What a COCO data set must satisfy. Every problem of every split is collected and reported at once.

A check adds to `Problems` and leaves the faulty entry out of what it returns, so that one fault is reported once and
the checks that follow see only sound entries.
"""

import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

Entry = dict[str, Any]

LARGEST = 1e12  # no pixel coordinate or area comes near; beyond it a number is taken for damage
SHOWN = 5  # examples listed per kind of problem
EXIF_ORIENTATION = 0x0112
READ_THREADS = 8  # the header checks wait for the disk, not for the processor

# What PIL raises on files that are no images, are cut short, or are too large to be meant seriously.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

REMEDIES = {
    "missing data folder": "give the folder that holds train.json, COCO's annotations/, or train/ and valid/",
    "missing split": "put one of these files in place, or leave the split out where it is optional",
    "missing image folder": "put the images there or link the folder",
    "empty JSON file": "write the annotations again; the export or download was interrupted",
    "truncated or invalid JSON": "write the annotations again; the export or download was interrupted",
    "missing key": "add the key; the format is that of COCO's instances_*.json",
    "wrong type": "correct the value; the format is that of COCO's instances_*.json",
    "duplicate image id": "give every image its own id",
    "duplicate annotation id": "give every annotation its own id",
    "duplicate category id": "give every category its own id",
    "unknown image": 'add the image to "images" or delete these annotations',
    "unknown category": 'add the category to "categories" or delete these annotations',
    "bad box": "expected bbox = [x, y, width, height]: four finite numbers, width and height not negative",
    "bad segmentation": "expected polygons (lists of at least 3 x, y pairs) or RLE {size: [height, width], counts} "
    "of the image's size; correct it or leave it out",
    "no images": "a split needs at least one image",
    "no annotations": "a split needs at least one annotation that is no crowd; leave the split out if it has none",
    "no categories": "a split needs at least one category",
    "categories differ between splits": "use the same ids and names in every split",
    "file_name outside the image folder": "use a path relative to the image folder, without '..'",
    "missing image file": 'put the files in place or delete the images from "images"',
    "unreadable image": "fetch or export these files again",
    "size differs from the file": "correct width and height; the size is taken after applying the EXIF orientation",
}


class DatasetError(ValueError):
    """A data set cannot be used; the message lists every problem by file and kind, with its remedy."""


class Problems:
    """Collects what is wrong with the data set in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[tuple[str, str], list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, file: Path, kind: str, what: str) -> None:
        """Note that `what` (an id with the value found) in `file` has a problem of `kind`, a key of REMEDIES."""
        name = str(file.relative_to(self.root)) if file.is_relative_to(self.root) else str(file)
        name = "the folder" if file == self.root else name
        self._found.setdefault((name, kind), []).append(what)

    def raise_if_any(self) -> None:
        """Raise one DatasetError with everything found; do nothing if nothing was."""
        if self:
            raise DatasetError(self.message())

    def message(self) -> str:
        """Problems grouped by file and kind: count, the first few, and the remedy."""
        count = sum(len(found) for found in self._found.values())
        lines = [f"the data set {self.root} cannot be used: {count} problem{'s' if count > 1 else ''} found"]
        for file in dict.fromkeys(name for name, _ in self._found):
            lines.append(f"{file}:")
            for (name, kind), found in self._found.items():
                if name == file:
                    rest = f", … and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                    lines.append(f"  {len(found)} × {kind}: {', '.join(found[:SHOWN])}{rest}")
                    lines.append(f"      remedy: {REMEDIES[kind]}")
        return "\n".join(lines)


class Expected(NamedTuple):
    text: str
    holds: Callable[[Any], bool]
    optional: bool = False


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < LARGEST  # false for NaN


INTEGER = Expected("an integer", _is_integer)
POSITIVE = Expected("an integer above 0", lambda value: _is_integer(value) and value > 0)
TEXT = Expected("text", lambda value: isinstance(value, str) and value != "")

CATEGORY_FIELDS = {"id": INTEGER, "name": TEXT}
IMAGE_FIELDS = {"id": INTEGER, "file_name": TEXT, "width": POSITIVE, "height": POSITIVE}
ANNOTATION_FIELDS = {
    "id": INTEGER,
    "image_id": INTEGER,
    "category_id": INTEGER,
    "bbox": Expected("a list", lambda value: isinstance(value, list)),
    "iscrowd": Expected("0 or 1", lambda value: value in (0, 1), optional=True),
    "area": Expected("a number not below 0", lambda value: _is_finite(value) and value >= 0, optional=True),
}


def load_document(path: Path, problems: Problems) -> Entry | None:
    """The JSON object in `path`, with its three lists present; None where that much is not given."""
    try:
        content = path.read_bytes()
        if not content.strip():
            problems.add(path, "empty JSON file", f"{len(content)} bytes")
            return None
        document = json.loads(content)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}, character {error.pos} of {len(error.doc)}"
        problems.add(path, "truncated or invalid JSON", f"{error.msg} at {where}")
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.add(path, "truncated or invalid JSON", str(error))
        return None
    if not isinstance(document, dict):
        problems.add(path, "wrong type", f"expected an object at the top, found {type(document).__name__}")
        return None
    sound = True
    for key in ("images", "annotations", "categories"):
        if key not in document:
            problems.add(path, "missing key", repr(key))
            sound = False
        elif not isinstance(document[key], list):
            problems.add(path, "wrong type", f"{key}: expected a list, found {_short(document[key])}")
            sound = False
    return document if sound else None


def checked_entries(
    file: Path, noun: str, entries: list[Any], fields: dict[str, Expected], problems: Problems
) -> list[Entry]:
    """The entries that have all fields, of the right type, and an id of their own. `noun` names them in messages."""
    good: list[Entry] = []
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.add(file, "wrong type", f"{noun} at position {position}: {_short(entry)}")
        elif _has_fields(file, f"{noun} {entry.get('id', f'at position {position}')}", entry, fields, problems):
            if entry["id"] in seen:
                problems.add(file, f"duplicate {noun} id", str(entry["id"]))
            else:
                seen.add(entry["id"])
                good.append(entry)
    return good


def by_id(entries: list[Any]) -> dict[int, Entry]:
    """All entries with an integer id, whatever else is wrong with them."""
    return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and _is_integer(entry.get("id"))}


def _has_fields(file: Path, name: str, entry: Entry, fields: dict[str, Expected], problems: Problems) -> bool:
    sound = True
    for key, expected in fields.items():
        if key not in entry or (entry[key] is None and expected.optional):
            if not expected.optional:
                problems.add(file, "missing key", f"{name}: {key!r}")
                sound = False
        elif not expected.holds(entry[key]):
            problems.add(file, "wrong type", f"{name}: {key} = {_short(entry[key])}, expected {expected.text}")
            sound = False
    return sound


def check_annotations(
    file: Path, annotations: list[Entry], images: dict[int, Entry], categories: Collection[int], problems: Problems
) -> None:
    """References, boxes and segmentations of annotations whose fields are sound. `images` by id."""
    for entry in annotations:
        name = f"annotation {entry['id']}"
        if entry["category_id"] not in categories:
            problems.add(file, "unknown category", f"{name} (category_id {entry['category_id']})")
        box = entry["bbox"]
        if len(box) != 4 or not all(_is_finite(value) for value in box) or min(box[2:]) < 0:
            problems.add(file, "bad box", f"{name} (bbox {_short(box)})")
        image = images.get(entry["image_id"])
        if image is None:
            problems.add(file, "unknown image", f"{name} (image_id {entry['image_id']})")
        elif entry.get("segmentation") and not _is_segmentation(entry["segmentation"], image):
            problems.add(file, "bad segmentation", f"{name} ({_short(entry['segmentation'])})")


def _is_segmentation(value: Any, image: Entry) -> bool:
    if isinstance(value, dict):
        size = value.get("size")
        return size == [image.get("height"), image.get("width")] and _covers(value.get("counts"), size[0] * size[1])
    return isinstance(value, list) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(_is_finite(number) for number in polygon)
        for polygon in value
    )


def _covers(counts: Any, pixels: int) -> bool:
    """Whether run lengths add up to the image. pycocotools fills what is missing from uninitialised memory."""
    try:
        runs = _run_lengths(counts) if isinstance(counts, str) else counts
    except IndexError:  # the text ends within a number
        return False
    return isinstance(runs, list) and all(_is_integer(run) and run >= 0 for run in runs) and sum(runs) == pixels


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths (pycocotools' maskApi.c, rleFrString): groups of five bits, lowest first, with a
    bit for "more follows"; from the fourth number on, the difference to the last but one."""
    runs: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            group = ord(text[position]) - 48
            value |= (group & 31) << shift
            position, shift, more = position + 1, shift + 5, bool(group & 32)
        if group & 16:
            value -= 1 << shift  # negative, in two's complement
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def check_image_files(file: Path, folder: Path, images: list[Entry], problems: Problems) -> None:
    """Presence, header and size of every image file in `folder`. Pixels are decoded later, by the image cache."""
    inside = []
    for entry in images:
        name = PurePosixPath(entry["file_name"])
        if name.is_absolute() or ".." in name.parts:
            problems.add(file, "file_name outside the image folder", f"image {entry['id']} ({entry['file_name']})")
        else:
            inside.append(entry)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for found in pool.map(lambda entry: _image_problem(folder, entry), inside):
            if found is not None:
                problems.add(file, *found)


def _image_problem(folder: Path, entry: Entry) -> tuple[str, str] | None:
    """(kind, what) of the first problem of one image file, if any."""
    name = f"image {entry['id']} ({entry['file_name']}"
    try:
        with Image.open(folder / entry["file_name"]) as image:
            width, height = upright_size(image)
    except FileNotFoundError:
        return "missing image file", f"{name})"
    except IMAGE_ERRORS as error:
        return "unreadable image", f"{name}: {type(error).__name__})"
    if (width, height) != (entry["width"], entry["height"]):
        return "size differs from the file", f"{name}: {entry['width']}×{entry['height']}, file {width}×{height})"
    return None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels after applying the EXIF orientation; reads the header only, but all of a PNG."""
    turned = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
