"""Inheriting copies what lies outside the body and fits, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distill_outputs import spec_of

from autodet.detectors import DetectorSpec, build
from autodet.detectors.spec import FAMILIES
from autodet.distill import inherit_neck_and_head
from autodet.distill.inherit import Inherited

LATERAL = "backbone.fpn.inner_blocks."


def test_all_that_fits_outside_the_body_is_copied(tiny_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
    student, teacher = build(tiny_spec), build(teacher_spec)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    report = inherit_neck_and_head(student, teacher)
    source = teacher.model.state_dict()
    # Stages 2 and 4 are wider in the teacher, so the laterals of strides 8 and 32 read other widths.
    differing = {f"{LATERAL}0.0.weight", f"{LATERAL}2.0.weight"}
    assert set(report.differing) == differing
    assert set(report.copied) == {name for name in before if not name.startswith("backbone.body.")} - differing
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, source[name] if name in report.copied else before[name]), name
    assert all(torch.equal(tensor, source[name]) for name, tensor in teacher.model.state_dict().items())


def test_the_copy_is_not_shared_with_the_teacher(tiny_spec: DetectorSpec) -> None:
    student, teacher = build(tiny_spec), build(tiny_spec)
    name = inherit_neck_and_head(student, teacher).copied[0]
    with torch.no_grad():
        student.model.state_dict()[name].add_(1)
    torch.testing.assert_close(student.model.state_dict()[name], teacher.model.state_dict()[name] + 1)


def test_neck_convolutions_are_matched_by_stride(tiny_spec: DetectorSpec) -> None:
    coarse = replace(tiny_spec, levels=(16, 32, 64), anchor_sizes=(8, 16, 32))
    student, teacher = build(coarse), build(tiny_spec)
    report = inherit_neck_and_head(student, teacher)
    ours, theirs = student.model.state_dict(), teacher.model.state_dict()
    for mine, its in (("0", "1"), ("1", "2")):
        for block in ("inner", "layer"):
            name = f"backbone.fpn.{block}_blocks.%s.0.weight"
            assert torch.equal(ours[name % mine], theirs[name % its]), (mine, block)
    assert report.differing == ()

    finer, taught = build(tiny_spec), build(coarse)
    copied = inherit_neck_and_head(finer, taught).copied
    assert "backbone.fpn.layer_blocks.0.0.weight" not in copied and "backbone.fpn.layer_blocks.1.0.weight" in copied


def copied_between(student: DetectorSpec, teacher: DetectorSpec) -> tuple[set[str], set[str]]:
    """Names of the copied tensors, and of the others outside the body that the student has; both checked by value."""
    torch.manual_seed(1)
    ours, theirs = build(student), build(teacher)
    with torch.no_grad():  # biases start alike, so that a copy could not be told
        for tensor in theirs.model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    before = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    report = inherit_neck_and_head(ours, theirs)
    source = theirs.model.state_dict()
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, source[name] if name in report.copied else before[name]), name
    outside = {name for name in before if not name.startswith("backbone.body.")}
    assert set(report.copied) <= outside and not set(report.copied) & set(report.differing)
    return set(report.copied), outside - set(report.copied)


@pytest.mark.parametrize("family", FAMILIES)
def test_within_a_family_neck_and_head_are_copied_whole(family: str) -> None:
    copied, left = copied_between(spec_of(family), spec_of(family))
    assert left == set() and any("head" in name for name in copied)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(family, FAMILIES[(i + step) % len(FAMILIES)]) for i, family in enumerate(FAMILIES) for step in (1, 2, 3)],
)
def test_between_families_only_the_neck_is_copied(student: str, teacher: str) -> None:
    """With one anchor, RetinaNet's head has tensors of the names and shapes of FCOS's, which mean something else."""
    like_fcos = {"retinanet": replace(spec_of("retinanet"), anchor_ratios=(1.0,), anchor_octaves=1)}
    copied, left = copied_between(*(like_fcos.get(family, spec_of(family)) for family in (student, teacher)))
    assert copied and all(name.startswith("backbone.fpn.") for name in copied)
    neck = {name for name in left if name.startswith("backbone.fpn.")}
    assert all(name.startswith("backbone.fpn.extra_blocks.") for name in neck)  # whose pooled level has none
    assert bool(neck) == (spec_of(teacher).top == "pool" != spec_of(student).top)


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("faster_rcnn", "roi_heads.box_predictor."),  # the proposal network knows no labels
        ("retinanet", "head.classification_head.cls_logits."),
        ("fcos", "head.classification_head.cls_logits."),
        ("gfl", "head.classification_head.cls_logits."),
        ("reppoints", "head.classification_head.cls_logits."),
    ],
)
def test_between_other_labels_the_layers_that_name_them_are_left(family: str, own: str) -> None:
    spec = spec_of(family)
    assert len(spec.labels) == 3
    for labels in ([(7, "x"), (8, "y"), (9, "z")], spec.labels[::-1]):  # as many, so that every shape fits
        _, left = copied_between(spec, spec.with_labels(labels))
        assert left and all(name.startswith(own) for name in left), left
        assert left == {name for name in build(spec).model.state_dict() if name.startswith(own)}


@pytest.mark.parametrize(("family", "change", "own"), [
    ("faster_rcnn", {"anchor_ratios": (0.3, 1.0, 3.0)}, ("rpn.head.cls_logits.", "rpn.head.bbox_pred.")),
    ("retinanet", {"anchor_ratios": (0.3, 1.0, 3.0)},
     ("head.classification_head.cls_logits.", "head.regression_head.bbox_reg.")),
    ("fcos", {"top": "body"}, ("backbone.fpn.extra_blocks.p6.",)),
    ("fcos", {"neck_groups": 4, "top_relu": False}, ("backbone.fpn.",)),
])  # fmt: skip
def test_layers_of_equal_shape_and_other_meaning_are_left(
    family: str, change: dict[str, Any], own: tuple[str, ...]
) -> None:
    """Other anchors, a level made from another map whose width is the same by chance, and a neck with norms."""
    spec = spec_of(family)
    assert spec.body.stages[-1].width == spec.neck_width
    _, left = copied_between(spec, replace(spec, **change))
    assert left == {name for name in build(spec).model.state_dict() if name.startswith(own)}


def test_the_report_says_what_was_and_was_not_copied() -> None:
    assert str(Inherited(("a", "b"), ())) == "2 neck and head tensors from the teacher"
    text = str(Inherited(("a",), ("x", "y")))
    assert text == "1 neck and head tensors from the teacher; 2 of another shape kept their own (x, y)"
