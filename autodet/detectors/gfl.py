"""GFL (Generalized Focal Loss, Li et al. 2020): a plain model in torchvision's idiom, and its explicit steps.

A one-stage detector without anchors to regress from. What it knows of a side of a box is a distribution over distances
from the location; its class score is the overlap that it expects of its box with the object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from autodet.detectors.atss import CANDIDATES, assign
from autodet.detectors.dims import Named, tower_counts, tower_groups
from autodet.detectors.gfl_loss import distance_targets, expected, paired_iou, quality_focal_loss, side_losses
from autodet.detectors.one_box import (
    OneBoxDetector,
    Outputs,
    conv_tower,
    convolution,
    describe_one_box,
    one_anchor,
    unsaid_one_box,
)
from autodet.detectors.one_stage import OneStageSteps, flatten, frame_options
from autodet.detectors.pyramid import build_backbone, check_rebuilt
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.state import CLASSIFY, REGRESS, TOWER_NAMES, UNUSED, MMDet, Read, State, count, sizes
from autodet.detectors.steps import Dense, Family, Features, Inputs, Target

PRIOR = 0.01  # score of every class before training (Lin et al. 2017)
BOX_WEIGHT, DISTRIBUTION_WEIGHT = 2.0, 0.25  # of the losses beside the quality focal loss (public code; eq. 8)


class GFLClassificationHead(nn.Module):
    """Class scores of a level's locations: a tower of convolutions with group norms, and a last one.

    num_classes: with the background, whose channel 0 is there as in torchvision's heads. No location ever learns it,
    so that it falls silent, and no detection is made of it.
    """

    def __init__(self, in_channels: int, num_classes: int, num_convs: int, groups: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = conv_tower(in_channels, num_convs, groups)
        self.cls_logits = convolution(in_channels, num_classes, 3, -math.log((1 - PRIOR) / PRIOR))

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
        self.conv = conv_tower(in_channels, num_convs, groups)
        self.bbox_reg = convolution(in_channels, 4 * (reg_max + 1), 3)
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


class GFL(OneBoxDetector):
    """The plain detector. Its anchors' sizes decide, by ATSS, which locations learn an object, and nothing else.

    atss_candidates: the locations of a level that come into question for an object; all else as ``OneBoxDetector``.
    """

    head: GFLHead

    def __init__(
        self,
        backbone: BackboneWithFPN,
        num_classes: int,
        anchor_generator: AnchorGenerator,
        head: GFLHead,
        nms_thresh: float = 0.6,
        atss_candidates: int = CANDIDATES,
        **frame: Any,
    ) -> None:
        super().__init__(backbone, num_classes, anchor_generator, head, nms_thresh=nms_thresh, **frame)
        self.atss_candidates = atss_candidates

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


class GFLSteps(OneStageSteps):
    """The steps of ``detectors.steps.Detector`` on a GFL."""

    model: GFL

    def dense(self, inputs: Inputs, features: Features) -> Dense:
        """Class logits, expected distances to the box's sides in pixels, and the distributions that they are of."""
        maps = [self.model.head.maps(level, number) for number, level in enumerate(features.values())]
        logits, distances, sides = (dict(zip(features, levels, strict=True)) for levels in zip(*maps, strict=True))
        anchors = self.model.anchor_generator(inputs.images, list(features.values()))
        return Dense(logits, distances, anchors, sides=sides)


def build_gfl(spec: DetectorSpec) -> GFL:
    """A GFL with fresh weights from torch's generator."""
    backbone = build_backbone(spec)
    classes = len(spec.labels) + 1
    head = GFLHead(spec.neck_width, classes, spec.levels, spec.head_depth, spec.head_groups, spec.reg_max)
    return GFL(backbone, classes, one_anchor(spec), head, **frame_options(spec))


def describe_gfl(model: GFL, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's GFL, read off its modules; SpecError where a spec cannot say a part."""
    if not isinstance(model.head, GFLHead):
        raise SpecError(f"Expected a GFLHead, found {type(model.head).__name__}: no adapter for it.")
    bins = model.head.regression_head.reg_max
    spec = DetectorSpec(family="gfl", reg_max=bins, **describe_one_box(model, labels))
    with torch.device("meta"):
        check_rebuilt(model, build_gfl(spec), _unsaid)
    return spec


def _unsaid(model: GFL) -> dict[str, object]:
    """Settings that a spec has no field for."""
    return unsaid_one_box(model) | {"atss_candidates": model.atss_candidates}


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


def _scales_in_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection keeps the factor of each level by itself."""
    factors = [name for name in state if name.startswith(f"{REGRESS}scales.")]
    levels = sorted(factors, key=lambda name: int(name.rpartition(".")[2]))
    rest = {name: value for name, value in state.items() if name not in factors}
    return rest | ({f"{REGRESS}scales": torch.stack([state[name].reshape(()) for name in levels])} if levels else {})


FAMILY = Family(
    model=GFL,
    steps=GFLSteps,
    build=build_gfl,
    describe=describe_gfl,
    read=read_gfl,
    head_groups=head_groups,
    head_counts=tower_counts,
    class_layers={f"{CLASSIFY}cls_logits": 1},
    mmdet=MMDet(
        mark="bbox_head.gfl_cls.weight",
        names=(
            *TOWER_NAMES,
            (r"bbox_head\.gfl_cls\.", f"{CLASSIFY}cls_logits."),
            (r"bbox_head\.gfl_reg\.", f"{REGRESS}bbox_reg."),
            (r"bbox_head\.scales\.(\d+)\.scale", rf"{REGRESS}scales.\1"),
            (r"bbox_head\.integral\.project", UNUSED),  # 0, 1, …, which we count ourselves
        ),
        spec={"top_relu": False},
        adjust=_scales_in_one,
    ),
)
