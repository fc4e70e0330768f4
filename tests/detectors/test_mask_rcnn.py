"""What only Mask R-CNN has: a mask branch, its loss, its masks in images, and its settings."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detector_cases import LABELS, batch, small_spec, step_losses, steps, stirred
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.ops import roi_align

from autodet.detectors import Masked, SpecError, adapt, build, detect
from autodet.detectors.channels import channel_counts, channel_groups, producers
from autodet.detectors.faster_rcnn import Sampled
from autodet.detectors.mask_rcnn import MaskRCNNSteps, build_mask_rcnn
from autodet.detectors.spec import FAMILIES
from autodet.detectors.traits import TRAITS

SPEC = small_spec("mask_rcnn")


def made(**changes: Any) -> MaskRCNNSteps:
    detector = stirred(replace(SPEC, **changes))
    assert isinstance(detector, MaskRCNNSteps)
    return detector


def of_model(detector: MaskRCNNSteps, levels: list[Tensor], boxes: Tensor) -> Tensor:
    """The mask logits of boxes of the first image, each pooled from its level by hand (Lin et al. 2017, eq. 1)."""
    heads, size, found = detector.model.roi_heads, detector.spec.mask_roi_size, []
    for box in boxes:
        side = float((box[2] - box[0]) * (box[3] - box[1])) ** 0.5
        level = min(max(int(torch.floor(4 + torch.log2(torch.tensor(side / 224)))), 2), 5)
        rois = torch.cat([torch.zeros(1), box])[None]
        pooled = roi_align(levels[level - 2][:1], rois, size, 1 / 2**level, detector.spec.roi_sampling)
        for conv, _ in heads.mask_head:
            pooled = F.relu(F.conv2d(pooled, conv.weight, conv.bias, padding=1))
        up = heads.mask_predictor.conv5_mask
        pooled = F.relu(F.conv_transpose2d(pooled, up.weight, up.bias, stride=2))
        last = heads.mask_predictor.mask_fcn_logits
        found.append(F.conv2d(pooled, last.weight, last.bias))
    return torch.cat(found)


def test_mask_logits_on_given_regions_equal_a_computation_by_hand() -> None:
    detector = made()
    detector.model.eval()
    inputs, features, _ = steps(detector, batch()[0])
    boxes = torch.tensor([[0.0, 0, 64, 60], [5, 8, 20, 40], [1, 2, 12, 9]])
    nothing = torch.zeros(0, 4)
    found = detector.region_masks(inputs, features, [boxes, nothing, nothing])
    assert tuple(found.shape) == (3, len(LABELS) + 1, 8, 8)
    torch.testing.assert_close(found, of_model(detector, list(features.values()), boxes), rtol=1e-4, atol=1e-5)
    empty = detector.region_masks(inputs, features, [nothing] * 3)
    assert tuple(empty.shape) == (0, len(LABELS) + 1, 8, 8)


def test_the_mask_loss_is_the_cross_entropy_of_the_objects_regions_alone() -> None:
    """A region that is half of its object: the target is the object's mask seen through the region."""
    detector = made()
    images, targets = batch(sizes=((64, 96),))
    targets[0]["masks"] = torch.zeros((2, 64, 96), dtype=torch.uint8)
    targets[0]["masks"][0, 4:44, 4:24] = 1  # of the first object; the region reaches beyond its right side
    inputs, features, _ = steps(detector, images, targets)
    regions = torch.tensor([[8.0, 8, 40, 40], [50, 10, 60, 30]])
    sampled = Sampled([regions], [torch.tensor([0, 1])], [torch.tensor([2, 0])], [torch.zeros(2, 4)])
    targets[0]["labels"][0] = 2
    loss = detector.region_losses(inputs, features, sampled)["loss_mask"]
    logits = detector.region_masks(inputs, features, [regions[:1]])[0, 2]
    inside = torch.zeros(8, 8)
    inside[:, :4] = 1  # of eight columns over 32 pixels the first four are the object's
    inside[:, 3] = 0.875  # torchvision's pooling looks half a pixel too far: one of its four points is on the border
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, inside), rtol=1e-4, atol=1e-4)


def test_targets_without_masks_are_refused() -> None:
    images, targets = batch()
    for target in targets:
        del target["masks"]
    with pytest.raises(ValueError, match="masks"):
        step_losses(made(), images, targets)


def test_masks_lie_in_their_boxes_at_the_images_size() -> None:
    detector = made()
    images, _ = batch(((48, 72), (130, 200)))
    found = detect(detector, images)
    for image, target in zip(images, found, strict=True):
        height, width = image.shape[1:]
        assert tuple(target["masks"].shape) == (len(target["boxes"]), 1, height, width)
        assert bool(((target["masks"] >= 0) & (target["masks"] <= 1)).all()) and bool((target["masks"] > 0.5).any())
        for box, mask in zip(target["boxes"], target["masks"][:, 0], strict=True):
            rows, columns = torch.where(mask > 0)
            # A mask is pasted with a border of one of its pixels, and rounded to whole pixels.
            border = (box[2:] - box[:2]) / 8 / 2 + 1.5
            assert columns.min() >= box[0] - border[0] and columns.max() <= box[2] + border[0]
            assert rows.min() >= box[1] - border[1] and rows.max() <= box[3] + border[1]


def test_no_detections_have_no_masks() -> None:
    found = detect(made(score_threshold=0.999999), [torch.rand(3, 48, 72)])[0]
    assert tuple(found["masks"].shape) == (0, 1, 48, 72)


def test_only_families_with_a_mask_branch_have_its_step() -> None:
    with torch.device("meta"):
        for family in FAMILIES:
            assert isinstance(build(small_spec(family)), Masked) == (True in TRAITS[family].masks)


def test_a_mask_rcnn_is_not_taken_for_a_faster_rcnn() -> None:
    with torch.device("meta"):
        model = build_mask_rcnn(SPEC)
    assert isinstance(model, MaskRCNN)
    assert adapt(model, LABELS).spec == SPEC


def test_the_transposed_convolution_makes_its_second_dimension() -> None:
    groups, counts = channel_groups(SPEC), channel_counts(SPEC)
    state = build(replace(SPEC, mask_width=20)).model.state_dict()
    wide = channel_counts(replace(SPEC, mask_width=20))
    assert {name: counts[name] for name in counts if name.startswith("mask.")} == dict.fromkeys(
        ("mask.0", "mask.1", "mask.up"), 12
    )
    for name in (name for name in groups if ".mask_" in name):
        for size, dim in zip(state[name].shape, groups[name], strict=False):
            assert dim is None or size == wide[str(dim)], name
    up = "roi_heads.mask_predictor.conv5_mask.weight"
    assert groups[up] == ("mask.1", "mask.up")
    assert producers(groups)["mask.up"] == [up]
    assert producers(groups)["mask.1"] == ["roi_heads.mask_head.1.0.weight"]


class OtherHead(nn.Sequential):
    """A head of the user's own."""


def other_head(model: Any) -> None:
    model.roi_heads.mask_head = OtherHead()


def other_predictor(model: Any) -> None:
    model.roi_heads.mask_predictor = OtherHead()


def other_scale(model: Any) -> None:
    model.roi_heads.mask_roi_pool.canonical_scale = 112


def other_sampling(model: Any) -> None:
    model.roi_heads.mask_roi_pool.sampling_ratio = 3


def other_width_above(model: Any) -> None:
    model.roi_heads.mask_predictor.conv5_mask = nn.ConvTranspose2d(12, 14, 2, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_head, "Expected a MaskRCNNHeads, found OtherHead"),
        (other_predictor, "Expected a MaskRCNNPredictor, found OtherHead"),
        (other_scale, "mask_roi_pool.canonical is"),
        (other_sampling, "roi_heads.mask_roi_pool is .*sampling_ratio=3"),
        (other_width_above, "parameter roi_heads.mask_predictor.conv5_mask"),
    ],
)
def test_parts_of_the_branch_that_a_spec_cannot_say_are_refused(change: Any, reason: str) -> None:
    with torch.device("meta"):
        model = copy.deepcopy(build_mask_rcnn(SPEC))
        change(model)
    with pytest.raises(SpecError, match=reason):
        adapt(model, LABELS)


def test_the_second_version_of_torchvisions_model_is_refused_and_the_first_one_is_not() -> None:
    with torch.device("meta"):
        second = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=3)
        first = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(SpecError, match="Expected a TwoMLPHead, found FastRCNNConvFCHead: no adapter"):
        adapt(second, LABELS)
    assert adapt(first, LABELS).spec.mask_depth == 4
