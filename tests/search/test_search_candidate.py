"""Candidates and asks as ledger payloads; random numbers."""

import json
import random

import pytest
from search_objective import INPUTS

from autodet.distill.formula import Formula
from autodet.distill.grammar import random_formula
from autodet.search import EMPTY, Ask, Candidate, rng_for

ASK = Ask(
    id=7,
    candidate=Candidate(Formula.parse("global: catt > pool(2) | l1 * 6; logits.roi: softmax(c, t=2) | kl"), False, 2),
    phase="weights",
    group="weights",
    generation=3,
    parents=(1, 4),
    origin="crossover",
    rejected=(("global: l2 * 50", "the loss is above 100"),),
)


def test_an_ask_reads_back_from_the_ledgers_json() -> None:
    payload = json.loads(json.dumps(ASK.to_payload()))
    assert Ask.from_payload(7, payload) == ASK
    assert payload["candidate"] == {"formula": str(ASK.candidate.formula), "inherit": False, "replicate": 2}
    assert payload["rejected"] == [["global: l2 * 50", "the loss is above 100"]]


def test_the_control_reads_back() -> None:
    control = Candidate(EMPTY, True)
    assert Candidate.from_json(json.loads(json.dumps(control.to_json()))) == control


def test_canonical_formulas_read_back_equal() -> None:
    """Otherwise a replayed search would breed from other parents than the live one."""
    rng = random.Random(0)
    for _ in range(200):
        formula = random_formula(INPUTS, rng).canonical()
        assert Formula.parse(str(formula)) == formula == formula.canonical()


def test_the_key_tells_apart_what_trains_differently() -> None:
    a, b = Formula.parse("global: l2 * 1; logits.roi: l1 * 2"), Formula.parse("logits.roi: l1 * 2.0; global: l2")
    assert Candidate(a, True).key == Candidate(b, True).key
    others = [Candidate(a, False), Candidate(a, True, 1), Candidate(EMPTY, True), Candidate(a, True)]
    assert len({candidate.key for candidate in others}) == 4
    assert Candidate(a, True, 1).arm == Candidate(a, True).arm != Candidate(a, False).arm


def test_random_numbers_depend_on_every_part_and_stay_the_same() -> None:
    parts: list[tuple[int, ...]] = [(0, 1), (0, 2), (1, 1), (0, 11), (0, 1, 1), (1, 11)]
    draws = [rng_for(*p).random() for p in parts]
    assert len(set(draws)) == len(set(parts))
    assert rng_for(3, 4, "global").random() == pytest.approx(random.Random("3/4/global").random())
