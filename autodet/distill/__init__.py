"""Distillation: formulas, their parts as pure functions, and the distiller that applies one to a pair of detectors."""

from autodet.distill.distiller import Distiller
from autodet.distill.formula import Formula, Term
from autodet.distill.inherit import inherit_neck_and_head
from autodet.distill.inputs import INPUTS, comparable_inputs, why_incomparable
from autodet.distill.probe import Probe
from autodet.distill.published import PUBLISHED
from autodet.distill.teacher import Teacher

__all__ = [
    "INPUTS",
    "PUBLISHED",
    "Distiller",
    "Formula",
    "Probe",
    "Teacher",
    "Term",
    "comparable_inputs",
    "inherit_neck_and_head",
    "why_incomparable",
]
