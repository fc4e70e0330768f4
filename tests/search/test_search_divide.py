"""Divide and conquer: its phases, what passes from one to the next, and extending it."""

from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest
from search_objective import INPUTS, curve, noisy_ap, true_ap

from autodet.distill.formula import Formula
from autodet.distill.grammar import WEIGHT_PHASE_FEATURES, WEIGHT_PHASE_RESPONSES
from autodet.search import (
    FINISHED,
    WAIT,
    Ask,
    Breeding,
    Candidate,
    DivideAndConquer,
    DivideSettings,
    Rules,
    rebuild,
    rng_for,
    run_serial,
)
from autodet.search.spaces import scaled, weight_factors, weight_space

RULES = Rules(controls=3, finalists=3, final_runs=3, stop=None)
SETTINGS = DivideSettings(12, 12, Breeding(3), Breeding(3), replicated=4, runs=3, rules=RULES)


@pytest.fixture
def finished() -> DivideAndConquer:
    search = DivideAndConquer(INPUTS, 0, SETTINGS)
    run_serial(search, curve)
    return search


def in_phase(search: DivideAndConquer, phase: str) -> list[Ask]:
    return [ask for ask in search.history.asks if ask.phase == phase]


def test_phases_follow_one_another_with_their_budgets(finished: DivideAndConquer) -> None:
    phases = [ask.phase for ask in finished.history.asks]
    order = list(dict.fromkeys(phases))
    assert order == ["control", "formula", "replicate", "weights", "final"]
    assert phases == sorted(phases, key=order.index)
    counts = Counter(phases)
    assert (counts["control"], counts["formula"], counts["weights"]) == (3, 36, 12)
    assert 8 <= counts["replicate"] <= 2 * 6 and counts["final"] <= 6


def test_inputs_take_turns_and_reach_four_generations(finished: DivideAndConquer) -> None:
    formulas = in_phase(finished, "formula")
    assert [ask.group for ask in formulas] == list(INPUTS) * 12
    assert all(ask.candidate.formula.inputs == (ask.group,) for ask in formulas)
    assert {(ask.group, ask.generation) for ask in formulas} == {(i, g) for i in INPUTS for g in range(4)}
    for ask in formulas:
        assert {finished.history.asks[parent].group for parent in ask.parents} <= {ask.group}


def test_controls_come_first_and_other_controls_on_demand() -> None:
    search = DivideAndConquer(INPUTS, 0, replace(SETTINGS, rules=replace(RULES, inherit=False, other_controls=True)))
    asks = [search.ask() for _ in range(7)]
    assert all(isinstance(ask, Ask) for ask in asks)
    candidates = [ask.candidate for ask in asks if isinstance(ask, Ask)]
    assert candidates[:6] == [Candidate(Formula(), inherit, r) for inherit in (False, True) for r in range(3)]
    assert candidates[6].formula.terms and not candidates[6].inherit


def test_the_best_overall_and_of_each_input_are_replicated(finished: DivideAndConquer) -> None:
    first = {ask.candidate.arm: noisy_ap(ask.candidate) for ask in in_phase(finished, "formula")}
    ranked = sorted(first, key=first.__getitem__, reverse=True)
    group = {ask.candidate.arm: ask.group for ask in in_phase(finished, "formula")}
    expected = set(ranked[:4]) | {next(arm for arm in ranked if group[arm] == input) for input in INPUTS}
    replicates = in_phase(finished, "replicate")
    assert {ask.candidate.arm for ask in replicates} == expected
    assert Counter(ask.candidate.arm for ask in replicates) == dict.fromkeys(expected, 2)
    assert {ask.candidate.replicate for ask in replicates} == {1, 2}
    assert all(finished.history.asks[ask.parents[0]].candidate.arm == ask.candidate.arm for ask in replicates)


def test_weights_combine_the_best_terms_by_the_allowed_factors(finished: DivideAndConquer) -> None:
    best: dict[str, list[Formula]] = {input: [] for input in INPUTS}
    arms = {ask.candidate.arm: ask.group for ask in in_phase(finished, "formula")}
    for standing in finished.history.standings():
        if standing.candidate.arm in arms and len(best[arms[standing.candidate.arm]]) < 4:
            best[arms[standing.candidate.arm]].append(standing.formula)
    allowed = {
        scaled(formula.terms[0], factor)
        for i in INPUTS
        for formula in best[i]
        for factor in weight_factors(i)
        if factor
    }
    weights = in_phase(finished, "weights")
    assert {term for ask in weights for term in ask.candidate.formula.terms} <= allowed
    assert weights[0].origin == "given" and weights[0].candidate.formula.inputs == INPUTS
    assert any(ask.origin in ("mutation", "crossover") for ask in weights)


def test_the_winner_has_as_many_runs_as_any(finished: DivideAndConquer) -> None:
    runs = Counter(ask.candidate.arm for ask in finished.history.asks if ask.candidate.formula.terms)
    best = finished.best()
    assert best is not None
    assert best.runs == runs[Candidate(best.formula, True).arm] == max(runs.values()) == 3
    assert best.ap == pytest.approx(sum(noisy_ap(Candidate(best.formula, True, r)) for r in range(3)) / 3)
    equals = [arm for arm, count in runs.items() if count == 3]
    means = {
        arm: sum(noisy_ap(a.candidate) for a in finished.history.asks if a.candidate.arm == arm) / 3 for arm in equals
    }
    assert best.ap == pytest.approx(max(means.values()))


def test_phases_change_softly() -> None:
    """Half of the formula phase told is enough to go on; less is not, while the rest is running."""
    search = DivideAndConquer(INPUTS, 0, SETTINGS)
    asked = []
    while isinstance(answer := search.ask(), Ask):
        asked.append(answer)
    assert answer is WAIT and len(asked) == 3 + 36
    for ask in asked[3 : 3 + 18]:
        assert search.ask() is WAIT
        search.tell(ask.id, noisy_ap(ask.candidate))
    after = search.ask()
    assert isinstance(after, Ask) and after.phase == "replicate"


def test_late_results_reach_the_weight_phase() -> None:
    search = DivideAndConquer(("global",), 0, replace(SETTINGS, rules=replace(RULES, controls=0)))
    asked = [ask for ask in (search.ask() for _ in range(12)) if isinstance(ask, Ask)]
    for ask in asked[:-1]:
        search.tell(ask.id, 0.3)
    while isinstance(answer := search.ask(), Ask) and answer.phase != "weights":
        search.tell(answer.id, 0.3)
    assert isinstance(answer, Ask)
    search.tell(asked[-1].id, 0.9)
    body = asked[-1].candidate.formula.terms[0].body
    later = [ask for ask in (search.ask() for _ in range(8)) if isinstance(ask, Ask)]
    assert any(body in str(ask.candidate.formula) for ask in later)


def test_an_input_that_always_fails_is_off() -> None:
    search = DivideAndConquer(INPUTS, 0, SETTINGS)
    run_serial(search, lambda c: [] if "logits.dense" in c.formula.inputs else curve(c))
    assert {i for ask in in_phase(search, "weights") for i in ask.candidate.formula.inputs} == {"global", "logits.roi"}


@pytest.mark.parametrize(
    ("larger", "added"),
    [
        (replace(SETTINGS, weights_budget=24), {"weights": 12, "final": 6}),
        (replace(SETTINGS, budget_per_input=24), {"formula": 36, "replicate": 8}),
    ],
    ids=["weights", "inputs"],
)
def test_a_finished_search_continues_with_a_larger_budget(larger: DivideSettings, added: dict[str, int]) -> None:
    """Each new formula is better than all before, so the new best ones get replicates, or finals, of their own."""
    order: dict[str, int] = {}

    def rising(candidate: Candidate) -> list[float | None]:
        return [0.3 + 0.001 * order.setdefault(candidate.arm, len(order))]

    events = run_serial(DivideAndConquer(INPUTS, 0, SETTINGS), rising)
    search = DivideAndConquer(INPUTS, 0, larger)
    rebuild(search, events)
    before = len(search.history.asks)
    run_serial(search, rising)
    new = search.history.asks[before:]
    assert Counter(ask.phase for ask in new) == added
    repeated = {ask.candidate.arm for ask in new if ask.candidate.replicate == 2}
    best = search.best()
    assert search.ask() is FINISHED
    assert best is not None and best.runs == 3 and Candidate(best.formula, True).arm in repeated


def test_the_weight_phase_breeds_from_the_single_formulas_too() -> None:
    search = DivideAndConquer(INPUTS, 0, SETTINGS)
    run_serial(search, lambda c: [] if len(c.formula.terms) > 1 else curve(c))
    parents = {parent for ask in in_phase(search, "weights") for parent in ask.parents}
    assert "formula" in {search.history.asks[parent].phase for parent in parents}


def test_budgets_below_four_generations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"budget_per_input of at least 4 generations of 6 = 24, found 23"):
        DivideSettings(budget_per_input=23)
    with pytest.raises(ValueError, match="weights_budget"):
        DivideSettings(weights_budget=7)
    assert DivideSettings(weights_budget=0).weights_budget == 0
    with pytest.raises(ValueError, match="inputs"):
        DivideAndConquer((), 0)


def test_the_weight_space_is_what_it_says() -> None:
    texts = {"global": ("l1 * 10", "l2 * 0.1"), "logits.dense": ("l1 * 5",), "logits.roi": ()}
    terms = {i: [Formula.parse(f"{i}: {text}").terms[0] for text in found] for i, found in texts.items()}
    space = weight_space(terms)
    assert list(map(str, space.given)) == ["global: l1 * 10; logits.dense: l1 * 5"]
    drawn = {str(space.random(rng_for(0, n)).canonical()) for n in range(3000)}
    features = {
        f"global: {d} * {w:g}"
        for d, base in (("l1", 10), ("l2", 0.1))
        for w in (base * f for f in WEIGHT_PHASE_FEATURES if f)
    }
    responses = {f"logits.dense: l1 * {5 * f:g}" for f in WEIGHT_PHASE_RESPONSES if f}
    assert drawn == {"none"} | features | responses | {f"{a}; {b}" for a in features for b in responses}
    start = space.given[0]
    for n in range(100):
        child = space.mutate(start, rng_for(1, n))
        assert len(set(child.terms) ^ set(start.terms)) in (1, 2)
        mixed = space.crossover(start, child, rng_for(2, n))
        assert set(mixed.terms) <= set(start.terms) | set(child.terms)


def test_found_weights_are_improved() -> None:
    """The weight phase starts from the single formulas; without noise it never ends below them, and mostly above."""
    gains = []
    for seed in range(8):
        search = DivideAndConquer(INPUTS, seed, SETTINGS)
        run_serial(search, lambda candidate: [true_ap(candidate.formula)])
        best = search.best()
        assert best is not None
        gains.append(true_ap(best.formula) - max(true_ap(ask.candidate.formula) for ask in in_phase(search, "formula")))
    assert min(gains) >= 0 and fmean(gains) > 0.005
