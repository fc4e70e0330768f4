"""Start a student's neck and head from its teacher's (inheriting; a gain of its own, so it is reported as one)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from autodet.detectors import Detector, DetectorSpec
from autodet.detectors.build import FAMILY_OF
from autodet.distill.inputs import same_anchors

BODY = "backbone.body."
NECK = "backbone.fpn."
P6 = f"{NECK}extra_blocks.p6."  # reads the neck's or the body's last map, as ``top`` says
# One number, or four, for each anchor.
ANCHORS = re.compile(r"(?:rpn|head)\.(?:\w+_head|head)\.(?:cls_logits|bbox_pred|bbox_reg)\.")
NECK_LEVEL = re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.)(\d+)(\..+)")


@dataclass(frozen=True)
class Inherited:
    """Names of the copied tensors, and of those whose shapes differ and which kept their own initialisation."""

    copied: tuple[str, ...]
    differing: tuple[str, ...]

    def __str__(self) -> str:
        differ = f"; {len(self.differing)} of another shape kept their own ({', '.join(self.differing[:3])})"
        return f"{len(self.copied)} neck and head tensors from the teacher{differ if self.differing else ''}"


def inherit_neck_and_head(student: Detector, teacher: Detector) -> Inherited:
    """Copy every tensor outside the body that has the same name and shape; in place. Neck convolutions are matched by
    their level's stride. Lateral 1×1 convolutions read the body's widths and so usually differ.

    Not copied is what has another meaning in the two: between families all but the neck, between different labels the
    layers that name them, between different anchors those that answer for each, between other norms of it the neck.
    """
    source = teacher.model.state_dict()
    copied, differing = [], []
    with torch.no_grad():
        for name, tensor in student.model.state_dict().items():
            theirs = source.get(_name_in_teacher(name, student.spec, teacher.spec))
            if name.startswith(BODY) or theirs is None or _foreign(name, student.spec, teacher.spec):
                continue
            if tensor.shape == theirs.shape:
                tensor.copy_(theirs)
                copied.append(name)
            else:
                differing.append(name)
    return Inherited(tuple(copied), tuple(differing))


def _foreign(name: str, student: DetectorSpec, teacher: DetectorSpec) -> bool:
    """Whether a tensor means something else in the teacher, be it of the same name and shape."""
    if name.startswith(NECK):
        return student.neck_groups != teacher.neck_groups or (name.startswith(P6) and student.top != teacher.top)
    if student.family != teacher.family:
        return True
    if student.labels != teacher.labels and name.rpartition(".")[0] in FAMILY_OF[student.family].class_layers_of(
        student
    ):
        return True
    return ANCHORS.search(name) is not None and not same_anchors(student, teacher)


def _name_in_teacher(name: str, student: DetectorSpec, teacher: DetectorSpec) -> str:
    """The teacher's name of a tensor; neck convolutions are numbered from the finest level, which may differ. Empty
    where the teacher has no such level."""
    found = NECK_LEVEL.fullmatch(name)
    if found is None:
        return name
    stride = student.body_levels[int(found[2])]
    return f"{found[1]}{teacher.body_levels.index(stride)}{found[3]}" if stride in teacher.body_levels else ""
