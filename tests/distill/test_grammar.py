"""The space of the search: always valid, mutation always changes one gene, crossover mixes, the count is exact."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest

from autodet.distill import grammar
from autodet.distill.distances import DISTANCES
from autodet.distill.formula import INPUTS, Formula, Op, Term
from autodet.distill.grammar import (
    Choose,
    count_terms,
    crossover_formulas,
    crossover_terms,
    formula_from_choices,
    mutate_formula,
    mutate_term,
    random_formula,
    random_term,
    term_from_choices,
    terms_of,
)
from autodet.distill.published import PUBLISHED
from autodet.distill.transforms import TRANSFORMS
from autodet.distill.values import ParamValue

NAMES = tuple(INPUTS)


def genes_of(term: Term) -> dict[str, ParamValue]:
    """Slots, parameters, distance and weight of a term, read from its parts."""
    genes: dict[str, ParamValue] = {"A": "none", "B": "none", "C": "none", "weight": term.weight}
    for role, op in [*((TRANSFORMS[op.name].slot, op) for op in term.transforms), ("distance", term.distance)]:
        genes[role] = op.name
        genes.update({f"{role}.{op.name}.{name}": value for name, value in op.arguments().items()})
    return genes


def walked_terms(input: str, min_batch: int) -> list[Term]:
    """Every term, by walking through all answers to all choices."""

    def walk(answers: list[ParamValue]) -> list[Term]:
        asked: list[Sequence[ParamValue]] = []

        def choose(_: str, options: Sequence[ParamValue]) -> ParamValue:
            asked.append(options)
            return answers[len(asked) - 1] if len(asked) <= len(answers) else options[0]

        term = term_from_choices(choose, input, min_batch, weights=(1,))
        if len(asked) == len(answers):
            return [term]
        return [found for option in asked[len(answers)] for found in walk([*answers, option])]

    return walk([])


@pytest.mark.parametrize("min_batch", [1, 3])
def test_count_is_the_number_of_different_terms(min_batch: int) -> None:
    for input in ("logits.roi", "localization.roi"):
        bodies = {Formula((term,)).key for term in walked_terms(input, min_batch)}
        assert count_terms(input, min_batch, weights=(1,)) == len(bodies)
        assert count_terms(input, min_batch) == len(bodies) * len(grammar.WEIGHTS)
        listed = list(terms_of(input, min_batch))
        assert len(listed) == len(bodies) and {Formula((term,)).key for term in listed} == bodies


@pytest.mark.parametrize("input", ["global", "logits.roi", "localization.roi"])
def test_all_terms_are_as_many_as_counted_and_all_different(input: str) -> None:
    assert len({term.body for term in terms_of(input, min_batch=1)}) == count_terms(input, 1, weights=(1,))


def test_maps_span_more_terms_and_large_batches_more_still() -> None:
    assert count_terms("global") > 10 * count_terms("logits.roi")
    assert count_terms("global", 1) < count_terms("global", 2) < count_terms("global", 3)


@pytest.mark.parametrize("input", NAMES)
@pytest.mark.parametrize("min_batch", [1, 2, 3])
def test_random_terms_are_valid_canonical_and_fit_the_batch(input: str, min_batch: int) -> None:
    rng = random.Random(1)
    for _ in range(200):
        term = random_term(input, rng, min_batch)
        Formula((term,)).validate()
        assert term.canonical() == term
        assert term.min_batch <= min_batch
        slots = [TRANSFORMS[op.name].slot for op in term.transforms]
        assert slots == sorted(set(slots))
        assert term.weight in grammar.WEIGHTS


def test_every_transform_and_distance_is_reached() -> None:
    rng = random.Random(2)
    terms = [random_term(name, rng) for name in NAMES for _ in range(300)]
    assert {op.name for term in terms for op in term.transforms} == set(TRANSFORMS)
    assert {term.distance.name for term in terms} == set(DISTANCES)


DRAW = """
import itertools, random
from autodet.distill.formula import INPUTS
from autodet.distill.grammar import crossover_formulas, mutate_formula, random_formula
rng, names = random.Random(3), tuple(INPUTS)
formulas = [random_formula(names, rng) for _ in range(20)]
formulas += [mutate_formula(f, names, rng) for f in formulas]
formulas += [crossover_formulas(a, b, rng) for a, b in itertools.pairwise(formulas)]
print(*formulas, sep=chr(10))
"""


def test_the_same_seed_gives_the_same_formulas_in_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    """A search that is rebuilt from its ledger repeats its draws, whatever the order of a set is there."""
    exec(DRAW, {})
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", DRAW], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout == capsys.readouterr().out
    assert len(other.stdout.splitlines()) == 79


@pytest.mark.parametrize("input", NAMES)
@pytest.mark.parametrize("min_batch", [1, 3])
def test_mutation_changes_one_gene_and_always_the_meaning(input: str, min_batch: int) -> None:
    rng = random.Random(4)
    unforced = 0
    for _ in range(300):
        term = random_term(input, rng, min_batch)
        mutant = mutate_term(term, rng, min_batch)
        Formula((mutant,)).validate()
        assert mutant.min_batch <= min_batch
        assert Formula((mutant,)).key != Formula((term,)).key
        before, after = genes_of(term), genes_of(mutant)
        shared = [gene for gene in before if gene in after and before[gene] != after[gene]]
        unforced += len(shared) == 1
        # Only a change of kind may force others: a new operation in a slot, or the axis of mean.
        assert len(shared) == 1 or shared[0] in ("A", "B", "C", "B.mean.axis"), (term, mutant)
    assert unforced > 200


def test_mutation_reaches_every_gene() -> None:
    rng = random.Random(5)
    term = Formula.parse("global: catt > pool(2) > norm(c) | l1 * 5").terms[0]
    before = genes_of(term)
    changed = set()
    for _ in range(200):
        after = genes_of(mutate_term(term, rng))
        changed |= {gene for gene in before if gene in after and before[gene] != after[gene]}
    assert changed == set(before)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_formulas_can_be_mutated_and_keep_their_own_numbers(name: str) -> None:
    rng = random.Random(6)
    term = PUBLISHED[name].formula.terms[0]
    mutants = [mutate_term(term, rng) for _ in range(40)]
    assert all(mutant != term for mutant in mutants)
    assert any(mutant.weight == term.weight for mutant in mutants)


def test_mutation_frees_a_term_from_a_batch_that_is_too_large() -> None:
    rng = random.Random(7)
    term = PUBLISHED["detkds"].formula.terms[0]
    assert all(mutate_term(term, rng, min_batch=1).min_batch == 1 for _ in range(50))


@pytest.mark.parametrize("input", NAMES)
def test_crossover_takes_every_gene_from_a_parent_where_it_fits(input: str) -> None:
    rng = random.Random(8)
    mixed, few = 0, count_terms(input, weights=(1,)) < 100  # of few terms, parents are often alike
    for _ in range(200):
        a, b = random_term(input, rng), random_term(input, rng)
        child = crossover_terms(a, b, rng)
        Formula((child,)).validate()
        one, other, new = genes_of(a), genes_of(b), genes_of(child)
        for slot in ("A", "weight"):  # what comes first can never be misfit
            assert new[slot] in (one[slot], other[slot])
        mixed += child not in (a, b)
    assert mixed > (40 if few else 100)


def test_crossover_of_equal_parents_is_the_parent() -> None:
    rng = random.Random(9)
    for _ in range(50):
        term = random_term("global", rng)
        assert crossover_terms(term, term, rng) == term


def test_terms_outside_the_grammar_and_of_other_inputs_are_refused() -> None:
    rng = random.Random(10)
    outside = Formula.parse("global: norm(c) > pool(2) | l2").terms[0]
    with pytest.raises(ValueError, match="at most one transform of each slot"):
        mutate_term(outside, rng)
    with pytest.raises(ValueError, match="same input"):
        crossover_terms(Term("global", (), Op("l2")), Term("logits.roi", (), Op("l2")), rng)


def test_formulas_random_mutated_and_crossed_are_valid_and_different() -> None:
    rng, names = random.Random(11), NAMES[:8]
    seen_inputs = set()
    for _ in range(200):
        a, b = random_formula(names, rng), random_formula(names, rng)
        seen_inputs.add(a.inputs)
        mutant = mutate_formula(a, names, rng)
        child = crossover_formulas(a, b, rng)
        for formula in (a, mutant, child):
            formula.validate()
            assert formula.terms
            assert formula == formula.canonical()
        assert mutant.key != a.key
        assert abs(len(mutant.terms) - len(a.terms)) <= 1
        assert set(child.inputs) <= {*a.inputs, *b.inputs}
    assert len(seen_inputs) > 100  # of 255 non-empty subsets
    assert {len(inputs) for inputs in seen_inputs} == set(range(1, len(names) + 1))


def test_the_empty_formula_grows_and_only_empty_parents_have_an_empty_child() -> None:
    rng = random.Random(12)
    one = Formula.parse("global: l2")
    assert mutate_formula(Formula(), ("logits.roi",), rng).inputs == ("logits.roi",)
    assert all(crossover_formulas(Formula(), one, rng) == one for _ in range(20))
    assert crossover_formulas(Formula(), Formula(), rng) == Formula()
    with pytest.raises(ValueError, match="no input"):
        mutate_formula(Formula(), (), rng)
    with pytest.raises(ValueError, match="at least one"):
        random_formula((), rng)


def test_a_choice_of_the_same_name_always_has_the_same_plain_options() -> None:
    rng = random.Random(13)
    known: dict[str, list[ParamValue]] = {}

    def choose(name: str, options: Sequence[ParamValue]) -> ParamValue:
        assert known.setdefault(name, list(options)) == list(options)
        assert len(options) == len(set(options)) > 0
        assert all(isinstance(option, (int, float, str)) for option in options)
        return rng.choice(options)

    for _ in range(1000):
        formula_from_choices(choose, NAMES)
    assert len(known) > 50


def test_recorded_choices_rebuild_the_formula() -> None:
    rng = random.Random(14)
    for _ in range(100):
        answers: dict[str, ParamValue] = {}
        formula = formula_from_choices(recording(answers, rng), NAMES, min_batch=2)
        assert formula_from_choices(repeating(answers), NAMES, min_batch=2) == formula


def repeating(answers: dict[str, ParamValue]) -> Choose:
    return lambda name, _: answers[name]


def recording(answers: dict[str, ParamValue], rng: random.Random) -> Choose:
    def choose(name: str, options: Sequence[ParamValue]) -> ParamValue:
        answers[name] = rng.choice(options)
        return answers[name]

    return choose
