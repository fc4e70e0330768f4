"""Formulas that other searches found, as arms of a comparison on another pair or data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from runs import SearchRun, read_search

from autodet.detectors import DetectorSpec, load_detector
from autodet.distill import Formula
from autodet.distill.formula import Term
from autodet.distill.inputs import why_incomparable
from autodet.results.facts import run_names


def transferred(folders: Sequence[Path], target: SearchRun) -> dict[str, Formula]:
    """Arm ``from <run>`` → what that search found, at the weights it was found with, as far as this pair allows.

    A term on an input that the pair cannot be compared on is left out: the screen says why, the arm's name what.
    ValueError where nothing is left, where a search has not finished, or where its weights mean something else.
    """
    if not folders:
        return {}
    teacher = load_detector(Path(str(target.task.teacher)))[0].spec
    arms = {}
    for name, folder in zip(run_names(folders), folders, strict=True):
        origin = read_search(folder)
        if origin.task.normalise != target.task.normalise:
            raise ValueError(f"{_differing(folder, origin)} Search again with the same, or compare without it.")
        left_out = _left_out(origin.found, target.student, teacher)
        kept = Formula(tuple(term for term in origin.found.terms if term not in left_out))
        reasons = "; ".join(f"'{term}': {reason}" for term, reason in left_out.items())
        if not kept.terms:
            raise ValueError(f"--transfer {folder}: nothing of its formula can be used on this pair: {reasons}.")
        arm = f"from {name}"
        if left_out:
            print(f"{arm}: left out {reasons}")
            arm += f" (without {', '.join(dict.fromkeys(term.input for term in left_out))})"
        arms[arm] = kept
    return arms


def _left_out(formula: Formula, student: DetectorSpec, teacher: DetectorSpec) -> Mapping[Term, str]:
    reasons = {term: why_incomparable(term.input, student, teacher) for term in formula.terms}
    return {term: reason for term, reason in reasons.items() if reason is not None}


def _differing(folder: Path, origin: SearchRun) -> str:
    was = "--normalise" if origin.task.normalise else "--no-normalise"
    return (
        f"--transfer {folder}: its weights were found with {was}, and this run's were not, so they mean another thing."
    )
