"""Real Ray: searches through Tune, lost workers, interrupted drivers, Ray's own searcher on the same trainable."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.tune.search.optuna import OptunaSearch

from autodet.distill import Formula
from autodet.ledger import Ledger, WriteError
from autodet.records import Record
from autodet.runtime.cluster import ray_running
from autodet.runtime.tune_search import OptunaSpace, SessionSearcher, run_searcher, run_session
from autodet.search import EMPTY, FINISHED, Ask, Candidate, FixedList, Session
from autodet.search import session as session_module
from autodet.search.session import MachineError
from autodet.training import Task, TrainSettings

KD = Formula.parse("logits.roi: softmax(c, t=2) | kl * 1")
EPOCHS = 3


@pytest.fixture(scope="session")
def task(shapes_folder: Path, teacher_file: Path, tiny_spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(
        data=str(shapes_folder),
        cache=str(tmp_path_factory.mktemp("cache")),
        student=tiny_spec,
        settings=TrainSettings(epochs=EPOCHS, batch_size=4, warmup=2),
        teacher=str(teacher_file),
        checks=(1, 2),
    )


def candidates(count: int) -> list[tuple[Candidate, str]]:
    return [(Candidate(KD if i % 2 else EMPTY, True, i // 2), "kd" if i % 2 else "none") for i in range(count)]


def records_of(session: Session, ledger: Ledger) -> list[Record]:
    assert session.finished
    return ledger.write_views()


def test_a_search_runs_to_its_end(ray_cluster: None, task: Task, tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, FixedList(candidates(4)))
        run_session(session, task, tmp_path, workers=2)
        records = records_of(session, ledger)
        began = [(event.kind, event.id) for event in ledger.events()][:2]
    assert began == [("asked", 0), ("asked", 1)]  # both workers start at once
    assert [r.status for r in records] == ["completed"] * 4
    assert [[epoch for epoch, _ in r.ap_by_epoch] for r in records] == [[1, 2]] * 4
    assert [r.epochs for r in records] == [EPOCHS] * 4
    assert [r.seed for r in records] == [0, 0, 1, 1]
    assert records[1].extra["scales"].keys() == {str(KD.terms[0])}
    assert list((tmp_path / "trials").iterdir()) == []  # told: no checkpoint is kept


class KillingSession(Session):
    """Kills the worker of the first candidate once, when it has reported its second epoch."""

    killed = 0

    def report(self, id: int, epoch: int, ap: float | None, payload: Mapping[str, Any]) -> bool:
        stop = super().report(id, epoch, ap, payload)
        if id == 0 and epoch == 2 and not self.killed:
            self.killed = int(payload["pid"])
            os.kill(self.killed, signal.SIGKILL)
        return stop


def test_a_killed_worker_goes_on_from_its_checkpoint(ray_cluster: None, task: Task, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with Ledger.create(straight, {}) as ledger:
        session = Session(ledger, FixedList(candidates(1)))
        run_session(session, task, straight, workers=1)
        expected = records_of(session, ledger)[0]
    with Ledger.create(killed, {}) as ledger:
        killing = KillingSession(ledger, FixedList(candidates(1)))
        run_session(killing, task, killed, workers=1)
        found = records_of(killing, ledger)[0]
        events = ledger.events()
    assert killing.killed
    assert [(e.kind, e.payload.get("epoch")) for e in events if e.kind != "told"] == [
        ("asked", None),
        ("reported", 1),
        ("reported", 2),
    ]
    assert found.status == "completed" and found.metrics == expected.metrics


def test_a_failing_candidate_is_recorded_with_its_cause_and_the_rest_goes_on(
    ray_cluster: None, task: Task, tmp_path: Path
) -> None:
    hopeless = Formula.parse("logits.roi: softmax(c) | kl * 1e38")
    given = [(Candidate(hopeless, True), "hopeless"), (Candidate(EMPTY, True), "none")]
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, FixedList(given))
        run_session(session, task, tmp_path, workers=1)
        failed, completed = records_of(session, ledger)
    assert failed.status == "failed" and failed.ap is None
    assert failed.cause is not None and failed.cause.startswith("Diverged")
    assert completed.status == "completed"


class StoppingList(FixedList):
    """Stops candidate 0 at its first report."""

    def report(self, id: int, epoch: int, ap: float | None) -> bool:
        return id == 0


def test_a_stopped_candidate_ends_at_once_with_its_last_ap(ray_cluster: None, task: Task, tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, StoppingList(candidates(2)))
        run_session(session, task, tmp_path, workers=1)
        stopped, other = records_of(session, ledger)
    assert (stopped.status, stopped.epochs) == ("stopped", 1)
    assert stopped.ap == stopped.ap_by_epoch[0][1] is not None
    assert other.status == "completed"


class InterruptedSession(Session):
    """A driver that is interrupted (as by Ctrl-C) after the first candidate."""

    def tell(self, id: int, payload: Mapping[str, Any] | None) -> None:
        super().tell(id, payload)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_is_resumed_without_repeating(ray_cluster: None, task: Task, tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = InterruptedSession(ledger, FixedList(candidates(3)))
        run_session(session, task, tmp_path, workers=1)
        assert not session.finished and session.ended.total() >= 1
        told = {event.id: event for event in ledger.events() if event.kind == "told"}
    with Ledger.resume(tmp_path) as ledger:
        resumed = Session(ledger, FixedList(candidates(3)))
        run_session(resumed, task, tmp_path, workers=1)
        records = records_of(resumed, ledger)
        events = ledger.events()
    assert [r.status for r in records] == ["completed"] * 3
    assert all(events[event.number] == event for event in told.values())
    assert sorted(e.id for e in events if e.kind == "told") == [0, 1, 2]


def test_one_worker_asks_only_after_it_was_told(ray_cluster: None, task: Task, tmp_path: Path) -> None:
    """Tune queues trials ahead; asking early would make a search decide without a result that is due."""
    short = replace(task, settings=TrainSettings(epochs=1, batch_size=4), checks=())
    with Ledger.create(tmp_path, {}) as ledger:
        run_session(Session(ledger, FixedList(candidates(3))), short, tmp_path, workers=1)
        kinds = [(e.kind, e.id) for e in ledger.events() if e.kind != "reported"]
    assert kinds == [(kind, id) for id in range(3) for kind in ("asked", "told")]


def test_rays_own_optuna_searcher_drives_the_same_trainable(ray_cluster: None, task: Task, tmp_path: Path) -> None:
    short = replace(task, settings=TrainSettings(epochs=1, batch_size=4), checks=())
    searcher = OptunaSearch(OptunaSpace(("global", "logits.roi"), inherit=True), metric="ap", mode="max", seed=0)
    grid = run_searcher(searcher, short, tmp_path, samples=3, workers=2)
    table = grid.get_dataframe()
    assert [json.loads(outcome)["status"] for outcome in table["outcome"]] == ["completed"] * 3
    assert table["config/candidate/formula"].map(lambda text: Formula.parse(text).key).nunique() > 1


def test_ray_client_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="ray job submit"), ray_running("ray://head:10001"):
        pass
    with pytest.raises(ValueError, match="'auto'"), ray_running("10.0.0.1"):
        pass


def test_a_finished_session_stays_finished(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, FixedList(candidates(1)))
        ask = session.next()
        assert isinstance(ask, Ask)
        session.tell(ask.id, {"status": "completed", "ap": 0.1})
        assert session.next() is FINISHED and session.finished


def test_a_machine_that_fails_stops_the_run_and_the_candidate_stays_open(
    ray_cluster: None, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PAUSE", 0.01)
    broken = replace(task, cache=str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("no folder can be made in a file")
    with Ledger.create(tmp_path / "run", {}) as ledger:
        session = Session(ledger, FixedList(candidates(2)))
        with pytest.raises(MachineError, match="NotADirectoryError"):
            run_session(session, broken, tmp_path / "run", workers=1)
        assert [event.kind for event in ledger.events()] == ["asked"]
    with Ledger.resume(tmp_path / "run") as ledger:
        session = Session(ledger, FixedList(candidates(2)))
        run_session(session, task, tmp_path / "run", workers=1)
        assert [r.status for r in records_of(session, ledger)] == ["completed"] * 2


def test_a_worker_that_dies_while_it_starts_or_changes_over_costs_no_candidate(
    ray_cluster: None, task: Task, tmp_path: Path
) -> None:
    """Tune itself would give such a candidate up, and tells of some ends twice."""
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, FixedList(candidates(1)))
        searcher = SessionSearcher(session, 1, tmp_path / "trials")
        config = searcher.suggest("first")
        searcher.on_trial_complete("first", None, error=True)
        searcher.on_trial_complete("first", None, error=True)
        assert searcher.suggest("second") == config
        outcome = {"status": "completed", "ap": 0.5, "epochs": 1, "metrics": {}}
        searcher.on_trial_complete("second", {"outcome": json.dumps(outcome)})
        assert [(event.kind, event.id) for event in ledger.events()] == [("asked", 0), ("told", 0)]


class MendingSession(Session):
    """Takes away what is in the machine's way once a candidate has failed under it."""

    obstacle = Path()

    def retry(self, id: int, error: MachineError) -> None:
        super().retry(id, error)
        self.obstacle.unlink()


def test_a_candidate_whose_machine_failed_is_tried_again(
    ray_cluster: None, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_module, "PAUSE", 0.01)
    (tmp_path / "file").write_text("no folder can be made in a file")
    with Ledger.create(tmp_path / "run", {}) as ledger:
        session = MendingSession(ledger, FixedList(candidates(2)))
        session.obstacle = tmp_path / "file"
        run_session(session, replace(task, cache=str(tmp_path / "file" / "cache")), tmp_path / "run", workers=1)
        assert [r.status for r in records_of(session, ledger)] == ["completed"] * 2
    assert caplog.text.count("Candidate 0 is tried again") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_does_not_answer_stops_the_run_and_the_candidates_stay_open(
    ray_cluster: None, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a broken one would fail every candidate within a second."""
    monkeypatch.setattr(session_module, "PAUSE", 0.01)
    with Ledger.create(tmp_path / "run", {}) as ledger:
        session = Session(ledger, FixedList(candidates(2)))
        with pytest.raises(MachineError, match=r"CUDA|NVIDIA"):
            run_session(session, replace(task, device="cuda"), tmp_path / "run", workers=1)
        assert [event.kind for event in ledger.events()] == ["asked"]


def test_a_full_disk_under_the_ledger_stops_the_run_with_its_error(
    ray_cluster: None, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, FixedList(candidates(2)))
        append = ledger.append

        def full(kind: Any, id: int, payload: Mapping[str, Any]) -> Any:
            if kind == "told":
                raise WriteError(28, "no space left")
            return append(kind, id, payload)

        with monkeypatch.context() as patch, pytest.raises(WriteError):
            patch.setattr(ledger, "append", full)
            run_session(session, task, tmp_path, workers=1)
        assert [event.kind for event in ledger.events() if event.kind != "reported"] == ["asked"]
    with Ledger.resume(tmp_path) as ledger:
        session = Session(ledger, FixedList(candidates(2)))
        run_session(session, task, tmp_path, workers=1)
        assert [r.status for r in records_of(session, ledger)] == ["completed"] * 2
