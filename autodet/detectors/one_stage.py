"""Between maps and lists: what one-stage families have in common behind their heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autodet.detectors.spec import DetectorSpec
from autodet.detectors.steps import Dense, Inputs, Target


def flatten(maps: Mapping[int, Tensor], numbers: int) -> Tensor:
    """Levels N×(A·numbers)×H×W → N×(all locations' anchors)×numbers, in the anchors' order (torchvision's)."""
    rows = []
    for level in maps.values():
        images, _, height, width = level.shape
        split = level.view(images, -1, numbers, height, width).permute(0, 3, 4, 1, 2)
        rows.append(split.reshape(images, -1, numbers))
    return torch.cat(rows, dim=1)


def head_outputs(dense: Dense, classes: int) -> dict[str, Tensor]:
    """The responses under the names, and in the shapes N×all×numbers, that torchvision's losses take."""
    outputs = {"cls_logits": flatten(dense.logits, classes), "bbox_regression": flatten(dense.deltas, 4)}
    if dense.centerness is not None:
        outputs["bbox_ctrness"] = flatten(dense.centerness, 1)
    if dense.sides is not None:
        outputs["bbox_distribution"] = flatten(dense.sides, next(iter(dense.sides.values())).shape[1])
    return outputs


def postprocess(model: Any, inputs: Inputs, dense: Dense, classes: int) -> list[Target]:
    """Detections by the plain model's own selection and NMS; boxes in pixels of the images before resizing."""
    per_level = [level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in dense.deltas.values()]
    outputs = {name: list(torch.split(rows, per_level, dim=1)) for name, rows in head_outputs(dense, classes).items()}
    anchors = [list(torch.split(rows, per_level)) for rows in dense.anchors]
    select: Callable[..., list[Target]] = model.postprocess_detections
    found = select(outputs, anchors, inputs.images.image_sizes)
    return list(model.transform.postprocess(found, inputs.images.image_sizes, inputs.sizes))


def frame_options(spec: DetectorSpec) -> dict[str, Any]:
    """What both constructors take of a spec besides body, anchors and head."""
    return {
        "min_size": spec.min_size,
        "max_size": spec.max_size,
        "score_thresh": spec.score_threshold,
        "nms_thresh": spec.nms_threshold,
        "detections_per_img": spec.detections,
        "topk_candidates": spec.candidates,
    }


def describe_selection(model: Any) -> dict[str, Any]:
    """The spec's fields about the selection of detections, read off a model."""
    return {
        "candidates": model.topk_candidates,
        "score_threshold": model.score_thresh,
        "nms_threshold": model.nms_thresh,
        "detections": model.detections_per_img,
    }
