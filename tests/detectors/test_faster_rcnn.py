"""The steps of Faster R-CNN against torchvision's own forward, and the ways into and out of a detector."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    maskrcnn_resnet50_fpn,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from autodet.detectors import Arch, DetectorSpec, SpecError, adapt, build, detect, load_detector, save_detector
from autodet.detectors.faster_rcnn import FasterRCNNSteps, describe_faster_rcnn
from autodet.detectors.weights import WeightsError, save_weights

LABELS = ((3, "dog"), (7, "traffic light"))
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
DETECTORS = ("small", "one level fewer", "torchvision")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def torchvision_model() -> FasterRCNN:
    """torchvision's usual detector for two classes, fresh, for small images."""
    model: FasterRCNN = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, box_score_thresh=0.01
    )
    return model


def make_detector(name: str) -> FasterRCNNSteps:
    if name == "torchvision":
        return adapt(torchvision_model(), LABELS)
    shallow = replace(SPEC, levels=(8, 16, 32, 64), anchor_sizes=(16, 32, 64, 96), rpn_depth=2, norm="frozen")
    return build(SPEC if name == "small" else shallow)


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Three images of different sizes; the second has no object."""
    images = [torch.rand(3, *size) for size in ((48, 72), (60, 40), (50, 50))]
    boxes = [[[4.0, 5, 40, 44], [30, 10, 70, 30]], [], [[10.0, 10, 30, 45]]]
    labels = [[1, 2], [], [2]]
    targets = [
        {"boxes": torch.tensor(b).reshape(-1, 4), "labels": torch.tensor(n, dtype=torch.int64)}
        for b, n in zip(boxes, labels, strict=True)
    ]
    return images, targets


def step_losses(detector: FasterRCNNSteps, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    inputs = detector.preprocess(images, targets)
    features = detector.features(inputs)
    return detector.losses(inputs, features, detector.dense(inputs, features))


def assert_same_detections(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    assert all(len(image["boxes"]) > 0 for image in expected), "nothing is detected, so nothing is compared"
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {"boxes", "scores", "labels"}
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_equal_the_plain_forward(name: str) -> None:
    detector = make_detector(name).train()
    images, targets = batch()
    untouched = copy.deepcopy(targets)
    torch.manual_seed(7)
    expected = detector.model(images, targets)
    torch.manual_seed(7)
    found = step_losses(detector, images, targets)
    assert found.keys() == expected.keys()
    for key, loss in expected.items():
        assert loss > 0
        torch.testing.assert_close(found[key], loss, rtol=1e-5, atol=1e-6)
    for target, before in zip(targets, untouched, strict=True):
        assert all(torch.equal(target[key], before[key]) for key in before)


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_equal_the_plain_forward(name: str) -> None:
    detector = make_detector(name)
    images, _ = batch()
    detector.eval()
    with torch.no_grad():
        expected = detector.model(images)
    assert_same_detections(detect(detector.train(), images), expected)


def test_losses_depend_on_the_random_draw() -> None:
    # Else the equality above would not show that the draws come in the same order.
    spec = replace(SPEC, regions_per_image=8)
    detector = build(spec).train()
    images, targets = batch()
    torch.manual_seed(1)
    first = step_losses(detector, images, targets)
    torch.manual_seed(2)
    second = step_losses(detector, images, targets)
    assert first["loss_classifier"] != second["loss_classifier"]
    assert first["loss_objectness"] != second["loss_objectness"]


def test_losses_without_targets_say_what_to_do() -> None:
    detector = build(SPEC)
    inputs = detector.preprocess(batch()[0])
    features = detector.features(inputs)
    with pytest.raises(ValueError, match=r"losses need targets: give them to preprocess"):
        detector.losses(inputs, features, detector.dense(inputs, features))


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_every_trainable_parameter_gets_a_gradient(norm: str) -> None:
    detector = build(replace(SPEC, norm=norm)).train()
    torch.stack(list(step_losses(detector, *batch()).values())).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0] == []
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(("size", "canvas"), [((48, 72), (64, 96)), ((64, 64), (64, 64)), ((40, 60), (64, 96))])
def test_maps_have_the_shapes_of_their_nominal_strides(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    detector = build(SPEC).eval()
    inputs = detector.preprocess([torch.rand(3, *size)])
    assert tuple(inputs.images.tensors.shape[-2:]) == canvas
    assert inputs.sizes == [size]
    features = detector.features(inputs)
    dense = detector.dense(inputs, features)
    assert tuple(features) == tuple(dense.objectness) == tuple(dense.deltas) == SPEC.levels
    # The canvas is a multiple of 32, not of 64: P6 is rounded up (96 px are 2 cells of 64).
    shapes = {stride: (math.ceil(canvas[0] / stride), math.ceil(canvas[1] / stride)) for stride in SPEC.levels}
    anchors = len(SPEC.anchor_ratios)
    for stride, (height, width) in shapes.items():
        assert tuple(features[stride].shape) == (1, SPEC.neck_width, height, width)
        assert tuple(dense.objectness[stride].shape) == (1, anchors, height, width)
        assert tuple(dense.deltas[stride].shape) == (1, 4 * anchors, height, width)
    locations = sum(height * width for height, width in shapes.values())
    assert [tuple(boxes.shape) for boxes in dense.anchors] == [(anchors * locations, 4)]


def test_proposals_are_clipped_counted_and_without_gradient() -> None:
    detector = build(SPEC).train()
    inputs = detector.preprocess(*batch())
    dense = detector.dense(inputs, detector.features(inputs))
    training, evaluation = detector.proposals(inputs, dense), detector.eval().proposals(inputs, dense)
    for proposals, most in ((training, 120), (evaluation, 90)):
        for boxes, (height, width) in zip(proposals, inputs.images.image_sizes, strict=True):
            assert 0 < len(boxes) <= most
            assert not boxes.requires_grad
            assert bool((boxes >= 0).all() and (boxes <= boxes.new_tensor([width, height] * 2)).all())


def test_regions_on_given_proposals_equal_the_models_box_head() -> None:
    detector = build(SPEC).eval()
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


@pytest.mark.parametrize("name", DETECTORS)
def test_description_rebuilds_the_same_parameters(name: str) -> None:
    detector = make_detector(name)
    spec = describe_faster_rcnn(detector.model, LABELS)
    assert spec == detector.spec
    with torch.device("meta"):
        rebuilt = build(spec)
    shapes, other = ({key: value.shape for key, value in d.model.state_dict().items()} for d in (detector, rebuilt))
    assert shapes == other
    assert list(shapes) == list(other)


def test_defaults_are_torchvisions() -> None:
    with torch.device("meta"):
        model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    assert describe_faster_rcnn(model, LABELS) == DetectorSpec("faster_rcnn", Arch.resnet50(), LABELS)


def test_adapted_model_is_the_users_own() -> None:
    with torch.device("meta"):
        model = torchvision_model()
    assert adapt(model, LABELS).model is model


def test_another_kind_of_model_is_refused() -> None:
    with torch.device("meta"):
        model = resnet18()
    with pytest.raises(SpecError, match="Expected a torchvision FasterRCNN, found ResNet: no adapter"):
        adapt(model, LABELS)


@pytest.mark.parametrize("labels", [LABELS[:1], (*LABELS, (9, "cat"))])
def test_a_wrong_number_of_labels_is_refused(labels: tuple[tuple[int, str], ...]) -> None:
    with (
        torch.device("meta"),
        pytest.raises(SpecError, match=f"2 classes besides background, but {len(labels)} labels were given"),
    ):
        adapt(torchvision_model(), labels)


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
        (fasterrcnn_resnet50_fpn_v2, "found FeaturePyramidNetwork and FastRCNNConvFCHead: no adapter"),
        (maskrcnn_resnet50_fpn, "parts that a spec cannot say: parameter roi_heads.mask_head"),
    ],
)
def test_other_torchvision_detectors_are_refused(make: type[FasterRCNN], reason: str) -> None:
    with torch.device("meta"):
        model = make(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(SpecError, match=reason):
        adapt(model, LABELS)


def test_models_without_our_pyramid_are_refused() -> None:
    with torch.device("meta"):
        plain, larger = plain_backbone(), six_levels()
    with pytest.raises(SpecError, match="found NoneType and TwoMLPHead"):
        adapt(plain, LABELS)
    with pytest.raises(SpecError, match="6 anchor_sizes for 5 levels"):
        adapt(larger, LABELS)


def test_settings_that_a_spec_cannot_say_are_refused() -> None:
    with torch.device("meta"):
        model = build(SPEC).model
    model.transform.image_mean = [0.0, 0.0, 0.0]
    model.rpn.nms_thresh = 0.9
    with pytest.raises(SpecError, match=r"image_mean is \(0.0, 0.0, 0.0\), expected .*; rpn.nms_thresh is 0.9"):
        adapt(model, LABELS)


@pytest.mark.parametrize("training", [True, False])
def test_detect_puts_every_mode_back(training: bool) -> None:
    detector = build(SPEC).train(training)
    detector.model.backbone.body.layer1.eval()
    modes = [module.training for module in detector.modules()]
    seen = []
    detector.model.roi_heads.box_head.register_forward_hook(lambda module, *_: seen.append(module.training))
    detect(detector, [torch.rand(3, 64, 64)])
    assert seen == [False]
    assert [module.training for module in detector.modules()] == modes
    with pytest.raises((ValueError, IndexError)):
        detect(detector, [torch.rand(64)])
    assert [module.training for module in detector.modules()] == modes


def test_saved_detector_comes_back_the_same(tmp_path: Path) -> None:
    detector = build(SPEC)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
    images, _ = batch()
    path = tmp_path / "detector.safetensors"
    save_detector(path, detector, {"formula": "none", "seed": 3})
    torch.manual_seed(99)  # the fresh weights of the rebuilt detector must not matter
    loaded, notes = load_detector(path)
    assert notes == {"formula": "none", "seed": 3}
    assert loaded.spec == SPEC
    assert not loaded.training
    expected = detect(detector, images)
    assert_same_detections(detect(loaded, images), expected)
    assert all(
        torch.equal(one[key], other[key])
        for one, other in zip(detect(loaded, images), expected, strict=True)
        for key in one
    )


def test_a_file_that_is_no_detector_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"weight": torch.zeros(2)}, {})
    with pytest.raises(SpecError, match=r"weights.safetensors holds weights but no detector.*save_detector"):
        load_detector(path)
    save_weights(path, {"weight": torch.zeros(2)}, {"spec": SPEC.to_json() | {"norm": "group"}})
    with pytest.raises(SpecError, match=r"weights.safetensors: its spec .* cannot be built: .*norm 'group'"):
        load_detector(path)
    save_weights(path, {"weight": torch.zeros(2)}, {"spec": SPEC.to_json()})
    with pytest.raises(WeightsError, match=r"weights.safetensors does not fit"):
        load_detector(path)
    with pytest.raises(WeightsError, match=r"absent.safetensors"):
        load_detector(tmp_path / "absent.safetensors")
