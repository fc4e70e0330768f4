"""What GFL and RepPoints, plain models of ours in torchvision's idiom, have in common: one box a location, given by the
distances to its sides, and a logit of each class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder, _topk_min
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import Conv2dNormActivation, batched_nms, clip_boxes_to_image

from autodet.detectors.one_stage import describe_selection
from autodet.detectors.pyramid import describe_frame, unsaid_frame
from autodet.detectors.spec import DetectorSpec
from autodet.detectors.steps import Target

Outputs = dict[str, Tensor]
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # torchvision's


class OneBoxDetector(nn.Module):
    """A plain one-stage detector with the forward, the parts and the names of torchvision's.

    Locations are the centres of the anchors, squares, one a location, which are where torchvision's are: at multiples
    of the stride from the image's corner. num_classes: with the background, whose logit is no detection's.
    """

    head: Any  # maps → Outputs, N×all×numbers each: cls_logits, bbox_regression, and what its losses need

    def __init__(
        self,
        backbone: BackboneWithFPN,
        num_classes: int,
        anchor_generator: AnchorGenerator,
        head: Any,
        min_size: int = 800,
        max_size: int = 1333,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
    ) -> None:
        super().__init__()
        if head.classification_head.num_classes != num_classes:
            found = head.classification_head.num_classes
            raise ValueError(f"Expected a head of {num_classes} classes with the background, found one of {found}.")
        self.backbone = backbone
        self.anchor_generator = anchor_generator
        self.head = head
        self.box_coder = BoxLinearCoder(normalize_by_size=False)
        self.transform = GeneralizedRCNNTransform(min_size, max_size, IMAGE_MEAN, IMAGE_STD)
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img
        self.topk_candidates = topk_candidates

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Outputs | list[Target]:
        """Images 3×h×w in [0, 1] → detections of each; in training mode, with targets, named losses.

        ValueError where these are missing, or a box has no area.
        """
        if self.training:
            check_targets(targets)
        before = [(image.shape[-2], image.shape[-1]) for image in images]
        image_list, targets = self.transform(images, targets)
        features = list(self.backbone(image_list.tensors).values())
        outputs = self.head(features)
        anchors = self.anchor_generator(image_list, features)
        per_level = [level.shape[2] * level.shape[3] for level in features]
        if targets is not None and self.training:
            return self.compute_loss(targets, outputs, anchors, per_level)
        split = {name: list(rows.split(per_level, dim=1)) for name, rows in outputs.items()}
        found = self.postprocess_detections(
            split, [list(rows.split(per_level)) for rows in anchors], image_list.image_sizes
        )
        return list(self.transform.postprocess(found, image_list.image_sizes, before))

    def compute_loss(
        self, targets: list[Target], head_outputs: Outputs, anchors: list[Tensor], num_anchors_per_level: list[int]
    ) -> Outputs:
        """Named losses, scalars; targets in the canvas's pixels."""
        raise NotImplementedError

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[Target]:
        """The best of each level above the threshold, NMS class by class, the best of these; arguments by level."""
        detections = []
        for index, shape in enumerate(image_shapes):
            levels = [
                self._best(logits[index], distances[index], centred, shape)
                for logits, distances, centred in zip(
                    head_outputs["cls_logits"], head_outputs["bbox_regression"], anchors[index], strict=True
                )
            ]
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*levels, strict=True))
            kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            detections.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
        return detections

    def _best(
        self, logits: Tensor, distances: Tensor, anchors: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes R×4 within the image, scores and labels of a level's best responses in one image."""
        classes = logits.shape[-1] - 1
        scores = logits[:, 1:].sigmoid().flatten()
        above = torch.where(scores > self.score_thresh)[0]
        scores, best = scores[above].topk(_topk_min(above, self.topk_candidates, 0))
        chosen = above[best]
        rows = torch.div(chosen, classes, rounding_mode="floor")
        boxes = clip_boxes_to_image(self.box_coder.decode(distances[rows], anchors[rows]), shape)
        return boxes, scores, chosen % classes + 1


def one_anchor(spec: DetectorSpec) -> AnchorGenerator:
    """A square at every location."""
    return AnchorGenerator(tuple((size,) for size in spec.anchor_sizes), ((1.0,),) * len(spec.anchor_sizes))


def describe_one_box(model: OneBoxDetector, labels: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """The spec's fields that are read off alike in both families."""
    classify = model.head.classification_head
    return {
        **describe_frame(model, classify.num_classes - 1, labels),
        **describe_selection(model),
        "anchor_sizes": tuple(sizes[0] for sizes in model.anchor_generator.sizes),
        "anchor_ratios": (1.0,),
        "head_depth": len(classify.conv),
        "head_groups": next((part.num_groups for part in classify.modules() if isinstance(part, nn.GroupNorm)), 0),
    }


def unsaid_one_box(model: OneBoxDetector) -> dict[str, object]:
    """Settings that a spec has no field for."""
    return unsaid_frame(model, model.anchor_generator) | {
        "head.strides": model.head.strides,
        "box_coder.normalize_by_size": model.box_coder.normalize_by_size,
    }


def conv_tower(width: int, depth: int, groups: int) -> nn.Sequential:
    """Convolutions 3×3, group norms unless ``groups`` is 0, and ReLUs, named as torchvision's RetinaNet names them."""
    norm = partial(nn.GroupNorm, groups) if groups else None
    layers = [Conv2dNormActivation(width, width, 3, norm_layer=norm) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer[0].weight, std=0.01)
    return nn.Sequential(*layers)


def convolution(inputs: int, outputs: int, kernel: int, bias: float = 0.0) -> nn.Conv2d:
    """A last layer: small weights, and a bias that says how seldom objects are."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    return layer


def check_targets(targets: list[Target] | None) -> None:
    """ValueError where targets are missing, or a box has no area."""
    if targets is None:
        raise ValueError("Expected targets in training mode, found none: give them, or call eval() first.")
    for number, target in enumerate(targets):
        boxes = target["boxes"]
        for box in boxes[(boxes[:, 2:] <= boxes[:, :2]).any(dim=1)]:
            raise ValueError(f"Expected boxes x1 y1 x2 y2 with an area, found {box.tolist()} in target {number}.")
