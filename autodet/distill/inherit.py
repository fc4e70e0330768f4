"""Start a student's neck and head from its teacher's (inheriting; a gain of its own, so it is reported as one)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from autodet.detectors import Detector, DetectorSpec

BODY = "backbone.body."
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
    their level's stride. Lateral 1×1 convolutions read the body's widths and so usually differ."""
    source = teacher.model.state_dict()
    copied, differing = [], []
    with torch.no_grad():
        for name, tensor in student.model.state_dict().items():
            theirs = source.get(_name_in_teacher(name, student.spec, teacher.spec))
            if name.startswith(BODY) or theirs is None:
                continue
            if tensor.shape == theirs.shape:
                tensor.copy_(theirs)
                copied.append(name)
            else:
                differing.append(name)
    return Inherited(tuple(copied), tuple(differing))


def _name_in_teacher(name: str, student: DetectorSpec, teacher: DetectorSpec) -> str:
    """The teacher's name of a tensor; neck convolutions are numbered from the finest level, which may differ. Empty
    where the teacher has no such level."""
    found = NECK_LEVEL.fullmatch(name)
    if found is None:
        return name
    stride = student.body_levels[int(found[2])]
    return f"{found[1]}{teacher.body_levels.index(stride)}{found[3]}" if stride in teacher.body_levels else ""
