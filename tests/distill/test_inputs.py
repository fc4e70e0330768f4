"""Knowledge inputs: what each compares, against independent computations, and what holds for all of them.

The second half runs over ``INPUTS`` and every pair of families, so a new input is tested by being listed there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distill_outputs import CANVAS, COUNTS, PROPOSED, answer, leaves, part, random_boxes, sides, spec_of
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from autodet.data import Batch
from autodet.detectors import DetectorSpec, Inputs, build
from autodet.detectors.spec import FAMILIES
from autodet.distill.formula import Formula
from autodet.distill.inputs import (
    INPUTS,
    background_masks,
    comparable_inputs,
    foreground_masks,
    parts_of,
    why_incomparable,
)
from autodet.distill.outputs import PARTS, DetectorOutput, RegionOutput, Size, output_of, resized_boxes
from autodet.distill.teacher import Teacher
from autodet.distill.terms import term_loss
from autodet.distill.values import Value

RCNN, RETINANET, FCOS = (spec_of(family) for family in ("faster_rcnn", "retinanet", "fcos"))
LEVELS = (8, 16, 32, 64)


def loss_of(name: str, student: DetectorOutput, teacher: DetectorOutput, distance: str = "") -> Tensor:
    """An input's unweighted loss; ``giou`` on boxes and ``l1`` elsewhere unless a distance is named."""
    distance = distance or ("giou" if INPUTS[name].kind.boxes else "l1")
    return term_loss(Formula.parse(f"{name}: {distance}").terms[0], *sides(INPUTS[name].pairs(student, teacher)))


# Masks. ---

AWKWARD = [  # on a canvas of 32×48 with cells of 8×8
    torch.tensor([[3.0, 2.0, 20.0, 17.0]]),
    torch.tensor([[0.0, 0.0, 16.0, 16.0], [8.0, 8.0, 40.0, 32.0]]),  # overlap, and edges between cells
    torch.tensor([[0.0, 0.0, 48.0, 32.0], [10.0, 10.0, 12.0, 12.0]]),  # one within the other
    torch.tensor([[17.0, 9.0, 17.5, 9.1]]),  # within one cell
    torch.tensor([[-9.0, -5.0, 6.0, 60.0], [40.5, 20.0, 70.0, 90.0]]),  # over the border
    torch.zeros(0, 4),
]


def brute_force(boxes: Tensor, canvas: Size, size: Size) -> tuple[Tensor, Tensor]:
    """Both masks by a loop over cells: a box touches a cell if they share an area."""
    down, across = canvas[0] / size[0], canvas[1] / size[1]
    touched = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for (box, (x0, y0, x1, y1)), y, x in itertools.product(enumerate(boxes.tolist()), range(size[0]), range(size[1])):
        wide = min(x1, (x + 1) * across) - max(x0, x * across)
        high = min(y1, (y + 1) * down) - max(y0, y * down)
        touched[box, y, x] = wide > 0 and high > 0
    foreground, background = torch.zeros(size), torch.zeros(size)
    free = sum(not touched[:, y, x].any() for y in range(size[0]) for x in range(size[1]))
    for y, x in itertools.product(range(size[0]), range(size[1])):
        shares = [1 / int(touched[box].sum()) for box in range(len(boxes)) if touched[box, y, x]]
        foreground[y, x] = max(shares, default=0.0)
        background[y, x] = 0.0 if shares else 1 / free
    return foreground, background


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 1)], ids=str)
def test_masks_equal_a_loop_over_cells(size: Size) -> None:
    """Also where the map's cells are no whole number of pixels: boxes are scaled by the canvas that the map covers."""
    generator = torch.Generator().manual_seed(0)
    boxes = [*AWKWARD, *(random_boxes(count, (32, 48), generator) for count in (1, 3, 8))]
    found = foreground_masks(boxes, (32, 48), size), background_masks(boxes, (32, 48), size)
    for image, own in enumerate(boxes):
        for masks, expected in zip(found, brute_force(own, (32, 48), size), strict=True):
            torch.testing.assert_close(masks[image], expected)


def test_a_box_without_area_still_has_the_cell_it_lies_in() -> None:
    boxes = [torch.tensor([[8.0, 8.0, 8.0, 8.0]]), torch.tensor([[48.0, 32.0, 48.0, 32.0]])]
    found = foreground_masks(boxes, (32, 48), (4, 6))
    assert [mask.nonzero().tolist() for mask in found] == [[[1, 1]], [[3, 5]]]
    assert found.sum() == 2


def test_foreground_sums_to_the_number_of_disjoint_boxes_and_background_to_one() -> None:
    boxes = [torch.tensor([[0.0, 0.0, 15.0, 31.0], [16.0, 0.0, 30.0, 9.0], [40.0, 24.0, 48.0, 32.0]])]
    assert foreground_masks(boxes, (32, 48), (4, 6)).sum() == pytest.approx(3)
    assert background_masks(boxes, (32, 48), (4, 6)).sum() == pytest.approx(1)
    everywhere = [torch.tensor([[0.0, 0.0, 48.0, 32.0]])]
    assert background_masks(everywhere, (32, 48), (4, 6)).eq(0).all()


def test_squares_of_masked_maps_average_to_the_mean_within_boxes_and_within_the_background() -> None:
    student, teacher = answer(RCNN, 1), answer(RCNN, 2)
    boxes = [
        torch.tensor([[0.0, 0.0, 31.0, 15.0], [64.0, 32.0, 96.0, 64.0]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0.0, 96.0, 64.0]]),
        torch.tensor([[32.0, 0.0, 64.0, 64.0]]),
    ]
    for side in (student, teacher):
        side.features, side.boxes = {8: side.features[8]}, boxes
    gap = (student.features[8] - teacher.features[8]).square()
    objects = [gap[0, :, :2, :4].mean() + gap[0, :, 4:, 8:].mean(), gap.new_zeros(()), gap[2].mean()]
    expected = torch.stack([*objects, gap[3, :, :, 4:8].mean()]).mean()
    torch.testing.assert_close(loss_of("fg", student, teacher, "l2"), expected)
    empty = [torch.ones(8, 12, dtype=torch.bool) for _ in boxes]
    empty[0][:2, :4] = empty[0][4:, 8:] = empty[2][:] = empty[3][:, 4:8] = False
    rest = [gap[image][:, free].mean() if free.any() else gap.new_zeros(()) for image, free in enumerate(empty)]
    torch.testing.assert_close(loss_of("bg", student, teacher, "l2"), torch.stack(rest).mean())


# Instances. ---


def test_instances_are_roi_aligned_from_the_level_that_suits_the_students_size() -> None:
    """Levels as torchvision's pyramids choose them, within those that both have up to stride 32."""
    spec = replace(RETINANET, min_size=1024, max_size=1536)
    boxes = [
        torch.tensor([[10.0, 20.0, 60.0, 80.0], [0.0, 0.0, 1500.0, 1000.0], [100.0, 100.0, 400.0, 430.0]]),
        torch.zeros(0, 4),
        torch.tensor([[5.0, 5.0, 230.0, 230.0], [400.0, 300.0, 410.0, 312.0]]),
    ]
    student, teacher = (answer(spec, seed, counts=(3, 0, 2), canvas=(1024, 1536)) for seed in (1, 2))
    student.boxes = teacher.boxes = boxes
    ((ours, theirs),) = INPUTS["instance"].pairs(student, teacher)
    strides = [8, 16, 32]
    chosen = LevelMapper(3, 5)(boxes)
    assert set(chosen.tolist()) == {0, 1, 2}
    order = [index for level in range(3) for index in (chosen == level).nonzero()[:, 0].tolist()]
    images, rows = [0, 0, 0, 2, 2], torch.cat(boxes)
    for found, side in ((ours, student), (theirs, teacher)):
        expected = []
        for index in order:
            stride = strides[int(chosen[index])]
            roi = [torch.zeros(0, 4)] * 3
            roi[images[index]] = rows[index : index + 1]
            expected.append(roi_align(side.features[stride], roi, 4, 1 / stride, 2, aligned=True))
        torch.testing.assert_close(found.data, torch.cat(expected))
    # Two thirds of the images have objects: three in the first, two in the last.
    torch.testing.assert_close(ours.weights, torch.tensor([1 / 9 if images[index] == 0 else 1 / 6 for index in order]))
    assert ours.weights is theirs.weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_instance_of_a_ramp_is_the_ramp_at_the_bins_centres(dtype: torch.dtype) -> None:
    """The maps' precision is not the boxes': at 500 pixels half precision would misplace a box by up to two."""
    box = torch.tensor([[433.3, 100.7, 508.1, 163.9]])
    output = answer(RCNN, 1, counts=(1,), proposed=(0,), canvas=(512, 768))
    output.boxes = [box]
    for stride, level in output.features.items():
        ramp = (torch.arange(level.shape[3]) + 0.5) * stride / 128
        output.features[stride] = ramp.expand_as(level).to(dtype)
    ((found, _),) = INPUTS["instance"].pairs(output, output)
    centres = 433.3 + (508.1 - 433.3) * (torch.arange(4) + 0.5) / 4
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.data, (centres / 128).expand(1, 16, 4, 4), rtol=tolerance, atol=0)


def test_each_side_pools_an_instance_from_its_own_pixels() -> None:
    student = answer(RCNN, 1, canvas=(64, 96))
    teacher = answer(RCNN.at_size(128), 2, canvas=(128, 192))
    teacher.boxes = [2 * boxes for boxes in student.boxes]
    student.features = {stride: ramp_of(level, stride) for stride, level in student.features.items()}
    teacher.features = {stride: ramp_of(level, stride / 2) for stride, level in teacher.features.items()}
    ((ours, theirs),) = INPUTS["instance"].pairs(student, teacher)
    inside = ours.data[..., 1:3, 1:3], theirs.data[..., 1:3, 1:3]  # beyond the outermost cells a map goes on level
    torch.testing.assert_close(*inside, rtol=0.05, atol=0.05)


def ramp_of(level: Tensor, stride: float) -> Tensor:
    """A map of the size of another: each cell's centre in the student's pixels, across plus twice down, in tens."""
    down, across = ((torch.arange(size) + 0.5) * stride / 10 for size in level.shape[2:])
    return (2 * down.unsqueeze(1) + across).expand_as(level)


# Logits. ---


def test_logits_of_the_same_anchors_and_classes_are_compared_one_by_one() -> None:
    for spec in (RCNN, RETINANET, FCOS):
        student, teacher = answer(spec, 1), answer(spec, 2)
        assert student.logits is not None and teacher.logits is not None
        pairs = INPUTS["logits.dense"].pairs(student, teacher)
        assert len(pairs) == len(spec.levels)
        for stride, pair in zip(spec.levels, pairs, strict=True):
            for value, side in zip(pair, (student.logits, teacher.logits), strict=True):
                images, anchors, classes, height, width = side[stride].shape
                assert torch.equal(value.data, side[stride].reshape(images, anchors * classes, height, width))


def test_of_other_anchors_the_strongest_is_compared_class_by_class() -> None:
    student, teacher = answer(FCOS, 1), answer(RETINANET, 2)
    assert student.logits is not None and teacher.logits is not None
    for stride, (ours, theirs) in zip(FCOS.levels, INPUTS["logits.dense"].pairs(student, teacher), strict=True):
        assert torch.equal(ours.data, student.logits[stride][:, 0])
        strongest = teacher.logits[stride][:, 0]
        for anchor in range(1, RETINANET.anchors_per_location):
            strongest = torch.maximum(strongest, teacher.logits[stride][:, anchor])
        assert theirs.data.shape == (4, 4, *teacher.logits[stride].shape[3:])
        assert torch.equal(theirs.data, strongest)


def test_objectness_is_compared_with_the_strongest_class_of_the_strongest_anchor() -> None:
    student, teacher = answer(RCNN, 1), answer(RETINANET, 2)
    assert student.logits is not None and teacher.logits is not None
    pairs = INPUTS["logits.dense"].pairs(student, teacher)
    assert len(pairs) == len(LEVELS)  # the student has no level of stride 128
    for stride, (ours, theirs) in zip(LEVELS, pairs, strict=True):
        assert torch.equal(ours.data[:, 0], student.logits[stride].max(1).values[:, 0])
        assert torch.equal(theirs.data[:, 0], teacher.logits[stride].flatten(1, 2).max(1).values)


def test_class_logits_of_regions_weigh_images_alike() -> None:
    student, teacher = answer(RCNN, 1), answer(RCNN, 2)
    assert student.regions is not None and teacher.regions is not None
    gaps = torch.split((student.regions.class_logits - teacher.regions.class_logits).abs(), list(PROPOSED))
    expected = torch.stack([gap.mean() if len(gap) else gap.new_zeros(()) for gap in gaps]).mean()
    torch.testing.assert_close(loss_of("logits.roi", student, teacher), expected)


# Boxes. ---


def tiny_batch(sizes: Sequence[Size] = ((64, 96), (64, 96), (64, 96))) -> Batch:
    """Noise of some sizes, with two objects each."""
    generator = torch.Generator().manual_seed(3)
    pictures = [torch.rand(3, *size, generator=generator) for size in sizes]
    labels = torch.ones(2, dtype=torch.long)
    targets = [{"boxes": random_boxes(2, size, generator), "labels": labels} for size in sizes]
    return Batch(None, pictures, targets)  # type: ignore[arg-type]  # no key: nothing is kept


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_the_detectors_own_in_strides_from_the_location(family: str) -> None:
    torch.manual_seed(0)
    detector = build(spec_of(family))
    detector.model.eval()
    batch = tiny_batch()
    with torch.no_grad():
        inputs = detector.preprocess(batch.images)
        features = detector.features(inputs)
        dense = detector.dense(inputs, features)
        output = output_of(detector, batch, inputs, features, dense)
        own = detector.boxes(dense)
    assert output.corners is not None and output.logits is not None
    anchors, start = torch.stack(dense.anchors), 0
    for stride, corners in output.corners.items():
        images, count, _, height, width = corners.shape
        assert output.logits[stride].shape[:2] == (images, count)
        for y, x, anchor in itertools.product(range(height), range(width), range(count)):
            row = start + (y * width + x) * count + anchor  # torchvision's order
            centre = (anchors[:, row, :2] + anchors[:, row, 2:]) / 2
            boxes = corners[:, anchor, :, y, x] * stride + torch.cat([centre, centre], dim=1)
            torch.testing.assert_close(boxes, own[:, row], rtol=1e-4, atol=1e-3)
            flat = dense.logits[stride].view(images, count, -1, height, width)
            assert torch.equal(output.logits[stride][:, anchor, :, y, x], flat[:, anchor, :, y, x])
        start += height * width * count
    assert start == own.shape[1]


def test_dense_boxes_weigh_as_the_teachers_chance_of_an_object() -> None:
    student, teacher = answer(RETINANET, 1), answer(RETINANET, 2)
    assert student.corners is not None and teacher.corners is not None and teacher.logits is not None
    ((ours, theirs),) = INPUTS["localization.dense"].pairs(student, teacher)
    torch.testing.assert_close(ours.weights.view(4, -1).sum(1), torch.full((4,), 1 / 4))
    total = torch.zeros(4)
    weighted = torch.zeros(4)
    for stride in RETINANET.levels:
        gap = (student.corners[stride] - teacher.corners[stride]).abs().mean(2)
        chance = teacher.logits[stride].max(2).values.sigmoid()
        weighted = weighted + (gap * chance).sum((1, 2, 3))
        total = total + chance.sum((1, 2, 3))
    torch.testing.assert_close(loss_of("localization.dense", student, teacher, "l1"), (weighted / total).mean())
    assert not ours.weights.requires_grad and theirs.data.shape == ours.data.shape


def test_of_other_anchors_the_strongest_stands_for_its_location() -> None:
    student, teacher = answer(FCOS, 1, counts=(1,)), answer(RETINANET, 2, counts=(1,))
    assert student.corners is not None and teacher.corners is not None and teacher.logits is not None
    ((ours, theirs),) = INPUTS["localization.dense"].pairs(student, teacher)
    rows, expected = [], []
    for stride in FCOS.levels:
        height, width = student.corners[stride].shape[3:]
        for y, x in itertools.product(range(height), range(width)):
            best = int(teacher.logits[stride][0, :, :, y, x].max(1).values.argmax())
            rows.append((student.corners[stride][0, 0, :, y, x], teacher.corners[stride][0, best, :, y, x]))
            expected.append(teacher.logits[stride][0, :, :, y, x].max().sigmoid())
    torch.testing.assert_close(ours.data, torch.stack([row for row, _ in rows]))
    torch.testing.assert_close(theirs.data, torch.stack([row for _, row in rows]))
    chances = torch.stack(expected)
    torch.testing.assert_close(ours.weights, chances / chances.sum())


def test_region_boxes_are_of_the_class_that_the_teacher_finds_likeliest() -> None:
    student, teacher = answer(RCNN, 1), answer(RCNN, 2)
    assert student.regions is not None and teacher.regions is not None
    ((ours, theirs),) = INPUTS["localization.roi"].pairs(student, teacher)
    row = 0
    for count in PROPOSED:
        chances = teacher.regions.class_logits[row : row + count].detach().softmax(1)
        objects = 1 - chances[:, 0]
        for index in range(count):
            label = max(range(1, 4), key=lambda k: float(chances[index, k]))
            assert torch.equal(ours.data[row + index], student.regions.corners[row + index, label])
            assert torch.equal(theirs.data[row + index], teacher.regions.corners[row + index, label])
            torch.testing.assert_close(ours.weights[row + index], objects[index] / objects.sum() / len(PROPOSED))
        row += count
    assert row == len(ours.data)


# Levels and sizes. ---


def test_levels_are_matched_by_stride_whatever_else_a_pyramid_has() -> None:
    student, teacher = answer(RCNN, 1), answer(RCNN, 2)
    student.features = {stride: student.features[stride] for stride in (64, 8, 32)}
    teacher.features = {4: torch.zeros(4, 16, 16, 24), **{s: teacher.features[s] for s in (8, 16, 64)}}
    pairs = INPUTS["global"].pairs(student, teacher)
    assert len(pairs) == 2
    for stride, (ours, theirs) in zip((8, 64), pairs, strict=True):
        assert torch.equal(ours.data, student.features[stride]) and torch.equal(theirs.data, teacher.features[stride])


def test_a_differently_rounded_level_is_resampled_to_the_students_grid() -> None:
    student, teacher = answer(RCNN, 1), answer(RCNN, 2)
    fine = torch.randn(4, 16, 4, 6)
    student.features, teacher.features = {32: student.features[32]}, {32: fine}
    ((ours, theirs),) = INPUTS["global"].pairs(student, teacher)
    assert ours.data.shape == theirs.data.shape == (4, 16, 2, 3)
    # Bilinear at half the size reads midway between four cells.
    torch.testing.assert_close(theirs.data, fine.view(4, 16, 2, 2, 3, 2).mean((3, 5)))


CANVASES = [  # student's and teacher's canvas, and the sizes of two images on each
    ((64, 96), (64, 96), [(64, 96), (48, 80)], [(64, 96), (48, 80)]),
    ((64, 96), (128, 192), [(64, 96), (48, 80)], [(128, 192), (96, 160)]),
    ((96, 96), (64, 96), [(90, 61), (64, 96)], [(64, 43), (60, 90)]),
    ((128, 160), (96, 128), [(128, 100), (75, 150)], [(96, 75), (56, 112)]),
]  # fmt: skip


def sloped(spec: DetectorSpec, canvas: Size, sizes: Sequence[Size]) -> DetectorOutput:
    """Outputs that are a linear function of the position in the image, whatever is padded around it."""
    output = answer(spec, 0, counts=(0,) * len(sizes), proposed=(0,) * len(sizes), canvas=canvas)
    output.sizes = list(sizes)
    for levels in (output.features, output.logits):
        assert levels is not None
        for stride, level in levels.items():
            rows, columns = level.shape[-2:]
            for image, (height, width) in enumerate(sizes):
                down = (torch.arange(rows) + 0.5) * canvas[0] / rows / height
                across = (torch.arange(columns) + 0.5) * canvas[1] / columns / width
                plane = 3 * down.unsqueeze(1) - 2 * across + 1
                levels[stride] = levels[stride].detach().clone()
                levels[stride][image] = plane
    return output


@pytest.mark.parametrize("name", ["global", "logits.dense"])
@pytest.mark.parametrize(("canvas", "other", "sizes", "others"), CANVASES)
def test_image_falls_on_image_whatever_canvas_and_padding(
    name: str, canvas: Size, other: Size, sizes: list[Size], others: list[Size]
) -> None:
    """Trap 5: a map covers the padded canvas, not the image."""
    student, teacher = sloped(FCOS, canvas, sizes), sloped(FCOS, other, others)
    pairs = INPUTS[name].pairs(student, teacher)
    compared = 0
    for stride, (ours, theirs) in zip(FCOS.levels, pairs, strict=True):
        assert ours.data.shape == theirs.data.shape
        rows, columns = -(-other[0] // stride), -(-other[1] // stride)
        for image, (height, width) in enumerate(sizes):
            # Beyond the outermost cells' centres the teacher's map goes on level, so only what lies within agrees.
            y = (torch.arange(ours.data.shape[2]) + 0.5) * canvas[0] / ours.data.shape[2] / height
            x = (torch.arange(ours.data.shape[3]) + 0.5) * canvas[1] / ours.data.shape[3] / width
            y, x = y * others[image][0] / other[0] * rows, x * others[image][1] / other[1] * columns
            within = ((y >= 0.5) & (y <= rows - 0.5)).unsqueeze(1) & ((x >= 0.5) & (x <= columns - 0.5))
            one, two = ours.data[image][:, within], theirs.data[image][:, within]
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
            compared += one.numel()
    assert compared > 500


def test_stretching_a_map_onto_the_other_would_misplace_padded_images() -> None:
    """The same outputs under a plain interpolation, which takes the canvas for the image."""
    canvas, other, sizes, others = CANVASES[2]
    student, teacher = sloped(FCOS, canvas, sizes), sloped(FCOS, other, others)
    stretched = F.interpolate(teacher.features[8], student.features[8].shape[2:], mode="bilinear")
    assert (stretched - student.features[8])[0, 0, 2:6, 2:8].abs().max() > 0.5


@pytest.mark.parametrize("name", ["fg", "bg"])
def test_masks_lie_where_the_students_boxes_are_on_both_sides(name: str) -> None:
    canvas, other, sizes, others = CANVASES[3]
    student, teacher = sloped(FCOS, canvas, sizes), sloped(FCOS, other, others)
    student.boxes = [torch.tensor([[16.0, 24.0, 60.0, 99.0]]), torch.tensor([[0.0, 0.0, 15.0, 15.0]])]
    masks = (foreground_masks if name == "fg" else background_masks)(student.boxes, canvas, (16, 20))
    plain, masked = (INPUTS[key].pairs(student, teacher)[0] for key in ("global", name))
    for whole, shown in zip(plain, masked, strict=True):
        torch.testing.assert_close(shown.data, whole.data * (masks * 16 * 20).sqrt().unsqueeze(1))


def test_outputs_carry_boxes_proposals_and_sizes_to_each_detectors_pixels() -> None:
    """The batch is 64×96; the detector sees it at half the size on a padded canvas."""
    torch.manual_seed(0)
    detector = build(RCNN.at_size(32))
    detector.model.eval()
    batch = tiny_batch([(64, 96), (64, 96)])
    proposals = [torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.zeros(0, 4)]
    asked: list[Tensor] = []
    regions = detector.regions  # type: ignore[attr-defined]

    def spied(inputs: Inputs, features: dict[int, Tensor], boxes: list[Tensor]) -> object:
        asked.extend(boxes)
        return regions(inputs, features, boxes)

    detector.regions = spied  # type: ignore[attr-defined]
    with torch.no_grad():
        inputs = detector.preprocess(batch.images)
        output = output_of(detector, batch, inputs, detector.features(inputs), None, proposals)
    assert (output.canvas, output.sizes) == ((32, 64), [(32, 48), (32, 48)])
    for found, target in zip(output.boxes, batch.targets, strict=True):
        torch.testing.assert_close(found, target["boxes"] / 2)
    assert torch.equal(asked[0], proposals[0] / 2)
    assert output.regions is not None and torch.equal(output.regions.proposals[0], proposals[0])
    assert output.logits is None and output.corners is None
    assert isinstance(inputs.images, ImageList)


def test_boxes_follow_their_image_to_another_size() -> None:
    boxes = [torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.zeros(0, 4)]
    moved = resized_boxes(boxes, [(100, 50), (64, 96)], [(200, 25), (64, 96)])
    assert torch.equal(moved[0], torch.tensor([[5.0, 40.0, 15.0, 120.0]]))
    assert moved[1].shape == (0, 4)


# Which pairs can be compared. ---

FEATURES = ("global", "fg", "bg", "instance")
COMPARABLE = {
    "same": {
        ("faster_rcnn", "faster_rcnn"): tuple(INPUTS),
        **{
            pair: (*FEATURES, "logits.dense", "localization.dense")
            for pair in itertools.product(FAMILIES, FAMILIES)
            if pair != ("faster_rcnn", "faster_rcnn")
        },
    },
    "labels": {  # objectness means the same whatever the labels
        pair: (*FEATURES, *(["logits.dense"] if "faster_rcnn" in pair else []), "localization.dense")
        for pair in itertools.product(FAMILIES, FAMILIES)
    },
    "size": {
        pair: (*FEATURES, "logits.dense", *(["logits.roi", "localization.roi"] if set(pair) == {"faster_rcnn"} else []))
        for pair in itertools.product(FAMILIES, FAMILIES)
    },
}


@pytest.mark.parametrize("other", list(COMPARABLE))
@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(FAMILIES, FAMILIES)))
def test_what_every_pair_of_families_can_be_compared_on(student: str, teacher: str, other: str) -> None:
    ours, theirs = spec_of(student), spec_of(teacher)
    theirs = {"same": theirs, "labels": theirs.with_labels([(1, "cell")]), "size": theirs.at_size(96)}[other]
    expected = COMPARABLE[other][student, teacher]
    assert set(comparable_inputs(ours, theirs)) == set(expected)
    for name in INPUTS:
        assert (why_incomparable(name, ours, theirs) is None) == (name in expected)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "reason"),
    [
        ("logits.roi", RETINANET, RCNN, "the student, a retinanet, has no second stage"),
        ("localization.roi", RCNN, FCOS, "the teacher, a fcos, has no second stage"),
        ("logits.roi", RCNN, RCNN.with_labels([(1, "cell")]), "different labels"),
        ("localization.roi", RCNN, RCNN.with_labels(RCNN.labels[::-1]), "different labels"),
        ("logits.dense", FCOS, RETINANET.with_labels([(1, "cell")]), "different labels"),
        ("localization.dense", FCOS, RETINANET.at_size(128), r"other sizes \(\(64, 96\) and \(128, 192\) pixels\)"),
    ],
)  # fmt: skip
def test_reasons_say_what_is_missing(name: str, student: DetectorSpec, teacher: DetectorSpec, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why_incomparable(name, student, teacher))


@pytest.mark.parametrize("name", list(INPUTS))
def test_pyramids_without_a_common_stride_are_refused(name: str) -> None:
    """No spec of today's families has such levels: all end at 32 and 64."""
    coarse = copy.copy(FCOS)
    object.__setattr__(coarse, "levels", (128, 256))
    reason = why_incomparable(name, RCNN, coarse)
    assert "share no stride" in str(reason) or INPUTS[name].part == "regions"
    assert reason is not None


@pytest.mark.parametrize("name", [name for name, spec in INPUTS.items() if spec.part != "features"])
def test_responses_that_were_not_computed_are_asked_for(name: str) -> None:
    output = replace(answer(RCNN, 1), logits=None, corners=None, regions=None)
    with pytest.raises(ValueError, match={"dense": "dense step", "regions": "second stage"}[INPUTS[name].part]):
        INPUTS[name].pairs(output, output)


def test_every_input_names_the_part_that_must_be_run() -> None:
    for name, spec in INPUTS.items():
        assert parts_of([name]) == {spec.part} <= set(PARTS)
    assert parts_of(tuple(INPUTS)) == set(PARTS) and parts_of(()) == set()


# What holds for every input, on every pair of families that has it. ---

TRIPLES = [
    (name, student, teacher)
    for student, teacher in itertools.product(FAMILIES, FAMILIES)
    for name in comparable_inputs(spec_of(student), spec_of(teacher))
]
EVERYWHERE = pytest.mark.parametrize(("name", "student", "teacher"), TRIPLES)
TAKEN_FROM = {"features": ("features",), "dense": ("logits", "corners"), "regions": ("class_logits", "region_corners")}


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_finite_equal_in_shape_and_weighted_alike(
    name: str, student: str, teacher: str, dtype: torch.dtype
) -> None:
    ours, theirs = answer(spec_of(student), 1, dtype=dtype), answer(spec_of(teacher), 2, dtype=dtype)
    for one, two in INPUTS[name].pairs(ours, theirs):
        assert one.data.shape == two.data.shape and one.kind == two.kind == INPUTS[name].kind
        assert one.axis is None and two.axis is None
        assert one.data.isfinite().all() and two.data.isfinite().all() and one.weights.isfinite().all()
        assert torch.equal(one.weights, two.weights) and len(one.weights) == len(one.data)
        assert 0 < one.weights.sum() < 1 + 1e-5 and one.weights.min() >= 0
    full = loss_of(name, answer(spec_of(student), 1), answer(spec_of(teacher), 2)).item()
    loss = loss_of(name, ours, theirs)
    assert loss.item() == pytest.approx(full, rel=0.02)
    loss.backward()  # type: ignore[no-untyped-call]
    reached = [key for key, tensor in leaves(ours).items() if tensor.grad is not None and tensor.grad.any()]
    assert reached and all(key.startswith(TAKEN_FROM[INPUTS[name].part]) for key in reached)
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in leaves(ours).values())
    assert all(tensor.grad is None for tensor in leaves(theirs).values())


@EVERYWHERE
def test_a_student_equal_to_its_teacher_has_no_loss(name: str, student: str, teacher: str) -> None:
    own = answer(spec_of(teacher), 2)
    if name in comparable_inputs(own.spec, own.spec):
        assert loss_of(name, own, answer(spec_of(teacher), 2)) == 0
    different = loss_of(name, answer(spec_of(student), 1), own)
    assert different > 0


@EVERYWHERE
def test_how_a_batch_is_split_over_workers_changes_nothing(name: str, student: str, teacher: str) -> None:
    """Trap 4 at the source: weights are of images, so the loss of a batch is the mean of its images' losses, also where
    one has no object and one no proposal."""
    ours, theirs = answer(spec_of(student), 1), answer(spec_of(teacher), 2)
    single = [loss_of(name, part(ours, slice(i, i + 1)), part(theirs, slice(i, i + 1))) for i in range(len(COUNTS))]
    torch.testing.assert_close(loss_of(name, ours, theirs), torch.stack(single).mean())
    halves = [loss_of(name, part(ours, rows), part(theirs, rows)) for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(loss_of(name, ours, theirs), torch.stack(halves).mean())


@EVERYWHERE
def test_without_objects_and_proposals_there_is_nothing_or_a_finite_loss(name: str, student: str, teacher: str) -> None:
    nothing = (0, 0)
    ours, theirs = (answer(spec_of(family), i, nothing, nothing) for i, family in enumerate((student, teacher)))
    loss = loss_of(name, ours, theirs)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in leaves(ours).values())
    if name in ("fg", "instance", "logits.roi", "localization.roi"):
        assert loss == 0


@EVERYWHERE
def test_levels_come_finest_first_and_equal_outputs_give_equal_values(name: str, student: str, teacher: str) -> None:
    first, again = (INPUTS[name].pairs(answer(spec_of(student), 1), answer(spec_of(teacher), 2)) for _ in "ab")
    sizes = [one.data[0].numel() for one, _ in first]
    assert sizes == sorted(sizes, reverse=True)
    for (one, two), (other, another) in zip(first, again, strict=True):
        assert torch.equal(one.data, other.data) and torch.equal(two.data, another.data)


@pytest.mark.parametrize("pixels", [64, 80])
@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(FAMILIES, FAMILIES)))
def test_real_detectors_are_compared_on_all_that_their_specs_allow(student: str, teacher: str, pixels: int) -> None:
    """Answers of untrained detectors on images of several sizes, whose canvases no stride above 32 divides."""
    torch.manual_seed(0)
    ours, theirs = build(spec_of(student)), build(spec_of(teacher).at_size(pixels))
    batch = tiny_batch([(64, 96), (70, 64), (50, 90)])
    taught = Teacher(theirs, comparable_inputs(ours.spec, theirs.spec))(batch)
    inputs = ours.preprocess(batch.images)
    features = ours.features(inputs)
    proposals = None if taught.regions is None else taught.regions.proposals
    output = output_of(ours, batch, inputs, features, ours.dense(inputs, features), proposals)
    for name in comparable_inputs(ours.spec, theirs.spec):
        loss = loss_of(name, output, taught)
        ours.model.zero_grad()
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in ours.model.parameters() if p.grad is not None]
        assert loss > 0 and gradients and all(gradient.isfinite().all() for gradient in gradients), name


def regions_of(output: DetectorOutput) -> RegionOutput:
    assert output.regions is not None
    return output.regions


def test_parts_of_made_up_outputs_are_consistent() -> None:
    whole = answer(RCNN, 1)
    pieces = [part(whole, slice(i, i + 1)) for i in range(4)]
    assert torch.equal(torch.cat([regions_of(p).class_logits for p in pieces]), regions_of(whole).class_logits)
    assert [len(regions_of(p).proposals[0]) for p in pieces] == list(PROPOSED)
    assert whole.canvas == CANVAS and isinstance(INPUTS["global"].pairs(whole, whole)[0][0], Value)
