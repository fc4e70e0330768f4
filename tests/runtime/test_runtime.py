"""Real Ray: searches through Tune, lost workers, interrupted drivers, Ray's own searcher on the same trainable."""

from __future__ import annotations

import json
import os
import re
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
from autodet.runtime import trial
from autodet.runtime.cluster import ray_running
from autodet.runtime.trial import ENVIRONMENT
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


class KillingSession(Session):
    """Kills the worker of the first candidate once, when it has reported its second epoch."""

    killed = 0

    def report(self, id: int, epoch: int, ap: float | None, payload: Mapping[str, Any]) -> bool:
        stop = super().report(id, epoch, ap, payload)
        if id == 0 and epoch == 2 and not self.killed:
            self.killed = int(payload["pid"])
            os.kill(self.killed, signal.SIGKILL)
        return stop


@pytest.fixture(scope="module")
def searched(ray_cluster: None, task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """The folder and records of four candidates on two workers, of which one was killed on its way."""
    folder = tmp_path_factory.mktemp("searched")
    with Ledger.create(folder, {}) as ledger:
        session = KillingSession(ledger, FixedList(candidates(4)))
        run_session(session, task, folder, workers=2)
        assert session.killed
        return folder, records_of(session, ledger)


def test_a_search_runs_to_its_end(searched: tuple[Path, list[Record]]) -> None:
    folder, records = searched
    began = [(event.kind, event.id) for event in Ledger.open(folder).events()][:2]
    assert began == [("asked", 0), ("asked", 1)]  # both workers start at once
    assert [r.status for r in records] == ["completed"] * 4
    assert [[epoch for epoch, _ in r.ap_by_epoch] for r in records] == [[1, 2]] * 4
    assert [r.epochs for r in records] == [EPOCHS] * 4
    assert [r.seed for r in records] == [0, 0, 1, 1]
    assert records[1].extra["scales"].keys() == {str(KD.terms[0])}
    assert list((folder / "trials").iterdir()) == []  # told: no checkpoint is kept


def test_a_killed_worker_goes_on_from_its_checkpoint(
    searched: tuple[Path, list[Record]], task: Task, tmp_path: Path
) -> None:
    """No epoch is reported twice, and the result is that of a training without Ray that nobody killed."""
    folder, records = searched
    events = [event for event in Ledger.open(folder).events() if event.id == 0]
    assert [(e.kind, e.payload.get("epoch")) for e in events if e.kind != "told"] == [
        ("asked", None),
        ("reported", 1),
        ("reported", 2),
    ]
    outcome = trial.FormulaEvaluator(task).evaluate(candidates(1)[0][0], tmp_path, lambda epoch, ap: None)
    assert records[0].metrics == outcome.metrics


class StoppingList(FixedList):
    """Stops candidate 1 at its first report."""

    def report(self, id: int, epoch: int, ap: float | None) -> bool:
        return id == 1


class InterruptedSession(Session):
    """A driver that is interrupted (as by Ctrl-C) after the first candidate."""

    def tell(self, id: int, payload: Mapping[str, Any] | None) -> None:
        super().tell(id, payload)
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_and_resumed_candidates_that_fail_are_stopped_or_complete_end_once(
    ray_cluster: None, task: Task, tmp_path: Path
) -> None:
    """And one worker asks only after it was told: Tune queues trials ahead, which would make a search decide without a
    result that is due."""
    hopeless = Formula.parse("logits.roi: softmax(c) | kl * 1e38")
    given = [(Candidate(hopeless, True), "hopeless"), *candidates(2)]
    with Ledger.create(tmp_path, {}) as ledger:
        session = InterruptedSession(ledger, StoppingList(given))
        run_session(session, task, tmp_path, workers=1)
        assert not session.finished and session.ended.total() >= 1
        told = {event.id: event for event in ledger.events() if event.kind == "told"}
    with Ledger.resume(tmp_path) as ledger:
        resumed = Session(ledger, StoppingList(given))
        run_session(resumed, task, tmp_path, workers=1)
        failed, stopped, completed = records_of(resumed, ledger)
        events = ledger.events()
    assert all(events[event.number] == event for event in told.values())
    assert failed.status == "failed" and failed.ap is None
    assert failed.cause is not None and failed.cause.startswith("Diverged")
    assert (stopped.status, stopped.epochs) == ("stopped", 1)
    assert stopped.ap == stopped.ap_by_epoch[0][1] is not None
    assert completed.status == "completed"
    ends = [(event.kind, event.id) for event in events if event.kind != "reported"]
    assert ends == [(kind, id) for id in range(3) for kind in ("asked", "told")]


def test_rays_own_optuna_searcher_drives_the_same_trainable(ray_cluster: None, task: Task, tmp_path: Path) -> None:
    short = replace(task, settings=TrainSettings(epochs=1, batch_size=4), checks=())
    searcher = OptunaSearch(OptunaSpace(("global", "logits.roi"), inherit=True), metric="ap", mode="max", seed=0)
    grid = run_searcher(searcher, short, tmp_path, samples=3, workers=1)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PAUSE", 0.0)
    with Ledger.create(tmp_path, {}) as ledger:
        session = Session(ledger, FixedList(candidates(2)))
        searcher = SessionSearcher(session, 1, tmp_path / "trials")
        failed = {"outcome": json.dumps({"status": ENVIRONMENT, "ap": None, "cause": "OSError: no disk"})}
        for trial in range(session_module.MACHINE_FAILURES + 1):
            assert session.broken is None and searcher.suggest(str(trial))["id"] == 0
            searcher.on_trial_complete(str(trial), failed)
        assert isinstance(session.broken, MachineError) and "OSError: no disk" in str(session.broken)
        assert [event.kind for event in ledger.events()] == ["asked"]
    assert_open(tmp_path, 0)


def assert_open(folder: Path, id: int) -> None:
    """A resumed run hands this candidate out first."""
    with Ledger.resume(folder) as ledger:
        ask = Session(ledger, FixedList(candidates(2))).next()
        assert isinstance(ask, Ask) and ask.id == id


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


def outcome_of(task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a trial of candidate 0 tells in the end; in this process, without Ray."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("autodet.runtime.trial.tune.report", told.append)
    monkeypatch.setattr(trial, "show_title", lambda name: None)
    trial.make_trainable(task, folder)({"id": 0, "candidate": candidates(1)[0][0].to_json()})
    outcome: dict[str, Any] = json.loads(told[-1]["outcome"])
    return outcome


def test_a_candidate_whose_machine_failed_is_tried_again(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session_module, "PAUSE", 0.0)
    (tmp_path / "file").write_text("no folder can be made in a file")
    hindered = replace(task, cache=str(tmp_path / "file" / "cache"))
    with Ledger.create(tmp_path / "run", {}) as ledger:
        session = Session(ledger, FixedList(candidates(1)))
        searcher = SessionSearcher(session, 1, tmp_path / "run" / "trials")
        config = searcher.suggest("first")
        failed = outcome_of(hindered, tmp_path / "run" / "trials", monkeypatch)
        searcher.on_trial_complete("first", {"outcome": json.dumps(failed)})
        assert session.broken is None and searcher.suggest("second") == config
        (tmp_path / "file").unlink()
        outcome = outcome_of(hindered, tmp_path / "run" / "trials", monkeypatch)
        searcher.on_trial_complete("second", {"outcome": json.dumps(outcome)})
        assert searcher.suggest("third") == SessionSearcher.FINISHED
        assert [r.status for r in records_of(session, ledger)] == ["completed"]
    assert caplog.text.count("Candidate 0 is tried again") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_does_not_answer_is_no_fault_of_the_candidate(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a broken one would fail every candidate within a second."""
    outcome = outcome_of(replace(task, device="cuda"), tmp_path, monkeypatch)
    assert outcome["status"] == ENVIRONMENT and re.search("CUDA|NVIDIA", outcome["cause"])


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
    assert_open(tmp_path, 0)
