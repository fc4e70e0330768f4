"""The files of a run's events: their names, their order, and what is wrong with a damaged folder."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from autodet.atomic import atomic_write_bytes
from autodet.records import Event, check_payload
from autodet.working_copy import discard

VERSION = 1
EVENTS = "events"
# The number alone, since a file, or an object in a store, is only ever created: of two drivers that write at once one
# fails, whatever their events say. Runs of before have kind and candidate behind it.
EVENT_NAME = re.compile(r"\d{8}(-(asked|reported|told)-\d{6,})?\.json")
READERS, CHUNK = 16, 64  # threads that read events, and the files of one turn
_COLLECTING, _later = threading.Lock(), [0, 0]  # how many threads collect garbage later, and whether it was on before

logger = logging.getLogger(__name__)


class LedgerError(RuntimeError):
    """A run folder is damaged, of another kind, or used against its rules; the message says what to do."""


class Rules:
    """Which event may come next, and what it takes to know that; every step is O(1)."""

    def __init__(self) -> None:
        self.asked = 0
        self.told: set[int] = set()
        self.reports: dict[tuple[int, int], Event] = {}

    def check(self, event: Event) -> None:
        """Raise LedgerError when `event` may not come next."""
        if event.kind == "asked":
            if event.id != self.asked:
                raise LedgerError(f"expected candidate {self.asked} to be asked next, found {event.id}; ask in order")
            return
        if not 0 <= event.id < self.asked:
            raise LedgerError(f"candidate {event.id} was {event.kind} but never asked; record 'asked' before training")
        if event.id in self.told:
            raise LedgerError(
                f"candidate {event.id} was {event.kind} after it was told; ask a new replicate to evaluate it again"
            )
        if event.kind == "reported" and (event.id, event.payload["epoch"]) in self.reports:
            raise LedgerError(f"candidate {event.id} reported epoch {event.payload['epoch']} twice; report it once")

    def add(self, event: Event) -> None:
        """Take in an event that was checked."""
        if event.kind == "asked":
            self.asked += 1
        elif event.kind == "told":
            self.told.add(event.id)
        else:
            self.reports[event.id, event.payload["epoch"]] = event


def event_name(event: Event) -> str:
    """The name of an event's file."""
    return f"{event.number:08d}.json"


def event_names(folder: Path) -> list[str]:
    """The names of all event files in order; temporary and other files are left out."""
    try:
        names = os.listdir(folder / EVENTS)
    except FileNotFoundError:
        return []
    return sorted(filter(EVENT_NAME.fullmatch, names))


def read_events(folder: Path) -> tuple[list[Event], Path | None]:
    """All valid events, and the last one's path if that one is damaged."""
    with collecting_later():
        return _read_events(folder)


def _read_events(folder: Path) -> tuple[list[Event], Path | None]:
    names, path = _contiguous_names(folder), folder / EVENTS
    index = Rules()
    events: list[Event] = []
    for number, (name, content) in enumerate(zip(names, _contents(path, names), strict=True)):
        try:
            event = _event_of(name, content)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            if number == len(names) - 1:
                return events, path / name
            raise LedgerError(
                f"{path / name}: expected a complete event, found a damaged one ({error}). Restore it from a copy, or "
                f"move it and the {len(names) - 1 - number} later events to {path / 'damaged'} and resume: "
                "what they recorded is done again"
            ) from error
        except LedgerError as error:
            raise LedgerError(f"{path / name}: {error}") from error
        try:
            index.check(event)
        except LedgerError as error:
            remedy = "was the folder edited by hand? Restore it from a copy"
            raise LedgerError(f"{path / name}: {error}; {remedy}") from error
        index.add(event)
        events.append(event)
    return events, None


def new_events(folder: Path, known: int) -> list[Event]:
    """The events after the first ``known`` ones that are there by now; what is not yet whole is left for later."""
    events: list[Event] = []
    for name in event_names(folder)[known:]:
        try:
            event = _event_of(name, _value(str(folder / EVENTS / name)))
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            break
        if event.number != known + len(events):
            break
        events.append(event)
    return events


def _contiguous_names(folder: Path, attempts: int = 3) -> list[str]:
    """The event files, numbered 0, 1, …; a listing made while a writer adds files may miss one, so look again."""
    for attempt in range(attempts):
        names = event_names(folder)
        wrong = next((place for place, name in enumerate(names) if number_of(name) != place), None)
        if wrong is None:
            return names
        if attempt + 1 < attempts:
            time.sleep(0.02)
    path, number = folder / EVENTS / names[wrong or 0], number_of(names[wrong or 0])
    if wrong and number == number_of(names[wrong - 1]):
        raise LedgerError(
            f"{path}: expected one event with number {number}, also found {names[wrong - 1]}; two drivers "
            "wrote at once: keep the older file, move the other and all later events away, then resume"
        )
    raise LedgerError(
        f"{path}: expected event {wrong} next, found {number}: an event in between is missing. Restore it from a copy, "
        "or move this and all later events away and resume: what they recorded is done again"
    )


def number_of(name: str) -> int:
    """The number of the event in a file."""
    return int(name[:8])


def _contents(folder: Path, names: Sequence[str]) -> Iterator[Any]:
    """The JSON value of each file, in order, or the error that reading it gives.

    Several files are read at a time: one that is not in memory takes a disk or a network most of a millisecond, and a
    long run has hundreds of thousands.
    """
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    pool = ThreadPoolExecutor(READERS)
    try:
        for values in pool.map(lambda chunk: _read([f"{folder}/{name}" for name in chunk]), chunks):
            yield from values
    finally:
        pool.shutdown(cancel_futures=True)


def _read(paths: Sequence[str]) -> list[Any]:
    """The JSON values of files, read as one list, so that they share their keys, which would fill the memory."""
    with contextlib.suppress(ValueError, FileNotFoundError):
        values: list[Any] = json.loads(b"[" + b",".join(_bytes(path) for path in paths) + b"]")
        if len(values) == len(paths):
            return values
    return [_value(path) for path in paths]  # one is damaged: which one?


def _value(path: str) -> Any:
    try:
        return json.loads(_bytes(path))
    except (ValueError, FileNotFoundError) as error:
        return error


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _event_of(name: str, content: Any) -> Event:
    """One event, checked against its file's name. Raises ValueError, KeyError or TypeError when it is damaged."""
    if isinstance(content, Exception):
        raise content
    if content["version"] != VERSION:
        raise LedgerError(f"expected version {VERSION}, found {content['version']}; use the autodet that wrote it")
    event = Event(content["number"], content["kind"], content["id"], content["time"], content["payload"])
    check_payload(event.kind, event.payload)
    if event.number != number_of(name):
        raise ValueError(f"its content says {event_name(event)}")
    return event


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Let Python not look for garbage where millions of objects are made to stay: it takes most of the time."""
    with _COLLECTING:
        _later[0] += 1
        if _later[0] == 1:
            _later[1] = int(gc.isenabled())
            gc.disable()
    try:
        yield
    finally:
        with _COLLECTING:
            _later[0] -= 1
            if _later[0] == 0 and _later[1]:
                gc.enable()


def set_aside(path: Path) -> None:
    """Move a damaged event out of the way, keeping it for a person to look at."""
    folder = path.parent / "damaged"
    folder.mkdir(exist_ok=True)
    target = folder / f"{path.stem}.{time.time_ns()}.json"  # a number may be damaged more than once
    atomic_write_bytes(target, path.read_bytes())
    discard(path)
    logger.warning(
        "%s was damaged, probably by a crash or a full disk; moved to %s; its work is done again", path, target
    )
