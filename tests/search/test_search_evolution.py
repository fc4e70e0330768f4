"""Breeding: who becomes a parent, what is drawn again, and that it pays."""

import random
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from search_objective import INPUTS, WANTED, curve, noisy_ap, true_ap

from autodet.distill.formula import Formula
from autodet.distill.published import PUBLISHED
from autodet.search import (
    FINISHED,
    WAIT,
    Admit,
    Ask,
    AskTell,
    Breeding,
    DivideAndConquer,
    DivideSettings,
    Evolution,
    History,
    Rules,
    Space,
    WholeFormulaSearch,
    admit_all,
    flat_evolution,
    random_search,
    run_serial,
)
from autodet.search.spaces import term_space

BARE = Rules(controls=0, finalists=0, stop=None)


def weight_space(count: int) -> Space:
    """`count` formulas that differ in their weight; children are neighbours of their parents."""

    def formula(number: int) -> Formula:
        return Formula.parse(f"global: l2 * {1 + number % count}")

    def mutate(parent: Formula, rng: random.Random) -> Formula:
        return formula(int(parent.terms[0].weight) - 1 + rng.choice((-1, 1)))

    return Space(lambda rng: formula(rng.randrange(count)), mutate, lambda a, b, rng: mutate(a, rng))


def population(space: Space, size: int, admit: Admit = admit_all) -> Evolution:
    return Evolution("p", "p", 0, True, space, Breeding(size, tournament=size, crossover=0.0), admit)


def weight(ask: Ask) -> float:
    return ask.candidate.formula.terms[0].weight


def test_generations_and_parents() -> None:
    """With a tournament of the whole population, the parent of every child is the best member so far."""
    search = WholeFormulaSearch(population(weight_space(1000), 5), 20, BARE)
    events = run_serial(search, lambda candidate: [candidate.formula.terms[0].weight])
    asks = search.history.asks
    assert len(events) == 3 * 20
    assert [ask.generation for ask in asks] == [n // 5 for n in range(20)]
    assert [ask.origin for ask in asks] == ["random"] * 5 + ["mutation"] * 15
    for ask in asks[5:]:
        assert ask.parents == (max(asks[: ask.id], key=weight).id,)
        assert abs(weight(ask) - weight(asks[ask.parents[0]])) == 1


def test_a_space_is_exhausted_once_and_completely() -> None:
    search = WholeFormulaSearch(population(weight_space(9), 3), 50, BARE)
    run_serial(search, curve)
    assert sorted(map(weight, search.history.asks)) == list(range(1, 10))
    assert search.ask() is FINISHED


def test_an_exhausted_space_waits_for_those_running() -> None:
    search = WholeFormulaSearch(population(weight_space(3), 3), 50, BARE)
    for _ in range(3):
        assert isinstance(search.ask(), Ask)
    assert search.ask() is WAIT


def test_refused_formulas_are_recorded_probed_once_and_never_asked() -> None:
    probed: list[str] = []

    def admit(formula: Formula) -> str | None:
        probed.append(str(formula))
        return "odd" if formula.terms[0].weight % 2 else None

    search = WholeFormulaSearch(population(weight_space(20), 4, admit), 10, BARE)
    run_serial(search, curve)
    asks = search.history.asks
    assert sorted(map(weight, asks)) == list(range(2, 21, 2))
    refused = [text for ask in asks for text, reason in ask.rejected if reason == "odd"]
    assert refused and len(set(refused)) == len(refused)
    assert len(probed) == len(set(probed)) == len(refused) + len(asks)


def test_given_formulas_come_first() -> None:
    given = [PUBLISHED[name].formula for name in ("detkds", "pkd", "kd")]
    flat = flat_evolution(INPUTS, 0, 8, Breeding(4), BARE, given=given)
    run_serial(flat, curve)
    assert [ask.origin for ask in flat.history.asks[:4]] == ["given"] * 3 + ["random"]
    assert [ask.candidate.formula for ask in flat.history.asks[:3]] == [formula.canonical() for formula in given]
    divided = DivideAndConquer(INPUTS, 0, DivideSettings(rules=BARE), given=given)
    first = [divided.ask() for _ in range(6)]
    origins = [(ask.group, ask.origin) for ask in first if isinstance(ask, Ask)]
    assert origins == [
        ("global", "given"), ("logits.dense", "random"), ("logits.roi", "given"),
        ("global", "given"), ("logits.dense", "random"), ("logits.roi", "random"),
    ]  # fmt: skip


def test_given_formulas_outside_the_grammar_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="slot"):
        flat_evolution(INPUTS, 0, 8, given=[Formula.parse("global: norm(n) > catt | l1")])


def test_nothing_is_offered_that_needs_a_larger_batch() -> None:
    search = flat_evolution(INPUTS, 0, 60, rules=BARE, min_batch=1)
    run_serial(search, curve)
    assert {ask.candidate.formula.min_batch for ask in search.history.asks} == {1}


def test_a_space_that_is_exhausted_is_left_without_drawing() -> None:
    drawn: list[int] = []

    def random_formula(rng: random.Random) -> Formula:
        drawn.append(1)
        return Formula.parse(f"global: l2 * {1 + rng.randrange(3)}")

    space = Space(random_formula, lambda a, rng: random_formula(rng), lambda a, b, rng: random_formula(rng))
    for size in (None, 3):
        drawn.clear()
        search = WholeFormulaSearch(population(replace(space, size=size), 2), 10, BARE)
        run_serial(search, lambda candidate: [0.1])
        assert len(search.history.asks) == 3
        before = len(drawn)
        assert search.ask() is FINISHED and (len(drawn) == before) == (size == 3)


def test_the_size_of_a_space_is_what_can_be_drawn_of_it() -> None:
    space = term_space("localization.roi")
    rng = random.Random(0)
    drawn = {space.random(rng) for _ in range(2000)}
    drawn |= {space.mutate(formula, rng) for formula in list(drawn)}
    assert len(drawn) == space.size == 42
    given = Formula.parse("localization.roi: l1 * 3")  # a weight that is not drawn, but may be inherited
    assert term_space("localization.roi", [given]).size is None


def test_no_history_no_members() -> None:
    ask = population(weight_space(5), 1).propose(History())
    assert ask is not None and ask.id == 0 and ask.origin == "random"


def test_wrong_sizes_are_refused() -> None:
    for wrong in ((0, 3, 0.3), (6, 0, 0.3), (6, 3, 1.5)):
        with pytest.raises(ValueError, match="expected population"):
            Breeding(*wrong)
    with pytest.raises(ValueError, match="at least 1 candidate"):
        random_search(INPUTS, 0, 0)


def test_searching_beats_drawing_at_equal_budget() -> None:
    """Paired over 20 seeds, noise on; the true AP of what each search calls the best. Upper end: 0.55."""
    rules, noise = Rules(controls=1, finalists=2, final_runs=3, stop=None), 0.004
    settings = DivideSettings(20, 12, Breeding(4), Breeding(3), replicated=2, runs=2, rules=rules)
    gains: dict[str, list[float]] = {"divide": [], "flat": []}
    for seed in range(20):
        found = {}
        divide = DivideAndConquer(INPUTS, seed, settings)
        explore = divide.budget - rules.overhead
        searches: dict[str, AskTell] = {
            "divide": divide,
            "flat": flat_evolution(INPUTS, seed, explore, settings.formulas, rules),
            "random": random_search(INPUTS, seed, explore, rules),
        }
        for name, search in searches.items():
            run_serial(search, lambda candidate: [noisy_ap(candidate, noise)], workers=2, seed=seed)
            assert len(search.history.asks) <= divide.budget
            best = search.best()
            assert best is not None
            found[name] = true_ap(best.formula)
        for name in gains:
            gains[name].append(found[name] - found["random"])
    for name, values in gains.items():
        error = stdev(values) / len(values) ** 0.5
        assert fmean(values) > 0.005 + 2 * error, f"{name}: {fmean(values):.4f} ± {error:.4f}"


def test_the_objective_has_the_optimum_it_names() -> None:
    perfect = Formula.parse(
        "global: catt > pool(2) > norm(c) | l1 * 10; logits.dense: mask > softmax(hw) | kl * 1;"
        "logits.roi: affine > softmax(c) | cosine * 5"
    )
    assert true_ap(perfect) == pytest.approx(0.55) and set(perfect.inputs) == set(WANTED)
