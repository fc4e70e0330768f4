"""What every search promises, whoever evaluates its candidates and in whatever order."""

import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from search_objective import INPUTS, curve, noisy_ap
from session_driver import follow

from autodet.distill.formula import Formula
from autodet.records import Event
from autodet.search import (
    FINISHED,
    WAIT,
    Ask,
    AskTell,
    Breeding,
    Candidate,
    DivideAndConquer,
    DivideSettings,
    FixedList,
    Rules,
    StopRule,
    flat_evolution,
    random_search,
    rebuild,
    run_serial,
)

RULES = Rules(controls=2, finalists=2, final_runs=3, stop=StopRule(min_epochs=1, min_known=2, margin=0.02))
SMALL = DivideSettings(8, 8, Breeding(2), Breeding(2), replicated=2, runs=2, rules=RULES)


def divide(seed: int) -> AskTell:
    return DivideAndConquer(INPUTS, seed, SMALL)


def flat(seed: int) -> AskTell:
    return flat_evolution(INPUTS, seed, 20, Breeding(4), RULES)


def whole_random(seed: int) -> AskTell:
    return random_search(INPUTS, seed, 20, RULES)


def fixed(seed: int) -> AskTell:
    texts = ("none", "global: l2 * 1", "logits.roi: softmax(c) | kl * 4")
    return FixedList([(Candidate(Formula.parse(t), True, r), t) for r in range(seed, seed + 4) for t in texts])


Make = Callable[[int], AskTell]
SEARCHES: dict[str, Make] = {"divide": divide, "flat": flat, "random": whole_random, "fixed": fixed}


@pytest.fixture(params=list(SEARCHES))
def make(request: pytest.FixtureRequest) -> Make:
    return SEARCHES[request.param]


def asks(events: Sequence[Event]) -> list[Ask]:
    return [Ask.from_payload(e.id, e.payload) for e in events if e.kind == "asked"]


@pytest.mark.parametrize("workers", [1, 3, 30])
def test_candidates_are_unique_and_within_budget(make: Make, workers: int) -> None:
    search = make(0)
    found = asks(run_serial(search, curve, workers))
    assert [ask.id for ask in found] == list(range(len(found)))
    assert len({ask.candidate.key for ask in found}) == len(found)
    assert 12 <= len(found) <= search.budget
    assert all(parent < ask.id for ask in found for parent in ask.parents)
    assert all(ask.candidate.formula == ask.candidate.formula.canonical() for ask in found)


def test_finished_stays_finished(make: Make) -> None:
    search = make(0)
    run_serial(search, curve)
    assert [search.ask() for _ in range(3)] == [FINISHED] * 3


@pytest.mark.parametrize("workers", [1, 4])
def test_a_rebuilt_search_continues_as_the_uninterrupted_one(make: Make, workers: int) -> None:
    events = run_serial(make(3), curve, workers, seed=5)
    for cut in range(0, len(events), 13):
        search = make(3)
        rebuild(search, events[:cut])
        follow(search, events[cut:])
        assert search.ask() is FINISHED


def test_a_crash_in_the_middle_changes_nothing_with_one_worker(make: Make) -> None:
    events = run_serial(make(3), curve)
    for cut in range(1, len(events), 17):
        search = make(3)
        rebuild(search, events[:cut])
        resumed = run_serial(search, curve)
        assert asks([*events[:cut], *resumed]) == asks(events)


def test_waiting_leaves_no_trace(make: Make) -> None:
    polled, plain = make(0), make(0)
    while isinstance(answer := polled.ask(), Ask):
        plain.replay(answer)
    assert [polled.ask() for _ in range(5)] == [WAIT] * 5
    for ask in tuple(plain.history.asks):
        for search in (polled, plain):
            search.tell(ask.id, noisy_ap(ask.candidate))
    assert polled.ask() == plain.ask() != WAIT


def test_the_seed_decides(make: Make) -> None:
    first, again, other = (asks(run_serial(make(seed), curve)) for seed in (1, 1, 2))
    assert first == again
    assert [ask.candidate for ask in first] != [ask.candidate for ask in other]


@pytest.mark.parametrize("failure", [[], [None], [math.nan]], ids=["crash", "none", "nan"])
def test_failures_are_survived_and_have_no_children(make: Make, failure: list[float | None]) -> None:
    def objective(candidate: Candidate) -> Sequence[float | None]:
        return failure if "l1" in str(candidate.formula) else curve(candidate)

    search = make(0)
    events = run_serial(search, objective, workers=2)
    found = asks(events)
    failed = {id for id, status in search.history.ends.items() if status == "failed"}
    assert failed == {ask.id for ask in found if "l1" in str(ask.candidate.formula)}
    assert not failed & {parent for ask in found for parent in ask.parents}
    best = search.best()
    assert best is not None and "l1" not in str(best.formula)


def test_if_everything_fails_the_search_goes_on_to_its_end(make: Make) -> None:
    search = make(0)
    found = asks(run_serial(search, lambda candidate: [], workers=2))
    assert len(found) >= 12
    assert all(ask.origin in ("control", "random", "given") for ask in found)
    assert search.best() is None


def test_candidates_that_fall_behind_are_stopped_and_never_win() -> None:
    """Heavy formulas start low and would end highest: a winner among the stopped would be noticed."""

    def objective(candidate: Candidate) -> Sequence[float | None]:
        heavy = max((term.weight for term in candidate.formula.terms), default=0) >= 20
        return [0.2, 0.9] if heavy else [0.4, 0.4]

    for make in (divide, flat, whole_random):
        search = make(2)
        events = run_serial(search, objective)
        stopped = [e for e in events if e.kind == "told" and e.payload["status"] == "stopped"]
        assert stopped and all(e.payload["ap"] == 0.2 and e.payload["epochs"] == 1 for e in stopped)
        kept = {ask.id for ask in asks(events) if ask.origin in ("control", "replicate")}
        assert kept and not kept & {e.id for e in stopped}
        best = search.best()
        assert best is not None
        assert Candidate(best.formula, True).arm not in {search.history.asks[e.id].candidate.arm for e in stopped}


def test_controls_and_replicates_run_to_their_end() -> None:
    search = random_search(INPUTS, 0, 20, Rules(controls=2, stop=StopRule(min_known=1, margin=0.0)))
    asks = [ask for ask in (search.ask() for _ in range(4)) if isinstance(ask, Ask)]
    assert [ask.origin for ask in asks] == ["control", "control", "random", "random"]
    assert [search.report(ask.id, 1, 0.4 - ask.id / 10) for ask in asks] == [False, False, False, True]
    for replicate in (1, 2):
        candidate = replace(asks[2].candidate, replicate=replicate)
        search.replay(Ask(3 + replicate, candidate, "final", "after 20", origin="replicate"))
    assert [search.report(id, 1, 0.4 - id / 10) for id in (4, 5)] == [False, False]


def test_after_the_finals_the_winner_is_chosen_among_equals() -> None:
    search = random_search(INPUTS, 0, 5, Rules(controls=0, finalists=1))
    asks = [ask for ask in (search.ask() for _ in range(5)) if isinstance(ask, Ask)]
    for ask, ap in zip(asks, (0.9, 0.5, 0.3, 0.3, 0.3), strict=True):
        search.tell(ask.id, ap)
    for replicate in (1, 2):
        candidate = replace(asks[1].candidate, replicate=replicate)
        search.replay(Ask(4 + replicate, candidate, "final", "after 5", origin="replicate"))
    search.tell(5, 0.5)
    best = search.best()
    assert best == (asks[0].candidate.formula, 0.9, 1)
    search.tell(6, 0.5)
    best = search.best()
    assert best == (asks[1].candidate.formula, 0.5, 3)


def test_misuse_is_refused(make: Make) -> None:
    search = make(0)
    ask = search.ask()
    assert isinstance(ask, Ask)
    with pytest.raises(ValueError, match="expected ask number 1, found 0"):
        search.replay(ask)
    with pytest.raises(ValueError, match="asked candidate"):
        search.tell(7, 0.1)
    with pytest.raises(ValueError, match="asked candidate"):
        search.report(-1, 1, 0.1)
    search.tell(0, 0.1)
    with pytest.raises(ValueError, match="second"):
        search.tell(0, 0.1)


def test_a_search_survives_pickling(make: Make) -> None:
    search = make(0)
    events = run_serial(make(0), curve)
    rebuild(search, events[:20])
    copy: AskTell = pickle.loads(pickle.dumps(search))
    follow(copy, events[20:])


@pytest.mark.parametrize("name", ["divide", "flat"])
def test_five_hundred_asks_take_less_than_two_seconds(name: str) -> None:
    if name == "divide":
        search: AskTell = DivideAndConquer(INPUTS, 0, DivideSettings(128, 128, rules=RULES))
    else:
        search = flat_evolution(INPUTS, 0, 500, rules=RULES)
    start = time.process_time()
    count = 0
    while count < 500 and isinstance(ask := search.ask(), Ask):
        search.tell(ask.id, noisy_ap(ask.candidate))
        count += 1
    assert count == 500
    assert time.process_time() - start < 2
