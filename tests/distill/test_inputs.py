"""Which values are compared: levels by nominal stride, regions weighted per image; which pairs cannot be compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autodet.detectors import DetectorOutput, DetectorSpec, Regions
from autodet.distill.formula import Formula
from autodet.distill.inputs import comparable_inputs, match_levels, resized_boxes, values_of, why_incomparable
from autodet.distill.terms import term_loss
from autodet.distill.values import map_value


def maps(sizes: dict[int, tuple[int, int]]) -> DetectorOutput:
    return DetectorOutput({stride: torch.randn(2, 3, *size) for stride, size in sizes.items()})


def test_levels_are_matched_by_stride_whatever_else_a_pyramid_has() -> None:
    student = values_of("global", maps({32: (4, 6), 8: (16, 24), 64: (2, 3)}))
    teacher = values_of("global", maps({4: (32, 48), 8: (16, 24), 16: (8, 12), 64: (2, 3)}))
    pairs = match_levels(student, teacher)
    assert len(pairs) == 2
    for stride, (ours, theirs) in zip((8, 64), pairs, strict=True):
        assert ours.data is student[stride].data and theirs.data is teacher[stride].data


def test_a_differently_rounded_level_is_resampled_to_the_students_grid() -> None:
    fine = torch.arange(32.0).view(1, 2, 4, 4)
    (ours, theirs), (_, odd) = match_levels(
        {32: map_value(torch.zeros(1, 2, 2, 2)), 64: map_value(torch.zeros(1, 2, 2, 3))},
        {32: map_value(fine), 64: map_value(torch.full((1, 2, 1, 2), 7.0))},
    )
    assert ours.data.shape == theirs.data.shape
    # Bilinear at half the size reads midway between four cells.
    torch.testing.assert_close(theirs.data, fine.view(1, 2, 2, 2, 2, 2).mean((3, 5)))
    torch.testing.assert_close(odd.data, torch.full((1, 2, 2, 3), 7.0))


@pytest.mark.parametrize("counts", [[1, 4], [3, 3, 3], [5, 0, 2], [0, 1]])
def test_a_roi_loss_is_the_mean_over_images_however_many_regions_each_has(counts: list[int]) -> None:
    torch.manual_seed(0)
    boxes = [torch.zeros(count, 4) for count in counts]
    sides = [torch.randn(sum(counts), 6) for _ in range(2)]
    student, teacher = (
        values_of("logits.roi", DetectorOutput({}, None, Regions(boxes, logits, torch.zeros(0)))) for logits in sides
    )
    loss = term_loss(Formula.parse("logits.roi: l1").terms[0], [student[0]], [teacher[0]])
    gaps = torch.split((sides[0] - sides[1]).abs(), counts)
    expected = torch.stack([gap.mean() for gap in gaps if len(gap)]).mean()
    torch.testing.assert_close(loss, expected)


def test_images_without_any_region_give_a_loss_of_zero() -> None:
    output = DetectorOutput({}, None, Regions([torch.zeros(0, 4)] * 2, torch.zeros(0, 6), torch.zeros(0, 24)))
    value = values_of("logits.roi", output)[0]
    assert term_loss(Formula.parse("logits.roi: l2").terms[0], [value], [value]) == 0


def test_maps_in_half_precision_weigh_images_exactly_alike() -> None:
    level = values_of("global", DetectorOutput({8: torch.zeros(3, 2, 4, 4, dtype=torch.bfloat16)}))[8]
    assert level.data.dtype == torch.float32
    torch.testing.assert_close(level.weights, torch.full((3,), 1 / 3))


@pytest.mark.parametrize(("name", "reason"), [("logits.rpn", "dense step"), ("logits.roi", "same proposals")])
def test_responses_that_were_not_computed_are_asked_for(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs .*{reason}"):
        values_of(name, DetectorOutput({}))


def test_an_unknown_input_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'logits'.*global, logits\.rpn, logits\.roi"):
        values_of("logits", DetectorOutput({}))


def test_pairs_are_comparable_where_levels_anchors_and_labels_correspond(tiny_spec: DetectorSpec) -> None:
    other_levels = replace(tiny_spec, levels=(16, 32, 64), anchor_sizes=(8, 16, 32))
    other_anchors = replace(tiny_spec, anchor_ratios=(0.5, 2.0))
    other_labels = tiny_spec.with_labels([(1, "cell")])
    assert comparable_inputs(tiny_spec, tiny_spec) == ("global", "logits.rpn", "logits.roi")
    assert comparable_inputs(other_levels, tiny_spec) == ("global", "logits.rpn", "logits.roi")
    assert comparable_inputs(tiny_spec, other_anchors) == ("global", "logits.roi")
    assert comparable_inputs(tiny_spec, other_labels) == ("global", "logits.rpn")
    assert "3 and 2 anchors" in str(why_incomparable("logits.rpn", tiny_spec, other_anchors))
    assert "labels" in str(why_incomparable("logits.roi", tiny_spec, other_labels))


def test_boxes_follow_their_image_to_another_size() -> None:
    boxes = [torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.zeros(0, 4)]
    moved = resized_boxes(boxes, [(100, 50), (64, 96)], [(200, 25), (64, 96)])
    assert torch.equal(moved[0], torch.tensor([[5.0, 40.0, 15.0, 120.0]]))
    assert moved[1].shape == (0, 4)
    assert torch.equal(resized_boxes(boxes, [(7, 3)] * 2, [(7, 3)] * 2)[0], boxes[0])
