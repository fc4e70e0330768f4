"""A grid against brute force: what it holds, how it is written, and where its spaces lead."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from search_tables import SMALL

from autodet.distill.formula import Formula
from autodet.distill.values import ParamValue
from autodet.search import Grid, GridInput
from autodet.search.grid import OFF


def all_texts(grid: Grid) -> set[str]:
    """Every formula, by writing it down."""
    words = [[None, *(f"{i.input}: {b} * {w}" for b in i.bodies for w in i.weights)] for i in grid.inputs]
    texts = ("; ".join(word for word in chosen if word) for chosen in itertools.product(*words))
    return {str(Formula.parse(text).canonical()) for text in texts if text}


def test_it_holds_the_product_without_the_empty_formula() -> None:
    formulas = list(SMALL.formulas())
    assert SMALL.count == len(formulas) == 7 * 5 - 1
    assert {str(formula) for formula in formulas} == all_texts(SMALL)
    assert all(formula == formula.canonical() for formula in formulas)
    assert SMALL["logits.roi"].input == "logits.roi"
    with pytest.raises(KeyError, match=r"found 'bg'"):
        SMALL["bg"]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("global: l2 * 10; logits.roi: l2 * 1", True),
        ("logits.roi: softmax(c) | kl * 10", False),
        ("logits.roi: softmax(c, t=2.0) | kl * 10.0", True),  # another way of writing it
        ("global: l2 * 5", False),
        ("global: l2 * 1; global: l1 * 1", False),
        ("bg: l2 * 1", False),
        ("none", False),
    ],
)
def test_membership_is_by_meaning(text: str, inside: bool) -> None:
    assert (Formula.parse(text) in SMALL) is inside


def test_it_is_written_and_read() -> None:
    assert Grid.from_json(SMALL.to_json()) == SMALL
    entry = json.loads(SMALL.to_json())["logits.roi"]
    assert entry == {"bodies": ["softmax(c, t=2) | kl", "l2"], "weights": [1.0, 10.0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a grid as"),
        ('{"global": 3}', "expected a grid as"),
        ("{", "expected a grid as"),
        ("{}", "different inputs, at least one"),
        ('{"global": {"bodies": ["l2"], "weights": ["heavy"]}}', "could not convert"),
        ('{"global": {"bodies": [], "weights": [1]}}', "at least one body"),
        ('{"global": {"bodies": ["l2"], "weights": [0, 1]}}', "weights above 0"),
        ('{"global": {"bodies": ["l2", "l2"], "weights": [1]}}', "drop repetitions"),
        ('{"global": {"bodies": ["pool(1) | l2", "l2"], "weights": [1]}}', "drop repetitions"),
        ('{"global": {"bodies": ["l7"], "weights": [1]}}', "global: expected a body.*unknown distance 'l7'"),
        ('{"global": {"bodies": ["l2 * 3"], "weights": [1]}}', "expected a body without weight, found 'l2 \\* 3'"),
        ('{"global": {"bodies": ["l2; bg: l2"], "weights": [1]}}', "expected one body"),
        ('{"globe": {"bodies": ["l2"], "weights": [1]}}', "unknown input 'globe'"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid.from_json(text)


def test_choices_lead_to_every_formula_and_back() -> None:
    """Every path through the choices, as Optuna may take them; the same name always has the same options."""
    options: dict[str, tuple[ParamValue, ...]] = {}
    found: set[str] = set()
    for formula in SMALL.formulas():
        answers = SMALL.choices_of(formula)

        def choose(name: str, choices: Sequence[ParamValue], answers: dict[str, ParamValue] = answers) -> ParamValue:
            assert options.setdefault(name, tuple(choices)) == tuple(choices)
            return answers[name]

        assert SMALL.from_choices(choose) == formula
        found.add(str(formula))
    assert len(found) == SMALL.count
    assert set(options) == {f"{i}/{g}" for i in ("global", "logits.roi") for g in ("body", "weight")}
    assert SMALL.from_choices(lambda name, choices: OFF) == Formula()


def test_single_terms_are_varied_one_gene_at_a_time() -> None:
    space = SMALL.spaces.single("global", (), 3)
    terms = {str(formula) for formula in SMALL.formulas() if formula.inputs == ("global",)}
    rng = random.Random(0)
    assert {str(space.random(rng)) for _ in range(300)} == terms
    parent = Formula.parse("global: l2 * 10").canonical()
    children = [space.mutate(parent, rng) for _ in range(300)]
    assert {str(child) for child in children} == {
        "global: l2 * 1", "global: l1 * 10", "global: pearson(nhw) * 10",
    }  # fmt: skip
    mixed = {str(space.crossover(parent, Formula.parse("global: l1 * 1").canonical(), rng)) for _ in range(50)}
    assert mixed == {"global: l2 * 1", "global: l1 * 10"}


def test_whole_formulas_are_drawn_evenly_and_stay_in_the_grid() -> None:
    space = SMALL.spaces.whole(SMALL.names, (), 3)
    rng = random.Random(0)
    drawn = Counter(str(space.random(rng)) for _ in range(35 * 200))
    assert set(drawn) == {"none", *all_texts(SMALL)}
    assert min(drawn.values()) > 120 and max(drawn.values()) < 280  # 200 ± 5.6 standard deviations
    formulas = list(SMALL.formulas())
    for _ in range(500):
        a, b = rng.choice(formulas), rng.choice(formulas)
        child = space.mutate(a, rng)
        assert child in SMALL and len(set(child.terms) ^ set(a.terms)) in (1, 2)
        mixed = space.crossover(a, b, rng)
        assert mixed == Formula() or (mixed in SMALL and set(mixed.terms) <= {*a.terms, *b.terms})


def test_the_combined_space_has_the_found_bodies_with_every_weight() -> None:
    terms = {"global": [Formula.parse("global: l2 * 10").terms[0].canonical()], "logits.roi": []}
    space = SMALL.spaces.combined(terms)
    assert list(map(str, space.given)) == ["global: l2 * 10"]
    rng = random.Random(0)
    assert {str(space.random(rng)) for _ in range(100)} == {"none", "global: l2 * 1", "global: l2 * 10"}


def test_a_part_of_the_inputs_may_be_searched() -> None:
    space = SMALL.spaces.whole(("logits.roi",), (), 3)
    rng = random.Random(0)
    assert len({str(space.random(rng)) for _ in range(200)} - {"none"}) == 4


def test_what_the_grid_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="expected given formulas of the grid, found 'global: l2 \\* 3'"):
        SMALL.spaces.whole(SMALL.names, [Formula.parse("global: l2 * 3")], 3)
    batchwise = Grid((GridInput("global", ("norm(n) | l1",), (1.0,)),))
    with pytest.raises(ValueError, match=r"batches of \d images, found 1"):
        batchwise.spaces.single("global", (), 1)


def test_its_spaces_can_be_sent_to_another_process() -> None:
    space = pickle.loads(pickle.dumps(SMALL.spaces)).whole(SMALL.names, (), 3)
    assert space.random(random.Random(1)) == SMALL.spaces.whole(SMALL.names, (), 3).random(random.Random(1))
