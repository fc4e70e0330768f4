"""What one-stage families have in common: their steps, all but those of their heads, and what of a spec they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autodet.detectors.pyramid import preprocess, pyramid
from autodet.detectors.spec import DetectorSpec
from autodet.detectors.steps import Dense, Features, Inputs, Target


class OneStageSteps(nn.Module):
    """The steps of ``detectors.steps.Detector`` on a plain model, which is used as it is; a family adds ``dense``."""

    def __init__(self, model: Any, spec: DetectorSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec

    def preprocess(self, images: list[Tensor], targets: list[Target] | None = None) -> Inputs:
        """Images 3×h×w in [0, 1] → normalised, resized, and padded to a canvas that 32 divides; targets follow."""
        return preprocess(self.model, images, targets)

    def features(self, inputs: Inputs) -> Features:
        """The pyramid, nominal stride → N×C×H×W."""
        return pyramid(self.model, self.spec.levels, inputs)

    def boxes(self, dense: Dense) -> Tensor:
        """N×all×4 xyxy in the canvas's pixels."""
        decoded: Tensor = self.model.box_coder.decode(flatten(dense.deltas, 4).float(), torch.stack(dense.anchors))
        return decoded

    def outputs(self, dense: Dense) -> dict[str, Tensor]:
        """The responses under the names, and in the shapes N×all×numbers, that the plain model's losses take."""
        outputs = {
            "cls_logits": flatten(dense.logits, len(self.spec.labels) + 1),
            "bbox_regression": flatten(dense.deltas, 4),
        }
        if dense.centerness is not None:
            outputs["bbox_ctrness"] = flatten(dense.centerness, 1)
        if dense.sides is not None:
            outputs["bbox_distribution"] = flatten(dense.sides, next(iter(dense.sides.values())).shape[1])
        return outputs

    def losses(self, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """The plain model's losses, equal to its own."""
        per_level = [level.shape[2] * level.shape[3] for level in features.values()]
        return dict(self.model.compute_loss(inputs.ground_truth(), self.outputs(dense), dense.anchors, per_level))

    def postprocess(self, inputs: Inputs, features: Features, dense: Dense) -> list[Target]:
        """Detections by the plain model's own selection and NMS: boxes in pixels of the images given to ``preprocess``,
        scores, labels 1..K."""
        per_level = [level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in dense.deltas.values()]
        outputs = {name: list(torch.split(rows, per_level, dim=1)) for name, rows in self.outputs(dense).items()}
        anchors = [list(torch.split(rows, per_level)) for rows in dense.anchors]
        found = self.model.postprocess_detections(outputs, anchors, inputs.images.image_sizes)
        return list(self.model.transform.postprocess(found, inputs.images.image_sizes, inputs.sizes))


def flatten(maps: Mapping[int, Tensor], numbers: int) -> Tensor:
    """Levels N×(A·numbers)×H×W → N×(all locations' anchors)×numbers, in the anchors' order (torchvision's)."""
    rows = []
    for level in maps.values():
        images, _, height, width = level.shape
        split = level.view(images, -1, numbers, height, width).permute(0, 3, 4, 1, 2)
        rows.append(split.reshape(images, -1, numbers))
    return torch.cat(rows, dim=1)


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
