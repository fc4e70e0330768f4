"""A lease keeps a second driver out of a run folder, and lapses by itself when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from autodet.atomic import atomic_write_json
from autodet.object_store import Changed, Place, Version, place_of

RENEW_SECONDS = 5.0
LAPSE_SECONDS = 30.0  # six renewals: a paused or swapping driver keeps its run
FRESH_SECONDS = 8.0  # since the last renewal, after which a stored lease is renewed before it is relied on
LONG_AGO = 600.0  # seconds by which no two machines' clocks differ

logger = logging.getLogger(__name__)


class LeaseHeld(RuntimeError):  # noqa: N818 - the name is the state it reports
    """Another living driver writes to this run."""


class LeaseLost(RuntimeError):  # noqa: N818
    """This driver's lease was taken over; it must stop writing."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. start: the process's start in clock ticks since boot; machine: boot and process space."""

    host: str
    machine: str
    pid: int
    start: int | None
    token: str
    heartbeat: float


class Lease:
    """Exclusive right to write to a run folder, kept in FOLDER/lease.json and renewed by a background thread.

    Taken over at once from a dead process of this machine (or one whose number was given to another process),
    after `LAPSE_SECONDS` without a renewal from any other. Else the constructor raises LeaseHeld. Where the folder is a
    copy of one in an object store, the lease is there. Whether another machine's lease is renewed, the constructor
    watches that long: clocks may differ. A driver that has lost its lease stops: what it writes next fails, and where
    it handles SIGTERM it is sent one, since a long stage may write into the folder without asking.
    """

    def __init__(
        self, folder: Path, renew_seconds: float = RENEW_SECONDS, lapse_seconds: float = LAPSE_SECONDS
    ) -> None:
        self.path = folder / "lease.json"
        place = place_of(self.path)
        self._file: _LocalFile | _StoredFile = _LocalFile(self.path) if place is None else _StoredFile(place)
        self._lapse_seconds = lapse_seconds
        pid = os.getpid()
        self._holder = Holder(
            socket.gethostname(), _machine(), pid, _process_start(pid), secrets.token_hex(8), time.time()
        )
        self._take(self._unless_held())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, args=(renew_seconds,), daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost unless the lease on disk is still this one."""
        holder = self._file.read()
        if holder is None or holder.token != self._holder.token:
            taken = "is gone" if holder is None else f"was taken over by process {holder.pid} on {holder.host}"
            raise LeaseLost(
                f"{self.path}: expected this driver's lease, but it {taken}; this driver stops writing. "
                "Stop it, and resume the run once no other driver is at work"
            )
        try:
            self._file.refresh(self._holder)
        except Changed as error:
            raise LeaseLost(f"{error} This driver stops writing; only one may be at work.") from error

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder's short lock, so that checking the lease and acting on it is one step."""
        return self._file.locked()

    def release(self) -> None:
        """Give the lease back; does nothing when it is already another's or was given back before."""
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if os.getpid() != self._holder.pid:  # a forked child must not give its parent's lease away
            return
        with self.locked():
            holder = self._file.read()
            if holder is not None and holder.token == self._holder.token:
                self._file.remove()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take(self, seen: Holder | None) -> None:
        """Write the lease where it still is what was seen; LeaseHeld where another driver was quicker."""
        with self.locked():
            found = self._file.read()
            try:
                if found != seen:
                    raise Changed(f"{self.path} was written meanwhile.")
                self._file.write(self._holder)
            except Changed as error:
                raise LeaseHeld(f"{error} Another driver has just begun with this run; stop one of them.") from error

    def _unless_held(self) -> Holder | None:
        """The lease that may be taken over, None where there is none; LeaseHeld where its holder is at work.

        Without the lock, which its holder needs for renewing it.
        """
        holder = self._file.read()
        if holder is None:
            return None
        age = max(0.0, time.time() - holder.heartbeat)
        if _is_dead(holder) or self._lapsed(holder):
            logger.info(
                "taking over the lease of process %d on %s, last renewed %.0f s ago", holder.pid, holder.host, age
            )
            return holder
        raise LeaseHeld(
            f"{self.path.parent}: expected no other driver, found process {holder.pid} on {holder.host}, which renewed "
            f"its lease {age:.0f} s ago; stop that process, or if it is dead retry in "
            f"{self._lapse_seconds - age:.0f} s, when its lease lapses"
        )

    def _lapsed(self, holder: Holder) -> bool:
        """By the clock where it is the same one, else by watching whether the lease is renewed."""
        age, seconds = time.time() - holder.heartbeat, self._lapse_seconds
        if age > LONG_AGO or holder.machine == _machine():
            return age > seconds
        logger.info("waiting %.0f s to see whether process %d on %s is at work", seconds, holder.pid, holder.host)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 10))
            if self._file.read() != holder:
                return False
        return True

    def _renew_forever(self, seconds: float) -> None:
        warned = False
        while not self._closing.wait(seconds):
            try:
                with self.locked():
                    self.check()
                    self._file.write(replace(self._holder, heartbeat=time.time()))
                warned = False
            except (LeaseLost, Changed) as error:
                logger.error("%s", error)
                if callable(signal.getsignal(signal.SIGTERM)):  # a script's own way to stop in order
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            except OSError as error:  # a full disk must not end the renewals: it may be cleared
                if not warned:
                    logger.warning("could not renew the lease: %s", error)
                warned = True


class _LocalFile:
    """lease.json on a disk, under the lock of a file beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        descriptor = os.open(self.path.with_name("lease.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A file system without locks leaves the lease itself and the ledger's refusal to overwrite an event.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def read(self) -> Holder | None:
        return read_holder(self.path)

    def write(self, holder: Holder) -> None:
        atomic_write_json(self.path, asdict(holder))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def refresh(self, holder: Holder) -> None:
        """Nothing: who holds the lock beside the file is alone."""


class _StoredFile:
    """lease.json in an object store. It is only written in place of the version that was read, so that of two drivers
    that find it free, or lapsed, one fails with Changed.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._version: Version | None = None
        self._renewed = -math.inf
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with self._lock:
            yield

    def read(self) -> Holder | None:
        found = self.place.read()
        self._version = None if found is None else found[1]
        return None if found is None else _holder_of(found[0], str(self.place))

    def write(self, holder: Holder) -> None:
        data, now = json.dumps(asdict(holder)).encode(), time.monotonic()
        self._version = self.place.write(data, instead_of=self._version, new=self._version is None)
        self._renewed = now

    def remove(self) -> None:
        self.place.remove()

    def refresh(self, holder: Holder) -> None:
        """Renew the lease unless that was just done.

        What is written next takes at most a few seconds (`object_store.SHORT_SECONDS`), so it cannot arrive after the
        lease has lapsed and another driver has taken over, whatever the network does.
        """
        if time.monotonic() - self._renewed > FRESH_SECONDS:
            self.write(replace(holder, heartbeat=time.time()))


def read_holder(path: Path) -> Holder | None:
    """The holder named in a lease file; None when there is no file or it cannot be read as one."""
    place = place_of(path)
    if place is not None:
        return _StoredFile(place).read()
    try:
        return _holder_of(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


def _holder_of(content: bytes, name: str) -> Holder | None:
    try:
        data = json.loads(content)
        return Holder(
            str(data["host"]),
            str(data["machine"]),
            int(data["pid"]),
            data["start"],
            str(data["token"]),
            float(data["heartbeat"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s) and counts as no lease", name, error)
        return None


def _machine() -> str:
    """What makes process numbers comparable: this boot of this machine and this process name space."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; None where there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _process_start(pid: int) -> int | None:
    stat = _process_stat(pid)
    return None if stat is None else int(stat[19])


def _is_dead(holder: Holder) -> bool:
    """True only when it is certain: same machine, and the process is gone, a zombie, or another one."""
    if holder.machine != _machine():
        return False
    stat = _process_stat(holder.pid)
    if stat is not None:
        return stat[0] in "ZX" or (holder.start is not None and int(stat[19]) != holder.start)
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return Path("/proc/self/stat").exists()  # the process ended between the two looks
