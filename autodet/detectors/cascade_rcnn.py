"""Cascade R-CNN (Cai & Vasconcelos 2018) with a feature pyramid: box heads in a row, of torchvision's parts.

Each stage looks at the boxes of the one before it and learns from those that overlap an object more than before (Sec.
4.1). As in the public code, boxes do not depend on classes, stages weigh 1, 1/2, 1/4, regressions are learned in units
that shrink as 1, 1/2, 1/3, by a smooth l1 loss with β = 1 of them (torchvision's has 1/9), and a stage's boxes of
ground truth are left out of the next one, which gets the ground truth itself again.

A Cascade Mask R-CNN has one mask branch: it learns from the regions of the first stage and answers on the last one's
boxes, as in one of the public codes; mmdetection has a branch in every stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image

from autodet.detectors.dims import Named
from autodet.detectors.faster_rcnn import (
    MMDET_REGIONS,
    ROI,
    RPN_NAMES,
    FasterRCNNSteps,
    Sampled,
    box_groups,
    describe_rcnn,
    poolable,
    rcnn_options,
    read_rcnn,
    rpn_counts,
    rpn_groups,
    unsaid_rcnn,
)
from autodet.detectors.mask_branch import (
    MASK_LAYERS,
    Sizes,
    build_mask_branch,
    describe_mask_branch,
    mask_counts,
    mask_groups,
    mask_logits,
    mask_losses,
    mmdet_names,
    read_mask_branch,
    unsaid_mask_branch,
    with_masks,
)
from autodet.detectors.pyramid import build_backbone, check_rebuilt, matching
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.state import UNUSED, MMDet, Read, State, count, sizes
from autodet.detectors.steps import Dense, Family, Features, Inputs, Regions, Target
from autodet.detectors.traits import TRAITS

UNITS: Final = (10.0, 10.0, 5.0, 5.0)  # of the first stage's regressions: torchvision's; stage s, from 1, has s · these
POSITIVE: Final = 0.25  # of the regions that a stage learns from: torchvision's


class CascadeRoIHeads(RoIHeads):  # type: ignore[misc]  # torchvision has no types
    """torchvision's RoIHeads with a box head and a predictor for each stage; its own settings are the first stage's.

    box_head, box_predictor: one a stage, the predictor with 4 regressions whatever the class. stage_ious: the least
    overlap with its object of what is no background in a stage. The rest is RoIHeads's; mask_branch: its parts for
    masks, if any, by their names.
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: Sequence[nn.Module],
        box_predictor: Sequence[nn.Module],
        stage_ious: Sequence[float],
        batch_size_per_image: int,
        score_thresh: float,
        nms_thresh: float,
        detections_per_img: int,
        **mask_branch: nn.Module | None,
    ) -> None:
        rest = (score_thresh, nms_thresh, detections_per_img)
        settings = [
            (iou, iou, batch_size_per_image, POSITIVE, tuple(number * unit for unit in UNITS), *rest)
            for number, iou in enumerate(stage_ious, start=1)
        ]
        super().__init__(
            box_roi_pool, nn.ModuleList(box_head), nn.ModuleList(box_predictor), *settings[0], **mask_branch
        )
        # What samples, encodes and decodes in each stage; without parts, and so without parameters.
        self.stages = tuple(RoIHeads(None, None, None, *own) for own in settings)

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes, targets: Any = None
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """As RoIHeads's: detections and no losses in evaluation mode, losses and no detections in training mode."""
        if self.training:
            sampled = Sampled(*self.select_training_samples(proposals, targets))
            return [], self.losses(features, sampled, image_shapes, targets)
        return self.detections(features, proposals, image_shapes), {}

    def responses(
        self, stage: int, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sizes
    ) -> tuple[Tensor, Tensor]:
        """Class logits R×(K+1) and regressions R×4 of a stage, from 0, on given boxes."""
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        class_logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
        return class_logits, deltas

    def refined(self, stage: int, boxes: list[Tensor], deltas: Tensor, image_shapes: Sizes) -> list[Tensor]:
        """The boxes that a stage makes of its own, within the images and without gradient."""
        coder = self.stages[stage].box_coder
        decoded = coder.decode_single(deltas.detach().float(), torch.cat(boxes))
        parts = decoded.split([own.shape[0] for own in boxes])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]

    def regions(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes) -> Regions:
        """All stages on given proposals: the last one's boxes, and the mean of all stages' class probabilities (Sec.
        5.1), each of the boxes that its stage has seen, as a logarithm."""
        boxes, chances = proposals, []
        for stage in range(len(self.stages)):
            class_logits, deltas = self.responses(stage, features, boxes, image_shapes)
            chances.append(class_logits.float().log_softmax(1))
            references = boxes
            boxes = self.refined(stage, boxes, deltas, image_shapes)
        mean = torch.stack(chances).logsumexp(0) - math.log(len(chances))
        return Regions(proposals, mean, deltas.repeat(1, mean.shape[1]), references)

    def decoded(self, regions: Regions) -> Tensor:
        """The regions' boxes R×(K+1)×4 in pixels, with gradient of the last stage's regressions alone."""
        assert regions.references is not None
        coder = self.stages[-1].box_coder
        boxes: Tensor = coder.decode_single(regions.box_deltas.float(), torch.cat(regions.references))
        return boxes.view(len(boxes), regions.box_deltas.shape[1] // 4, 4)

    def detections(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes) -> list[Target]:
        """What is left after thresholds and NMS, with masks R×1×M×M in their boxes where there is a branch."""
        regions = self.regions(features, proposals, image_shapes)
        found = self.stages[-1].postprocess_detections(
            regions.class_logits, regions.box_deltas, regions.references, image_shapes
        )
        kept = [
            {"boxes": boxes, "scores": scores, "labels": kinds} for boxes, scores, kinds in zip(*found, strict=True)
        ]
        return with_masks(self, features, kept, image_shapes) if self.has_mask() else kept

    def losses(
        self, features: dict[str, Tensor], sampled: Sampled, image_shapes: Sizes, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Two losses a stage, weighted, and that of the masks. sampled: what the first stage learns from."""
        found = mask_losses(self, features, sampled, image_shapes, targets) if self.has_mask() else {}
        for stage in range(len(self.stages)):
            class_logits, deltas = self.responses(stage, features, sampled.boxes, image_shapes)
            loss_class, loss_box = stage_losses(class_logits, deltas, sampled)
            found[f"loss_classifier_{stage}"] = loss_class / 2**stage
            found[f"loss_box_reg_{stage}"] = loss_box / 2**stage
            if stage + 1 < len(self.stages):
                boxes = self.refined(stage, sampled.boxes, deltas, image_shapes)
                boxes = [own[new] for own, new in zip(boxes, _no_truth(sampled, targets), strict=True)]
                sampled = Sampled(*self.stages[stage + 1].select_training_samples(boxes, targets))
        return found


def stage_losses(class_logits: Tensor, deltas: Tensor, sampled: Sampled) -> tuple[Tensor, Tensor]:
    """Cross entropy, and the smooth l1 loss of the regressions R×4 of objects; both a mean over all R regions."""
    labels = torch.cat(sampled.labels)
    objects = labels > 0
    wanted = torch.cat(sampled.regression)[objects]
    loss_box = F.smooth_l1_loss(deltas[objects].float(), wanted, reduction="sum") / labels.numel()
    return F.cross_entropy(class_logits, labels), loss_box


def _no_truth(sampled: Sampled, targets: list[Target]) -> list[Tensor]:
    """Per image, which of the regions are none of the ground truth's own boxes."""
    found = []
    for boxes, matched, target in zip(sampled.boxes, sampled.matched, targets, strict=True):
        truth = target["boxes"].to(boxes)
        found.append((boxes != truth[matched]).any(1) if len(truth) else torch.ones_like(matched, dtype=torch.bool))
    return found


class CascadeRCNN(FasterRCNN):  # type: ignore[misc]  # torchvision has no types
    """torchvision's FasterRCNN with a cascade of box heads.

    box_head, box_predictor, stage_ious: as ``CascadeRoIHeads`` takes them; mask_roi_pool, mask_head, mask_predictor: of
    a Cascade Mask R-CNN, as MaskRCNN takes them; options: all else that FasterRCNN does.
    """

    roi_heads: CascadeRoIHeads

    def __init__(
        self,
        backbone: nn.Module,
        box_head: Sequence[nn.Module],
        box_predictor: Sequence[nn.Module],
        stage_ious: Sequence[float] = TRAITS["cascade_rcnn"].standard["stage_ious"],
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
        **options: Any,
    ) -> None:
        if not len(box_head) == len(box_predictor) == len(stage_ious) > 0:
            counts = f"{len(box_head)}, {len(box_predictor)} and {len(stage_ious)}"
            raise ValueError(f"Expected as many box_head, box_predictor and stage_ious, found {counts}.")
        super().__init__(backbone, box_head=box_head[0], box_predictor=box_predictor[0], **options)
        one = self.roi_heads
        self.roi_heads = CascadeRoIHeads(
            one.box_roi_pool,
            box_head,
            box_predictor,
            stage_ious,
            one.fg_bg_sampler.batch_size_per_image,
            one.score_thresh,
            one.nms_thresh,
            one.detections_per_img,
            mask_roi_pool=mask_roi_pool,
            mask_head=mask_head,
            mask_predictor=mask_predictor,
        )


class CascadeRCNNSteps(FasterRCNNSteps):
    """The steps of ``detectors.steps.TwoStage``, and of ``Masked``, on a CascadeRCNN."""

    def regions(self, inputs: Inputs, features: Features, proposals: list[Tensor]) -> Regions:
        """All stages on given proposals. The class logits are logarithms of the stages' mean probabilities."""
        found: Regions = self.model.roi_heads.regions(poolable(features), proposals, inputs.images.image_sizes)
        return found

    def region_corners(self, regions: Regions) -> Tensor:
        """R×(K+1)×4 xyxy in units of the given proposal from its centre: the last stage's box for every class.

        Its gradient is that of the last stage alone: what the others make of a box is no less fixed in training.
        """
        boxes, given = self.model.roi_heads.decoded(regions), torch.cat(regions.proposals).float()
        centre = (given[:, :2] + given[:, 2:]).repeat(1, 2) / 2
        size = (given[:, 2:] - given[:, :2]).repeat(1, 2)
        corners: Tensor = (boxes - centre.unsqueeze(1)) / size.unsqueeze(1)
        return corners

    def region_losses(self, inputs: Inputs, features: Features, sampled: Sampled) -> dict[str, Tensor]:
        """The losses of all stages; sampled: what the first one learns from."""
        heads, sizes_ = self.model.roi_heads, inputs.images.image_sizes
        return dict(heads.losses(poolable(features), sampled, sizes_, inputs.ground_truth()))

    def selected(self, inputs: Inputs, features: Features, dense: Dense) -> list[Target]:
        """The detections after NMS, boxes still in the canvas's pixels, masks R×1×M×M still in their boxes."""
        proposals, heads = self.proposals(inputs, dense), self.model.roi_heads
        return list(heads.detections(poolable(features), proposals, inputs.images.image_sizes))

    def region_masks(self, inputs: Inputs, features: Features, proposals: list[Tensor]) -> Tensor:
        """The mask branch's logits on given proposals; only where there is one."""
        return mask_logits(self.model.roi_heads, poolable(features), proposals, inputs.images.image_sizes)


def build_cascade_rcnn(spec: DetectorSpec) -> CascadeRCNN:
    """A CascadeRCNN with fresh weights from torch's generator; parameter names as torchvision would give them."""
    options = rcnn_options(spec)
    heads, predictors = [options.pop("box_head")], [options.pop("box_predictor")]
    for _ in spec.stage_ious[1:]:
        heads.append(TwoMLPHead(spec.neck_width * spec.roi_size**2, spec.head_width))
        predictors.append(FastRCNNPredictor(spec.head_width, len(spec.labels) + 1))
    for predictor in predictors:
        predictor.bbox_pred = nn.Linear(spec.head_width, 4)
    masks = build_mask_branch(spec) if spec.masks else {}
    return CascadeRCNN(build_backbone(spec), heads, predictors, spec.stage_ious, **masks, **options)


def describe_cascade_rcnn(model: CascadeRCNN, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's CascadeRCNN, read off its modules; SpecError where a spec cannot say a part."""
    heads = model.roi_heads
    if not isinstance(heads, CascadeRoIHeads):
        raise SpecError(f"Expected CascadeRoIHeads, found {type(heads).__name__}: no adapter for it.")
    spec = DetectorSpec(
        family="cascade_rcnn",
        **describe_rcnn(model, labels, heads.box_head[0], heads.box_predictor[0]),
        stage_ious=tuple(stage.proposal_matcher.high_threshold for stage in heads.stages),
        **(describe_mask_branch(heads) if heads.has_mask() else {}),
    )
    with torch.device("meta"):
        check_rebuilt(model, build_cascade_rcnn(spec), _unsaid)
    return spec


def _unsaid(model: CascadeRCNN) -> dict[str, object]:
    """Settings that a spec has no field for."""
    heads = model.roi_heads
    stages = tuple(
        (
            matching(stage.proposal_matcher),
            tuple(stage.box_coder.weights),
            stage.fg_bg_sampler.batch_size_per_image,
            stage.fg_bg_sampler.positive_fraction,
        )
        for stage in heads.stages
    )
    return unsaid_rcnn(model) | (unsaid_mask_branch(heads) if heads.has_mask() else {}) | {"stages": stages}


def read_cascade_rcnn(state: State) -> Read | None:
    """Classes and fields that the heads' tensors tell; of the stages only their number: thresholds are the usual ones,
    and go on in steps of 0.1 where there are more."""
    predictor = f"{ROI}box_predictor.0.cls_score.weight"
    if predictor not in state:
        return None
    stages = count(state, f"{ROI}box_predictor.{{}}.cls_score.weight")
    ious = tuple(round(0.5 + 0.1 * stage, 1) for stage in range(stages))
    fields = read_rcnn(state, f"{ROI}box_head.0.") | read_mask_branch(state)
    return sizes(state, predictor, 2)[0] - 1, fields | {"stage_ious": ious}


def head_groups(spec: DetectorSpec) -> Named:
    """Channels of the proposal network's and of every box head's layers."""
    yield from rpn_groups(spec)
    for stage in range(len(spec.stage_ious)):
        yield from box_groups(spec, f".{stage}")
    yield from mask_groups(spec)


def head_counts(spec: DetectorSpec) -> dict[str, int]:
    """Channels of those layers."""
    layers = [f"{layer}.{stage}" for stage in range(len(spec.stage_ious)) for layer in ("fc6", "fc7")]
    return rpn_counts(spec) | dict.fromkeys(layers, spec.head_width) | mask_counts(spec)


def _as_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection's third stage has the rounded deviations 0.033 and 0.067 where ours, as the first public code's, has
    1/30 and 1/15: its regressions in our units. Of its three mask branches the last one alone."""
    layer, found = f"{ROI}box_predictor.2.bbox_pred", dict(state)
    units = torch.tensor([0.033, 0.033, 0.067, 0.067]) * torch.tensor(UNITS) * 3
    for kind in ("weight", "bias"):
        value = found.get(f"{layer}.{kind}")
        if value is not None and len(value) == len(units):
            found[f"{layer}.{kind}"] = value * units.to(value).view(-1, *(1,) * (value.dim() - 1))
    return found


FAMILY = Family(
    model=CascadeRCNN,
    steps=CascadeRCNNSteps,
    build=build_cascade_rcnn,
    describe=describe_cascade_rcnn,
    read=read_cascade_rcnn,
    head_groups=head_groups,
    head_counts=head_counts,
    class_layers={f"{ROI}box_predictor.{{}}.cls_score": 1},
    mask_layers=MASK_LAYERS,
    mmdet=MMDet(
        mark="roi_head.bbox_head.0.fc_cls.weight",
        names=(
            *RPN_NAMES,
            (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.0\.", rf"{ROI}box_head.\1.fc6."),
            (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.1\.", rf"{ROI}box_head.\1.fc7."),
            (r"roi_head\.bbox_head\.(\d+)\.fc_cls\.", rf"{ROI}box_predictor.\1.cls_score."),
            (r"roi_head\.bbox_head\.(\d+)\.fc_reg\.", rf"{ROI}box_predictor.\1.bbox_pred."),
            *mmdet_names(r"\.2"),
            (r"roi_head\.mask_head\.", UNUSED),
        ),
        spec=MMDET_REGIONS,
        adjust=_as_ours,
    ),
)
