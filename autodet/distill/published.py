"""Published distillation losses as data in the formula language.

Weights are those of the equations, so that a formula equals the published loss up to what ``remark`` says; the factor
that suits a data set is tuned by whoever compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autodet.distill.formula import Formula


@dataclass(frozen=True)
class Published:
    """A method's loss: its text in the language, where it comes from, and how ours differs."""

    text: str
    source: str
    remark: str

    @property
    def formula(self) -> Formula:
        """The text, read and checked."""
        return Formula.parse(self.text)

    def weighted(self, normalised: bool) -> Formula:
        """The formula for the distiller's ``normalise``: weight 1 where terms are normalised, since the equation's
        weight belongs to terms as they are."""
        if not normalised:
            return self.formula
        return Formula(tuple(replace(term, weight=1.0) for term in self.formula.terms))


PUBLISHED: dict[str, Published] = {
    "detkds": Published(
        "global: catt > pool(2) > norm(n) | l1 * 6",
        "DetKDS (ICML 2024), public code: the global formula it found",
        "The weight is within the published 2 to 10. Depends on the batch, which its norm over n makes explicit.",
    ),
    "fitnets": Published(
        "global: l2 * 0.5",
        "Romero et al., FitNets: Hints for Thin Deep Nets (ICLR 2015), eq. 3",
        "The paper adds squares, ours averages them. Every pyramid level is a hint; one stage of training, not two.",
    ),
    "pkd": Published(
        "global: standardize(nhw) | l2 * 0.5",
        "Cao et al., PKD (NeurIPS 2022), eq. 4",
        "Equal to 'pearson(nhw) * 1' exactly, because the standard deviation is the population's.",
    ),
    "cwd": Published(
        "global: softmax(hw, t=4) | kl * 16",
        "Shu et al., Channel-wise Knowledge Distillation for Dense Prediction (ICCV 2021), eq. 4",
        "The weight is t²; another temperature needs another weight. On pyramid levels instead of the last map.",
    ),
    "at": Published(
        "global: mean(c, p=2) > norm(hw) | l2 * 0.5",
        "Zagoruyko & Komodakis, Paying More Attention to Attention (ICLR 2017), eq. 2, p = 2",
        "Squares are averaged over positions, where the equation takes their root; its factor beta is the weight.",
    ),
    "kd": Published(
        "logits.roi: softmax(c, t=2) | kl * 4",
        "Hinton et al., Distilling the Knowledge in a Neural Network (2015), section 2",
        "The weight is t². On the class logits of shared proposals, background included, averaged per image.",
    ),
}
