"""A formula's text as a person would say it.

Reads the text only (`input: transform > transform | distance * weight; …`), so that a run can be shown without the
code that trained it; an operation that is unknown here is shown as it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INPUTS = {
    "global": "the feature maps of every pyramid level",
    "fg": "the feature maps inside the true boxes",
    "bg": "the feature maps outside the true boxes",
    "instance": "the features of each true box",
    "logits.dense": "the responses at every location (objectness, or classes)",
    "logits.roi": "the class responses on shared proposals",
    "logits.mask": "the masks on shared proposals",
    "localization.dense": "the boxes predicted at every location",
    "localization.sides": "the distributions of each box side's distance from every location",
    "localization.roi": "the boxes predicted from shared proposals",
}
# Phrase, the name of the parameter that may be written without its name.
OPERATIONS: dict[str, tuple[str, str]] = {
    "satt": ("stress positions by attention{t}", "t"),
    "catt": ("stress channels by attention{t}", "t"),
    "batt": ("stress images by attention{t}", "t"),
    "mask": ("keep a random share of the positions{keep}", "keep"),
    "pool": ("take the maximum of every {k}×{k} cells", "k"),
    "patch": ("cut into patches of {p}×{p} cells", "p"),
    "affine": ("move into (F + 1) / 2", ""),
    "mean": ("average{axis}{p}", "axis"),
    "norm": ("scale to length one{axis}", "axis"),
    "softmax": ("turn into probabilities{axis}{t}", "axis"),
    "log_softmax": ("turn into log-probabilities{axis}{t}", "axis"),
    "minmax": ("scale to 0–1{axis}", "axis"),
    "standardize": ("scale to mean 0 and deviation 1{axis}", "axis"),
    "gram": ("take the correlations between channels", ""),
    "power": ("raise to a power{p}", "p"),
    "root": ("take the signed root", ""),
    "log": ("take the signed logarithm", ""),
    "sigmoid": ("apply the sigmoid", ""),
    "tanh": ("apply the hyperbolic tangent", ""),
    "abs": ("take absolute values", ""),
    "bernoulli": ("turn every logit into a probability{t}", "t"),
    "l1": ("the mean absolute difference", ""),
    "l2": ("the mean squared difference", ""),
    "smooth_l1": ("the smooth absolute difference{beta}", "beta"),
    "kl": ("the Kullback–Leibler divergence from teacher to student", ""),
    "cosine": ("one minus the cosine{axis}", "axis"),
    "pearson": ("one minus the correlation{axis}", "axis"),
    "crosscorr": ("the distance of each element's correlation across the batch from one", ""),
    "iou": ("one minus the overlap of the boxes (IoU)", ""),
    "giou": ("one minus the generalised overlap of the boxes (GIoU)", ""),
    "ssim": ("one minus the structural similarity{window}", "window"),
}
AXES = {"n": "the batch", "c": "channels", "hw": "positions"}


@dataclass(frozen=True)
class TermText:
    """The parts of one term as written."""

    input: str
    transforms: tuple[str, ...]
    distance: str
    weight: str


def terms_of(formula: str) -> list[TermText]:
    """Split a formula's text; `none` and blank text have no terms. Does not judge whether the formula is valid."""
    terms = []
    for part in formula.split(";"):
        if not part.strip() or part.strip() == "none":
            continue
        name, _, body = part.partition(":")
        chain, _, end = body.rpartition("|")
        distance, _, weight = end.partition("*")
        transforms = tuple(op.strip() for op in chain.split(">") if op.strip())
        terms.append(TermText(name.strip(), transforms, distance.strip(), weight.strip() or "1"))
    return terms


def operation_name(operation: str) -> str:
    """`softmax` of `softmax(c, t=2)`."""
    return operation.partition("(")[0].strip()


def sentences(formula: str) -> list[str]:
    """One sentence per term, or one that says that nothing is distilled."""
    terms = terms_of(formula)
    return [_sentence(term) for term in terms] or ["No distillation: the student learns from the ground truth alone."]


def equations(formula: str) -> list[str]:
    """One line per term: weight · distance(φ(S), φ(T)) with φ the transforms in the order of application."""
    lines = []
    for term in terms_of(formula):
        where = f"  on {term.input}"
        if term.transforms:
            chain = " ∘ ".join(reversed(term.transforms))
            lines.append(f"{term.weight} · {term.distance}( φ(S), φ(T) ),  φ = {chain}{where}")
        else:
            lines.append(f"{term.weight} · {term.distance}( S, T ){where}")
    return lines


def _sentence(term: TermText) -> str:
    steps = [phrase(op) for op in term.transforms]
    prepared = f"{', then '.join(steps)}; compare" if steps else "compare as they are"
    source = INPUTS.get(term.input, term.input)
    return f"Take {source} of student and teacher; {prepared} by {phrase(term.distance)}; weight {term.weight}."


def phrase(operation: str) -> str:
    """An operation in words; its own text where it or one of its parameters is unknown here."""
    name, _, inside = operation.partition("(")
    if name.strip() not in OPERATIONS:
        return operation
    template, first = OPERATIONS[name.strip()]
    values = {}
    for argument in filter(None, (a.strip() for a in inside.rstrip(") ").split(","))):
        key, equals, value = argument.partition("=")
        values[key.strip() if equals else first] = value.strip() if equals else argument
    wanted = re.findall(r"{(\w+)}", template)
    if set(values) - set(wanted):
        return operation
    bare = re.findall(r"{(\w+)}×", template)
    return template.format(**{key: _value(key, values.get(key), key in bare) for key in wanted})


def _value(key: str, value: str | None, bare: bool) -> str:
    if value is None or bare:
        return value or ""
    if key == "axis":
        rest, words = value, []
        for axis, word in AXES.items():
            if axis in rest:
                words.append(word)
                rest = rest.replace(axis, "")
        return f" over {' and '.join(words)}" if words and not rest else f" over {value}"
    return f" ({key} = {value})"
