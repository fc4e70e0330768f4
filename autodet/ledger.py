"""The run's ledger: the truth about a run, as one small immutable file per event.

    RUN/config.json                    settings, immutable but for extensions, with their history
    RUN/events/00000042.json           by sequence number: kind, candidate's id, when, and what
    RUN/records.jsonl, RUN/summary.csv views, rebuilt from the events at any time
    RUN/lease.json                     who writes now

One writer, any number of readers. Nothing here knows what is searched for.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from autodet.atomic import WriteError, atomic_write_bytes, atomic_write_json, plain_json
from autodet.event_files import (
    EVENTS,
    VERSION,
    LedgerError,
    Rules,
    event_name,
    event_names,
    number_of,
    read_events,
    set_aside,
)
from autodet.lease import Lease, LeaseHeld, LeaseLost
from autodet.records import Event, Kind, Record, check_payload, records_from
from autodet.working_copy import update

__all__ = ["Event", "LeaseHeld", "LeaseLost", "Ledger", "LedgerError", "WriteError", "is_run", "records_from"]

CONFIG = "config.json"
ABSENT = "(absent)"
HERE = "{run}"  # how paths in recorded settings begin: in the run's own folder

logger = logging.getLogger(__name__)


class Ledger:
    """Events of one run folder. Use `create` or `resume` to write (as a context manager), `open` to read."""

    def __init__(self, run_dir: Path, about: Mapping[str, Any], lease: Lease | None = None) -> None:
        self.run_dir = run_dir
        self._about = dict(about)
        self._lease = lease
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._index = Rules()
        self._folder_time = 0

    @classmethod
    def create(cls, run_dir: Path | str, config: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Ledger:
        """Start a run in a new folder, or one that holds no run yet, and take its lease.

        config: all settings that decide the result. about: facts kept beside it and never compared (command, versions).
        Raises LedgerError when the folder already holds a run, LeaseHeld, WriteError.
        """
        folder = Path(run_dir)
        (folder / EVENTS).mkdir(parents=True, exist_ok=True)
        lease = Lease(folder)
        try:
            update(folder)
            if (folder / CONFIG).exists() or event_names(folder):
                raise LedgerError(
                    f"{folder}: expected a folder without a run, found one; resume it or choose another folder"
                )
            content = {"version": VERSION, "created": time.time(), "about": dict(about or {})}
            content |= {"config": portable(plain_json(config, "config"), folder), "history": []}
            atomic_write_json(folder / CONFIG, content, overwrite=False)
            return cls._writer(folder, lease)
        except BaseException:
            lease.release()
            raise

    @classmethod
    def open(cls, run_dir: Path | str) -> Ledger:
        """Read a run, also one that is running or was killed; takes no lease. Raises LedgerError if it is no run."""
        folder = Path(run_dir)
        return cls(folder, _read_about(folder))

    @classmethod
    def resume(
        cls, run_dir: Path | str, config: Mapping[str, Any] | None = None, extendable: Sequence[str] = ()
    ) -> Ledger:
        """Continue a run as its writer.

        config: the settings now asked for, None for the recorded ones. Every difference is refused unless its key
        (dotted for nested ones, such as `budget.epochs`) or one above it is in `extendable`; extensions are recorded.
        Raises LedgerError naming keys, old and new values; LeaseHeld when another driver is at work.
        """
        folder = Path(run_dir)
        _read_about(folder)
        lease = Lease(folder)
        try:
            update(folder)  # now that nobody else writes: a driver that has just ended may have
            if config is not None:
                _extend_config(folder, config, extendable)
            return cls._writer(folder, lease)
        except BaseException:
            lease.release()
            raise

    @classmethod
    def _writer(cls, folder: Path, lease: Lease) -> Ledger:
        (folder / EVENTS).mkdir(exist_ok=True)
        leftovers = [*(folder / EVENTS).glob(".*.tmp"), *folder.glob(".lease.json.*.tmp")]
        for path in leftovers:  # of a killed writer: the lease says that there is no other
            path.unlink(missing_ok=True)
        ledger = cls(folder, _read_about(folder), lease)
        ledger._events, damaged = read_events(folder)
        if damaged is not None:
            set_aside(damaged)
        for event in ledger._events:
            ledger._index.add(event)
        ledger._folder_time = ledger._modified()
        return ledger

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings, as plain JSON values."""
        return dict(self._about["config"])

    @property
    def about(self) -> dict[str, Any]:
        """All of config.json: version, created, about, config, history of extensions."""
        return dict(self._about)

    def events(self) -> list[Event]:
        """All events in order, checked. A writer answers from memory, a reader looks at the disk again."""
        if self._lease is not None:
            with self._lock:
                return list(self._events)
        events, damaged = read_events(self.run_dir)
        if damaged is not None:
            logger.warning("%s is damaged and is ignored; a writer that resumes the run sets it aside", damaged)
        return events

    def append(self, kind: Kind, id: int, payload: Mapping[str, Any]) -> Event:
        """Record one event, durable on return, and give it back as a reader will see it.

        A report that is already recorded for (id, epoch) is returned unchanged. Raises LedgerError when the order of
        events is broken (asked ids 0, 1, …; told once, after asked), LeaseLost, and WriteError (nothing was recorded).
        """
        if self._lease is None:
            raise LedgerError(f"{self.run_dir}: opened for reading; use Ledger.resume to write")
        plain = plain_json(payload, kind)
        with self._lock:
            check_payload(kind, plain)
            if kind == "reported" and (known := self._index.reports.get((id, plain["epoch"]))) is not None:
                return known
            event = Event(len(self._events), kind, id, time.time(), plain)
            self._index.check(event)
            with self._lease.locked():
                self._lease.check()
                self._write(event)
            self._index.add(event)
            self._events.append(event)
            return event

    def write_views(self, output: Path | str | None = None) -> list[Record]:
        """Write records.jsonl and summary.csv from the events, to `output` or the run folder; return the records."""
        folder = self.run_dir if output is None else Path(output)
        records = records_from(self.events())
        lines = [json.dumps(plain_json(record.to_json()), ensure_ascii=False) + "\n" for record in records]
        atomic_write_bytes(folder / "records.jsonl", "".join(lines).encode())
        atomic_write_bytes(folder / "summary.csv", _csv(record.row() for record in records).encode())
        return records

    def close(self) -> None:
        """Give the lease back. The ledger can still be read afterwards."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, event: Event) -> None:
        if self._modified() != self._folder_time:
            self._refuse_foreign_events()
        path = self.run_dir / EVENTS / event_name(event)
        try:
            atomic_write_json(path, {"version": VERSION, **dataclasses.asdict(event)}, overwrite=False)
        except FileExistsError as error:
            raise LedgerError(_foreign(path)) from error
        self._folder_time = self._modified()

    def _modified(self) -> int:
        return os.stat(self.run_dir / EVENTS).st_mtime_ns

    def _refuse_foreign_events(self) -> None:
        """The folder changed since this writer's last event: an event it does not know means a second writer."""
        for name in event_names(self.run_dir):
            if number_of(name) >= len(self._events):
                raise LedgerError(_foreign(self.run_dir / EVENTS / name))


def is_run(folder: Path | str) -> bool:
    """Whether `folder` holds a run, perhaps one without events."""
    try:
        return bool(_read_about(Path(folder)))
    except LedgerError:
        return False


def portable(value: Any, folder: Path) -> Any:
    """JSON whose paths inside a run, or inside the run that it is a part of, do not say where that lies."""
    inside = folder = folder.resolve()
    while is_run(inside.parent):
        inside = inside.parent
    return _texts_changed(
        value, lambda text: f"{HERE}/{os.path.relpath(text, folder)}" if text.startswith(f"{inside}/") else text
    )


def localised(value: Any, folder: Path) -> Any:
    """The inverse of `portable`, where the run lies now."""
    here = folder.resolve()
    return _texts_changed(
        value, lambda text: os.path.normpath(here / text[len(HERE) + 1 :]) if text.startswith(f"{HERE}/") else text
    )


def _texts_changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _texts_changed(item, change) for key, item in value.items()}
    return [_texts_changed(item, change) for item in value] if isinstance(value, list) else value


def _foreign(path: Path) -> str:
    return (
        f"{path}: expected no event of another writer, found this one; this driver stops. "
        "Resume the run with one driver only"
    )


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LedgerError(f"{folder}: expected a run folder, found no {CONFIG} in it; check the path") from error
    except ValueError as error:
        raise LedgerError(f"{path}: expected JSON, found a damaged file ({error}); restore it from a copy") from error
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("config"), dict):
        found = data.get("version") if isinstance(data, dict) else type(data).__name__
        raise LedgerError(f"{path}: expected a run's settings of version {VERSION}, found {found!r}; check the path")
    return data | {"config": localised(data["config"], folder)}


def _extend_config(folder: Path, config: Mapping[str, Any], extendable: Sequence[str]) -> None:
    """Check `config` against the recorded one, and record the differences that are allowed."""
    about = _read_about(folder)
    new_config = plain_json(config, "config")
    old, new = _flat(about["config"]), _flat(new_config)
    changes = {
        key: [old.get(key, ABSENT), new.get(key, ABSENT)]
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)  # an option that is newer than the run and was not given changes nothing
    }
    refused = {k: v for k, v in changes.items() if not any(k == e or k.startswith(f"{e}.") for e in extendable)}
    if refused:
        listed = "; ".join(f"{key}: recorded {before!r}, now {after!r}" for key, (before, after) in refused.items())
        allowed = ", ".join(extendable) or "nothing"
        raise LedgerError(
            f"{folder}: expected the settings this run was started with, found others ({listed}). Resume with the "
            f"recorded values or start a new run; what may change on resuming: {allowed}"
        )
    if changes:
        history = [*about.get("history", []), {"time": time.time(), "changes": changes}]
        content = about | {"config": portable(new_config, folder), "history": history}
        atomic_write_json(folder / CONFIG, content)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys; an empty dictionary is a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
