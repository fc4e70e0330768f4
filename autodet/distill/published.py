"""Published distillation losses as data in the formula language.

Weights are those of the equations, so that a formula equals the published loss up to what ``remark`` says; the factor
that suits a data set is tuned by whoever compares them.

The language treats student and teacher alike and trains nothing but a 1×1 convolution, so it cannot say:

- FGD's attention (from the teacher alone, as a weight on both), its loss between attentions, and its relation (GcBlock,
  trained);
- MGD (Yang et al., ECCV 2022): the student's map alone is masked, and a trained block restores it;
- FRS (Du et al., NeurIPS 2021): every position weighs as the teacher's highest class score there;
- LD's regions (Zheng et al., CVPR 2022): its loss counts where a location learns an object and, beside these, in the
  valuable localization region of anchors that nearly do; ours counts everywhere, by the teacher's score;
- GID's choice of instances, by how far student and teacher scores differ, and its relation, the distances between them;
- CrossKD (Wang et al., CVPR 2024): the student's features run through the teacher's head;
- weights by the difference between student and teacher, as in BCKD.
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

    def weighted(self, normalised: bool, weight: float = 1.0) -> Formula:
        """The formula for the distiller's ``normalise``: where terms are normalised the heaviest gets ``weight``, since
        the equation's weights belong to terms as they are; what remains of these is their ratio."""
        if not normalised:
            return self.formula
        heaviest = max(term.weight for term in self.formula.terms)
        scaled = (replace(term, weight=weight * term.weight / heaviest) for term in self.formula.terms)
        return Formula(tuple(scaled))


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
    "kd_dense": Published(
        "logits.dense: bernoulli | kl * 1",
        "Hinton et al., Distilling the Knowledge in a Neural Network (2015), section 2, for sigmoid heads",
        "Each logit is a distribution over two outcomes, t = 1; averaged over anchors, classes and positions.",
    ),
    "bckd": Published(
        "localization.dense: iou * 1; logits.dense: bernoulli | kl * 1",
        "Yang et al., Bridging Cross-task Protocol Inconsistency (ICCV 2023): binary and IoU-based losses",
        "Boxes weigh as the teacher's score and logits alike, where the paper weighs by |p_T − p_S|. The divergence is "
        "its cross-entropy less the teacher's entropy. The weight between the two terms is ours.",
    ),
    "ld": Published(
        "localization.sides: softmax(c, t=10) | kl * 100",
        "Zheng et al., Localization Distillation for Dense Object Detection (CVPR 2022): its loss on box sides, τ = 10",
        "The weight is τ², of which the public code has 0.25/17, since it averages over the bins. The sides of a box "
        "are averaged; locations weigh as the teacher's score, where the paper chooses regions. Its distillation of "
        "class scores is a term on logits.",
    ),
    "fgd": Published(
        "bg: l2 * 0.5; fg: l2 * 1",
        "Yang et al., Focal and Global Knowledge Distillation for Detectors (CVPR 2022): the focal feature loss",
        "The paper's α = 2β, up to their common factor; it adds channels and levels, ours averages them. Its attention "
        "weights, attention loss and global relation are missing.",
    ),
    "gid": Published(
        "instance: l2 * 1",
        "Dai et al., General Instance Distillation (CVPR 2021): the feature-based part",
        "Instances are the ground-truth boxes, where the paper chooses by differences of scores; squares are averaged. "
        "The relation-based part is missing; the response-based one is a term on logits.",
    ),
}
