"""Can a detector run without autodet and PyTorch?

command:   python experiments/export_onnx.py DETECTOR OUTPUT.onnx --image IMAGE [IMAGE ...]
hardware:  any; one core is enough
time:      seconds; half a minute for a large Faster R-CNN
expected:  OUTPUT.onnx, and how far its detections in ONNX Runtime are from the detector's own; no file where too far

DETECTOR is a file of save_detector. The images are what it is checked on, each at its own size and resized as those of
a training are; give some with objects in them. Needs pip install "autodet[onnx]".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from options import main_of
from predict import as_tensor, prepared, read_image

from autodet.detectors import load_detector
from autodet.export import export_onnx


def main(argv: list[str] | None = None) -> int:
    """Export, check, print."""
    options = parse(argv)
    detector, _ = load_detector(options.detector)
    images = [read_image(path) for path in options.image]
    sizes = [tensor for image in images for tensor in (prepared(image, detector.spec), as_tensor(image))]
    check = export_onnx(detector, options.output, sizes)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, {detector.spec}")
    if check.detections == 0:
        print("Nothing was detected in these images, so nothing was compared: check it on others, with objects.")
    else:
        print(
            f"{check.detections} detections of {len(images)} images, each at 2 sizes, agree with the detector's own: "
            f"boxes within {check.box_difference:.2g} pixels, scores within {check.score_difference:.2g}"
        )
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("detector", type=Path, metavar="DETECTOR", help="a file of save_detector")
    add("output", type=Path, metavar="OUTPUT.onnx", help="the file to write")
    add("--image", type=Path, nargs="+", required=True, metavar="IMAGE", help="what the file is checked on")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main_of(main))
