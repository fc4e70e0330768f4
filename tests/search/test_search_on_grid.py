"""What every search promises, on a grid: it stays inside, asks nothing twice, repeats itself, and resumes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from search_tables import SMALL, made_table
from session_driver import follow

from autodet.distill.formula import Formula
from autodet.records import Event
from autodet.search import (
    FINISHED,
    Ask,
    AskTell,
    Breeding,
    DivideAndConquer,
    DivideSettings,
    Prediction,
    Rules,
    StopRule,
    Table,
    flat_evolution,
    random_search,
    rebuild,
    run_serial,
)

BARE = Rules(controls=0, finalists=0, stop=None)
STOPPING = Rules(controls=0, finalists=0, stop=StopRule(min_known=3, margin=0.002))
Make = Callable[[int, Table, Rules], AskTell]


def divide(seed: int, table: Table, rules: Rules, prediction: Prediction | None = None) -> AskTell:
    settings = DivideSettings(4, 16, Breeding(1), Breeding(3), replicated=0, runs=1, top=4, rules=rules)
    return DivideAndConquer(SMALL.names, seed, settings, table.admit, spaces=SMALL.spaces, prediction=prediction)


def predicted(seed: int, table: Table, rules: Rules) -> AskTell:
    return divide(seed, table, rules, Prediction(singles=2, pool=12))


def flat(seed: int, table: Table, rules: Rules) -> AskTell:
    return flat_evolution(SMALL.names, seed, 20, Breeding(4), rules, table.admit, spaces=SMALL.spaces)


def whole_random(seed: int, table: Table, rules: Rules) -> AskTell:
    return random_search(SMALL.names, seed, 20, rules, table.admit, spaces=SMALL.spaces)


SEARCHES: dict[str, Make] = {"divide": divide, "predicted": predicted, "flat": flat, "random": whole_random}


@pytest.fixture(params=list(SEARCHES))
def make(request: pytest.FixtureRequest) -> Make:
    return SEARCHES[request.param]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return made_table(tmp_path / "table.csv", failing="pearson(nhw) * 10")


def asks(events: list[Event]) -> list[Ask]:
    return [Ask.from_payload(event.id, event.payload) for event in events if event.kind == "asked"]


@pytest.mark.parametrize("rules", [BARE, STOPPING], ids=["whole", "stopping"])
@pytest.mark.parametrize("workers", [1, 3])
def test_it_asks_inside_the_grid_and_nothing_twice(make: Make, table: Table, rules: Rules, workers: int) -> None:
    search = make(0, table, rules)
    found = asks(run_serial(search, table.objective, workers))
    assert 18 <= len(found) <= search.budget
    assert all(ask.candidate.formula in SMALL and ask.candidate.replicate == 0 for ask in found)
    assert len({ask.candidate.key for ask in found}) == len(found)
    assert search.ask() is FINISHED


def test_half_a_table_is_searched_without_paying_for_the_other(make: Make, table: Table) -> None:
    half = table.half("first")
    search = make(0, half, BARE)
    found = asks(run_serial(search, half.objective))
    assert len(found) >= 16 and all(str(ask.candidate.formula) in half.aps for ask in found)
    assert any(ask.rejected for ask in found)


def test_the_seed_decides(make: Make, table: Table) -> None:
    first, again, other = (asks(run_serial(make(seed, table, BARE), table.objective)) for seed in (1, 1, 2))
    assert first == again and first != other


@pytest.mark.parametrize("workers", [1, 3])
def test_rebuilt_from_its_events_it_goes_on_as_before(make: Make, table: Table, workers: int) -> None:
    events = run_serial(make(3, table, STOPPING), table.objective, workers)
    for cut in range(0, len(events), 11):
        search = make(3, table, STOPPING)
        rebuild(search, events[:cut])
        follow(search, events[cut:])


def test_it_survives_pickling(make: Make, table: Table) -> None:
    events = run_serial(make(0, table, BARE), table.objective)
    search = make(0, table, BARE)
    rebuild(search, events[:20])
    follow(pickle.loads(pickle.dumps(search)), events[20:])


def test_a_whole_grid_is_searched_to_its_end(table: Table) -> None:
    search = random_search(SMALL.names, 0, 100, BARE, table.admit, spaces=SMALL.spaces)
    assert {str(a.candidate.formula) for a in asks(run_serial(search, table.objective))} == set(table.aps)


def test_given_formulas_come_first() -> None:
    given = [Formula.parse("global: l1 * 10; logits.roi: l2 * 1")]
    settings = DivideSettings(4, 12, Breeding(1), Breeding(3), rules=BARE)
    divided = DivideAndConquer(SMALL.names, 0, settings, given=given, spaces=SMALL.spaces)
    first = [divided.ask() for _ in range(2)]
    assert [str(ask.candidate.formula) for ask in first if isinstance(ask, Ask)] == [
        "global: l1 * 10",
        "logits.roi: l2 * 1",
    ]
    flat = flat_evolution(SMALL.names, 0, 8, rules=BARE, given=given, spaces=SMALL.spaces)
    ask = flat.ask()
    assert isinstance(ask, Ask) and ask.candidate.formula == given[0].canonical() and ask.origin == "given"
