"""A search and its events: rebuilding one from a ledger, and running one without training anything."""

import heapq
from collections.abc import Callable, Iterable, Sequence

from autodet.records import Event
from autodet.search.ask_tell import AskTell
from autodet.search.candidate import FINISHED, Ask, Candidate, Status, rng_for

Objective = Callable[[Candidate], Sequence[float | None]]
"""A stand-in for training: the AP after each epoch, NaN before the end where it is not measured; empty, or with None or
NaN at the end, for a failure."""


def rebuild(search: AskTell, events: Iterable[Event]) -> None:
    """Bring a fresh search to the state after `events`, in their order; nothing is drawn or probed again."""
    for event in events:
        if event.kind == "asked":
            search.replay(Ask.from_payload(event.id, event.payload))
        elif event.kind == "reported":
            search.report(event.id, event.payload["epoch"], event.payload.get("ap"))
        else:
            search.tell(event.id, event.payload.get("ap"), event.payload["status"])


def run_serial(search: AskTell, objective: Objective, workers: int = 1, seed: int = 0) -> list[Event]:
    """Run a search to its end in one process, as if `workers` worked at once, and return its events.

    Epochs take random times drawn from `seed`, so candidates end in another order than they were asked in. What a
    rebuilt search had running starts again, as after a crash.
    """
    return _Simulation(search, objective, seed).run(workers)


class _Simulation:
    def __init__(self, search: AskTell, objective: Objective, seed: int) -> None:
        self.search, self.objective, self.seed = search, objective, seed
        self.events: list[Event] = []
        self.due: list[tuple[float, int, int]] = []  # time, candidate, epochs done by then
        self.curves: dict[int, Sequence[float | None]] = {}
        self.now = 0.0

    def run(self, workers: int) -> list[Event]:
        for ask in self.search.history.asks:
            if ask.id not in self.search.history.ends:
                self._start(ask)
        while True:
            while len(self.due) < workers:
                answer = self.search.ask()
                if not isinstance(answer, Ask):
                    break
                self._record("asked", answer.id, answer.to_payload())
                self._start(answer)
            if not self.due:
                if answer is not FINISHED:
                    raise RuntimeError(f"the search answers {answer} although nothing is running")
                return self.events
            self._advance()

    def _start(self, ask: Ask) -> None:
        self.curves[ask.id] = self.objective(ask.candidate)
        self._schedule(ask.id, 1)

    def _schedule(self, id: int, epoch: int) -> None:
        heapq.heappush(self.due, (self.now + rng_for(self.seed, id, epoch).uniform(0.2, 1.8), id, epoch))

    def _advance(self) -> None:
        self.now, id, epoch = heapq.heappop(self.due)
        curve = self.curves[id]
        if not curve or curve[epoch - 1] is None:
            return self._end(id, None, "failed", epoch - 1)
        ap = curve[epoch - 1]
        stop = self.search.report(id, epoch, ap)
        self._record("reported", id, {"epoch": epoch, "ap": ap, "verdict": "stop" if stop else "continue"})
        if epoch == len(curve):
            return self._end(id, ap, "completed", epoch)
        return self._end(id, ap, "stopped", epoch) if stop else self._schedule(id, epoch + 1)

    def _end(self, id: int, ap: float | None, status: Status, epochs: int) -> None:
        self.search.tell(id, ap, status)
        self._record("told", id, {"status": status, "ap": ap, "epochs": epochs})

    def _record(self, kind: str, id: int, payload: dict[str, object]) -> None:
        self.events.append(Event(len(self.events), kind, id, self.now, payload))  # type: ignore[arg-type]
