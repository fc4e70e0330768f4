"""What ``fg``, ``bg`` and ``instance`` compare, on which levels and pixels, against independent computations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distill_outputs import (
    FCOS,
    RCNN,
    RETINANET,
    answer,
    loss_of,
    random_boxes,
    tiny_batch,
)
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from autodet.detectors import DetectorSpec, Inputs, build
from autodet.distill.inputs import (
    INPUTS,
    background_masks,
    foreground_masks,
)
from autodet.distill.outputs import DetectorOutput, Size, output_of, resized_boxes

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
