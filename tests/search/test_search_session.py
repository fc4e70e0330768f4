"""A session records before it acts, and goes on from any cut of its ledger, also after kill -9."""

from __future__ import annotations

import gc
import multiprocessing as mp
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from session_driver import make_search, train_serially

from autodet.ledger import Ledger
from autodet.records import Event, records_from
from autodet.search import FINISHED, WAIT, Ask, Session
from autodet.search import session as session_module
from autodet.search.session import WORKER_LOSSES, MachineError


def asks_of(events: list[Event]) -> list[dict[str, Any]]:
    return [event.payload for event in events if event.kind == "asked"]


def run_to_end(folder: Path) -> list[Event]:
    with Ledger.create(folder, {}) as ledger:
        train_serially(Session(ledger, make_search()))
        return ledger.events()


def test_events_come_in_order_and_every_candidate_ends(tmp_path: Path) -> None:
    events = run_to_end(tmp_path / "run")
    first: dict[tuple[str, int], int] = {}
    for event in events:
        first.setdefault((event.kind, event.id), event.number)
    ids = [event.id for event in events if event.kind == "asked"]
    assert ids == list(range(len(ids)))
    assert all(first["asked", id] < first["reported", id] < first["told", id] for id in ids)
    statuses = {record.status for record in records_from(events)}
    assert "running" not in statuses and "failed" in statuses and "stopped" in statuses


def test_any_cut_continues_to_the_same_asks(tmp_path: Path) -> None:
    whole = run_to_end(tmp_path / "whole")
    for cut in (1, 2, 7, len(whole) // 2, len(whole) - 1):
        with Ledger.create(tmp_path / f"cut{cut}", {}) as ledger:
            for event in whole[:cut]:
                ledger.append(event.kind, event.id, event.payload)
            train_serially(Session(ledger, make_search()))
            resumed = ledger.events()
        assert asks_of(resumed) == asks_of(whole)
        told = [event.id for event in resumed if event.kind == "told"]
        assert sorted(told) == list(range(len(told)))


def test_interrupted_candidates_are_handed_out_first_with_their_numbers(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        asked = [session.next(), session.next()]
    with Ledger.resume(tmp_path) as ledger:
        session = Session(ledger, make_search())
        assert [session.next(), session.next()] == asked
        assert len(ledger.events()) == 2


def test_a_repeated_report_changes_nothing_and_keeps_its_verdict(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        ask = session.next()
        assert isinstance(ask, Ask)
        assert session.report(ask.id, 1, 0.5, {}) is False
        count = len(ledger.events())
        assert session.report(ask.id, 1, 0.1, {}) is False
        assert len(ledger.events()) == count


def test_a_candidate_whose_worker_is_lost_is_handed_out_again_and_fails_in_the_end(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        ask = session.next()
        assert isinstance(ask, Ask)
        for _ in range(WORKER_LOSSES):
            assert session.again(ask.id) and not session.running
            assert session.next() == ask
        assert not session.again(ask.id)
        session.tell(ask.id, None)
        record = records_from(ledger.events())[0]
        assert [event.kind for event in ledger.events()] == ["asked", "told"]
    assert (record.status, record.cause, record.ap) == ("failed", "its worker was lost 4 times", None)


def test_a_candidate_that_is_to_be_stopped_is_not_begun_again_because_its_worker_is_lost(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        ask = session.next()
        assert isinstance(ask, Ask)
        monkey = pytest.MonkeyPatch()
        monkey.setattr(session.search, "report", lambda id, epoch, ap: True)
        assert session.report(ask.id, 1, 0.1, {})
        monkey.undo()
        assert not session.again(ask.id)
        session.tell(ask.id, None)
        assert records_from(ledger.events())[0].status == "stopped"


def test_what_was_lost_counts_the_epochs_that_it_reported_also_before_the_run_was_resumed(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        for _ in range(2):
            assert isinstance(session.next(), Ask)
        for epoch in (2, 1):
            session.report(1, epoch, 0.5, {})
    with Ledger.resume(tmp_path) as ledger:
        session = Session(ledger, make_search())
        assert (session.ended.total(), gc.isenabled()) == (0, True)
        for id in (0, 1):
            assert isinstance(session.next(), Ask)
            session.tell(id, None)
        assert session.ended.total() == 2
        records = records_from(ledger.events())
    assert [record.epochs for record in records] == [0, 2]


def test_a_machine_that_fails_again_and_again_ends_the_run_and_one_that_is_mended_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PAUSE", 0.0)
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        for _ in range(2):
            ask = session.next()
            assert isinstance(ask, Ask)
            for _ in range(session_module.MACHINE_FAILURES):
                session.retry(ask.id, MachineError("no space left"))
                assert session.next() == ask
            events = len(ledger.events())
            session.tell(ask.id, {"status": "completed", "ap": 0.5})
            assert len(ledger.events()) == events + 1
        ask = session.next()
        assert isinstance(ask, Ask)
        for _ in range(session_module.MACHINE_FAILURES):
            session.retry(ask.id, MachineError("no space left"))
            session.next()
        with pytest.raises(MachineError, match="no space left"):
            session.retry(ask.id, MachineError("no space left"))
        assert [event.kind for event in ledger.events()] == ["asked", "told", "asked", "told", "asked"]


def test_a_candidate_whose_machine_failed_waits_and_nothing_else_is_asked_for_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        ask = session.next()
        assert isinstance(ask, Ask)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now)
        session.retry(ask.id, MachineError("no space left"))
        assert session.next() is WAIT
        now += session_module.PAUSE
        assert session.next() == ask


def test_an_ap_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        ask = session.next()
        assert isinstance(ask, Ask)
        session.tell(ask.id, {"status": "completed", "ap": float("nan")})
        record = records_from(ledger.events())[0]
    assert record.status == "failed" and record.cause is not None and "nan" in record.cause


def test_finished_only_at_the_end(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, make_search())
        before = session.finished
        train_serially(session)
        assert (before, session.finished) == (False, True)
        assert session.next() is FINISHED


RESUMED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from session_driver import make_search, train_serially
from autodet.ledger import Ledger
from autodet.search import Session
with Ledger.resume(Path(sys.argv[2])) as ledger:
    train_serially(Session(ledger, make_search()))
"""


def run_slowly(folder: Path) -> None:
    with Ledger.create(folder, {}) as ledger:
        train_serially(Session(ledger, make_search()), pause=0.003)


def test_killed_at_a_random_moment_and_resumed_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = run_to_end(tmp_path / "whole")
    folder = tmp_path / "killed"
    process = mp.get_context("fork").Process(target=run_slowly, args=(folder,))
    process.start()
    deadline = time.monotonic() + 60
    while len(list((folder / "events").glob("*.json"))) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # An interpreter of its own, where nothing has the same place in memory or in a set.
    command = [sys.executable, "-c", RESUMED, str(Path(__file__).parent), str(folder)]
    assert subprocess.run(command, timeout=120).returncode == 0
    events = Ledger.open(folder).events()
    assert asks_of(events) == asks_of(whole)
    assert [e.id for e in events if e.kind == "told"] == [e.id for e in whole if e.kind == "told"]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_candidate_is_told_once_with_several_at_a_time(tmp_path: Path, workers: int) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        train_serially(Session(ledger, make_search()), workers=workers)
        told = [event.id for event in ledger.events() if event.kind == "told"]
    assert sorted(told) == list(range(len(told)))
