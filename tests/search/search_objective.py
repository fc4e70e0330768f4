"""A stand-in for training: an AP that a formula's parts decide, with noise as between seeds."""

import math

from autodet.distill.formula import Formula, Term
from autodet.search import Candidate, rng_for

INPUTS = ("global", "logits.dense", "logits.roi")
WANTED = {
    "global": ({"catt", "pool", "norm"}, "l1", 10.0),
    "logits.dense": ({"softmax", "mask"}, "kl", 1.0),
    "logits.roi": ({"softmax", "affine"}, "cosine", 5.0),
}
CONTROL_AP = 0.40


def term_gain(term: Term) -> float:
    """From -0.03 (nothing right) to +0.05 (transforms, distance and weight right)."""
    transforms, distance, weight = WANTED[term.input]
    found = {op.name for op in term.transforms}
    right = len(found & transforms) / len(transforms) - 0.2 * len(found - transforms)
    near = max(0.0, 1 - abs(math.log(term.weight / weight)) / math.log(50))
    return -0.03 + 0.03 * right + 0.02 * (term.distance.name == distance) + 0.03 * near


def true_ap(formula: Formula) -> float:
    return CONTROL_AP + sum(term_gain(term) for term in formula.terms)


def noisy_ap(candidate: Candidate, noise: float = 0.01) -> float:
    """One seed's AP. Part of the noise is the replicate's own and so cancels in paired differences."""
    shared = rng_for(1, candidate.replicate).gauss(0, noise)
    return true_ap(candidate.formula) + shared + rng_for(2, candidate.key).gauss(0, noise)


def curve(candidate: Candidate, epochs: int = 3) -> list[float | None]:
    """A learning curve that ends at `noisy_ap`."""
    return [noisy_ap(candidate) * (epoch + 3) / (epochs + 3) for epoch in range(1, epochs + 1)]
