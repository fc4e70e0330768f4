"""What the ``logits`` and ``localization`` inputs compare, against independent computations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from detector_cases import stirred
from distill_outputs import (
    FCOS,
    GFL,
    MASK,
    MASK_RCNN,
    PROPOSED,
    RCNN,
    RETINANET,
    answer,
    loss_of,
    regions_of,
    sides,
    spec_of,
    tiny_batch,
)

from autodet.detectors import Masked, build
from autodet.detectors.spec import FAMILIES
from autodet.distill.formula import Formula
from autodet.distill.inputs import (
    INPUTS,
)
from autodet.distill.outputs import answer_to, output_of
from autodet.distill.teacher import Teacher
from autodet.distill.terms import term_loss

LEVELS = (8, 16, 32, 64)


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


# Masks. ---


def test_masks_are_compared_pixel_by_pixel_where_the_teacher_sees_objects() -> None:
    """The cross-entropy between two coins a pixel, less the teacher's entropy, by the definition."""
    student, teacher = answer(MASK_RCNN, 1), answer(MASK_RCNN, 2)
    ours, theirs = regions_of(student), regions_of(teacher)
    assert ours.masks is not None and theirs.masks is not None
    p, q = theirs.masks.detach().sigmoid().double(), ours.masks.detach().sigmoid().double()
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean((1, 2))
    objects = 1 - theirs.class_logits.detach().softmax(1)[:, 0]
    rows = zip(*(torch.split(side, list(PROPOSED)) for side in (divergence, objects.double())), strict=True)
    expected = sum(float((loss * chance).sum() / chance.sum()) for loss, chance in rows if len(loss)) / len(PROPOSED)
    term = Formula.parse("logits.mask: bernoulli | kl").terms[0]
    loss = term_loss(term, *sides(INPUTS["logits.mask"].pairs(student, teacher)))
    assert loss.item() == pytest.approx(expected)


def test_masks_are_of_the_class_that_the_teacher_finds_likeliest() -> None:
    torch.manual_seed(0)
    detectors = [stirred(MASK_RCNN) for _ in range(2)]
    batch = tiny_batch()
    taught = Teacher(detectors[1], ["logits.mask"])(batch)
    assert taught.regions is not None and taught.regions.masks is not None
    labels = [max(range(1, 4), key=lambda k: float(row[k])) for row in taught.regions.class_logits]
    assert len(set(labels)) > 1
    inputs = detectors[0].preprocess(batch.images)
    features = detectors[0].features(inputs)
    answered = answer_to(taught, detectors[0], batch, inputs, features, detectors[0].dense(inputs, features))
    for detector, found in zip(detectors, (answered, taught), strict=True):
        assert isinstance(detector, Masked)
        own = detector.preprocess(batch.images)
        every = detector.region_masks(own, detector.features(own), taught.regions.proposals)
        for row, label in enumerate(labels):
            masks = regions_of(found).masks
            assert masks is not None
            torch.testing.assert_close(masks[row], every[row, label])


def test_larger_masks_are_resampled_to_the_students_size() -> None:
    """A plane over the region stays one, but for the border, where nothing lies beyond."""
    student, teacher = answer(MASK_RCNN, 1), answer(replace(MASK_RCNN, mask_roi_size=MASK), 2)
    (theirs,) = (value for _, value in INPUTS["logits.mask"].pairs(student, teacher))
    assert theirs.data.shape == (sum(PROPOSED), 1, MASK, MASK)
    fine = (torch.arange(2 * MASK) + 0.5) / (2 * MASK)
    plane = (3 * fine[:, None] - 2 * fine).expand(sum(PROPOSED), -1, -1)
    teacher.regions = replace(regions_of(teacher), masks=plane)
    (theirs,) = (value for _, value in INPUTS["logits.mask"].pairs(student, teacher))
    coarse = (torch.arange(MASK) + 0.5) / MASK
    torch.testing.assert_close(theirs.data[0, 0], 3 * coarse[:, None] - 2 * coarse)


# Boxes. ---


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


def test_distributions_of_sides_are_compared_location_by_location() -> None:
    """The divergence of each side's distribution, a location's four averaged, weighted by the teacher's score."""
    student, teacher = answer(GFL, 1), answer(GFL, 2)
    assert student.sides is not None and teacher.sides is not None and teacher.logits is not None
    expected = []
    for image in range(len(student.boxes)):
        weighted, total = torch.zeros(()), torch.zeros(())
        for stride in GFL.levels:
            height, width = student.sides[stride].shape[3:]
            for y, x in itertools.product(range(height), range(width)):
                chance = teacher.logits[stride][image, 0, :, y, x].max().sigmoid()
                p, q = (side.sides[stride][image, :, :, y, x].softmax(1) for side in (teacher, student))  # type: ignore[index]
                weighted = weighted + chance * (p * (p / q).log()).sum(1).mean()
                total = total + chance
        expected.append(weighted / total)
    found = loss_of("localization.sides", student, teacher, "softmax(c) | kl")
    torch.testing.assert_close(found, torch.stack(expected).mean())
    ((ours, theirs),) = INPUTS["localization.sides"].pairs(student, teacher)
    assert ours.data.shape == theirs.data.shape == (4 * sum(x[0, 0, 0].numel() * 4 for x in student.sides.values()), 6)


def test_distributions_are_those_whose_means_are_the_boxes() -> None:
    torch.manual_seed(0)
    detector = build(GFL)
    detector.model.eval()
    batch = tiny_batch()
    with torch.no_grad():
        inputs = detector.preprocess(batch.images)
        features = detector.features(inputs)
        output = output_of(detector, batch, inputs, features, detector.dense(inputs, features))
    assert output.sides is not None and output.corners is not None
    for stride, places in output.sides.items():
        means = (places.softmax(2) * torch.arange(6.0).view(6, 1, 1)).sum(2)
        signs = torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(4, 1, 1)
        torch.testing.assert_close(output.corners[stride][:, 0], means * signs, rtol=1e-4, atol=1e-4)


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
