"""Inheriting copies what lies outside the body and fits, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch

from autodet.detectors import DetectorSpec, build
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


def test_the_report_says_what_was_and_was_not_copied() -> None:
    assert str(Inherited(("a", "b"), ())) == "2 neck and head tensors from the teacher"
    text = str(Inherited(("a",), ("x", "y")))
    assert text == "1 neck and head tensors from the teacher; 2 of another shape kept their own (x, y)"
