"""What only Faster R-CNN has: proposals, a second stage on given regions, and its settings."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from detector_cases import LABELS, batch, small_spec, step_losses, steps
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn_v2,
    keypointrcnn_resnet50_fpn,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from autodet.detectors import Arch, DetectorSpec, SpecError, adapt, build, detect
from autodet.detectors.faster_rcnn import FasterRCNNSteps, build_faster_rcnn

SPEC = DetectorSpec(
    family="faster_rcnn",
    body=Arch.parse("bottleneck[g2]-8:16x1(8)-16x1(4)-32x2(8,16)-32x1"),
    labels=LABELS,
    norm_eps=1e-4,
    neck_width=16,
    anchor_sizes=(8, 16, 32, 64, 96),
    anchor_ratios=(0.5, 1.5),
    head_width=32,
    roi_size=5,
    proposals_before_nms=(400, 300),
    proposals=(120, 90),
    regions_per_image=100,
    score_threshold=0.01,
    nms_threshold=0.45,
    detections=60,
    min_size=64,
    max_size=96,
)


def make_detector(spec: DetectorSpec = SPEC) -> FasterRCNNSteps:
    return FasterRCNNSteps(build_faster_rcnn(spec), spec)


def test_losses_depend_on_the_random_draw() -> None:
    # Else the losses' equality to the plain forward would not show that the draws come in the same order.
    detector = make_detector(replace(SPEC, regions_per_image=8)).train()
    images, targets = batch()
    torch.manual_seed(1)
    first = step_losses(detector, images, targets)
    torch.manual_seed(2)
    second = step_losses(detector, images, targets)
    assert first["loss_classifier"] != second["loss_classifier"]
    assert first["loss_objectness"] != second["loss_objectness"]


def test_proposals_are_clipped_counted_and_without_gradient() -> None:
    detector = make_detector().train()
    inputs, _, dense = steps(detector, *batch())
    training, evaluation = detector.proposals(inputs, dense), detector.eval().proposals(inputs, dense)
    for proposals, most in ((training, 120), (evaluation, 90)):
        for boxes, (height, width) in zip(proposals, inputs.images.image_sizes, strict=True):
            assert 0 < len(boxes) <= most
            assert not boxes.requires_grad
            assert bool((boxes >= 0).all() and (boxes <= boxes.new_tensor([width, height] * 2)).all())


def test_regions_on_given_proposals_equal_the_models_box_head() -> None:
    detector = make_detector().eval()
    # A copy, since the pooling keeps the scales of its first call; images that grow threefold, so that scales matter.
    model = copy.deepcopy(detector.model)
    inputs = detector.preprocess([torch.rand(3, *size) for size in ((20, 30), (20, 20), (22, 24))])
    proposals = [torch.tensor([[0.0, 0, 64, 64], [5, 8, 20, 40]]), torch.zeros(0, 4), torch.tensor([[1.0, 2, 12, 9]])]
    with torch.no_grad():
        features = detector.features(inputs)
        regions = detector.regions(inputs, features, proposals)
        pooled = model.roi_heads.box_roi_pool(
            model.backbone(inputs.images.tensors), proposals, inputs.images.image_sizes
        )
        class_logits, box_deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    assert regions.proposals is proposals
    assert tuple(regions.class_logits.shape) == (3, len(LABELS) + 1)
    assert tuple(regions.box_deltas.shape) == (3, 4 * (len(LABELS) + 1))
    torch.testing.assert_close(regions.class_logits, class_logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(regions.box_deltas, box_deltas, rtol=1e-5, atol=1e-6)


def test_region_corners_on_the_proposals_are_the_decoded_boxes() -> None:
    """Corner · size + centre of the proposal, for every class; with gradient, and for no regions at all."""
    detector = make_detector().eval()
    # Fresh regressions are too small to tell the decoding's terms apart.
    nn.init.normal_(detector.model.roi_heads.box_predictor.bbox_pred.weight, std=0.5)
    inputs, features, dense = steps(detector, batch()[0])
    proposals = detector.proposals(inputs, dense)
    regions = detector.regions(inputs, features, proposals)
    corners = detector.region_corners(regions)
    assert tuple(corners.shape) == (sum(map(len, proposals)), len(LABELS) + 1, 4)
    found = torch.cat(proposals)
    size = (found[:, 2:] - found[:, :2]).repeat(1, 2).unsqueeze(1)
    centre = ((found[:, :2] + found[:, 2:]) / 2).repeat(1, 2).unsqueeze(1)
    expected = detector.model.roi_heads.box_coder.decode(regions.box_deltas, proposals)
    assert float((corners - corners.new_tensor([-0.5, -0.5, 0.5, 0.5])).abs().median()) > 0.02
    torch.testing.assert_close(corners * size + centre, expected, rtol=1e-5, atol=1e-3)
    (slope,) = torch.autograd.grad(corners.sum(), regions.box_deltas)
    assert bool((slope.abs().sum(1) > 0).all())
    nothing = detector.regions(inputs, features, [torch.zeros(0, 4)] * len(proposals))
    assert tuple(detector.region_corners(nothing).shape) == (0, len(LABELS) + 1, 4)


class PlainBody(nn.Sequential):
    """A backbone with a single map, as in torchvision's tutorial."""

    out_channels = 8


def plain_backbone() -> FasterRCNN:
    body = PlainBody(nn.Conv2d(3, 8, 3, 2))
    return FasterRCNN(body, 3, rpn_anchor_generator=AnchorGenerator(((32,),), ((1.0,),)))


def six_levels() -> FasterRCNN:
    channels = [64, 128, 256, 512]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(resnet18(), layers, channels, 16, extra_blocks=LastLevelP6P7(16, 16))
    anchors = AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64, 128, 256)), ((1.0,),) * 6)
    return FasterRCNN(backbone, 3, rpn_anchor_generator=anchors)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fasterrcnn_mobilenet_v3_large_fpn, "Expected a ResNet as the detector's body"),
        (fasterrcnn_resnet50_fpn_v2, "Expected a TwoMLPHead, found FastRCNNConvFCHead: no adapter"),
        (keypointrcnn_resnet50_fpn, "parts that a spec cannot say: .*parameter roi_heads.keypoint_head"),
    ],
)
def test_other_torchvision_detectors_are_refused(make: Any, reason: str) -> None:
    with torch.device("meta"):
        model = make(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(SpecError, match=reason):
        adapt(model, LABELS)


def test_models_without_our_pyramid_are_refused() -> None:
    with torch.device("meta"):
        plain, larger = plain_backbone(), six_levels()
    with pytest.raises(SpecError, match="Expected a FeaturePyramidNetwork, found NoneType"):
        adapt(plain, LABELS)
    with pytest.raises(SpecError, match="top 'neck' is none of pool"):
        adapt(larger, LABELS)


def test_settings_that_a_spec_cannot_say_are_refused() -> None:
    with torch.device("meta"):
        model = build_faster_rcnn(SPEC)
    model.transform.image_mean = [0.0, 0.0, 0.0]
    model.rpn.nms_thresh = 0.9
    with pytest.raises(SpecError, match=r"image_mean is \(0.0, 0.0, 0.0\), expected .*; rpn.nms_thresh is 0.9"):
        adapt(model, LABELS)


@pytest.mark.parametrize(
    ("part", "name", "value", "reason"),
    [
        ("rpn.proposal_matcher", "high_threshold", 0.6, "matchers is"),
        ("roi_heads.proposal_matcher", "allow_low_quality_matches", True, "matchers is"),
        ("roi_heads.fg_bg_sampler", "positive_fraction", 0.5, "samplers is"),
        ("rpn.box_coder", "weights", (2.0, 2.0, 1.0, 1.0), "box_coders is"),
        ("roi_heads.box_coder", "weights", (1.0, 1.0, 1.0, 1.0), "box_coders is"),
        ("roi_heads.box_roi_pool", "canonical_scale", 112, "box_roi_pool.canonical is"),
        ("roi_heads.box_roi_pool", "output_size", (5, 3), r"output_size=\(5, 3\)"),
    ],
)
def test_parts_of_the_two_stages_that_a_spec_cannot_say_are_refused(
    part: str, name: str, value: object, reason: str
) -> None:
    with torch.device("meta"):
        model = build_faster_rcnn(SPEC)
    owner: Any = model
    for step in part.split("."):
        owner = getattr(owner, step)
    setattr(owner, name, value)
    with pytest.raises(SpecError, match=f"parts that a spec cannot say: .*{reason}"):
        adapt(model, LABELS)


def test_the_first_image_does_not_decide_where_regions_are_pooled() -> None:
    """torchvision's pooling keeps the strides that it infers from the first image, of which small ones mislead it."""
    torch.manual_seed(0)
    spec = replace(small_spec("faster_rcnn"), min_size=33, max_size=400, score_threshold=0.0)
    first = build(spec)
    second = copy.deepcopy(first)
    detect(first, [torch.rand(3, 33, 37)])
    image = torch.rand(3, 120, 160)
    assert torch.equal(detect(first, [image])[0]["scores"], detect(second, [image])[0]["scores"])
    pool = second.model.get_submodule("roi_heads.box_roi_pool")
    assert pool.scales == [1 / stride for stride in spec.body_levels]
