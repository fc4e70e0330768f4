"""Faster R-CNN (Ren et al. 2015) with a feature pyramid (Lin et al. 2017): torchvision's model in explicit steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from autodet.detectors.dims import Named, biased, pyramid_dim
from autodet.detectors.pyramid import (
    build_backbone,
    check_rebuilt,
    describe_frame,
    matching,
    preprocess,
    pyramid,
    unsaid_frame,
)
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.state import MMDet, Read, State, count, octaves_of, sizes
from autodet.detectors.steps import Dense, Family, Features, Inputs, Regions, Target

ROI = "roi_heads."
RPN_NAMES = (  # mmdetection's → ours
    (r"rpn_head\.rpn_conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_conv\.(\d+)\.conv\.", r"rpn.head.conv.\1.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
)
MMDET_NAMES = (
    *RPN_NAMES,
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", f"{ROI}box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", f"{ROI}box_head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", f"{ROI}box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", f"{ROI}box_predictor.bbox_pred."),
)
MMDET_REGIONS = {"roi_aligned": True, "roi_sampling": 0}  # how mmdetection pools regions


@dataclass
class Sampled:
    """Regions that the second stage learns from, per image: boxes R_i×4; matched: numbers of the objects that they are
    nearest to; labels: 0 where they are background; regression: what their boxes should become, R_i×4."""

    boxes: list[Tensor]
    matched: list[Tensor]
    labels: list[Tensor]
    regression: list[Tensor]


class FasterRCNNSteps(nn.Module):
    """The steps of ``detectors.steps.TwoStage`` on a torchvision FasterRCNN, which is used as it is, not copied."""

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

    def dense(self, inputs: Inputs, features: Features) -> Dense:
        """The proposal network's responses and the anchors they belong to."""
        maps = list(features.values())
        objectness, deltas = self.model.rpn.head(maps)
        anchors = self.model.rpn.anchor_generator(inputs.images, maps)
        return Dense(dict(zip(features, objectness, strict=True)), dict(zip(features, deltas, strict=True)), anchors)

    def boxes(self, dense: Dense) -> Tensor:
        """N×all×4 xyxy in the canvas's pixels, before any selection."""
        _, deltas = _flatten(dense)
        decoded: Tensor = self.model.rpn.box_coder.decode(deltas.float(), dense.anchors)
        return decoded.view(len(dense.anchors), -1, 4)

    def proposals(self, inputs: Inputs, dense: Dense) -> list[Tensor]:
        """Per image R_i×4 boxes after NMS, best first; how many depends on training or evaluation mode."""
        return self._proposals(inputs, dense, *_flatten(dense))

    def _proposals(self, inputs: Inputs, dense: Dense, objectness: Tensor, deltas: Tensor) -> list[Tensor]:
        rpn = self.model.rpn
        # Like the plain model: no gradient through the proposals' coordinates.
        boxes = rpn.box_coder.decode(deltas.detach(), dense.anchors).view(len(dense.anchors), -1, 4)
        per_level = [level[0].numel() for level in dense.logits.values()]
        kept, _ = rpn.filter_proposals(boxes, objectness, inputs.images.image_sizes, per_level)
        return list(kept)

    def regions(self, inputs: Inputs, features: Features, proposals: list[Tensor]) -> Regions:
        """The box head's responses on given proposals."""
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(poolable(features), proposals, inputs.images.image_sizes)
        class_logits, box_deltas = heads.box_predictor(heads.box_head(pooled))
        return Regions(proposals, class_logits, box_deltas)

    def region_corners(self, regions: Regions) -> Tensor:
        """R×(K+1)×4 xyxy in units of the proposal from its centre: a decoding onto the unit square does not need it."""
        unit = regions.box_deltas.new_tensor([[-0.5, -0.5, 0.5, 0.5]]).expand(len(regions.box_deltas), 4)
        corners: Tensor = self.model.roi_heads.box_coder.decode_single(regions.box_deltas.float(), unit.float())
        return corners.view(len(unit), regions.box_deltas.shape[1] // 4, 4)

    def losses(self, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """The plain model's losses, equal to its own: random draws come in its order."""
        rpn, heads, targets = self.model.rpn, self.model.roi_heads, inputs.ground_truth()
        objectness, deltas = _flatten(dense)
        proposals = self._proposals(inputs, dense, objectness, deltas)
        labels, matched = rpn.assign_targets_to_anchors(dense.anchors, targets)
        regression = rpn.box_coder.encode(matched, dense.anchors)
        loss_objectness, loss_rpn_box = rpn.compute_loss(objectness, deltas, labels, regression)
        boxes, objects, roi_labels, roi_regression = heads.select_training_samples(proposals, targets)
        sampled = Sampled(boxes, objects, roi_labels, roi_regression)
        return self.region_losses(inputs, features, sampled) | {
            "loss_objectness": loss_objectness,
            "loss_rpn_box_reg": loss_rpn_box,
        }

    def region_losses(self, inputs: Inputs, features: Features, sampled: Sampled) -> dict[str, Tensor]:
        """The second stage's losses."""
        regions = self.regions(inputs, features, sampled.boxes)
        loss_class, loss_box = fastrcnn_loss(
            regions.class_logits, regions.box_deltas, sampled.labels, sampled.regression
        )
        return {"loss_classifier": loss_class, "loss_box_reg": loss_box}

    def postprocess(self, inputs: Inputs, features: Features, dense: Dense) -> list[Target]:
        """Detections per image: boxes in pixels of the images given to ``preprocess``, scores, labels 1..K."""
        found = self.selected(inputs, features, dense)
        return list(self.model.transform.postprocess(found, inputs.images.image_sizes, inputs.sizes))

    def selected(self, inputs: Inputs, features: Features, dense: Dense) -> list[Target]:
        """The detections after NMS, boxes still in the canvas's pixels."""
        regions = self.regions(inputs, features, self.proposals(inputs, dense))
        found = self.model.roi_heads.postprocess_detections(
            regions.class_logits, regions.box_deltas, regions.proposals, inputs.images.image_sizes
        )
        return [
            {"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in zip(*found, strict=True)
        ]


def poolable(features: Features) -> dict[str, Tensor]:
    """The maps under the names that a RoIAlign over levels knows them by."""
    return {str(index): level for index, level in enumerate(features.values())}


def _flatten(dense: Dense) -> tuple[Tensor, Tensor]:
    """Objectness (all locations of all images)×1 and deltas ×4, in the anchors' order."""
    objectness, deltas = concat_box_prediction_layers(list(dense.logits.values()), list(dense.deltas.values()))
    return objectness, deltas


def build_faster_rcnn(spec: DetectorSpec) -> FasterRCNN:
    """A torchvision FasterRCNN with fresh weights from torch's generator; parameter names are torchvision's."""
    return FasterRCNN(build_backbone(spec), **rcnn_options(spec))


def rcnn_options(spec: DetectorSpec) -> dict[str, Any]:
    """What the constructors of torchvision's two-stage detectors take of a spec, besides the backbone."""
    anchors = AnchorGenerator(
        tuple((size,) for size in spec.anchor_sizes), (spec.anchor_ratios,) * len(spec.anchor_sizes)
    )
    return {
        "min_size": spec.min_size,
        "max_size": spec.max_size,
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(spec.neck_width, anchors.num_anchors_per_location()[0], conv_depth=spec.rpn_depth),
        "rpn_pre_nms_top_n_train": spec.proposals_before_nms[0],
        "rpn_pre_nms_top_n_test": spec.proposals_before_nms[1],
        "rpn_post_nms_top_n_train": spec.proposals[0],
        "rpn_post_nms_top_n_test": spec.proposals[1],
        "box_roi_pool": region_pool(spec, spec.roi_size),
        "box_head": TwoMLPHead(spec.neck_width * spec.roi_size**2, spec.head_width),
        "box_predictor": FastRCNNPredictor(spec.head_width, len(spec.labels) + 1),
        "box_batch_size_per_image": spec.regions_per_image,
        "box_score_thresh": spec.score_threshold,
        "box_nms_thresh": spec.nms_threshold,
        "box_detections_per_img": spec.detections,
    }


class AlignedRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]  # torchvision has no types
    """RoIAlign that takes a cell's value to be that of its centre, not of its corner (``aligned`` of roi_align)."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """As MultiScaleRoIAlign: R×C×size×size."""
        levels = self.map_levels(boxes)
        regions = torch.cat([nn.functional.pad(own, (1, 0), value=float(image)) for image, own in enumerate(boxes)])
        rows = [(levels == level).nonzero()[:, 0] for level in range(len(self.scales))]
        parts = [
            roi_align(x[name], regions[chosen], self.output_size, scale, self.sampling_ratio, aligned=True)
            for name, chosen, scale in zip(self.featmap_names, rows, self.scales, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]


def region_pool(spec: DetectorSpec, size: int) -> MultiScaleRoIAlign:
    """RoIAlign of size×size bins, at the nominal strides of the levels that come from the body.

    torchvision infers them from the first image that it meets, and keeps them: a small one, whose maps are rounded up,
    would change all later detections.
    """
    strides = spec.body_levels
    kind = AlignedRoIAlign if spec.roi_aligned else MultiScaleRoIAlign
    pool = kind([str(index) for index in range(len(strides))], size, spec.roi_sampling)
    pool.scales = [1 / stride for stride in strides]
    first, last = strides[0].bit_length() - 1, strides[-1].bit_length() - 1
    pool.map_levels = initLevelMapper(first, last, pool.canonical_scale, pool.canonical_level)
    return pool


def describe_faster_rcnn(model: FasterRCNN, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's torchvision Faster R-CNN, read off its modules; SpecError where a spec cannot say a part."""
    spec = DetectorSpec(family="faster_rcnn", **describe_rcnn(model, labels))
    with torch.device("meta"):
        check_rebuilt(model, build_faster_rcnn(spec), unsaid_rcnn)
    return spec


def describe_rcnn(
    model: FasterRCNN, labels: Sequence[tuple[int, str]], head: Any = None, predictor: Any = None
) -> dict[str, Any]:
    """The spec's fields that are read off alike in Faster R-CNN and what extends it.

    head, predictor: those of its box heads that are described, where it has several.
    """
    rpn, heads = model.rpn, model.roi_heads
    head, predictor = head or heads.box_head, predictor or heads.box_predictor
    if not isinstance(head, TwoMLPHead):
        raise SpecError(f"Expected a TwoMLPHead, found {type(head).__name__}: no adapter for it.")
    return {
        **describe_frame(model, predictor.cls_score.out_features - 1, labels),
        "anchor_sizes": tuple(sizes[0] for sizes in rpn.anchor_generator.sizes),
        "anchor_ratios": tuple(rpn.anchor_generator.aspect_ratios[0]),
        "rpn_depth": len(rpn.head.conv),
        "head_width": head.fc6.out_features,
        "roi_size": heads.box_roi_pool.output_size[0],
        "roi_sampling": heads.box_roi_pool.sampling_ratio,
        "roi_aligned": isinstance(heads.box_roi_pool, AlignedRoIAlign),
        "proposals_before_nms": (rpn._pre_nms_top_n["training"], rpn._pre_nms_top_n["testing"]),
        "proposals": (rpn._post_nms_top_n["training"], rpn._post_nms_top_n["testing"]),
        "regions_per_image": heads.fg_bg_sampler.batch_size_per_image,
        "score_threshold": heads.score_thresh,
        "nms_threshold": heads.nms_thresh,
        "detections": heads.detections_per_img,
    }


def unsaid_rcnn(model: FasterRCNN) -> dict[str, object]:
    """Settings that a spec has no field for."""
    rpn, heads = model.rpn, model.roi_heads
    return unsaid_frame(model, rpn.anchor_generator) | {
        "rpn.nms_thresh": rpn.nms_thresh,
        "rpn.score_thresh": rpn.score_thresh,
        "rpn.min_size": rpn.min_size,
        "box_roi_pool.canonical": (heads.box_roi_pool.canonical_scale, heads.box_roi_pool.canonical_level),
        "samplers": tuple(
            (sampler.batch_size_per_image, sampler.positive_fraction)
            for sampler in (rpn.fg_bg_sampler, heads.fg_bg_sampler)
        ),
        "matchers": (matching(rpn.proposal_matcher), matching(heads.proposal_matcher)),
        "box_coders": (tuple(rpn.box_coder.weights), tuple(heads.box_coder.weights)),
    }


def read_faster_rcnn(state: State) -> Read | None:
    """Classes and fields that the heads' tensors tell."""
    if "rpn.head.cls_logits.weight" not in state:
        return None
    if f"{ROI}box_head.fc6.weight" not in state:
        raise SpecError(
            "expected a box head of two layers (roi_heads.box_head.fc6), found another one, as that of "
            "fasterrcnn_resnet50_fpn_v2: there is no adapter for it."
        )
    return sizes(state, f"{ROI}box_predictor.cls_score.weight", 2)[0] - 1, read_rcnn(state, f"{ROI}box_head.")


def read_rcnn(state: State, head: str) -> dict[str, Any]:
    """Fields that the tensors of the proposal network and of a box head tell."""
    anchors, width = sizes(state, "rpn.head.bbox_pred.weight", 4)[:2]
    head_width, inputs = sizes(state, f"{head}fc6.weight", 2)
    return {
        "anchor_octaves": octaves_of({3: 1}, anchors // 4),
        "rpn_depth": count(state, "rpn.head.conv.{}.0.weight"),
        "head_width": head_width,
        "roi_size": math.isqrt(inputs // width),
    }


def head_groups(spec: DetectorSpec) -> Named:
    """Channels of the proposal network's and of the box head's layers."""
    yield from rpn_groups(spec)
    yield from box_groups(spec)


def rpn_groups(spec: DetectorSpec) -> Named:
    """Channels of the proposal network's layers."""
    before = pyramid_dim(spec)
    for index in range(spec.rpn_depth):
        yield from biased(f"rpn.head.conv.{index}.0", f"rpn.{index}", before)
        before = f"rpn.{index}"
    for name in ("cls_logits", "bbox_pred"):
        yield f"rpn.head.{name}.weight", (None, before)


def box_groups(spec: DetectorSpec, stage: str = "") -> Named:
    """Channels of a box head's layers; stage: what follows the heads' names where there are several, as ``.0``."""
    first, second = f"fc6{stage}", f"fc7{stage}"
    yield from biased(f"{ROI}box_head{stage}.fc6", first, pyramid_dim(spec, places=spec.roi_size**2))
    yield from biased(f"{ROI}box_head{stage}.fc7", second, first)
    for name in ("cls_score", "bbox_pred"):
        yield f"{ROI}box_predictor{stage}.{name}.weight", (None, second)


def head_counts(spec: DetectorSpec) -> dict[str, int]:
    """Channels of those layers."""
    return rpn_counts(spec) | {"fc6": spec.head_width, "fc7": spec.head_width}


def rpn_counts(spec: DetectorSpec) -> dict[str, int]:
    """Channels of the proposal network's layers."""
    return {f"rpn.{index}": spec.neck_width for index in range(spec.rpn_depth)}


FAMILY = Family(
    model=FasterRCNN,
    steps=FasterRCNNSteps,
    build=build_faster_rcnn,
    describe=describe_faster_rcnn,
    read=read_faster_rcnn,
    head_groups=head_groups,
    head_counts=head_counts,
    class_layers={f"{ROI}box_predictor.cls_score": 1, f"{ROI}box_predictor.bbox_pred": 4},
    mmdet=MMDet(
        mark="roi_head.bbox_head.fc_cls.weight",
        names=MMDET_NAMES,
        spec=MMDET_REGIONS,
    ),
)
