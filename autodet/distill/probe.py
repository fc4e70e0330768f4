"""One batch decides whether a formula is worth training: a small fraction of a training's cost."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autodet.detectors import DetectorSpec
from autodet.distill.distiller import Distiller
from autodet.distill.formula import Formula
from autodet.distill.outputs import DetectorOutput

THRESHOLD = 100.0  # a weighted loss above this is rejected (DetKDS's public code)
GRADIENT_FLOOR = 1e-12


class Probe:
    """Judges formulas on recorded outputs of one batch, so that no detector runs for a judgement.

    student: outputs of the untrained student; teacher: of its teacher, both on the same batch (and proposals).
    """

    def __init__(
        self,
        student_spec: DetectorSpec,
        teacher_spec: DetectorSpec,
        student: DetectorOutput,
        teacher: DetectorOutput,
        normalise: bool = False,
    ) -> None:
        self._specs = (student_spec, teacher_spec)
        self._student, self._teacher = student, teacher
        self._normalise = normalise

    def __call__(self, formula: Formula) -> str | None:
        """None where the formula may be trained, otherwise the reason why not."""
        if not formula.terms:
            return None
        batch = len(next(iter(self._student.features.values())))
        if batch < formula.min_batch:
            return f"it compares images of a batch with one another, and the local batch is {batch}"
        student = _leaves(self._student)
        device = next(iter(student.features.values())).device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # draws the adapter and the masks, on the CPU
            try:
                distiller = Distiller(formula, *self._specs, normalise=self._normalise).to(device)
                losses = distiller(student, self._teacher)
            except ValueError as error:  # impossible for this pair, or for so few regions
                return str(error)
        for index, term in enumerate(formula.terms):
            if f"distill/{index}/{term.input}" not in losses:
                return f"'{term}' needs {term.min_batch} images or regions to compare, and the batch has fewer"
        for name, loss in losses.items():
            if reason := _reason(float(loss.detach())):
                return f"{name}: {reason}"
            if not loss.requires_grad:
                return f"{name}: no gradient reaches the student"
            if reason := _gradient_reason(loss, student):
                return f"{name}: {reason}"
        return None


def _reason(loss: float) -> str | None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        return f"the loss is {loss}"
    if loss < 0:
        return f"the loss is negative ({loss:.3g})"
    if loss > THRESHOLD:
        return f"the loss {loss:.3g} is above {THRESHOLD:g}"
    return None


def _gradient_reason(loss: Tensor, student: DetectorOutput) -> str | None:
    gradients = torch.autograd.grad(loss, _tensors(student), retain_graph=True, allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    if norm != norm or norm == float("inf"):
        return f"the gradient's norm is {norm}"
    return None if norm > GRADIENT_FLOOR else "the gradient is zero"


def _tensors(output: DetectorOutput) -> list[Tensor]:
    """All that a loss may depend on."""
    found = [level for levels in _levels(output) for level in levels.values()]
    if output.regions is not None:
        found += [output.regions.class_logits, output.regions.corners]
        found += [] if output.regions.masks is None else [output.regions.masks]
    return found


def _levels(output: DetectorOutput) -> list[dict[int, Tensor]]:
    return [output.features, output.logits or {}, output.corners or {}, output.sides or {}]


def _leaves(output: DetectorOutput) -> DetectorOutput:
    """The same values as leaves of a new graph."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().float().requires_grad_()

    features, logits, corners, sides = ({s: leaf(level) for s, level in levels.items()} for levels in _levels(output))
    regions = output.regions
    if regions is not None:
        masks = None if regions.masks is None else leaf(regions.masks)
        class_logits, boxes = leaf(regions.class_logits), leaf(regions.corners)
        regions = replace(regions, class_logits=class_logits, corners=boxes, masks=masks)
    output = replace(output, features=features, regions=regions)
    return replace(output, logits=logits or None, corners=corners or None, sides=sides or None)
