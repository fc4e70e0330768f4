"""A simulated run in a real ledger: what recording it costs, and rebuilding a search from it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from autodet.event_files import EVENTS
from autodet.ledger import Ledger
from autodet.records import Metrics
from autodet.search import Answer, Search, Session, Status

EPOCHS = 2  # of a candidate, the first of which it reports


class Recorded:
    """A session as what a simulation asks and tells; its records are as long as those of a real run."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def ask(self) -> Answer:
        return self._session.next()

    def report(self, id: int, epoch: int, ap: float) -> bool:
        return self._session.report(id, epoch, ap, {"seconds": 61.234, "losses": {"total": 1.23456}, "pid": 12345})

    def tell(self, id: int, ap: float | None, status: Status = "completed", weights: str | None = None) -> None:
        self._session.tell(id, None if status == "stopped" else told(ap, status, weights))


def told(ap: float | None, status: Status, weights: str | None) -> dict[str, Any]:
    """The payload of a `told` event."""
    metrics = None if ap is None else Metrics(*[ap] * 12).to_json()
    times = {"epochs": EPOCHS, "seconds": 123.456, "seed": 0}
    return {"status": status, "ap": ap, "metrics": metrics, "weights": weights, "cause": None, "extra": {}} | times


@contextmanager
def without_sync() -> Iterator[None]:
    """Leave out the waiting for the disk: nobody minds if a simulated run is lost, and it is hours of it."""
    with patch("os.fsync", lambda descriptor: None):
        yield


def durable_ms(folder: Path, events: int = 100) -> float:
    """Milliseconds that recording one event takes until the disk has it: the mean over `events`, in a new run."""
    payload = told(0.5, "completed", "0" * 64)
    with Ledger.create(folder, {}) as ledger:
        start = time.perf_counter()
        for id in range(events // 2):
            ledger.append("asked", id, {"candidate": {"formula": "global: l2 * 1"}})
            ledger.append("told", id, payload)
        return 1000 * (time.perf_counter() - start) / (events // 2 * 2)


class Rebuilt(NamedTuple):
    """Seconds of reading and checking a ledger, and of replaying it into a fresh search; processor: of both."""

    events: int
    megabytes: float
    reading: float
    replaying: float
    processor: float


def rebuilt(folder: Path, fresh: Search) -> Rebuilt:
    """Bring a fresh search to the state that a run's ledger holds, as a resumed run does."""
    names = os.listdir(folder / EVENTS)
    size = sum(os.stat(folder / EVENTS / name).st_size for name in names)
    start, processor = time.perf_counter(), time.process_time()
    with Ledger.resume(folder) as ledger:
        read = time.perf_counter()
        Session(ledger, fresh)
        done = time.perf_counter()
    return Rebuilt(len(names), size / 1e6, read - start, done - read, time.process_time() - processor)
