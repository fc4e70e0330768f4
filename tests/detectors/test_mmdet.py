"""mmdetection's state dicts (``mmdet_states``) as detectors, against forwards written here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detector_cases import LABELS, batch, steps
from mmdet_states import (
    BINS,
    CLASSES,
    HEAD,
    NECK,
    WIDTHS,
    State,
    body,
    cascade_mask_rcnn,
    cascade_rcnn,
    faster_rcnn,
    fcos,
    gfl,
    layer,
    mask_rcnn,
    neck,
    reppoints,
    retinanet,
)
from torch import Tensor
from torchvision.ops import deform_conv2d, roi_align

from autodet.detectors import Detector, Masked, SpecError, TwoStage, detector_of_state_dict, load_any_detector
from autodet.detectors.mmdet import COCO_80, is_mmdet
from autodet.detectors.steps import Features, Inputs
from autodet.detectors.weights import WeightsError

HEADS = {
    "faster_rcnn": faster_rcnn,
    "retinanet": retinanet,
    "cascade_rcnn": cascade_rcnn,
    "mask_rcnn": mask_rcnn,
    "gfl": gfl,
    "reppoints": reppoints,
}
every = pytest.mark.parametrize("family", HEADS)


def loaded(state: State, **settings: Any) -> Detector:
    return detector_of_state_dict(state, LABELS, 64, 96, **settings)


def conv(state: State, name: str, value: Tensor, **options: Any) -> Tensor:
    return F.conv2d(value, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def pyramid(state: State, maps: list[Tensor]) -> list[Tensor]:
    """mmdetection's: sums from the top, a convolution each; then P6, and P7 without a ReLU, or P6 by pooling."""

    def made(name: str, value: Tensor, **options: Any) -> Tensor:
        value, norm = conv(state, f"neck.{name}.conv", value, **options), f"neck.{name}.gn"
        if f"{norm}.weight" not in state:
            return value
        return F.group_norm(value, 32, state[f"{norm}.weight"], state[f"{norm}.bias"])

    sums = [made(f"lateral_convs.{i}", level) for i, level in enumerate(maps)]
    for i in range(len(sums) - 1, 0, -1):
        sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[2:], mode="nearest")
    found = [made(f"fpn_convs.{i}", level, padding=1) for i, level in enumerate(sums)]
    p6 = f"neck.fpn_convs.{len(maps)}.conv.weight"
    if p6 not in state:
        return [*found, F.max_pool2d(found[-1], 1, stride=2)]
    on_input = state[p6].shape[1] == maps[-1].shape[1]
    found.append(made(f"fpn_convs.{len(maps)}", maps[-1] if on_input else found[-1], stride=2, padding=1))
    return [*found, made(f"fpn_convs.{len(maps) + 1}", found[-1], stride=2, padding=1)]


def answers(detector: Detector) -> tuple[Inputs, Features, Any]:
    detector.model.eval()
    with torch.no_grad():
        return steps(detector, batch()[0])


# Body and pyramid. ---


@pytest.mark.parametrize("groups", [1, 4])
def test_a_body_is_torchvisions_by_another_name(groups: int) -> None:
    state = faster_rcnn(groups=groups)
    detector = loaded(state)
    assert detector.spec.body.groups == groups and [s.width for s in detector.spec.body.stages] == list(WIDTHS)
    assert (detector.spec.norm, detector.spec.norm_eps) == ("batch", 1e-5)
    own = detector.model.state_dict()
    for name, value in state.items():
        if name.startswith("backbone."):
            assert torch.equal(own[name.replace("backbone.", "backbone.body.")], value)


@pytest.mark.parametrize(
    ("make", "first", "top"),
    [
        (faster_rcnn, 0, "pool"),
        (retinanet, 1, "body"),
        (lambda: retinanet(on_input=False), 1, "neck"),
        (lambda: reppoints(neck_groups=True), 1, "body"),
    ],
)
def test_the_pyramid_is_mmdetections(make: Any, first: int, top: str) -> None:
    state = make()
    detector = loaded(state)
    assert detector.spec.top == top
    assert detector.spec.neck_groups == (32 if "neck.lateral_convs.0.gn.weight" in state else 0)
    inputs, features, _ = answers(detector)
    with torch.no_grad():
        value, maps = inputs.images.tensors, []
        modules = detector.model.get_submodule("backbone.body")
        for name, module in modules.named_children():
            value = module(value)
            maps += [value] if name.startswith("layer") else []
        expected = pyramid(state, maps[first:])
    assert len(features) == len(expected) == 5
    for level, other in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-4)
    assert bool((features[64] < 0).any())  # so that a ReLU before P7 would show


# Heads. ---


@pytest.mark.parametrize("on_input", [True, False])
def test_a_retinanets_answers_are_mmdetections(on_input: bool) -> None:
    state = retinanet(on_input)
    detector = loaded(state)
    _, features, dense = answers(detector)
    assert (detector.spec.family, detector.spec.anchor_octaves, detector.spec.head_depth) == ("retinanet", 3, 4)
    for stride, level in features.items():
        towers = []
        for tower in ("cls", "reg"):
            value = level
            for index in range(4):
                value = conv(state, f"bbox_head.{tower}_convs.{index}.conv", value, padding=1).relu()
            towers.append(value)
        logits = conv(state, "bbox_head.retina_cls", towers[0], padding=1)
        own = dense.logits[stride].view(len(logits), 9, CLASSES + 1, *logits.shape[2:])
        expected = logits.view(len(logits), 9, CLASSES, *logits.shape[2:])
        torch.testing.assert_close(own[:, :, 1:], expected, rtol=1e-4, atol=1e-4)
        assert float(own[:, :, 0].sigmoid().max()) < 1e-4
        deltas = conv(state, "bbox_head.retina_reg", towers[1], padding=1)
        torch.testing.assert_close(dense.deltas[stride], deltas, rtol=1e-4, atol=1e-4)


def tower(state: State, name: str, value: Tensor, groups: int = 32) -> Tensor:
    """Convolutions, group norms where there are any, and ReLUs."""
    index = 0
    while f"bbox_head.{name}_convs.{index}.conv.weight" in state:
        value = conv(state, f"bbox_head.{name}_convs.{index}.conv", value, padding=1)
        norm = f"bbox_head.{name}_convs.{index}.gn"
        if f"{norm}.weight" in state:
            value = F.group_norm(value, groups, state[f"{norm}.weight"], state[f"{norm}.bias"])
        value, index = value.relu(), index + 1
    return value


def test_a_gfls_answers_are_mmdetections() -> None:
    """Distances are the means of the distributions in strides; each level's logits have a factor of their own."""
    state = gfl()
    detector = loaded(state)
    _, features, dense = answers(detector)
    spec = detector.spec
    assert (spec.family, spec.reg_max, spec.head_depth, spec.top) == ("gfl", 16, 4, "neck")
    for number, (stride, level) in enumerate(features.items()):
        logits = conv(state, "bbox_head.gfl_cls", tower(state, "cls", level), padding=1)
        torch.testing.assert_close(dense.logits[stride][:, 1:], logits, rtol=1e-4, atol=1e-4)
        assert float(dense.logits[stride][:, 0].sigmoid().max()) < 1e-4
        sides = conv(state, "bbox_head.gfl_reg", tower(state, "reg", level), padding=1)
        sides = sides * state[f"bbox_head.scales.{number}.scale"]
        bins = sides.view(len(sides), 4, 17, *sides.shape[2:]).softmax(2)
        distances = (bins * state["bbox_head.integral.project"].view(1, 1, 17, 1, 1)).sum(2) * stride
        torch.testing.assert_close(dense.deltas[stride], distances, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("groups", [True, False], ids=["norms", "no norms"])
def test_a_reppoints_answers_are_mmdetections(groups: bool) -> None:
    """Points are strides down and across; what looks at them is a deformable convolution of offsets from the kernel."""
    state = reppoints(groups)
    detector = loaded(state)
    _, features, dense = answers(detector)
    spec = detector.spec
    assert (spec.family, spec.points, spec.head_depth, spec.top) == ("reppoints", 9, 3, "body")
    assert spec.head_groups == (32 if groups else 0)
    kernel = torch.tensor([(row, column) for row in (-1.0, 0, 1) for column in (-1.0, 0, 1)]).view(1, 18, 1, 1)
    head, boxes = "bbox_head.reppoints_", []
    for stride, level in features.items():
        classify, locate = tower(state, "cls", level), tower(state, "reg", level)
        first = conv(state, f"{head}pts_init_out", conv(state, f"{head}pts_init_conv", locate, padding=1).relu())
        looked = [
            deform_conv2d(value, first - kernel, state[f"{head}{name}_conv.weight"], padding=1).relu()
            for name, value in (("cls", classify), ("pts_refine", locate))
        ]
        logits = conv(state, f"{head}cls_out", looked[0])
        torch.testing.assert_close(dense.logits[stride][:, 1:], logits, rtol=1e-4, atol=1e-4)
        points = (first + conv(state, f"{head}pts_refine_out", looked[1])) * stride
        down, across = points[:, 0::2], points[:, 1::2]
        half = [axis.std(1) * state["bbox_head.moment_transfer"][i].exp() for i, axis in enumerate((across, down))]
        box = torch.stack([across.mean(1) - half[0], down.mean(1) - half[1],
                           across.mean(1) + half[0], down.mean(1) + half[1]], 1)  # fmt: skip
        rows, columns = torch.meshgrid(*(torch.arange(n) * stride for n in level.shape[2:]), indexing="ij")
        boxes.append((box + torch.stack([columns, rows] * 2)).flatten(2).transpose(1, 2))
    expected = torch.cat(boxes[:3], 1)  # the canvas is none of whole cells of 64 pixels
    torch.testing.assert_close(detector.boxes(dense)[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("make", [faster_rcnn, cascade_rcnn])
def test_proposal_networks_answer_as_mmdetections(make: Any) -> None:
    state = make()
    _, features, dense = answers(loaded(state))
    for stride, level in features.items():
        value = conv(state, "rpn_head.rpn_conv", level, padding=1).relu()
        torch.testing.assert_close(dense.logits[stride], conv(state, "rpn_head.rpn_cls", value), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dense.deltas[stride], conv(state, "rpn_head.rpn_reg", value), rtol=1e-4, atol=1e-4)


REGIONS = torch.tensor([[3.0, 5, 60, 50], [10, 20, 33, 41], [0, 0, 96, 64], [40, 8, 52, 62], [5, 5, 30, 20]])


def regressed(boxes: Tensor, deltas: Tensor, deviations: tuple[float, ...]) -> Tensor:
    """Boxes R×4 moved by regressions R×4 in units of the deviations (Ren et al. 2015, eq. 2)."""
    shift = deltas * torch.tensor(deviations)
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + shift[:, :2] * size
    half = size * shift[:, 2:].clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([centre - half, centre + half], 1)


def pooled(features: Features, boxes: Tensor, bins: int) -> Tensor:
    """mmdetection's pooling of the first image: level by √area / 56, half a cell's offset, a point a cell."""
    rows = []
    for box in boxes:
        side = ((box[2] - box[0]) * (box[3] - box[1])).sqrt()
        stride = 4 * 2 ** int(torch.log2(side / 56 + 1e-6).floor().clamp(0, 3))
        rows.append(roi_align(features[stride][:1], [box[None]], bins, 1 / stride, 0, aligned=True))
    return torch.cat(rows)


def answered(state: State, name: str, features: Features, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """mmdetection's box head."""
    value = pooled(features, boxes, BINS).flatten(1)
    for index in (0, 1):
        weights = (state[f"{name}.shared_fcs.{index}.{kind}"] for kind in ("weight", "bias"))
        value = F.linear(value, *weights).relu()
    logits, deltas = (F.linear(value, *(state[f"{name}.{layer}.{kind}"] for kind in ("weight", "bias")))
                      for layer in ("fc_cls", "fc_reg"))  # fmt: skip
    return logits, deltas


def asked(detector: Detector) -> tuple[Features, Tensor, Tensor]:
    """Features, probabilities R×(K+1) and boxes R×(K+1)×4 in pixels for the regions, which are the first image's."""
    inputs, features, _ = answers(detector)
    assert isinstance(detector, TwoStage)
    with torch.no_grad():
        regions = detector.regions(inputs, features, [REGIONS, torch.zeros(0, 4), torch.zeros(0, 4)])
        corners = detector.region_corners(regions)
    size = (REGIONS[:, 2:] - REGIONS[:, :2]).repeat(1, 2)[:, None]
    centre = ((REGIONS[:, :2] + REGIONS[:, 2:]) / 2).repeat(1, 2)[:, None]
    return features, regions.class_logits.softmax(1), corners * size + centre


@pytest.mark.parametrize("regressions", [4 * CLASSES, 4], ids=["a class", "for all classes"])
def test_a_faster_rcnns_regions_are_mmdetections(regressions: int) -> None:
    state = faster_rcnn(regressions)
    detector = loaded(state)
    features, chances, boxes = asked(detector)
    assert (detector.spec.family, detector.spec.roi_size, detector.spec.head_width) == ("faster_rcnn", BINS, HEAD)
    logits, deltas = answered(state, "roi_head.bbox_head", features, REGIONS)
    torch.testing.assert_close(chances, logits.softmax(1)[:, [CLASSES, *range(CLASSES)]], rtol=1e-4, atol=1e-5)
    for label in range(CLASSES):
        own = deltas[:, 4 * label : 4 * label + 4] if regressions > 4 else deltas
        expected = regressed(REGIONS, own, (0.1, 0.1, 0.2, 0.2))
        torch.testing.assert_close(boxes[:, label + 1], expected, rtol=1e-4, atol=1e-3)


def test_a_cascades_regions_are_mmdetections_but_for_how_scores_are_averaged() -> None:
    state = cascade_rcnn()
    detector = loaded(state)
    features, chances, found = asked(detector)
    assert (detector.spec.family, detector.spec.stage_ious) == ("cascade_rcnn", (0.5, 0.6, 0.7))
    boxes, scores, limit = REGIONS, [], torch.tensor([96.0, 64, 96, 64])
    for stage, deviations in enumerate([(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]):
        logits, deltas = answered(state, f"roi_head.bbox_head.{stage}", features, boxes)
        scores.append(logits.softmax(1)[:, [CLASSES, *range(CLASSES)]])
        boxes = regressed(boxes, deltas, deviations)
        boxes = boxes.clamp(min=0).minimum(limit) if stage < 2 else boxes
    for label in range(CLASSES + 1):
        torch.testing.assert_close(found[:, label], boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(chances, torch.stack(scores).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "branch"), [(mask_rcnn, ""), (cascade_mask_rcnn, ".2")])
def test_masks_on_regions_are_mmdetections(make: Any, branch: str) -> None:
    """Of a cascade's three branches, those of the last one."""
    state = make()
    detector = loaded(state)
    spec, name = detector.spec, f"roi_head.mask_head{branch}"
    assert (spec.mask_depth, spec.mask_width, spec.mask_roi_size) == (2, 12, 14)
    assert isinstance(detector, Masked)
    inputs, features, _ = answers(detector)
    nothing = torch.zeros(0, 4)
    with torch.no_grad():
        found = detector.region_masks(inputs, features, [REGIONS, nothing, nothing])
    value = pooled(features, REGIONS, 14)
    for index in range(2):
        value = conv(state, f"{name}.convs.{index}.conv", value, padding=1).relu()
    weight, bias = (state[f"{name}.upsample.{kind}"] for kind in ("weight", "bias"))
    expected = conv(state, f"{name}.conv_logits", F.conv_transpose2d(value, weight, bias, stride=2).relu())
    torch.testing.assert_close(found[:, 1:], expected, rtol=1e-4, atol=1e-4)


# Files. ---


@every
def test_files_know_themselves(family: str, tmp_path: Path) -> None:
    state = HEADS[family]()
    path = tmp_path / "theirs.pth"
    meta = {"mmdet_version": "2.25.0", "epoch": 12, "CLASSES": ("dog", "light")}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, path)
    found = load_any_detector(path, LABELS, 64)
    assert is_mmdet(state) and found.spec.family == family and not found.model.training
    same = loaded(state)
    assert all(torch.equal(value, same.model.state_dict()[key]) for key, value in found.model.state_dict().items())


@every
def test_what_is_not_told_is_mmdetections(family: str) -> None:
    spec = loaded(HEADS[family]()).spec
    if spec.two_stage:
        assert (spec.roi_aligned, spec.roi_sampling, spec.detections) == (True, 0, 100)
        assert spec.anchor_sizes == (32, 64, 128, 256, 512)
    else:
        assert (spec.top_relu, spec.detections) == (False, 100)
    assert (spec.score_threshold, spec.nms_threshold) == (0.05, 0.6 if family == "gfl" else 0.5)


def test_eighty_classes_are_cocos() -> None:
    assert len(COCO_80) == 80 and [number for number, _ in COCO_80[:12]] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert COCO_80[-1][0] == 90
    state = retinanet()
    layer(state, "bbox_head.retina_cls", 9 * 80, NECK, 3, 3)
    assert loaded(state).spec.labels == COCO_80
    layer(state, "bbox_head.retina_cls", 9 * 7, NECK, 3, 3)
    with pytest.raises(SpecError, match=r"7 classes besides background.*but the data has 2 labels"):
        loaded(state)


# What is refused. ---


def without_statistics(state: State) -> State:
    return {name: torch.zeros_like(value) if "running_mean" in name else value for name, value in state.items()}


def with_offsets(state: State) -> State:
    layer(state, "backbone.layer4.0.conv2_offset", 18, 8, 3, 3)
    return state


def with_convolutions(state: State) -> State:
    layer(state, "roi_head.bbox_head.shared_convs.0.conv", NECK, NECK, 3, 3)
    return state


def with_another_head(state: State) -> State:
    return {name.replace("retina_", "sabl_"): value for name, value in state.items()}


def of_six_anchors(state: State) -> State:
    layer(state, "bbox_head.retina_cls", 5, NECK, 3, 3)
    return state


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (lambda: without_statistics(faster_rcnn()), 'body is one of style "caffe".*Give one of style "pytorch"'),
        (lambda: with_offsets(faster_rcnn()), r"parts that have no counterpart here: backbone.layer4.0.conv2_offset"),
        (lambda: with_convolutions(faster_rcnn()), r"no counterpart here: roi_head.bbox_head.shared_convs.0.conv"),
        (lambda: with_another_head(retinanet()), r"expected a head of .*retinanet.*found one with bbox_head.*sabl_"),
        (lambda: of_six_anchors(retinanet()), "class responses of 9 anchors a location, found 5 in all"),
        (lambda: body() | neck(0), "in mmdetection's names, found none"),
        (fcos, "FCOS of mmdetection's, .* half a stride .* train one here"),
    ],
)
def test_what_has_no_counterpart_is_refused(state: Any, reason: str) -> None:
    with pytest.raises(SpecError, match=f"^theirs.pth: .*{reason}"):
        loaded(state(), source="theirs.pth")


def test_a_missing_or_misshapen_tensor_is_named() -> None:
    state = faster_rcnn()
    del state["neck.fpn_convs.2.conv.bias"]
    with pytest.raises(WeightsError, match=r"missing: backbone.fpn.layer_blocks.2.0.bias"):
        loaded(state)
    state = faster_rcnn()
    layer(state, "rpn_head.rpn_cls", 6, NECK, 1, 1)  # by softmax, with a row for the background
    with pytest.raises(WeightsError, match=r"of another shape: rpn.head.cls_logits"):
        loaded(state)
