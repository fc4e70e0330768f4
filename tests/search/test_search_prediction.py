"""The model of what terms add: its numbers against direct ones, and the phase that asks by it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from search_objective import INPUTS, curve, noisy_ap
from search_tables import SMALL, made_table

from autodet.distill.formula import INPUTS as INPUTS_OF_ALL
from autodet.distill.formula import Formula, Term
from autodet.distill.grammar import mutate_formula, random_formula
from autodet.search import (
    Ask,
    Breeding,
    DivideAndConquer,
    DivideSettings,
    Prediction,
    Rules,
    divide_conquer,
    prediction,
    run_serial,
)
from autodet.search.prediction import (
    BODY,
    LEVEL,
    MOST,
    NOISE,
    PAIR,
    TERM,
    USED,
    WEIGHT,
    _encoded,
    expected_improvement,
)

BARE = Rules(controls=0, finalists=0, stop=None)


def shared(a: Term, b: Term) -> float:
    """What two terms share, written out for one pair."""
    if a.input != b.input:
        return 0.0
    near = math.exp(-abs(math.log(a.weight) - math.log(b.weight)))
    return USED + BODY * (a.body == b.body) + WEIGHT * near + TERM * (a.body == b.body) * near


def covariance(first: Formula, second: Formula) -> float:
    """Of two formulas, written out."""
    parts = [sum(shared(a, b) for b in second.terms) for a in first.terms]
    return LEVEL + sum(parts) + PAIR * sum(x * y for x, y in itertools.combinations(parts, 2)) / MOST**2


def predict(
    known: Sequence[Formula], results: Sequence[float], noise: Sequence[float], wanted: Sequence[Formula]
) -> tuple[prediction.Array, prediction.Array]:
    model = prediction.Model(known, wanted)
    return model.predict(results, noise, model.wanted)


def test_predictions_are_those_of_the_conditioned_normal_distribution() -> None:
    formulas = list(SMALL.formulas())
    random.Random(0).shuffle(formulas)
    known, wanted = formulas[:9], formulas[9:]
    results = [math.sin(n) for n in range(9)]
    noise = [NOISE / (1 + n % 3) for n in range(9)]
    mean, deviation = predict(known, results, noise, wanted)
    between = np.array([[covariance(w, k) for k in known] for w in wanted])
    inverse = np.linalg.inv(np.array([[covariance(a, b) for b in known] for a in known]) + np.diag(noise))
    scaled = (np.array(results) - np.mean(results)) / np.std(results)
    np.testing.assert_allclose(mean, np.mean(results) + np.std(results) * between @ inverse @ scaled, rtol=1e-6)
    own = np.array([covariance(w, w) for w in wanted])
    variance = own - np.einsum("wk,kl,wl->w", between, inverse, between)
    np.testing.assert_allclose(deviation, np.std(results) * np.sqrt(variance), rtol=1e-4)


def test_covariances_of_formulas_on_all_inputs_are_as_written_out() -> None:
    rng = random.Random(0)
    formulas = [random_formula(tuple(INPUTS_OF_ALL), rng) for _ in range(12)]
    formulas += [mutate_formula(formula, tuple(INPUTS_OF_ALL), rng) for formula in formulas]
    bodies, logs = _encoded(formulas)
    found = prediction.covariance((bodies, logs), (bodies[:7], logs[:7]))
    np.testing.assert_allclose(found, [[covariance(a, b) for b in formulas[:7]] for a in formulas], rtol=1e-12)


def test_the_results_of_candidates_that_run_are_allowed_for_as_predicted() -> None:
    """In one model, as in two that are made one after the other."""
    formulas = list(SMALL.formulas())
    random.Random(1).shuffle(formulas)
    known, running, wanted = formulas[:8], formulas[8:12], formulas[12:]
    results, noise = [math.cos(n) for n in range(8)], [NOISE] * 8
    model = prediction.Model([*known, *running], wanted)
    taken, _ = model.predict(results, noise, slice(8, 12))
    np.testing.assert_allclose(taken, predict(known, results, noise, running)[0])
    expected = predict([*known, *running], [*results, *taken], [NOISE] * 12, wanted)
    np.testing.assert_allclose(model.predict([*results, *taken], [NOISE] * 12, model.wanted), expected)


def test_of_many_results_the_model_goes_by_the_best_and_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting(prediction.Model):
        def __init__(self, known: Sequence[Formula], wanted: Sequence[Formula]) -> None:
            sizes.append(len(known))
            super().__init__(known, wanted)

    monkeypatch.setattr(prediction, "Model", Counting)
    monkeypatch.setattr(prediction, "RUNNING", 3)
    monkeypatch.setattr(divide_conquer, "KNOWN", 10)
    settings = DivideSettings(8, 40, Breeding(2), Breeding(3), replicated=0, runs=1, rules=BARE)
    search = DivideAndConquer(INPUTS, 0, settings, min_batch=1, prediction=Prediction(singles=4, pool=6))
    run_serial(search, lambda candidate: [noisy_ap(candidate)], workers=5)
    assert len(search.history.asks) == search.budget and max(sizes) == sizes[-1] == 13


def test_what_terms_add_is_found_from_others_that_have_them() -> None:
    """Without noise, sums of effects: the best pair is predicted from formulas that never have both."""
    gains = {"global: l2 * 10": 3.0, "global: l1 * 10": 1.0, "logits.roi: l2 * 10": 2.0, "logits.roi: l2 * 1": 0.0}
    texts = [*gains, "global: l2 * 10; logits.roi: l2 * 1", "global: l1 * 10; logits.roi: l2 * 10"]
    known = [Formula.parse(text) for text in texts]
    results = [sum(gains[str(term)] for term in formula.terms) for formula in known]
    pairs = [f"{a}; {b}" for a in list(gains)[:2] for b in list(gains)[2:]]
    mean, _ = predict(known, results, [0.01] * len(known), [Formula.parse(pair) for pair in pairs])
    assert int(np.argmax(mean)) == pairs.index("global: l2 * 10; logits.roi: l2 * 10")


def test_expected_improvement_against_samples() -> None:
    mean, deviation = np.array([0.0, 1.0, -3.0]), np.array([1.0, 0.1, 2.0])
    samples = np.random.default_rng(0).normal(mean, deviation, size=(400_000, 3))
    expected = np.maximum(samples - 0.5, 0).mean(axis=0)
    np.testing.assert_allclose(expected_improvement(mean, deviation, best=0.5), expected, atol=0.004)
    assert expected_improvement(np.zeros(2), np.array([0.1, 0.2]), best=0.3)[1] > 0


def test_equal_results_can_be_predicted_from() -> None:
    known = [Formula.parse(text) for text in ("global: l2 * 1", "global: l1 * 1")]
    mean, deviation = predict(known, [0.3, 0.3], [NOISE] * 2, known)
    np.testing.assert_allclose(mean, 0.3)
    assert (deviation > 0).all()


def test_the_budget_is_that_of_evolution_and_single_formulas_are_fewer(tmp_path: Path) -> None:
    table = made_table(tmp_path / "table.csv")
    settings = DivideSettings(6, 12, Breeding(1), Breeding(3), replicated=0, runs=1, rules=BARE)
    plain = DivideAndConquer(SMALL.names, 0, settings, spaces=SMALL.spaces)
    search = DivideAndConquer(SMALL.names, 0, settings, spaces=SMALL.spaces, prediction=Prediction(singles=2))
    assert search.budget == plain.budget == 2 * 6 + 12
    run_serial(search, table.objective)
    phases = [ask.phase for ask in search.history.asks]
    assert phases == ["formula"] * 4 + ["weights"] * 20
    assert {len(ask.candidate.formula.terms) for ask in search.history.asks[4:]} == {1, 2}


def test_running_candidates_are_not_repeated_in_spirit() -> None:
    """Asked for several at once, it does not ask for the same term everywhere: results to come are allowed for."""
    settings = DivideSettings(4, 12, Breeding(1), Breeding(3), replicated=0, runs=1, rules=BARE)
    search = DivideAndConquer(SMALL.names, 0, settings, spaces=SMALL.spaces, prediction=Prediction(singles=2))
    for _ in range(4):
        ask = search.ask()
        assert isinstance(ask, Ask)
        search.tell(ask.id, 0.2 + 0.01 * ask.id)
    together = [ask.candidate.formula for ask in (search.ask() for _ in range(6)) if isinstance(ask, Ask)]
    assert len(set(together)) == 6 and len({term.body for formula in together for term in formula.terms}) >= 4


def test_it_moves_in_the_whole_grammar_too() -> None:
    settings = DivideSettings(8, 12, Breeding(2), Breeding(3), replicated=0, runs=1, rules=BARE)
    search = DivideAndConquer(INPUTS, 0, settings, min_batch=1, prediction=Prediction(singles=4, pool=12))
    run_serial(search, lambda candidate: [noisy_ap(candidate, 0.004)], workers=2)
    asks = search.history.asks
    assert len(asks) == search.budget == 3 * 8 + 12
    assert {ask.origin for ask in asks[12:]} >= {"mutation", "crossover"}
    assert all(ask.candidate.formula.min_batch == 1 for ask in asks)
    best = search.best()
    assert best is not None and len(best.formula.terms) > 1


def test_replicates_and_finals_follow_as_with_evolution() -> None:
    settings = DivideSettings(
        8, 8, Breeding(2), Breeding(2), replicated=2, runs=2, rules=Rules(controls=2, finalists=2)
    )
    search = DivideAndConquer(INPUTS, 0, settings, prediction=Prediction(singles=3))
    run_serial(search, curve, workers=2)
    phases = [ask.phase for ask in search.history.asks]
    assert list(dict.fromkeys(phases)) == ["control", "formula", "replicate", "weights", "final"]
    assert phases.count("formula") == 9 and phases.count("weights") == 8 + 3 * 5
    best = search.best()
    assert best is not None and best.runs == 3


def test_wrong_sizes_are_refused() -> None:
    for wrong in ((0, 10), (2, 0)):
        with pytest.raises(ValueError, match="singles and pool of at least 1"):
            Prediction(*wrong)
