"""GFL (Generalized Focal Loss, Li et al. 2020): a plain model in torchvision's idiom, and its explicit steps.

A one-stage detector without anchors to regress from. What it knows of a side of a box is a distribution over distances
from the location; its class score is the overlap that it expects of its box with the object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder, _topk_min
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import Conv2dNormActivation, batched_nms, clip_boxes_to_image

from autodet.detectors.atss import CANDIDATES, assign
from autodet.detectors.dims import Named, tower_counts, tower_groups
from autodet.detectors.gfl_loss import distance_targets, expected, paired_iou, quality_focal_loss, side_losses
from autodet.detectors.one_stage import describe_selection, flatten, frame_options, head_outputs, postprocess
from autodet.detectors.pyramid import PyramidSteps, build_backbone, check_rebuilt, describe_frame, unsaid_frame
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.state import CLASSIFY, REGRESS, Read, State, count, sizes
from autodet.detectors.steps import Dense, Family, Features, Inputs, Target

# torchvision's for its detectors; those of ImageNet.
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PRIOR = 0.01  # score of every class before training (Lin et al. 2017)
BOX_WEIGHT, DISTRIBUTION_WEIGHT = 2.0, 0.25  # of the losses beside the quality focal loss (public code; eq. 8)

Outputs = dict[str, Tensor]


class GFLClassificationHead(nn.Module):
    """Class scores of a level's locations: a tower of convolutions with group norms, and a last one.

    num_classes: with the background, whose channel 0 is there as in torchvision's heads. No location ever learns it,
    so that it falls silent, and no detection is made of it.
    """

    def __init__(self, in_channels: int, num_classes: int, num_convs: int, groups: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = _tower(in_channels, num_convs, groups)
        self.cls_logits = _last(in_channels, num_classes, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, level: Tensor) -> Tensor:
        """N×C×H×W → logits N×num_classes×H×W."""
        logits: Tensor = self.cls_logits(self.conv(level))
        return logits


class GFLRegressionHead(nn.Module):
    """Distributions of the distances to a box's left, upper, right and lower side, in units of the level's stride.

    reg_max: the largest distance that can be said; the bins are 0, 1, …, reg_max. scales: factors of the logits of each
    level, which share all other weights.
    """

    def __init__(self, in_channels: int, levels: int, num_convs: int, groups: int, reg_max: int) -> None:
        super().__init__()
        self.reg_max = reg_max
        self.conv = _tower(in_channels, num_convs, groups)
        self.bbox_reg = _last(in_channels, 4 * (reg_max + 1), 0.0)
        self.scales = nn.Parameter(torch.ones(levels))

    def forward(self, level: Tensor, number: int) -> Tensor:
        """N×C×H×W of the pyramid's level of a number, from 0 → logits N×4(reg_max + 1)×H×W."""
        logits: Tensor = self.bbox_reg(self.conv(level)) * self.scales[number]
        return logits


class GFLHead(nn.Module):
    """Both heads on every level of the pyramid. strides: of the levels, in pixels."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int],
        num_convs: int = 4,
        groups: int = 32,
        reg_max: int = 16,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.classification_head = GFLClassificationHead(in_channels, num_classes, num_convs, groups)
        self.regression_head = GFLRegressionHead(in_channels, len(self.strides), num_convs, groups, reg_max)

    def maps(self, level: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one level N×C×H×W: class logits, expected distances N×4×H×W in pixels (float32), and the logits of their
        distributions, which the distances are means of."""
        sides = self.regression_head(level, number)
        return self.classification_head(level), expected(sides) * self.strides[number], sides

    def forward(self, x: list[Tensor]) -> Outputs:
        """The pyramid → cls_logits N×all×num_classes, bbox_regression N×all×4 and bbox_distribution
        N×all×4(reg_max + 1), the locations level by level and row by row."""
        levels = [self.maps(level, number) for number, level in enumerate(x)]
        logits, distances, sides = (dict(enumerate(maps)) for maps in zip(*levels, strict=True))
        return {
            "cls_logits": flatten(logits, self.classification_head.num_classes),
            "bbox_regression": flatten(distances, 4),
            "bbox_distribution": flatten(sides, 4 * (self.regression_head.reg_max + 1)),
        }


class GFL(nn.Module):
    """The plain detector, with the forward, the parts and the names of torchvision's one-stage detectors.

    Locations are the centres of the anchors, which are where torchvision's are: at multiples of the stride from the
    image's corner. The anchors' sizes decide, by ATSS, which locations learn an object, and nothing else.
    """

    def __init__(
        self,
        backbone: BackboneWithFPN,
        num_classes: int,
        anchor_generator: AnchorGenerator,
        head: GFLHead,
        min_size: int = 800,
        max_size: int = 1333,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
        atss_candidates: int = CANDIDATES,
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
        self.atss_candidates = atss_candidates

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Outputs | list[Target]:
        """Images 3×h×w in [0, 1] → detections of each; in training mode, with targets, named losses.

        ValueError where these are missing, or a box has no area.
        """
        if self.training:
            _check_targets(targets)
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
        """Quality focal loss, GIoU loss and distribution focal loss, scalars; targets in the canvas's pixels.

        Over the batch as it is given: whoever splits one over processes combines their gradients, as for the losses of
        torchvision's detectors. The first is divided by the number of locations with an object, the others weigh each
        as its highest class score and are divided by the sum of these (public code).
        """
        logits = head_outputs["cls_logits"].float()
        matched = [
            assign(rows, target["boxes"], num_anchors_per_level, self.atss_candidates)
            for rows, target in zip(anchors, targets, strict=True)
        ]
        taught = torch.stack(matched) >= 0
        image, row = taught.nonzero(as_tuple=True)  # image by image, as the objects below
        truth, labels = (
            torch.cat([target[key][own[own >= 0]] for target, own in zip(targets, matched, strict=True)])
            for key in ("boxes", "labels")
        )
        centred = torch.stack(anchors)[taught]
        boxes = self.box_coder.decode(head_outputs["bbox_regression"][taught], centred)
        units = [centred.new_full((n, 1), s) for s, n in zip(self.head.strides, num_anchors_per_level, strict=True)]
        bins = self.box_coder.encode(centred, truth) / torch.cat(units)[row]
        quality = torch.zeros_like(logits)
        quality[image, row, labels] = paired_iou(boxes.detach(), truth)
        box, distribution = side_losses(
            boxes,
            head_outputs["bbox_distribution"][taught].float(),
            truth,
            distance_targets(bins, self.head.regression_head.reg_max),
            logits.detach()[..., 1:].amax(2).sigmoid()[taught],
        )
        return {
            "classification": quality_focal_loss(logits, quality).sum() / max(1, len(row)),
            "bbox_regression": BOX_WEIGHT * box,
            "bbox_distribution": DISTRIBUTION_WEIGHT * distribution,
        }

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


def _tower(width: int, depth: int, groups: int) -> nn.Sequential:
    """Convolutions 3×3 with group norms and ReLUs, named in pairs as torchvision's RetinaNet names them."""
    norm = partial(nn.GroupNorm, groups)
    layers = [Conv2dNormActivation(width, width, 3, norm_layer=norm) for _ in range(depth)]
    for layer in layers:
        nn.init.normal_(layer[0].weight, std=0.01)
    return nn.Sequential(*layers)


def _last(width: int, outputs: int, bias: float) -> nn.Conv2d:
    layer = nn.Conv2d(width, outputs, 3, padding=1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    return layer


def _check_targets(targets: list[Target] | None) -> None:
    if targets is None:
        raise ValueError("Expected targets in training mode, found none: give them, or call eval() first.")
    for number, target in enumerate(targets):
        boxes = target["boxes"]
        for box in boxes[(boxes[:, 2:] <= boxes[:, :2]).any(dim=1)]:
            raise ValueError(f"Expected boxes x1 y1 x2 y2 with an area, found {box.tolist()} in target {number}.")


class GFLSteps(PyramidSteps):
    """The steps of ``detectors.steps.Detector`` on a GFL."""

    model: GFL

    def dense(self, inputs: Inputs, features: Features) -> Dense:
        """Class logits, expected distances to the box's sides in pixels, and the distributions that they are of."""
        maps = [self.model.head.maps(level, number) for number, level in enumerate(features.values())]
        logits, distances, sides = (dict(zip(features, levels, strict=True)) for levels in zip(*maps, strict=True))
        anchors = self.model.anchor_generator(inputs.images, list(features.values()))
        return Dense(logits, distances, anchors, sides=sides)

    def boxes(self, dense: Dense) -> Tensor:
        """N×all×4 xyxy in the canvas's pixels."""
        decoded: Tensor = self.model.box_coder.decode(flatten(dense.deltas, 4), torch.stack(dense.anchors))
        return decoded

    def losses(self, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """The plain model's quality focal loss, GIoU loss and distribution focal loss."""
        outputs = head_outputs(dense, len(self.spec.labels) + 1)
        per_level = [level.shape[2] * level.shape[3] for level in features.values()]
        return self.model.compute_loss(inputs.ground_truth(), outputs, dense.anchors, per_level)

    def postprocess(self, inputs: Inputs, features: Features, dense: Dense) -> list[Target]:
        """Detections per image: boxes in pixels of the images given to ``preprocess``, scores, labels 1..K."""
        return postprocess(self.model, inputs, dense, len(self.spec.labels) + 1)


def build_gfl(spec: DetectorSpec) -> GFL:
    """A GFL with fresh weights from torch's generator."""
    backbone = build_backbone(spec)
    classes = len(spec.labels) + 1
    anchors = AnchorGenerator(tuple((size,) for size in spec.anchor_sizes), ((1.0,),) * len(spec.anchor_sizes))
    head = GFLHead(spec.neck_width, classes, spec.levels, spec.head_depth, spec.head_groups, spec.reg_max)
    return GFL(backbone, classes, anchors, head, **frame_options(spec))


def describe_gfl(model: GFL, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's GFL, read off its modules; SpecError where a spec cannot say a part."""
    if not isinstance(model.head, GFLHead):
        raise SpecError(f"Expected a GFLHead, found {type(model.head).__name__}: no adapter for it.")
    classify = model.head.classification_head
    spec = DetectorSpec(
        family="gfl",
        **describe_frame(model, classify.num_classes - 1, labels),
        anchor_sizes=tuple(sizes[0] for sizes in model.anchor_generator.sizes),
        anchor_ratios=(1.0,),
        head_depth=len(classify.conv),
        head_groups=next(module.num_groups for module in classify.modules() if isinstance(module, nn.GroupNorm)),
        reg_max=model.head.regression_head.reg_max,
        **describe_selection(model),
    )
    with torch.device("meta"):
        check_rebuilt(model, build_gfl(spec), _unsaid)
    return spec


def _unsaid(model: GFL) -> dict[str, object]:
    """Settings that a spec has no field for."""
    return unsaid_frame(model, model.anchor_generator) | {
        "head.strides": model.head.strides,
        "atss_candidates": model.atss_candidates,
        "box_coder.normalize_by_size": model.box_coder.normalize_by_size,
    }


def read_gfl(state: State) -> Read | None:
    """Classes and fields that the head's tensors tell."""
    if f"{REGRESS}scales" not in state:
        return None
    bins = sizes(state, f"{REGRESS}bbox_reg.weight", 4)[0] // 4
    return sizes(state, f"{CLASSIFY}cls_logits.weight", 4)[0] - 1, {
        "reg_max": bins - 1,
        "head_depth": count(state, CLASSIFY + "conv.{}.0.weight"),
    }


def head_groups(spec: DetectorSpec) -> Named:
    """The towers' channels."""
    yield from tower_groups(spec, "classification", True, ("cls_logits",))
    yield from tower_groups(spec, "regression", True, ("bbox_reg",))


FAMILY = Family(
    model=GFL,
    steps=GFLSteps,
    build=build_gfl,
    describe=describe_gfl,
    read=read_gfl,
    head_groups=head_groups,
    head_counts=tower_counts,
    class_layers={f"{CLASSIFY}cls_logits": 1},
)
