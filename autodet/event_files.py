"""The files of a run's events: their names, their order, and what is wrong with a damaged folder."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path

from autodet.atomic import atomic_write_bytes
from autodet.records import Event, check_payload
from autodet.working_copy import discard

VERSION = 1
EVENTS = "events"
EVENT_NAME = re.compile(r"(\d{8})-(asked|reported|told)-(\d{6,})\.json")

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
    return f"{event.number:08d}-{event.kind}-{event.id:06d}.json"


def event_files(folder: Path) -> list[tuple[int, Path]]:
    """(number, path) of all event files in order; temporary and other files are left out."""
    try:
        names = sorted(os.listdir(folder / EVENTS))
    except FileNotFoundError:
        return []
    matches = [match for name in names if (match := EVENT_NAME.fullmatch(name))]
    return [(int(match[1]), folder / EVENTS / match[0]) for match in matches]


def read_events(folder: Path) -> tuple[list[Event], Path | None]:
    """All valid events, and the last one's path if that one is damaged."""
    files = _contiguous_files(folder)
    index = Rules()
    events: list[Event] = []
    for number, path in files:
        try:
            event = _read_event(path)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            if number == len(files) - 1:
                return events, path
            raise LedgerError(
                f"{path}: expected a complete event, found a damaged one ({error}). Restore it from a copy, or move it "
                f"and the {len(files) - 1 - number} later events to {path.parent / 'damaged'} and resume: "
                "what they recorded is done again"
            ) from error
        try:
            index.check(event)
        except LedgerError as error:
            raise LedgerError(f"{path}: {error}; was the folder edited by hand? Restore it from a copy") from error
        index.add(event)
        events.append(event)
    return events, None


def new_events(folder: Path, known: int) -> list[Event]:
    """The events after the first ``known`` ones that are there by now; what is not yet whole is left for later."""
    events: list[Event] = []
    for number, path in event_files(folder)[known:]:
        try:
            event = _read_event(path)
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            break
        if number != known + len(events):
            break
        events.append(event)
    return events


def _contiguous_files(folder: Path, attempts: int = 3) -> list[tuple[int, Path]]:
    """The event files, numbered 0, 1, …; a listing made while a writer adds files may miss one, so look again."""
    for attempt in range(attempts):
        files = event_files(folder)
        wrong = next((i for i, (number, _) in enumerate(files) if number != i), None)
        if wrong is None:
            return files
        if attempt + 1 < attempts:
            time.sleep(0.02)
    number, path = files[wrong or 0]
    if wrong and number == files[wrong - 1][0]:
        raise LedgerError(
            f"{path}: expected one event with number {number}, also found {files[wrong - 1][1].name}; two drivers "
            "wrote at once: keep the older file, move the other and all later events away, then resume"
        )
    raise LedgerError(
        f"{path}: expected event {wrong} next, found {number}: an event in between is missing. Restore it from a copy, "
        "or move this and all later events away and resume: what they recorded is done again"
    )


def _read_event(path: Path) -> Event:
    """One event, checked against its file's name. Raises ValueError, KeyError or TypeError when it is damaged."""
    data = json.loads(path.read_bytes())
    if data["version"] != VERSION:
        raise LedgerError(f"{path}: expected version {VERSION}, found {data['version']}; use the autodet that wrote it")
    event = Event(data["number"], data["kind"], data["id"], data["time"], data["payload"])
    check_payload(event.kind, event.payload)
    if event_name(event) != path.name:
        raise ValueError(f"its content says {event_name(event)}")
    return event


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
