"""Knowledge inputs: what is taken from a student's and a teacher's outputs to be compared (DetKDS, knowledge inputs).

A new input is one entry in ``formula.INPUTS`` and one branch of ``values_of`` and ``why_incomparable``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from autodet.detectors import DetectorOutput, DetectorSpec
from autodet.distill.formula import INPUTS
from autodet.distill.values import Value, map_value, vector_value


def why_incomparable(name: str, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """The reason why a pair cannot be compared on an input, None where it can."""
    if not set(student.levels) & set(teacher.levels):
        return f"the pyramids share no stride ({student.levels} and {teacher.levels})"
    if name == "logits.rpn" and len(student.anchor_ratios) != len(teacher.anchor_ratios):
        counts = f"{len(student.anchor_ratios)} and {len(teacher.anchor_ratios)}"
        return f"student and teacher have {counts} anchors in a cell, so their objectness maps do not correspond"
    if name == "logits.roi" and student.labels != teacher.labels:
        return "student and teacher have different labels"
    return None


def comparable_inputs(student: DetectorSpec, teacher: DetectorSpec) -> tuple[str, ...]:
    """The knowledge inputs that this pair can be compared on."""
    return tuple(name for name in INPUTS if why_incomparable(name, student, teacher) is None)


def values_of(name: str, output: DetectorOutput) -> dict[int, Value]:
    """An input's values by nominal stride; ``logits.roi`` has one value, under stride 0.

    Rows are weighted so that a weighted sum over rows is the mean over images, however many regions an image has.
    """
    if name == "global":
        return {stride: map_value(level.float()) for stride, level in output.features.items()}
    if name == "logits.rpn":
        if output.objectness is None:
            raise ValueError("logits.rpn needs the objectness of both detectors; run their dense step.")
        return {stride: map_value(level.float()) for stride, level in output.objectness.items()}
    if name == "logits.roi":
        if output.regions is None:
            raise ValueError("logits.roi needs class responses of both detectors on the same proposals.")
        counts = [len(boxes) for boxes in output.regions.proposals]
        return {0: vector_value(output.regions.class_logits.float(), counts)}
    raise ValueError(f"Unknown knowledge input {name!r}; expected one of {', '.join(INPUTS)}.")


def match_levels(student: dict[int, Value], teacher: dict[int, Value]) -> list[tuple[Value, Value]]:
    """Pairs of values of the same nominal stride, finest first.

    Where the two detectors see the image at different sizes, the teacher's map is resampled to the student's grid.
    """
    pairs = []
    for stride in sorted(set(student) & set(teacher)):
        ours, theirs = student[stride], teacher[stride]
        if ours.kind.spatial and ours.data.shape[-2:] != theirs.data.shape[-2:]:
            size = (int(ours.data.shape[-2]), int(ours.data.shape[-1]))
            resampled = F.interpolate(theirs.data, size=size, mode="bilinear", align_corners=False)
            theirs = Value(resampled, theirs.kind, theirs.axis, theirs.weights)
        pairs.append((ours, theirs))
    return pairs


def resized_boxes(
    boxes: Sequence[Tensor], before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Boxes R×4 xyxy per image, moved from images of the sizes ``before`` (height, width) to the sizes ``after``."""
    moved = []
    for found, (height, width), (new_height, new_width) in zip(boxes, before, after, strict=True):
        moved.append(found * found.new_tensor([new_width / width, new_height / height] * 2))
    return moved
