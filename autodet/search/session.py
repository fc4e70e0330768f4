"""A search whose every step is in the ledger before it takes effect, so that it can stop at any moment and go on."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from autodet.event_files import collecting_later
from autodet.ledger import LeaseLost, Ledger, LedgerError
from autodet.records import Event
from autodet.search.candidate import FINISHED, WAIT, Ask, Search, Signal, Status

logger = logging.getLogger(__name__)

WORKER_LOSSES = 3  # of a candidate, which goes on from its checkpoint; with one more it counts as failed
MACHINE_FAILURES = 3  # in a row, after which a run stops
PAUSE = 5.0  # seconds before a candidate is tried again whose machine failed; twice as long each time

T = TypeVar("T")
OnTold = Callable[[Ask, Mapping[str, Any]], None]  # called with each candidate and its told event's payload


class MachineError(RuntimeError):
    """A machine cannot go on; what was recorded stands, and the run resumes once the cause is mended."""


class Session:
    """Joins a search and the ledger of its run. The one writer of the ledger's events; knows nothing of Ray.

    Opening it replays what the ledger holds into the fresh search. Candidates that were asked but not told when the
    run was interrupted are handed out again, with their numbers, before anything new is asked for.
    """

    def __init__(self, ledger: Ledger, search: Search, on_told: OnTold | None = None) -> None:
        self._ledger, self.search, self._on_told = ledger, search, on_told
        self.finished = False
        self.ended: Counter[tuple[str, str]] = Counter()  # by phase and status
        self.best_ap: float | None = None  # of all candidates, whatever the search looks for
        self.broken: Exception | None = None
        self._verdicts: dict[tuple[int, int], bool] = {}
        self._last_ap: dict[int, float] = {}
        self._stopped: set[int] = set()
        self._epochs: dict[int, int] = {}  # candidate → the last one that it reported
        self.running: dict[int, Ask] = {}
        self._failures, self._not_before = 0, 0.0
        self._losses: Counter[int] = Counter()  # of workers, by candidate
        with collecting_later():
            self._interrupted = list(self._replay(ledger.events()).values())

    def _replay(self, events: Iterable[Event]) -> dict[int, Ask]:
        """Take recorded events into the search; the asks that are left open, by number."""
        open_asks: dict[int, Ask] = {}
        for event in events:
            if event.kind == "asked":
                open_asks[event.id] = Ask.from_payload(event.id, event.payload)
                self.search.replay(open_asks[event.id])
            elif event.kind == "reported":
                self._replay_report(event.id, event.payload)
            else:
                ask = open_asks.pop(event.id)
                ap, weights = event.payload.get("ap"), event.payload.get("weights")
                self.search.tell(event.id, ap, event.payload["status"], weights)
                self._count(ask, event.payload)
        return open_asks

    def next(self) -> Ask | Literal[Signal.WAIT, Signal.FINISHED]:
        """A candidate to train, recorded as asked; WAIT while a decision needs results; FINISHED when all is done."""
        if self._interrupted and time.monotonic() >= self._not_before:
            ask = self._interrupted.pop(0)
            self.running[ask.id] = ask
            return ask
        answer = WAIT if self._interrupted else self.search.ask()
        self.finished = answer is FINISHED
        if answer is WAIT or answer is FINISHED:
            return answer
        assert isinstance(answer, Ask)
        self._ledger.append("asked", answer.id, answer.to_payload())
        self.running[answer.id] = answer
        return answer

    def report(self, id: int, epoch: int, ap: float | None, payload: Mapping[str, Any]) -> bool:
        """Record an epoch's report; True where the candidate is to be stopped. A repeated report changes nothing."""
        if (id, epoch) in self._verdicts:
            return self._verdicts[id, epoch]
        stop = ap is not None and self.search.report(id, epoch, ap)
        verdict = "stop" if stop else "continue"
        self._ledger.append("reported", id, {**payload, "epoch": epoch, "ap": ap, "verdict": verdict})
        self._note(id, epoch, ap, stop)
        return stop

    def tell(self, id: int, payload: Mapping[str, Any] | None) -> None:
        """Record the end of a candidate. payload: of the told event; None where its worker was lost or stopped."""
        told = dict(payload) if payload is not None else self._unfinished(id)
        ap: float | None = told.get("ap")
        if ap is not None and not math.isfinite(ap):
            told |= {"status": "failed", "ap": None, "cause": f"its AP is {ap}"}
        status: Status = told["status"]
        self._ledger.append("told", id, told)
        self.search.tell(id, told["ap"], status, told.get("weights"))
        ask, self._failures = self.running.pop(id), 0
        self._count(ask, told)
        if self._on_told is not None:
            self._on_told(ask, told)

    def again(self, id: int) -> bool:
        """Whether a candidate whose worker was lost is handed out once more; False where its end is to be told.

        Tune's own retries leave out workers that die while they start or change over to another candidate.
        """
        self._losses[id] += 1
        if id in self._stopped or self._losses[id] > WORKER_LOSSES:
            return False
        self._interrupted.append(self.running.pop(id))
        return True

    def retry(self, id: int, error: MachineError) -> None:
        """A machine failed under a candidate, which is handed out again after a pause; nothing is recorded.

        Raises the error where the last ends were all such: then it is no passing trouble, or not of one machine alone.
        """
        self._failures += 1
        if self._failures > MACHINE_FAILURES:
            raise error
        logger.warning("Candidate %d is tried again, since a machine failed: %s", id, error)
        self._interrupted.append(self.running.pop(id))
        self._not_before = time.monotonic() + PAUSE * 2 ** (self._failures - 1)

    def _count(self, ask: Ask, told: Mapping[str, Any]) -> None:
        self.ended[ask.phase, told["status"]] += 1
        if told["status"] == "completed" and told.get("ap") is not None:
            self.best_ap = max(told["ap"], self.best_ap or 0.0)

    def guarded(self, step: Callable[[], T], instead: T) -> T:
        """A step's answer; ``instead`` where ledger or machine fail, now or before, which ``broken`` then holds.

        For drivers that would swallow the error, or take it for the candidate's and train it again.
        """
        if self.broken is None:
            try:
                return step()
            except (LedgerError, LeaseLost, MachineError, OSError) as error:
                self.broken = error
        return instead

    def _unfinished(self, id: int) -> dict[str, Any]:
        epochs = self._epochs.get(id, 0)
        if id in self._stopped:
            behind = "clearly behind the others at this epoch"
            return {"status": "stopped", "ap": self._last_ap[id], "epochs": epochs, "cause": behind}
        cause = f"its worker was lost {self._losses[id]} times" if self._losses[id] else "it ended without a result"
        return {"status": "failed", "ap": None, "epochs": epochs, "cause": cause}

    def _replay_report(self, id: int, payload: Mapping[str, Any]) -> None:
        ap = payload.get("ap")
        if ap is not None:
            self.search.report(id, int(payload["epoch"]), ap)
        self._note(id, int(payload["epoch"]), ap, payload["verdict"] == "stop")

    def _note(self, id: int, epoch: int, ap: float | None, stop: bool) -> None:
        self._verdicts[id, epoch] = stop
        self._epochs[id] = max(epoch, self._epochs.get(id, 0))
        if ap is not None:
            self._last_ap[id] = ap
        if stop:
            self._stopped.add(id)
