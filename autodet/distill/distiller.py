"""The distiller: student's outputs, teacher's outputs → named, weighted losses. It runs no detector."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from autodet.detectors import DetectorSpec
from autodet.distill.formula import Formula
from autodet.distill.inputs import INPUTS, why_incomparable
from autodet.distill.outputs import DetectorOutput
from autodet.distill.terms import term_loss

NORMALISING_STEPS = 20  # a term's scale is the median of its raw values over this many first steps [ours]


class Distiller(nn.Module):
    """A formula applied to a pair of detectors.

    Where the neck widths differ, one trained 1×1 convolution, shared by the levels, lifts the student's maps (FitNets,
    Romero et al. 2015); it is not part of the student. With ``normalise`` each term is divided by the median of its raw
    values over the first steps, so that a weight means the same share of the loss whatever the formula; the scales are
    in ``scales()`` and belong in the record.
    """

    step_count: Tensor
    history: Tensor

    def __init__(self, formula: Formula, student: DetectorSpec, teacher: DetectorSpec, normalise: bool = False) -> None:
        super().__init__()
        self.formula, self.normalise = formula, normalise
        for term in formula.terms:
            if reason := why_incomparable(term.input, student, teacher):
                raise ValueError(f"Term '{term}' is impossible for this pair: {reason}. Leave {term.input} out.")
        compares_maps = any(INPUTS[term.input].part == "features" for term in formula.terms)
        needed = compares_maps and student.neck_width != teacher.neck_width
        self.adapter = nn.Conv2d(student.neck_width, teacher.neck_width, 1) if needed else None
        self.register_buffer("step_count", torch.zeros((), dtype=torch.long))
        self.register_buffer("history", torch.full((NORMALISING_STEPS, len(formula.terms)), torch.nan))

    def forward(
        self, student: DetectorOutput, teacher: DetectorOutput, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses by name ``distill/<number>/<input>``. The teacher's tensors get no gradient.

        generator: draws random masks, the same for both sides; None draws from torch's own.
        """
        losses = {}
        raw = []
        if self.adapter is not None:
            adapted = {stride: self.adapter(level.float()) for stride, level in student.features.items()}
            student = replace(student, features=adapted)
        # In half precision the positions that a map is resampled at would be off by parts of a cell.
        with torch.autocast(self.history.device.type, enabled=False):
            used = dict.fromkeys(term.input for term in self.formula.terms)  # in order, or rounding would depend on it
            values = {name: INPUTS[name].pairs(student, teacher) for name in used}
        for index, term in enumerate(self.formula.terms):
            pairs = values[term.input]
            if len(pairs[0][0].data) < term.min_batch:
                raw.append(self.history.new_tensor(torch.nan))  # an epoch's last batch may be too small to compare in
                continue
            loss = term_loss(term, [s for s, _ in pairs], [t for _, t in pairs], generator)
            raw.append(loss.detach())
            losses[f"distill/{index}/{term.input}"] = loss * (term.weight / self._scale(index, loss))
        if raw and self.training:
            self._remember(torch.stack(raw))
        return losses

    def scales(self) -> dict[str, float]:
        """What each term is divided by; 1 without ``normalise``."""
        return {str(term): float(self._scale(i, torch.ones(()))) for i, term in enumerate(self.formula.terms)}

    def _scale(self, index: int, current: Tensor) -> Tensor:
        if not self.normalise:
            return current.new_ones(())
        seen = self.history[:, index]
        seen = seen[~seen.isnan()]
        median = seen.median() if len(seen) else current.detach()
        return median.clamp_min(1e-8)

    def _remember(self, raw: Tensor) -> None:
        step = int(self.step_count)
        if step < NORMALISING_STEPS:
            self.history[step] = raw.to(self.history)
            self.step_count += 1
