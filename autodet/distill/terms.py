"""What a term means: its loss on a student's and a teacher's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autodet.distill.distances import DISTANCES
from autodet.distill.formula import Op, Term
from autodet.distill.transforms import TRANSFORMS
from autodet.distill.values import Operation, Value


def term_loss(
    term: Term, student: Sequence[Value], teacher: Sequence[Value], generator: torch.Generator | None = None
) -> Tensor:
    """The term's unweighted loss, a scalar ≥ 0 that is 0 where the student equals the teacher.

    student, teacher: values of the same levels in the same order, of equal shapes. generator: draws the random masks
    (None: torch's own); both sides get the same. The teacher gets no gradient. Half precision is computed in float32.

    The one reduction of the language: elements of a row are averaged (added along the axis that a distribution sums to
    one over), rows are added with their weights, which is the mean over images, and levels are averaged. The term's
    weight is *not* applied: the caller multiplies.
    ValueError: other shapes on the two sides, or too few rows for an operation along n.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"Expected as many levels of both, at least one; found {len(student)} and {len(teacher)}.")
    generator = torch.default_generator if generator is None else generator
    with torch.autocast(student[0].data.device.type, enabled=False):
        losses = [_level_loss(term, s, t, generator) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()


def _level_loss(term: Term, student: Value, teacher: Value, generator: torch.Generator) -> Tensor:
    if student.data.shape != teacher.data.shape or student.kind != teacher.kind:
        ours, theirs = (f"{value.kind} {tuple(value.data.shape)}" for value in (student, teacher))
        raise ValueError(
            f"Term '{term}': the student's {ours} cannot be compared with the teacher's {theirs}. "
            "Match the levels by stride and lift the student's channels first."
        )
    student, teacher = _precise(student), _precise(replace(teacher, data=teacher.data.detach()))
    for op in term.transforms:
        student, teacher = transformed(op, student, teacher, generator)
    return compared(term.distance, student, teacher)


def compared(op: Op, student: Value, teacher: Value) -> Tensor:
    """A distance between two transformed values, reduced to a scalar."""
    spec = DISTANCES[op.name]
    _check_rows(op, spec, student)
    loss: Tensor = spec.function(student, teacher, **op.arguments())
    return loss if loss.ndim == 0 else (loss * student.weights).sum()


def transformed(op: Op, student: Value, teacher: Value, generator: torch.Generator) -> tuple[Value, Value]:
    """Both sides after one transform, with the same random draw."""
    spec, arguments = TRANSFORMS[op.name], op.arguments()
    _check_rows(op, spec, student)
    if not spec.random:
        return spec.function(student, **arguments), spec.function(teacher, **arguments)
    state = generator.get_state()
    other = spec.function(teacher, **arguments, generator=generator)
    generator.set_state(state)
    return spec.function(student, **arguments, generator=generator), other


def _check_rows(op: Op, spec: Operation, value: Value) -> None:
    rows = len(value.data)
    if op.axis == "n" and rows < spec.batch_rows:
        raise ValueError(
            f"'{op}' works along the batch and needs at least {spec.batch_rows} rows; found {rows}. "
            "Use a larger batch per worker or another axis."
        )


def _precise(value: Value) -> Value:
    dtype = torch.promote_types(value.data.dtype, torch.float32)
    return replace(value, data=value.data.to(dtype), weights=value.weights.to(dtype))
