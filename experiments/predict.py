"""What does a detector see in a picture?

command:   python experiments/predict.py DETECTOR IMAGE [IMAGE ...] [--threshold 0.5] [--output DIR]
hardware:  any; one core is enough
time:      a few seconds, then as long as the detector takes for an image
expected:  CSV on the screen, a line a detection, best first: image,category_id,name,score,x1,y1,x2,y2 (pixels of the
           file, turned as its EXIF orientation says); with --output a picture with the boxes, and masks where the
           detector gives them, drawn, an image

DETECTOR is a file of save_detector, such as the scripts here write, or an ONNX file of export_onnx.py. Images are
resized as those of a training are, so that these are the detections that an evaluation counts.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from options import main_of, share
from PIL import Image
from torch import Tensor

from autodet.atomic import atomic_write_bytes
from autodet.data.cache import decode, resized_size
from autodet.data.checks import IMAGE_ERRORS
from autodet.detectors import DetectorSpec, Target, detect, load_detector
from autodet.evaluation import binary_masks, to_original
from autodet.export import load_onnx
from autodet.results.detections import Panel, draw_detections
from autodet.results.plots import to_png

COLUMNS = ("image", "category_id", "name", "score", "x1", "y1", "x2", "y2")

See = Callable[[Tensor], Target]  # an image 3×H×W in [0, 1] → its detections


def main(argv: list[str] | None = None) -> int:
    """Look at one image after the other."""
    options = parse(argv)
    pictures = picture_files(options.images, options.output)
    spec, see = opened(options.detector)
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(COLUMNS)
    for path in options.images:
        image = read_image(path)
        found = predicted(see, spec, image, options.threshold)
        rows.writerows(lines(path, found, spec))
        sys.stdout.flush()
        if path in pictures:
            atomic_write_bytes(pictures[path], drawn(path.name, image, found, spec))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("detector", type=Path, metavar="DETECTOR", help="a file of save_detector, or an ONNX file of export_onnx.py")
    add("images", type=Path, nargs="+", metavar="IMAGE")
    default = "least score; the detector's own lower limit stays (default: 0.5)"
    add("--threshold", type=share, default=0.5, help=default)
    add("--output", type=Path, metavar="DIR", help="where pictures with boxes go, as <image>.png (default: none)")
    return parser.parse_args(argv)


def picture_files(images: Sequence[Path], folder: Path | None) -> Mapping[Path, Path]:
    """Image → its picture; ValueError where two would be one file, or a picture would replace an image."""
    if folder is None:
        return {}
    pictures = {path: folder / f"{path.stem}.png" for path in images}
    names = [path.name for path in pictures.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--output {folder}: several images would become {', '.join(twice)}; give them one at a time.")
    replaced = {path.resolve() for path in images} & {path.resolve() for path in pictures.values()}
    if replaced:
        raise ValueError(
            f"--output {folder}: the picture would replace the image {min(replaced)}; name another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return pictures


def opened(path: Path) -> tuple[DetectorSpec, See]:
    """A detector, and how it looks at one image."""
    if path.suffix == ".onnx":
        exported = load_onnx(path)
        return exported.spec, exported
    detector, _ = load_detector(path)
    return detector.spec, lambda image: detect(detector, [image])[0]


def read_image(path: Path) -> Image.Image:
    """An upright RGB image; ValueError where the file is missing or no image."""
    try:
        return decode(path)
    except IMAGE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(
            f"{path}: expected an image that can be read ({reason}); check the path and the file."
        ) from error


def prepared(image: Image.Image, spec: DetectorSpec) -> Tensor:
    """float32 3×H×W in [0, 1], resized as ``data.ImageCache`` does for a training of this detector."""
    height, width = resized_size(image.height, image.width, spec.min_size, spec.max_size)
    return as_tensor(image.resize((width, height), Image.Resampling.BILINEAR))


def as_tensor(image: Image.Image) -> Tensor:
    """float32 3×H×W in [0, 1] at the image's own size."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32) / 255


def predicted(see: See, spec: DetectorSpec, image: Image.Image, threshold: float) -> Target:
    """Detections of at least this score: boxes float64 N×4 xyxy in pixels of ``image``, scores, labels of the spec.

    Of a detector with masks also these, bool N×H×W.
    """
    small = prepared(image, spec)
    found = see(small)
    known = torch.tensor(list(spec.categories), dtype=found["labels"].dtype)
    keep = (found["scores"] >= threshold) & torch.isin(found["labels"], known)
    sizes = (small.shape[-2], small.shape[-1]), (image.height, image.width)
    kept = {name: values[keep] for name, values in found.items()}
    kept["boxes"] = to_original(kept["boxes"].double(), *sizes)
    if "masks" in kept:
        kept["masks"] = binary_masks(kept["masks"], sizes[1])
    return kept


def lines(path: Path, found: Target, spec: DetectorSpec) -> Iterable[Sequence[object]]:
    """What COLUMNS names, of every detection."""
    for box, score, label in zip(*(found[name].tolist() for name in ("boxes", "scores", "labels")), strict=True):
        category, name = spec.labels[label - 1]
        yield (path, category, name, f"{score:.4f}", *(f"{value:.2f}" for value in box))


def drawn(title: str, image: Image.Image, found: Target, spec: DetectorSpec) -> bytes:
    """A PNG of the image with its boxes and masks; the legend names the classes that it shows."""
    boxes, labels, scores = (found[name].numpy() for name in ("boxes", "labels", "scores"))
    shown = set(labels.tolist())
    names = {label: name for label, (_, name) in enumerate(spec.labels, start=1) if label in shown}
    masks = found["masks"].numpy() if "masks" in found else None
    return to_png(draw_detections([[Panel(title, np.asarray(image), boxes, labels, scores, masks)]], names))


if __name__ == "__main__":
    raise SystemExit(main_of(main))
