"""RepPoints: boxes of points in closed form, assignments by brute force, losses written anew, and learning.

What every family promises is tested over ``spec.FAMILIES`` in ``test_family_*``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detector_cases import batch, small_spec, steps, stirred
from torch import Tensor
from torchvision.ops import box_iou

from autodet.detectors import build, detect
from autodet.detectors.reppoints import POINT_RATE, RepPoints, RepPointsDense, RepPointsHead, RepPointsRegressionHead
from autodet.detectors.reppoints_loss import BETWEEN, NOTHING, assign_nearest, assign_overlapping, moment_box


def minmax_box(points: Tensor) -> Tensor:
    """The smallest box around all points (section 3.2, the first transform)."""
    down, across = points[:, 0::2], points[:, 1::2]
    return torch.stack([across.amin(1), down.amin(1), across.amax(1), down.amax(1)], dim=1)


def grid_points(centre: tuple[float, float], spacing: tuple[float, float]) -> Tensor:
    """Nine points, 1×18×1×1, on a grid around a centre; both down, then across."""
    places = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    values = [centre[axis] + place[axis] * spacing[axis] for place in places for axis in (0, 1)]
    return torch.tensor(values, dtype=torch.float64).view(1, 18, 1, 1)


# Points and boxes. ---


def test_the_box_of_a_grid_in_closed_form() -> None:
    """Of −1, 0, 1, three times each, the unbiased variance is 6/8."""
    points = grid_points((3.0, -1.0), (2.0, 0.5))
    scale = torch.tensor([0.3, -0.2], dtype=torch.float64)
    across, down = 0.5 * math.sqrt(6 / 8) * math.exp(0.3), 2.0 * math.sqrt(6 / 8) * math.exp(-0.2)
    expected = [-1 - across, 3 - down, -1 + across, 3 + down]
    assert moment_box(points, scale).flatten().tolist() == pytest.approx(expected)


def test_with_the_right_factor_it_is_the_smallest_box_around_a_grid() -> None:
    points = grid_points((3.0, -1.0), (2.0, 0.5))
    scale = torch.full((2,), -0.5 * math.log(6 / 8), dtype=torch.float64)
    torch.testing.assert_close(moment_box(points, scale), minmax_box(points))
    outlier = points.clone()
    outlier[0, 1] -= 4.0  # one point far to the left: the moments follow it less than the smallest box does
    widths = [float(box[0, 2] - box[0, 0]) for box in (moment_box(outlier, scale), minmax_box(outlier))]
    assert 1.0 < widths[0] < widths[1] == pytest.approx(5.0)


def test_the_factors_learn_at_a_hundredth_of_the_rate() -> None:
    points, scale = grid_points((0.0, 0.0), (1.0, 1.0)), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(moment_box(points, scale)[:, 2:].sum(), scale)
    assert slope.tolist() == pytest.approx([0.01 * math.sqrt(6 / 8)] * 2)


def test_points_that_coincide_have_a_box_without_area_and_a_finite_gradient() -> None:
    points = torch.zeros(1, 18, 2, 2, requires_grad=True)
    box = moment_box(points, torch.zeros(2))
    assert not box.any()
    (slope,) = torch.autograd.grad(box.sum(), points)
    assert slope.isfinite().all()


def test_what_looks_at_points_sees_the_map_where_their_box_lies() -> None:
    """Points, kernels and boxes mean the same place, across and down not being mixed up."""
    head = RepPointsHead(4, 2, (8,), num_convs=1, groups=1)
    regress, classify = head.regression_head, head.classification_head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        regress.get_parameter("init_points.bias").copy_(grid_points((2.0, 1.0), (0.0, 0.0)).flatten().float())
        classify.cls_conv.weight[0, 0] = 1 / 9  # the mean over the points of the first channel
        _, second, offsets = regress(torch.zeros(1, 4, 6, 6))
        maps = torch.rand(1, 4, 6, 6)
        seen = classify.cls_conv(maps, offsets)[0, 0, 1, 1]
        box = regress.sides(second, 8)[0, :, 1, 1]
    assert seen.item() == pytest.approx(maps[0, 0, 1 + 2, 1 + 1].item())
    assert box.tolist() == pytest.approx([-8, -16, 8, 16])  # left and up of the location it lies not at all


def test_what_looks_at_the_first_points_moves_them_little_and_second_ones_start_from_them() -> None:
    head = stirred(small_spec("reppoints")).model.get_submodule("head.regression_head")
    first, second, offsets = head(torch.rand(1, 16, 4, 4))
    bias = head.get_parameter("init_points.bias")
    (whole,) = torch.autograd.grad(first.sum(), bias, retain_graph=True)
    (share,) = torch.autograd.grad(offsets.sum(), bias, retain_graph=True)
    torch.testing.assert_close(share, POINT_RATE * whole)
    moves = second - first
    moved_by = head.get_parameter("refine_points.bias")
    (own,) = torch.autograd.grad(second.sum(), moved_by)
    assert own.tolist() == [16.0] * 18 and moves.std() > 0


def test_first_boxes_start_with_the_size_of_a_levels_objects() -> None:
    """A square around the location, of the geometric mean of the smallest and the largest: one and two anchors wide."""
    spec = small_spec("reppoints")
    head = build(spec).model.get_submodule("head.regression_head")
    assert isinstance(head, RepPointsRegressionHead)
    with torch.no_grad():
        head.init_points.weight.zero_()
        first, _, _ = head(torch.rand(1, 16, 4, 4))
        sides = head.sides(first, spec.levels[0])[0, :, 2, 3]
    assert sides.tolist() == pytest.approx([spec.anchor_sizes[0] / math.sqrt(2)] * 4)


# Who learns what. ---


def locations(strides: tuple[int, ...], sizes: tuple[int, ...], canvas: int) -> tuple[Tensor, list[int]]:
    """Square anchors of all levels of a square canvas, and how many each has."""
    rows, counts = [], []
    for stride, size in zip(strides, sizes, strict=True):
        cells = canvas // stride
        centres = [(x * stride, y * stride) for y in range(cells) for x in range(cells)]
        rows += [[x - size / 2, y - size / 2, x + size / 2, y + size / 2] for x, y in centres]
        counts.append(cells * cells)
    return torch.tensor(rows, dtype=torch.float64), counts


def random_truth(count: int, canvas: int) -> Tensor:
    corner = torch.rand(count, 2, dtype=torch.float64) * canvas * 0.6
    return torch.cat([corner, corner + 3 + torch.rand(count, 2, dtype=torch.float64) ** 2 * canvas * 0.4], dim=1)


def nearest_by_hand(anchors: Tensor, truth: Tensor, strides: tuple[int, ...], counts: list[int]) -> list[int]:
    """Object by object, the level by the logarithms of the sides over 4 as in the public code."""
    found, distances = [-1] * len(anchors), [math.inf] * len(anchors)
    starts = [sum(counts[:level]) for level in range(len(counts))]
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).tolist()
    exponents = [int(math.log2(stride)) for stride in strides]
    for number, (x0, y0, x1, y1) in enumerate(truth.tolist()):
        exponent = int((math.log2((x1 - x0) / 4) + math.log2((y1 - y0) / 4)) / 2)
        level = exponents.index(min(max(exponent, exponents[0]), exponents[-1]))
        best, place = math.inf, -1
        for row in range(starts[level], starts[level] + counts[level]):
            x, y = centres[row]
            away = math.hypot((x - (x0 + x1) / 2) / (x1 - x0), (y - (y0 + y1) / 2) / (y1 - y0))
            if away < best:
                best, place = away, row
        if best < distances[place]:
            found[place], distances[place] = number, best
    return found


@pytest.mark.parametrize("seed", range(6))
def test_first_points_learn_the_object_whose_centre_is_near(seed: int) -> None:
    torch.manual_seed(seed)
    strides = (8, 16, 32)
    anchors, counts = locations(strides, (32, 64, 128), 256)
    truth = random_truth((0, 1, 5, 20, 40, 40)[seed], 256)
    found = assign_nearest(anchors, truth, counts)
    assert found.tolist() == nearest_by_hand(anchors, truth, strides, counts)
    assert int((found >= 0).sum()) <= len(truth)


def test_anchors_half_as_large_take_objects_half_as_large() -> None:
    anchors, counts = locations((8, 16), (16, 32), 64)
    truth = torch.tensor([[10.0, 10, 30, 30], [10, 10, 44, 44]], dtype=torch.float64)
    found = assign_nearest(anchors, truth, counts)
    assert [int((found == number).nonzero()) >= counts[0] for number in (0, 1)] == [False, True]


def overlapping_by_hand(boxes: Tensor, truth: Tensor) -> list[int]:
    overlaps = box_iou(truth, boxes).tolist()
    found = []
    for row in range(len(boxes)):
        own = [of_object[row] for of_object in overlaps]
        best = max(own, default=0.0)
        found.append(own.index(best) if best >= 0.5 else BETWEEN if best >= 0.4 else NOTHING)
    for number, own in enumerate(overlaps):
        for row, overlap in enumerate(own):
            if overlap == max(own) > 0:
                found[row] = number
    return found


@pytest.mark.parametrize("count", [0, 1, 8])
def test_classes_learn_the_object_that_the_first_box_overlaps(count: int) -> None:
    truth, boxes = random_truth(count, 128), random_truth(300, 128)
    boxes[:count] = truth + 4  # some overlap a lot
    found = assign_overlapping(boxes, truth)
    assert found.tolist() == overlapping_by_hand(boxes, truth)
    assert set(found.tolist()) >= (set(range(count)) | {NOTHING} if count else {NOTHING})


def test_an_object_that_no_box_overlaps_is_nobodys() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 0], [50, 50, 60, 60]])
    truth = torch.tensor([[20.0, 20, 30, 30]])
    assert assign_overlapping(boxes, truth).tolist() == [NOTHING, NOTHING]


def focal(logit: float, wanted: bool) -> float:
    """Lin et al. 2017, eq. 5, α = 0.25, γ = 2."""
    chance = 1 / (1 + math.exp(-logit))
    own, weight = (chance, 0.25) if wanted else (1 - chance, 0.75)
    return -weight * (1 - own) ** 2 * math.log(max(own, 1e-300))


def smooth(difference: float) -> float:
    size, beta = abs(difference), 1 / 9
    return size**2 / (2 * beta) if size < beta else size - beta / 2


def test_losses_equal_a_computation_number_by_number() -> None:
    """Two objects, none, and one; anchors of an even side, so that torchvision's are as large as the spec says."""
    detector = build(small_spec("reppoints", anchor_sizes=(16, 32, 64, 128, 256)))
    detector.model.get_parameter("head.regression_head.init_points.bias").data.normal_(std=2.0)
    detector.model.train()
    images, targets = batch()
    inputs, features, dense = steps(detector, images, targets)
    assert isinstance(dense, RepPointsDense) and isinstance(detector.model, RepPoints)
    found = detector.losses(inputs, features, dense)
    counts = [level.shape[2] * level.shape[3] for level in features.values()]
    head, sums, first_count, second_count = detector.model.head, [0.0, 0.0, 0.0], 0, 0
    for image, target in enumerate(inputs.ground_truth()):
        anchors, truth = dense.anchors[image], target["boxes"]
        first, second = (rows_of(head, points, image, anchors) for points in (dense.first, dense.second))
        logits = torch.cat([level[image].flatten(1).T for level in dense.logits.values()]).tolist()
        near = nearest_by_hand(anchors, truth, (4, 8, 16, 32, 64), counts)
        over = overlapping_by_hand(first, truth)
        sides = (anchors[:, 2] - anchors[:, 0]).tolist()
        for row, side in enumerate(sides):
            for term, boxes, matched in ((1, second, over), (2, first, near)):
                if matched[row] >= 0:
                    sums[term] += sum(smooth(d / side) for d in (boxes[row] - truth[matched[row]]).tolist())
            if over[row] != BETWEEN:
                label = int(target["labels"][over[row]]) if over[row] >= 0 else -1
                sums[0] += sum(focal(logit, channel == label) for channel, logit in enumerate(logits[row]))
        first_count += max(1, sum(number >= 0 for number in near))
        second_count += max(1, sum(number >= 0 for number in over))
    assert first_count == 4 and second_count >= 4
    assert found["classification"].item() == pytest.approx(sums[0] / second_count, rel=1e-4)
    assert found["bbox_regression"].item() == pytest.approx(sums[1] / second_count, rel=1e-4)
    assert found["bbox_initial"].item() == pytest.approx(0.5 * sums[2] / first_count, rel=1e-4)


def rows_of(head: Any, points: dict[int, Tensor], image: int, anchors: Tensor) -> Tensor:
    """Boxes of one image, all × 4 in pixels, from its points."""
    boxes = []
    for stride, level in points.items():
        cells = level[image].detach().flatten(1).T  # locations × 18
        down, across = cells[:, 0::2] * stride, cells[:, 1::2] * stride
        half = torch.stack([across.std(1), down.std(1)], 1) * head.regression_head.box_scale.detach().exp()
        middle = torch.stack([across.mean(1), down.mean(1)], 1)
        boxes.append(torch.cat([middle - half, middle + half], 1))
    return torch.cat(boxes) + ((anchors[:, :2] + anchors[:, 2:]) / 2).repeat(1, 2)


# The plain model. ---


def test_its_forward_asks_for_targets_and_boxes_with_an_area() -> None:
    model = build(small_spec("reppoints")).model
    model.train()
    images, targets = batch()
    with pytest.raises(ValueError, match="Expected targets in training mode, found none"):
        model(images)
    targets[2]["boxes"][0, 2] = targets[2]["boxes"][0, 0]
    with pytest.raises(ValueError, match=r"found \[10.0, 10.0, 10.0, 45.0\] in target 2"):
        model(images, targets)


def test_a_head_of_other_classes_is_refused() -> None:
    model = build(small_spec("reppoints")).model
    assert isinstance(model, RepPoints)
    with pytest.raises(ValueError, match="Expected a head of 5 classes with the background, found one of 3"):
        RepPoints(model.backbone, 5, model.anchor_generator, model.head)


def test_no_detection_is_background() -> None:
    detector = stirred(small_spec("reppoints"))
    detector.model.get_parameter("head.classification_head.cls_logits.bias").data[0] = 50.0
    found = detect(detector, batch()[0])
    assert all(len(image["labels"]) and int(image["labels"].min()) >= 1 for image in found)


def test_points_are_an_extra_of_the_dense_step() -> None:
    spec = small_spec("reppoints", points=25)
    _, features, dense = steps(build(spec), batch()[0])
    assert isinstance(dense, RepPointsDense)
    for sets in (dense.first, dense.second):
        assert {stride: tuple(level.shape) for stride, level in sets.items()} == {
            stride: (3, 50, *level.shape[2:]) for stride, level in features.items()
        }
