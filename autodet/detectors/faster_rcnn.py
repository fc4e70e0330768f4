"""Faster R-CNN (Ren et al. 2015) with a feature pyramid (Lin et al. 2017): torchvision's model in explicit steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign

from autodet.detectors.arch import Arch, ArchError
from autodet.detectors.resnet import ResNetBody, norm_layer
from autodet.detectors.spec import BODY_STRIDES, DetectorSpec, SpecError
from autodet.detectors.steps import Dense, Features, Inputs, Regions, Target


class FasterRCNNSteps(nn.Module):
    """The steps of ``detectors.steps.Detector`` on a torchvision FasterRCNN, which is used as it is, not copied."""

    def __init__(self, model: FasterRCNN, spec: DetectorSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec

    def preprocess(self, images: list[Tensor], targets: list[Target] | None = None) -> Inputs:
        """Images 3×h×w in [0, 1] → normalised, resized, and padded to a canvas that 32 divides; targets follow."""
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        image_list, targets = self.model.transform(images, targets)
        return Inputs(image_list, targets, sizes)

    def features(self, inputs: Inputs) -> Features:
        """The pyramid, nominal stride → N×C×H×W. P6 is a pooled P5: its size is rounded, so strides are nominal."""
        pyramid = self.model.backbone(inputs.images.tensors)
        return dict(zip(self.spec.levels, pyramid.values(), strict=True))

    def dense(self, inputs: Inputs, features: Features) -> Dense:
        """The proposal network's responses and the anchors they belong to."""
        maps = list(features.values())
        objectness, deltas = self.model.rpn.head(maps)
        anchors = self.model.rpn.anchor_generator(inputs.images, maps)
        return Dense(dict(zip(features, objectness, strict=True)), dict(zip(features, deltas, strict=True)), anchors)

    def proposals(self, inputs: Inputs, dense: Dense) -> list[Tensor]:
        """Per image R_i×4 boxes after NMS, best first; how many depends on training or evaluation mode."""
        return self._proposals(inputs, dense, *_flatten(dense))

    def _proposals(self, inputs: Inputs, dense: Dense, objectness: Tensor, deltas: Tensor) -> list[Tensor]:
        rpn = self.model.rpn
        # Like the plain model: no gradient through the proposals' coordinates.
        boxes = rpn.box_coder.decode(deltas.detach(), dense.anchors).view(len(dense.anchors), -1, 4)
        per_level = [level[0].numel() for level in dense.objectness.values()]
        kept, _ = rpn.filter_proposals(boxes, objectness, inputs.images.image_sizes, per_level)
        return list(kept)

    def regions(self, inputs: Inputs, features: Features, proposals: list[Tensor]) -> Regions:
        """The box head's responses on given proposals."""
        heads = self.model.roi_heads
        named = {str(index): level for index, level in enumerate(features.values())}
        pooled = heads.box_roi_pool(named, proposals, inputs.images.image_sizes)
        class_logits, box_deltas = heads.box_predictor(heads.box_head(pooled))
        return Regions(proposals, class_logits, box_deltas)

    def losses(self, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """The plain model's four losses, equal to its own: random draws come in its order."""
        if inputs.targets is None:
            raise ValueError("The losses need targets: give them to preprocess().")
        rpn, heads = self.model.rpn, self.model.roi_heads
        objectness, deltas = _flatten(dense)
        proposals = self._proposals(inputs, dense, objectness, deltas)
        labels, matched = rpn.assign_targets_to_anchors(dense.anchors, inputs.targets)
        regression = rpn.box_coder.encode(matched, dense.anchors)
        loss_objectness, loss_rpn_box = rpn.compute_loss(objectness, deltas, labels, regression)
        sampled, _, roi_labels, roi_regression = heads.select_training_samples(proposals, inputs.targets)
        regions = self.regions(inputs, features, sampled)
        loss_class, loss_box = fastrcnn_loss(regions.class_logits, regions.box_deltas, roi_labels, roi_regression)
        return {
            "loss_classifier": loss_class,
            "loss_box_reg": loss_box,
            "loss_objectness": loss_objectness,
            "loss_rpn_box_reg": loss_rpn_box,
        }

    def postprocess(self, inputs: Inputs, features: Features, dense: Dense) -> list[Target]:
        """Detections per image: boxes in pixels of the images given to ``preprocess``, scores, labels 1..K."""
        regions = self.regions(inputs, features, self.proposals(inputs, dense))
        found = self.model.roi_heads.postprocess_detections(
            regions.class_logits, regions.box_deltas, regions.proposals, inputs.images.image_sizes
        )
        detections = [
            {"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in zip(*found, strict=True)
        ]
        return list(self.model.transform.postprocess(detections, inputs.images.image_sizes, inputs.sizes))


def _flatten(dense: Dense) -> tuple[Tensor, Tensor]:
    """Objectness (all locations of all images)×1 and deltas ×4, in the anchors' order."""
    objectness, deltas = concat_box_prediction_layers(list(dense.objectness.values()), list(dense.deltas.values()))
    return objectness, deltas


def build_faster_rcnn(spec: DetectorSpec) -> FasterRCNN:
    """A torchvision FasterRCNN with fresh weights from torch's generator; parameter names are torchvision's."""
    body = ResNetBody(spec.body, norm_layer(spec.norm, spec.norm_eps))
    stages = [BODY_STRIDES.index(stride) for stride in spec.body_levels]
    backbone = BackboneWithFPN(
        body,
        return_layers={f"layer{stage + 1}": str(index) for index, stage in enumerate(stages)},
        in_channels_list=[spec.body.stages[stage].width for stage in stages],
        out_channels=spec.neck_width,
    )
    anchors = AnchorGenerator(
        tuple((size,) for size in spec.anchor_sizes), (spec.anchor_ratios,) * len(spec.anchor_sizes)
    )
    return FasterRCNN(
        backbone,
        min_size=spec.min_size,
        max_size=spec.max_size,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(spec.neck_width, anchors.num_anchors_per_location()[0], conv_depth=spec.rpn_depth),
        rpn_pre_nms_top_n_train=spec.proposals_before_nms[0],
        rpn_pre_nms_top_n_test=spec.proposals_before_nms[1],
        rpn_post_nms_top_n_train=spec.proposals[0],
        rpn_post_nms_top_n_test=spec.proposals[1],
        box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(len(stages))], spec.roi_size, spec.roi_sampling),
        box_head=TwoMLPHead(spec.neck_width * spec.roi_size**2, spec.head_width),
        box_predictor=FastRCNNPredictor(spec.head_width, len(spec.labels) + 1),
        box_batch_size_per_image=spec.regions_per_image,
        box_score_thresh=spec.score_threshold,
        box_nms_thresh=spec.nms_threshold,
        box_detections_per_img=spec.detections,
    )


def describe_faster_rcnn(model: FasterRCNN, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's torchvision Faster R-CNN, read off its modules; SpecError where a spec cannot say a part."""
    rpn, heads, transform = model.rpn, model.roi_heads, model.transform
    body, fpn = getattr(model.backbone, "body", None), getattr(model.backbone, "fpn", None)
    if body is None or not isinstance(heads.box_head, TwoMLPHead) or not isinstance(fpn, FeaturePyramidNetwork):
        found = f"{type(fpn).__name__} and {type(heads.box_head).__name__}"
        raise SpecError(f"Expected a FeaturePyramidNetwork and a TwoMLPHead, found {found}: no adapter for these.")
    classes = heads.box_predictor.cls_score.out_features - 1
    if classes != len(labels):
        raise SpecError(f"The detector has {classes} classes besides background, but {len(labels)} labels were given.")
    try:
        arch = Arch.of_state_dict(body.state_dict())
    except ArchError as error:
        raise SpecError(f"Expected a ResNet as the detector's body, found another one: {error}") from error
    spec = DetectorSpec(
        family="faster_rcnn",
        body=arch,
        labels=tuple((int(category), name) for category, name in labels),
        norm="frozen" if isinstance(body.bn1, FrozenBatchNorm2d) else "batch",
        norm_eps=body.bn1.eps,
        neck_width=model.backbone.out_channels,
        levels=(*BODY_STRIDES[len(BODY_STRIDES) - len(fpn.inner_blocks) :], 64),
        anchor_sizes=tuple(sizes[0] for sizes in rpn.anchor_generator.sizes),
        anchor_ratios=tuple(rpn.anchor_generator.aspect_ratios[0]),
        rpn_depth=len(rpn.head.conv),
        head_width=heads.box_head.fc6.out_features,
        roi_size=heads.box_roi_pool.output_size[0],
        roi_sampling=heads.box_roi_pool.sampling_ratio,
        proposals_before_nms=(rpn._pre_nms_top_n["training"], rpn._pre_nms_top_n["testing"]),
        proposals=(rpn._post_nms_top_n["training"], rpn._post_nms_top_n["testing"]),
        regions_per_image=heads.fg_bg_sampler.batch_size_per_image,
        score_threshold=heads.score_thresh,
        nms_threshold=heads.nms_thresh,
        detections=heads.detections_per_img,
        min_size=transform.min_size[0],
        max_size=transform.max_size,
    )
    _check_description(model, spec)
    return spec


def _check_description(model: FasterRCNN, spec: DetectorSpec) -> None:
    """What a spec leaves unsaid is torchvision's default when it is built: one that differs would come back wrong."""
    with torch.device("meta"):
        rebuilt = build_faster_rcnn(spec)
    differing = [
        f"{name} is {value}, expected {expected}"
        for (name, value), expected in zip(_unsaid(model).items(), _unsaid(rebuilt).values(), strict=True)
        if value != expected
    ]
    own, other = ({key: value.shape for key, value in m.state_dict().items()} for m in (model, rebuilt))
    differing += [f"parameter {key}" for key in {**own, **other} if own.get(key) != other.get(key)]
    if differing:
        raise SpecError(f"The detector has parts that a spec cannot say: {'; '.join(differing[:4])}.")


def _unsaid(model: FasterRCNN) -> dict[str, object]:
    """Settings that a spec has no field for."""
    rpn, heads, transform = model.rpn, model.roi_heads, model.transform
    return {
        "image_mean": tuple(transform.image_mean),
        "image_std": tuple(transform.image_std),
        "number of min_size": len(transform.min_size),
        "anchor_generator.sizes": tuple(map(tuple, rpn.anchor_generator.sizes)),
        "anchor_generator.aspect_ratios": tuple(map(tuple, rpn.anchor_generator.aspect_ratios)),
        "rpn.nms_thresh": rpn.nms_thresh,
        "rpn.score_thresh": rpn.score_thresh,
        "box_roi_pool.featmap_names": tuple(heads.box_roi_pool.featmap_names),
        "box_roi_pool.sampling_ratio": heads.box_roi_pool.sampling_ratio,
        "samplers": tuple(
            (sampler.batch_size_per_image, sampler.positive_fraction)
            for sampler in (rpn.fg_bg_sampler, heads.fg_bg_sampler)
        ),
        "matchers": tuple((m.high_threshold, m.low_threshold) for m in (rpn.proposal_matcher, heads.proposal_matcher)),
        "box_coder.weights": tuple(heads.box_coder.weights),
    }
