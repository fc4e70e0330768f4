"""Drives any search through Ray Tune: the adapter, and ``run_session``, which runs a session to its end."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from autodet.distill.grammar import formula_from_choices
from autodet.joint import JointTask
from autodet.runtime.cluster import warn_of_idle_machines
from autodet.runtime.metrics import SessionMetrics
from autodet.runtime.trial import ENVIRONMENT, METRIC, make_trainable
from autodet.search.candidate import FINISHED, WAIT, Answer, Ask, Candidate
from autodet.search.session import MachineError, Session
from autodet.training import Task
from autodet.working_copy import discard


class SessionSearcher(Searcher):
    """Presents a session to Tune. The ledger is the truth: Tune's own snapshots of this object hold nothing."""

    def __init__(self, session: Session, workers: int, checkpoints: Path) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._session: Session | None = session
        self._checkpoints = checkpoints
        self._workers = workers
        self._ids: dict[str, int] = {}  # Tune's trial id → candidate's number
        self._metrics = SessionMetrics(checkpoints.parent)

    def suggest(self, trial_id: str) -> Any:
        """The next candidate as a config; None to be asked again, FINISHED at the end."""
        session = self._live()
        if session.broken is not None:
            return None
        if len(session.running) >= self._workers:
            return None  # Tune queues a trial ahead; asking early would decide without results that are due
        answer: Answer = session.guarded(session.next, WAIT)
        if answer is FINISHED:
            return str(Searcher.FINISHED)
        if answer is WAIT:
            return None
        assert isinstance(answer, Ask)
        self._ids[trial_id] = answer.id
        self._metrics.show(session)
        place = dict.fromkeys((answer.phase, answer.group))  # of a search without groups they are the same
        title = "/".join((*place, f"{answer.id:04d}"))
        return {"id": answer.id, "title": title, "candidate": answer.candidate.to_json()}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial: completed or failed by its own word, stopped, or lost with its worker."""
        outcome = (result or {}).get("outcome")
        payload = json.loads(outcome) if outcome and not error else None
        number, session = self._ids.pop(trial_id, None), self._live()
        if number is None:
            return  # Tune may announce one end twice
        if payload is not None and payload["status"] == ENVIRONMENT:
            session.guarded(lambda: session.retry(number, MachineError(payload["cause"])), None)
            return
        if error and session.guarded(lambda: session.again(number), False):
            return
        session.guarded(lambda: session.tell(number, payload), None)
        self._metrics.show(session)
        if session.broken is not None:
            return
        # Told: nothing resumes from it.
        session.guarded(lambda: discard(self._checkpoints / f"{number:06d}"), None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed run builds its search from the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see ``save``."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_session": None, "_metrics": None}  # the session holds a lease, which has no copy

    def _live(self) -> Session:
        if self._session is None:
            raise RuntimeError("This searcher is Tune's stored copy. Resume with the script's --resume instead.")
        return self._session


class SessionStopper(Stopper):
    """Passes every report to the session, whose search decides whether the candidate goes on."""

    def __init__(self, session: Session) -> None:
        self._session: Session | None = session

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """True to stop the trial."""
        if self._session is None or "epoch" not in result or result.get("outcome"):
            return False
        ap = float(result[METRIC]) if result["measured"] else None
        details = {"seconds": result["seconds"], "losses": json.loads(result["losses"]), "pid": result["pid"]}
        session, id, epoch = self._session, int(result["config"]["id"]), int(result["epoch"])
        return session.guarded(lambda: session.report(id, epoch, ap, details), True)

    def stop_all(self) -> bool:
        """True once the session cannot go on; otherwise the searcher ends the run."""
        return self._session is not None and self._session.broken is not None

    def __getstate__(self) -> dict[str, Any]:
        return {"_session": None}


def run_session(
    session: Session,
    task: Task | JointTask,
    run_folder: Path,
    workers: int,
    gpus_per_trial: float = 0.0,
) -> None:
    """Run a session's candidates as Tune trials until its search has finished, or Ctrl-C. Ray must be running.

    A trial takes ``task.threads`` CPUs; at most ``workers`` run at a time and keep their process between candidates.
    Raises what stopped it: MachineError where a machine failed, or the ledger's error (a full disk, a lost lease).
    """
    folder = run_folder.resolve()
    warn_of_idle_machines(task.threads, gpus_per_trial)
    config = tune.TuneConfig(
        search_alg=SessionSearcher(session, workers, folder / "trials"),
        num_samples=-1,
        reuse_actors=True,
        trial_name_creator=_trial_name,
        trial_dirname_creator=_trial_name,
    )
    # A worker's process takes seconds to start, and Tune ends one that is still starting where another worker gets free
    # to take its candidate. So all start at once: one after another, most would never be there.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers)
    gc.freeze()  # a long run's history is millions of objects, which the garbage collector would go through for seconds
    try:
        _tuner(task, folder, config, gpus_per_trial, SessionStopper(session)).fit()
    finally:
        gc.unfreeze()
    if session.broken is not None:
        raise session.broken


def run_searcher(searcher: Searcher, task: Task, run_folder: Path, samples: int, workers: int) -> tune.ResultGrid:
    """Run one of Ray's own searchers over the same trainable, for comparison. It has no ledger: Tune's results are all.

    searcher: its configs hold ``candidate`` (Candidate.to_json()); see ``OptunaSpace``.
    """
    config = tune.TuneConfig(search_alg=searcher, num_samples=samples, reuse_actors=True, max_concurrent_trials=workers)
    return _tuner(task, run_folder.resolve(), config).fit()


@dataclass(frozen=True)
class OptunaSpace:
    """The grammar's formulas as a define-by-run space for ``OptunaSearch(space=…, metric="ap", mode="max")``.

    A class, because Tune pickles the searcher and a closure has no pickled form.
    """

    inputs: tuple[str, ...]
    inherit: bool

    def __call__(self, trial: Any) -> dict[str, Any]:
        """trial: Optuna's; returns what the trainable needs beside the choices that Optuna records."""
        formula = formula_from_choices(trial.suggest_categorical, self.inputs)
        return {"candidate": Candidate(formula, self.inherit).to_json()}


def _tuner(
    task: Task | JointTask,
    folder: Path,
    config: tune.TuneConfig,
    gpus_per_trial: float = 0.0,
    stop: Stopper | None = None,
) -> tune.Tuner:
    resources = {"cpu": task.threads} | ({"gpu": gpus_per_trial} if gpus_per_trial else {})
    return tune.Tuner(
        tune.with_resources(make_trainable(task, folder / "trials"), resources),
        tune_config=config,
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder / "ray"),
            stop=stop,
            verbose=0,
        ),
    )


def _trial_name(trial: Any) -> str:
    return str(trial.config.get("title", trial.trial_id)).replace("/", "-")
