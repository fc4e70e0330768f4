"""Detectors, images and comparisons that the tests of all families share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)

from autodet.detectors import Arch, Dense, Detector, DetectorSpec, Features, Inputs, build, standard_spec
from autodet.detectors.spec import FAMILIES

LABELS = ((3, "dog"), (7, "traffic light"))
ONE = ((5, "cell"),)
families = pytest.mark.parametrize("family", FAMILIES)
BODY = Arch.parse("basic-8:8x1-16x1-16x1-24x1")
# What torchvision's constructors build for LABELS.
CONSTRUCTORS = {
    "fasterrcnn_resnet50_fpn": (fasterrcnn_resnet50_fpn, standard_spec("faster_rcnn", Arch.resnet50(), LABELS)),
    "retinanet_resnet50_fpn": (retinanet_resnet50_fpn, standard_spec("retinanet", Arch.resnet50(), LABELS)),
    "retinanet_resnet50_fpn_v2": (
        retinanet_resnet50_fpn_v2,
        replace(standard_spec("retinanet", Arch.resnet50(), LABELS), top="body", head_groups=32, box_loss="giou"),
    ),
    "fcos_resnet50_fpn": (fcos_resnet50_fpn, standard_spec("fcos", Arch.resnet50(), LABELS)),
    "maskrcnn_resnet50_fpn": (maskrcnn_resnet50_fpn, standard_spec("mask_rcnn", Arch.resnet50(), LABELS)),
}

Targets = list[dict[str, Tensor]]


def small_spec(family: str, labels: tuple[tuple[int, str], ...] = LABELS, **changes: Any) -> DetectorSpec:
    """The usual detector of a family for images of 64×96, narrow, and quick to find something; with masks if it can."""
    spec = standard_spec(family, BODY, labels).at_size(64)
    values: dict[str, Any] = {"neck_width": 16, "max_size": 96, "score_threshold": 0.01, "detections": 80}
    if spec.two_stage:
        values |= {"head_width": 32, "roi_size": 3, "proposals_before_nms": (90, 80), "proposals": (60, 50)}
        values |= {"regions_per_image": 32}
    else:
        values |= {"candidates": 60, "head_depth": 2}
    if True in spec.traits.masks:
        values |= {"mask_depth": 2, "mask_width": 12, "mask_roi_size": 4}
    if spec.head_groups:
        values["head_groups"] = 4
    if spec.traits.distributions:
        values["reg_max"] = 2  # random distributions have means in the middle, which of 16 strides is beyond the image
    return replace(spec, **values | changes)


def constructed(name: str, **settings: Any) -> Any:
    """A fresh model of one of torchvision's constructors, for LABELS and small images."""
    return CONSTRUCTORS[name][0](
        weights=None, weights_backbone=None, num_classes=len(LABELS) + 1, min_size=64, max_size=96, **settings
    )


def stir(model: nn.Module) -> None:
    """Make fresh weights answer differently from place to place and class to class, as if trained; in place."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                tensor.uniform_(-0.5, 0.5)
            elif "conv_offset" in name:
                tensor.normal_(std=0.3)
            elif name.startswith("backbone.body.") and tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.2, 0.6)  # keeps the maps of a deep body from growing
            elif not name.startswith("backbone.body.") and tensor.dim() > 1:
                small = {
                    "bbox_": 0.5,
                    "_points.": 0.5,
                    "cls_score": 0.1,
                    "mask_fcn_logits": 0.5,
                }  # no class always wins
                gain = next((gain for part, gain in small.items() if part in name), 2.0)
                tensor.normal_(std=gain / tensor[0].numel() ** 0.5)
            elif "cls_logits" in name:
                tensor.uniform_(-0.5, 0.5)
            elif "cls_score" in name:
                tensor.zero_()


def batch(
    sizes: tuple[tuple[int, int], ...] = ((48, 72), (60, 40), (50, 50)), classes: int = 2
) -> tuple[list[Tensor], Targets]:
    """Images of these sizes (height, width) in turn with two objects, with none, and with one; masks are triangles."""
    images = [torch.rand(3, *size) for size in sizes]
    boxes: list[list[list[float]]] = [[[4, 5, 40, 44], [22, 10, 38, 30]], [], [[10, 10, 30, 45]]]
    labels: list[list[int]] = [[1, classes], [], [classes]]
    return images, [
        {
            "boxes": torch.tensor(boxes[i % 3], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels[i % 3], dtype=torch.int64),
            "masks": triangles(boxes[i % 3], sizes[i]),
        }
        for i in range(len(sizes))
    ]


def triangles(boxes: list[list[float]], size: tuple[int, int]) -> Tensor:
    """uint8 N×H×W: the lower left half of each box."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    found = torch.zeros((len(boxes), *size), dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(found, boxes, strict=True):
        mask[(x > x1) & (y < y2) & ((x - x1) / (x2 - x1) < (y - y1) / (y2 - y1))] = 1
    return found


def steps(detector: Detector, images: list[Tensor], targets: Targets | None = None) -> tuple[Inputs, Features, Dense]:
    """The values of the first three steps."""
    inputs = detector.preprocess(images, targets)
    features = detector.features(inputs)
    return inputs, features, detector.dense(inputs, features)


def step_losses(detector: Detector, images: list[Tensor], targets: Targets) -> dict[str, Tensor]:
    return detector.losses(*steps(detector, images, targets))


def assert_same_detections(found: Targets, expected: Targets) -> None:
    assert len(found) == len(expected)
    assert all(len(image["boxes"]) > 0 for image in expected), "nothing is detected, so nothing is compared"
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and one.keys() - {"masks"} == {"boxes", "scores", "labels"}
        for key in one:
            # How a processor rounds moves boxes by up to 1e-4 pixels.
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=2e-4 if key == "boxes" else 1e-5)


def stirred(spec: DetectorSpec) -> Detector:
    """A detector that finds something."""
    detector = build(spec)
    stir(detector.model)
    return detector
