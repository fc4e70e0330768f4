"""The simulation of many workers: its oracle, its invariants, and a small run of all of it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import simulate_scale
from scale_ledger import Recorded, durable_ms, rebuilt, without_sync
from scale_searchers import SEARCHERS, Case
from scale_simulation import (
    RETRIES,
    Span,
    Timed,
    Times,
    beside_oracle,
    oracle,
    simulate,
    utilisation,
)

from autodet.distill.formula import Formula
from autodet.ledger import Ledger
from autodet.results.scale_plots import LENGTHS, latencies_by_history
from autodet.search import FINISHED, WAIT, Answer, Ask, AskTell, Candidate, JointSearch, Session, Status

EVEN = Times(failures=0.0, spread=0.0)
SMALL = 160  # candidates: few, but enough for all phases


class Batches:
    """A search with a barrier: each batch waits for all of the former one. It checks what it is told."""

    def __init__(self, candidates: int, batch: int, stuck: bool = False) -> None:
        self._left, self._batch, self._stuck = candidates, batch, stuck
        self.asked = 0
        self.running: set[int] = set()
        self.most = 0
        self.told: list[int] = []

    def ask(self) -> Answer:
        if self.asked == self._left:
            return WAIT if self.running or self._stuck else FINISHED
        if self.asked % self._batch == 0 and self.running:
            return WAIT
        self.running.add(self.asked)
        self.most, self.asked = max(self.most, len(self.running)), self.asked + 1
        return Ask(self.asked - 1, Candidate(Formula(), True, self.asked), "p", "p")

    def report(self, id: int, epoch: int, ap: float) -> bool:
        assert id in self.running and epoch == 1
        return id % 5 == 3

    def tell(self, id: int, ap: float | None, status: Status = "completed", weights: str | None = None) -> None:
        self.running.remove(id)
        self.told.append(id)
        assert (ap is None) == (status == "failed")


def ap_of(ask: Ask) -> float:
    return 0.5


def case_of(name: str, candidates: int = SMALL, seed: int = 0) -> Case:
    return SEARCHERS[name](candidates, seed)


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (7, 1), (10, 4), (12, 4), (3, 5)])
def test_with_equal_times_the_oracle_works_in_rounds(count: int, workers: int) -> None:
    assert oracle([2.0] * count, workers) == [2.0 * (number // workers) for number in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_no_schedule_in_the_same_order_starts_the_last_one_sooner(seed: int) -> None:
    """Every way to give the evaluations to workers, each as soon as its worker is free and its predecessor started."""
    rng = random.Random(seed)
    spent = [rng.expovariate(1) for _ in range(7)]
    for workers in (1, 2, 3):
        lasts = []
        for chosen in itertools.product(range(workers), repeat=len(spent)):
            free, start = [0.0] * workers, 0.0
            for worker, each in zip(chosen, spent, strict=True):
                start = max(start, free[worker])
                free[worker] = start + each
            lasts.append(start)
        assert oracle(spent, workers)[-1] == pytest.approx(min(lasts))


def test_a_barrier_costs_what_it_costs() -> None:
    """Batches of 6 on 4 workers: starts at 0, 1, 2 and 3; without barriers 12 of them start at 0, 1 and 2."""
    search = Batches(12, 6)
    search.report = lambda id, epoch, ap: False  # type: ignore[method-assign]
    spans = simulate(search, 4, EVEN, ap_of)
    assert [span.start for span in spans] == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2
    assert beside_oracle(spans, 4) == pytest.approx(2 / 3)
    assert utilisation(spans, 4) == pytest.approx((4 + 2 + 4) / (3 * 4))


def test_the_drain_does_not_count() -> None:
    spans = [Span(0, 0.0, 100.0, "completed"), Span(1, 0.0, 1.0, "failed"), Span(2, 1.0, 3.0, "completed")]
    assert (utilisation(spans, 2), beside_oracle(spans, 2)) == (1.0, 1.0)
    assert (utilisation(spans[:2], 2), beside_oracle(spans[:2], 2)) == (1.0, 1.0)  # all at once: nothing but drain


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_every_candidate_is_told_once_and_no_worker_has_two(workers: int) -> None:
    search = Batches(60, 25)
    spans = simulate(search, workers, Times(seed=3, failures=0.3), ap_of)
    assert sorted(search.told) == [span.id for span in spans] == list(range(60))
    assert search.most == min(workers, 25)
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    assert starts == sorted(starts) and all(start <= end for start, end in zip(starts, ends, strict=True))
    assert [span.id for span in sorted(spans, key=lambda span: span.end)] == search.told  # time goes forward
    for moment in starts:
        assert sum(span.start <= moment < span.end for span in spans) <= workers
    assert {span.status for span in spans} == {"completed", "failed", "stopped"}


def test_a_candidate_that_is_stopped_or_fails_takes_less_time() -> None:
    times = Times(seed=3, failures=0.3)
    for span in simulate(Batches(60, 25), 4, times, ap_of):
        trial = times.of(span.id)
        assert (span.status == "failed") == trial.fails
        assert span.end - span.start == pytest.approx(trial.spent * (0.5 if span.status == "stopped" else 1))


def test_a_search_that_waits_for_nothing_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="nothing is running"):
        simulate(Batches(5, 5, stuck=True), 2, EVEN, ap_of)


def test_times_are_as_said() -> None:
    whole = Times(failures=0.0)
    spent = [whole.of(id).spent for id in range(20_000)]
    assert sum(spent) / len(spent) == pytest.approx(1, abs=0.05)
    assert sum(each > 3.28 for each in spent) / len(spent) == pytest.approx(0.0455, abs=0.005)  # ln 3.28 = -1/2 + 1.69
    assert {EVEN.of(id) for id in range(9)} == {(1.0, 1, False)}
    pareto = [Times(failures=0.0, tail="pareto").of(id).spent for id in range(20_000)]
    assert min(pareto) >= 0.5 and sum(each > 5 for each in pareto) / 20_000 == pytest.approx(0.01, abs=0.003)
    trials = [Times(failures=0.2).of(id) for id in range(20_000)]
    attempts = Counter(trial.attempts for trial in trials)
    assert sum(trial.fails for trial in trials) / 20_000 == pytest.approx(0.1 + 0.9 * 0.1**4, abs=0.01)
    assert attempts[2] / 20_000 == pytest.approx(0.9 * 0.1 * 0.9, abs=0.01) and max(attempts) <= RETRIES + 1
    assert trials == [Times(failures=0.2).of(id) for id in range(20_000)]
    assert trials[:50] != [Times(1, failures=0.2).of(id) for id in range(50)]
    with pytest.raises(ValueError, match="expected failures"):
        Times(failures=1.0)


@pytest.mark.parametrize("name", list(SEARCHERS))
def test_searchers_ask_what_they_may_and_flat_ones_never_wait(name: str) -> None:
    case = case_of(name)
    spans = simulate(case.search, 3, Times(), case.ap)
    assert 0.85 * SMALL <= len(spans) <= SMALL
    assert 0.9 < beside_oracle(spans, 3) <= 1 + 1e-12
    if name in ("flat", "random"):
        assert beside_oracle(spans, 3) == pytest.approx(1) and utilisation(spans, 3) == pytest.approx(1)


@pytest.mark.parametrize("name", ["divide", "joint"])
def test_a_search_is_rebuilt_from_the_ledger_of_a_simulated_run(name: str, tmp_path: Path) -> None:
    case, fresh = case_of(name), case_of(name).search
    with without_sync(), Ledger.create(tmp_path / "run", {}) as ledger:
        spans = simulate(Recorded(Session(ledger, case.search)), 5, Times(), case.ap)
        count = len(ledger.events())
    found = rebuilt(tmp_path / "run", fresh)
    reported = sum(span.status != "failed" for span in spans)
    assert found.events == count == 2 * len(spans) + reported and found.megabytes > 0
    for search in (fresh, case.search):
        assert search.ask() is FINISHED
    if isinstance(fresh, AskTell) and isinstance(case.search, AskTell):
        assert fresh.history.ends == case.search.history.ends and fresh.best() == case.search.best()
    if isinstance(fresh, JointSearch) and isinstance(case.search, JointSearch):
        assert fresh.front() == case.search.front() and fresh.ends == case.search.ends
    assert 0 < durable_ms(tmp_path / "durable", 4) < 10_000


def test_latencies_are_those_of_the_last_fifth() -> None:
    rows = [("ask", history, float(history)) for history in range(1001)] + [("tell", 1000, 7.0)]
    found = latencies_by_history(pd.DataFrame(rows, columns=["call", "history", "ms"]))
    assert list(found["history"]) == [100, 300, 1000, 1000] and set(found["history"]) <= set(LENGTHS)
    asks = found[found["call"] == "ask"].set_index("history")
    assert asks.loc[1000, "p50"] == 900 and asks.loc[1000, "max"] == 1000 and asks.loc[100, "answers"] == 21
    assert found.iloc[-1]["p50"] == 7.0


@pytest.mark.parametrize("name", ["divide", "flat", "joint"])
def test_asks_do_not_slow_down_with_the_history(name: str) -> None:
    """Processor time of the median ask; of a search that looks at all of its history it would be five times as long."""
    case = case_of(name, 1500)
    search = Timed(case.search)
    simulate(search, 20, Times(), case.ap)
    answers = search.latencies()
    asks = answers[answers["call"] == "ask"]
    early, late = (asks[asks["history"].between(*part)]["ms"].median() for part in ((150, 300), (1000, 1400)))
    assert late < 4 * early


def run(output: Path, *more: str) -> Sequence[str]:
    sizes = ["--candidates", str(SMALL), "--predicted", "90", "--workers", "2", "20", "--rebuild", "20", "--here"]
    assert simulate_scale.main([*sizes, "--output", str(output), *more]) == 0
    return sizes


def test_all_of_it_runs_and_equal_seeds_give_equal_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "one")
    said = capsys.readouterr().out
    assert "of the oracle" in said and "Latency, processor ms" in said and "rebuild_s" in said
    part = ["--searchers", "divide", "joint", "--workers", "20"]
    run(tmp_path / "two", *part)
    run(tmp_path / "other", *part, "--seed", "1", "--tail", "pareto")
    tables = [pd.read_csv(tmp_path / name / "scale.csv") for name in ("one", "two", "other")]
    decided = ["searcher", "workers", "candidates", "completed", "stopped", "failed", "utilisation", "oracle", "events"]
    one, two, other = (table[decided] for table in tables)
    again = one[one["searcher"].isin(two["searcher"]) & (one["workers"] == 20)].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, two, check_dtype=False)
    assert not again.equals(other) and len(one) == 2 * len(SEARCHERS)
    assert one["oracle"].between(0, 1 + 1e-9).all() and one["utilisation"].between(0, 1 + 1e-9).all()
    assert (tables[0]["rebuild_s"].notna() == (one["workers"] == 20)).all()
    latency = pd.read_csv(tmp_path / "one" / "latency.csv")
    assert set(latency["searcher"]) == set(SEARCHERS) and (latency["p50"] <= latency["max"]).all()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["latency.csv", "scale.csv", "scale.png"]
