"""What the families in ``spec.FAMILIES`` refuse, and the reasons they give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from detector_cases import (
    LABELS,
    ONE,
    families,
    small_spec,
)
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, RetinaNet, fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead

from autodet.detectors import (
    Arch,
    SpecError,
    adapt,
    build,
    standard_spec,
)
from autodet.detectors.spec import FAMILIES


@families
@pytest.mark.parametrize("labels", [LABELS[:1], (*LABELS, (9, "cat"))], ids=["too few", "too many"])
def test_a_wrong_number_of_labels_is_refused(family: str, labels: tuple[tuple[int, str], ...]) -> None:
    with torch.device("meta"):
        model = build(small_spec(family)).model
    with pytest.raises(SpecError, match=f"2 classes besides background, but {len(labels)} labels were given"):
        adapt(model, labels)


def test_another_kind_of_model_is_refused() -> None:
    with torch.device("meta"):
        model = resnet18()
    with pytest.raises(SpecError, match=r"Expected a model among FasterRCNN, .*RetinaNet, FCOS.*, found ResNet"):
        adapt(model, LABELS)


@families
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "yolo"}, "family 'yolo' is none of faster_rcnn, retinanet, fcos"),
        ({"top": "ceiling"}, "top 'ceiling' is none of"),
        ({"levels": (16, 8, 32, 64)}, "levels .* are not strides"),
        ({"levels": (4, 8, 16, 32)}, "levels .* are not strides"),
        ({"anchor_sizes": (8, 16)}, "2 anchor_sizes for 5 levels; give one a level"),
        ({"head_groups": 7}, "head_groups 7 do not divide neck_width 16"),
        ({"head_groups": -1}, "head_groups|group norms"),
        ({"head_depth": 0}, "head_depth is 0, expected at least 1"),
        ({"roi_sampling": -1}, "roi_sampling is -1, expected at least 0"),
        ({"candidates": 0}, "candidates is 0, expected at least 1"),
        ({"anchor_octaves": 0}, "anchor_octaves"),
        ({"box_loss": "iou"}, "box_loss 'iou' is none of l1"),
        ({"norm": "group"}, "norm 'group' is none of batch, frozen"),
        ({"mask_depth": -1}, "mask_depth is -1, but a .* has"),
        ({"mask_width": 0}, "mask_width is 0, expected at least 1"),
        ({"mask_roi_size": 0}, "mask_roi_size is 0, expected at least 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_no_family_can_have(family: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        replace(small_spec(family), **change)


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("fcos", {"anchor_ratios": (0.5, 1.0)}, "anchor_ratios is .0.5, 1.0., but always"),
        ("fcos", {"anchor_octaves": 3}, "anchor_octaves is 3, but always 1"),
        ("fcos", {"head_groups": 0}, "has group norms: head_groups is 0"),
        ("gfl", {"anchor_ratios": (0.5, 1.0)}, "anchor_ratios is .0.5, 1.0., but always"),
        ("gfl", {"head_groups": 0}, "the head of a gfl has group norms: head_groups is 0"),
        ("gfl", {"reg_max": 0}, "reg_max is 0, expected at least 1"),
        ("reppoints", {"anchor_ratios": (0.5, 1.0)}, "anchor_ratios is .0.5, 1.0., but always"),
        ("reppoints", {"points": 16}, "points is 16, expected the square of an odd number, one of 9, 25, 49"),
        ("reppoints", {"points": 1}, "points is 1, expected the square of an odd number"),
        ("fcos", {"top": "pool"}, "top 'pool' is none of neck, body, which a fcos may have"),
        ("retinanet", {"top": "pool"}, "top 'pool' is none of neck, body"),
        ("retinanet", {"head_depth": 5}, "head_depth 5 is above a retinanet's 4"),
        ("retinanet", {"levels": (8, 16, 32, 64)}, "levels .* are not strides up to 32, then 64 and 128"),
        ("faster_rcnn", {"stage_ious": (0.5, 0.6)}, r"stage_ious are \(0.5, 0.6\), but a faster_rcnn has one stage"),
        ("gfl", {"neck_groups": 5, "top_relu": False}, "neck_groups 5 do not divide neck_width 16"),
        ("gfl", {"neck_groups": 4}, "norms has no ReLU between its upper levels: top_relu is true"),
        ("cascade_rcnn", {"stage_ious": (0.5,)}, r"stage_ious are \(0.5,\), but a cascade_rcnn has two at least"),
        ("cascade_rcnn", {"stage_ious": (0.5, 1.0)}, r"stage_ious \(0.5, 1.0\) are not all between 0 and 1"),
        ("fcos", {"mask_depth": 1}, "mask_depth is 1, but a fcos has no mask branch: 0"),
        ("faster_rcnn", {"mask_depth": 4}, "mask_depth is 4, but a faster_rcnn has no mask branch: 0"),
        ("mask_rcnn", {"mask_depth": 0}, "mask_depth is 0, but a mask_rcnn has a mask branch: at least 1"),
        ("faster_rcnn", {"top": "neck"}, "top 'neck' is none of pool"),
        ("faster_rcnn", {"anchor_octaves": 3}, "anchor_octaves is 3, but always 1"),
        ("faster_rcnn", {"levels": (8, 16, 32, 64, 128)}, "levels .* are not strides up to 32, then 64"),
    ],
)
def test_a_family_cannot_have(family: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        replace(small_spec(family), **change)


def test_an_unknown_family_has_no_standard_spec() -> None:
    with pytest.raises(SpecError, match=f"family among {', '.join(FAMILIES)}, found 'yolo'"):
        standard_spec("yolo", Arch.resnet18(), ONE)


def widen_the_stride(model: Any) -> None:
    model.backbone.body["layer4"][0].conv1.dilation = (2, 2)


def change_the_mean(model: Any) -> None:
    model.transform.image_mean = [0.0, 0.0, 0.0]


def change_one_eps(model: Any) -> None:
    model.backbone.body["layer2"][0].bn1.eps = 0.1


def train_at_several_sizes(model: Any) -> None:
    model.transform.min_size = (64, 80)


@families
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (widen_the_stride, r"backbone.body.layer4.0.conv1 is Conv2d.*dilation=\(2, 2\)"),
        (change_the_mean, r"image_mean is \(0.0, 0.0, 0.0\), expected \(0.485"),
        (change_one_eps, r"backbone.body.layer2.0.bn1 is BatchNorm2d\(.*eps=0.1"),
        (train_at_several_sizes, "number of min_size is 2, expected 1"),
    ],
)
def test_parts_that_no_spec_can_say_are_refused(family: str, change: Callable[[Any], None], reason: str) -> None:
    with torch.device("meta"):
        model = build(small_spec(family)).model
        change(model)
        with pytest.raises(SpecError, match=f"parts that a spec cannot say: .*{reason}"):
            adapt(model, LABELS)


@families
def test_a_body_or_pyramid_that_no_spec_can_say_is_refused(family: str) -> None:
    with torch.device("meta"):
        model: Any = build(small_spec(family)).model
        other = copy.deepcopy(model)
        other.backbone.body["bn1"] = nn.Identity()
        with pytest.raises(SpecError, match=r"Expected batch norms, frozen or not, in the detector's body, found Iden"):
            adapt(other, LABELS)
        other = copy.deepcopy(model)
        other.backbone.fpn.extra_blocks = None
        with pytest.raises(SpecError, match="Expected a pooled level or P6 and P7 on the pyramid, found NoneType"):
            adapt(other, LABELS)
        other = copy.deepcopy(model)
        other.backbone.body.return_layers = {"layer1": "0", "layer2": "1", "layer4": "2"}
        with pytest.raises(SpecError, match=r"Expected a pyramid on .*, found one on layer1, layer2, layer4"):
            adapt(other, LABELS)


class OtherHead(nn.Module):
    """A head of the user's own."""


class OtherFCOSHead(FCOSHead):  # type: ignore[misc]  # torchvision has no types
    """A head of the user's own that torchvision's type check lets pass: without norms."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, 1, classes, num_convs=0)


def retinanet(**settings: Any) -> RetinaNet:
    model: RetinaNet = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, **settings)
    return model


def fcos(**settings: Any) -> FCOS:
    model: FCOS = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, **settings)
    return model


def with_gelu(model: Any) -> Any:
    model.head.regression_head.conv[-1] = nn.GELU()
    return model


def with_other_coder(model: Any) -> Any:
    model.head.regression_head.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: retinanet(fg_iou_thresh=0.6), r"matcher is \(0.6, 0.4, True\), expected \(0.5, 0.4, True\)"),
        (lambda: retinanet(head=OtherHead()), "Expected a RetinaNetHead, found OtherHead"),
        (lambda: with_other_coder(retinanet()), "box_coders is"),
        (lambda: retinanet(head=RetinaNetHead(256, 9, 3, norm_layer=nn.BatchNorm2d)), "conv.0.1"),
        (lambda: fcos(center_sampling_radius=2.0), "center_sampling_radius is 2.0, expected 1.5"),
        (lambda: fcos(head=OtherHead()), "Expected an FCOSHead, found OtherHead"),
        (lambda: fcos(head=OtherFCOSHead(256, 3)), "Expected an FCOSHead with group norms, found none"),
        (lambda: with_gelu(fcos()), "head.regression_head.conv.11 is GELU"),
    ],
)
def test_other_one_stage_parts_are_refused(make: Callable[[], nn.Module], reason: str) -> None:
    with torch.device("meta"):
        model = make()
    with pytest.raises(SpecError, match=reason):
        adapt(model, LABELS)
