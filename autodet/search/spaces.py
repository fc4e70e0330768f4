"""The spaces that the searches move in, built on the grammar's random draws."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from autodet.distill.formula import INPUTS, Formula, Term
from autodet.distill.grammar import (
    MIN_BATCH,
    WEIGHT_PHASE_FEATURES,
    WEIGHT_PHASE_RESPONSES,
    count_terms,
    crossover_formulas,
    crossover_terms,
    mutate_formula,
    mutate_term,
    random_formula,
    random_term,
)
from autodet.search.evolution import Space

Choices = Mapping[str, tuple[Term | None, ...]]
"""For each input the terms to choose from; None is "off"."""

WEIGHT_DIGITS = 6
"""Significant digits of a product of weights, so that 0.1 · 0.1 is printed, and compared, as 0.01."""


def term_space(input: str, given: Sequence[Formula] = (), min_batch: int = MIN_BATCH) -> Space:
    """Formulas of one term on one input. The terms of `given` formulas on that input are asked first.

    min_batch: images in the smallest batch of a worker. Raises ValueError if a given term is outside the grammar.
    """
    terms = tuple(Formula((term,)) for formula in given for term in formula.terms if term.input == input)
    draw, mutate = partial(_random_single, input, min_batch), partial(_mutate_single, min_batch)
    size = None if terms else count_terms(input, min_batch)  # a given term may have numbers that are not drawn
    return _checked(Space(draw, mutate, partial(_cross_single, min_batch), terms, size))


def formula_space(inputs: Sequence[str], given: Sequence[Formula] = (), min_batch: int = MIN_BATCH) -> Space:
    """Whole formulas on any of the inputs; otherwise as `term_space`."""
    names = tuple(inputs)
    draw, mutate = partial(_random_whole, names, min_batch), partial(_mutate_whole, names, min_batch)
    return _checked(Space(draw, mutate, partial(_cross_whole, min_batch), tuple(given)))


def _checked(space: Space) -> Space:
    """Raises ValueError unless every given formula can become a parent."""
    for formula in space.given:
        for term in formula.terms:
            mutate_term(term, random.Random(0))
    return space


def weight_space(terms: Mapping[str, Sequence[Term]]) -> Space:
    """Formulas that take for each input one of its terms times a factor, or leave the input out; never all of them.

    terms: per input the best terms found, best first. The factors are those of DetKDS's weight phase, 0 being "off".
    Ours: they multiply the weight that the formula phase found, instead of replacing it, since that weight carries
    the scale of the term's own distance. Given formulas: all best terms at factor 1, then all but one input, so that
    each input's share is known early (each input alone is known from the formula phase).
    """
    choices = {
        input: tuple(scaled(term, factor) for factor in weight_factors(input) for term in found)
        for input, found in terms.items()
        if found
    }
    return choice_space(choices, [found[0] for found in terms.values() if found])


def choice_space(choices: Choices, best: Sequence[Term]) -> Space:
    """Formulas that take one of each input's choices; `best`: one term an input, of which the given formulas are made.

    Given formulas: all best terms together, then all but one input.
    """
    given = [Formula(tuple(best))]
    if len(best) > 2:
        given += [Formula(tuple(term for term in best if term is not left_out)) for left_out in best]
    return Space(partial(_random_choice, choices), partial(_mutate_choice, choices), _mix_choices, tuple(given))


@dataclass(frozen=True)
class Spaces:
    """The spaces of a search's phases: the grammar's by default, or those of a finite part of it (`grid.Grid.spaces`).

    single(input, given, min_batch): one term on one input. combined(terms): for each input one of its best terms, best
    first, with other weights, or none. whole(inputs, given, min_batch): any formula on these inputs.
    """

    single: Callable[[str, Sequence[Formula], int], Space]
    combined: Callable[[Mapping[str, Sequence[Term]]], Space]
    whole: Callable[[Sequence[str], Sequence[Formula], int], Space]


GRAMMAR = Spaces(term_space, weight_space, formula_space)


def weight_factors(input: str) -> tuple[float, ...]:
    """The factors of the weight phase, with 0: one list for features, one for the head's responses."""
    return WEIGHT_PHASE_FEATURES if INPUTS[input].family == "features" else WEIGHT_PHASE_RESPONSES


def scaled(term: Term, factor: float) -> Term | None:
    """The term with its weight multiplied; None for factor 0."""
    return replace(term, weight=float(f"{term.weight * factor:.{WEIGHT_DIGITS}g}")) if factor else None


def _random_single(input: str, min_batch: int, rng: random.Random) -> Formula:
    return Formula((random_term(input, rng, min_batch),))


def _mutate_single(min_batch: int, formula: Formula, rng: random.Random) -> Formula:
    return Formula((mutate_term(formula.terms[0], rng, min_batch),))


def _cross_single(min_batch: int, a: Formula, b: Formula, rng: random.Random) -> Formula:
    return Formula((crossover_terms(a.terms[0], b.terms[0], rng, min_batch),))


def _random_whole(inputs: tuple[str, ...], min_batch: int, rng: random.Random) -> Formula:
    return random_formula(inputs, rng, min_batch)


def _mutate_whole(inputs: tuple[str, ...], min_batch: int, formula: Formula, rng: random.Random) -> Formula:
    return mutate_formula(formula, inputs, rng, min_batch)


def _cross_whole(min_batch: int, a: Formula, b: Formula, rng: random.Random) -> Formula:
    return crossover_formulas(a, b, rng, min_batch)


def _random_choice(choices: Choices, rng: random.Random) -> Formula:
    """All inputs off comes out as the empty formula, which a population draws again."""
    return _formula({input: rng.choice(options) for input, options in choices.items()})


def _mutate_choice(choices: Choices, formula: Formula, rng: random.Random) -> Formula:
    current: dict[str, Term | None] = {term.input: term for term in formula.terms}
    input = rng.choice(tuple(choices))
    others = [term for term in choices[input] if term != current.get(input)]
    return _formula({**current, input: rng.choice(others)})


def _mix_choices(a: Formula, b: Formula, rng: random.Random) -> Formula:
    first, second = ({term.input: term for term in formula.terms} for formula in (a, b))
    inputs = sorted(first.keys() | second.keys())
    return _formula({input: rng.choice((first, second)).get(input) for input in inputs})


def _formula(terms: Mapping[str, Term | None]) -> Formula:
    return Formula(tuple(term for term in terms.values() if term is not None))
