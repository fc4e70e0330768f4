"""Weights like torchvision's published ones, put into detectors: what the 90 raw labels and the eps of 0 mean there."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet50
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from autodet.detectors import Arch, DetectorSpec, adapt, build, detect
from autodet.detectors.download import download_coco_detector
from autodet.detectors.spec import COCO_LABELS
from autodet.detectors.weights import WeightsError, load_strict

SPEC = DetectorSpec(
    family="faster_rcnn",
    body=Arch.resnet50(),
    labels=COCO_LABELS,
    norm="frozen",
    norm_eps=0.0,
    min_size=64,
    max_size=96,
    score_threshold=0.012,
    proposals=(50, 50),
)


def make_reference() -> FasterRCNN:
    """As ``fasterrcnn_resnet50_fpn`` with weights builds it: frozen norms, eps 0. Weights and statistics are drawn."""
    torch.manual_seed(0)
    backbone = _resnet_fpn_extractor(resnet50(norm_layer=FrozenBatchNorm2d), trainable_layers=3)
    settings = {"box_score_thresh": 0.012, "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50}
    model = FasterRCNN(backbone, num_classes=91, min_size=64, max_size=96, **settings)
    overwrite_eps(model, 0.0)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # Variances as small as the usual eps of 1e-5, as the published weights have in places: there eps matters.
            module.running_var.uniform_(1e-6, 1e-4)
            module.weight.copy_(0.5 * module.running_var.sqrt())
            module.running_mean.uniform_(-0.1, 0.1)
    # A fresh classifier gives every label 1/91; the published one is sure of some.
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.bias)
    return model.eval()


@pytest.fixture(scope="module")
def reference() -> FasterRCNN:
    return make_reference()


@pytest.fixture
def downloaded(reference: FasterRCNN, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the download gives when the server has the reference's weights."""
    asked = []

    def from_url(url: str, **options: Any) -> dict[str, Tensor]:
        asked.append((url, options["check_hash"]))
        return dict(reference.state_dict())

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", from_url)
    state = download_coco_detector("fasterrcnn_resnet50_fpn")
    assert asked == [(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url, True)]
    return state


def test_coco_weights_give_torchvisions_detections(reference: FasterRCNN, downloaded: dict[str, Tensor]) -> None:
    detector = build(SPEC)
    assert load_strict(detector.model, downloaded, "COCO weights").complete
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 50)]
    with torch.no_grad():
        expected = reference(images)
    for one, other in zip(detect(detector, images), expected, strict=True):
        assert len(other["boxes"]) > 5 and other["labels"].unique().numel() > 1 and other["scores"].std() > 1e-3
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-5)
    detector.model.eval()
    inputs = detector.preprocess(images)
    with torch.no_grad():
        exact = detector.features(inputs)[8]
        overwrite_eps(detector.model, 1e-5)  # what a detector built without norm_eps=0 would compute
        assert not torch.allclose(detector.features(inputs)[8], exact, rtol=0.1)


def test_the_reference_is_described_as_this_spec(reference: FasterRCNN) -> None:
    assert adapt(reference, COCO_LABELS).spec == DetectorSpec.parse(str(SPEC))


def test_contiguous_labels_refuse_the_raw_weights(downloaded: dict[str, Tensor]) -> None:
    contiguous = SPEC.with_labels([(number, f"class {number}") for number in range(1, 81)])
    with torch.device("meta"):
        detector = build(contiguous)
    with pytest.raises(WeightsError) as error:
        load_strict(detector.model, downloaded, "COCO weights")
    assert "COCO weights does not fit FasterRCNN" in str(error.value)
    assert "roi_heads.box_predictor.cls_score.weight (expected (81, 1024), found (91, 1024))" in str(error.value)
