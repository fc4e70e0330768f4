"""Quiet for a timing: whoever works holds a shared lock, whoever measures waits for all of them and keeps them waiting.

Locks are of files, between processes of one machine, and end with the process that holds them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Quiet:
    """Two lock files in a folder that the processes of a run share, which must be on each machine's own disk.

    A worker passes the gate before each piece of work, so that one who waits to be alone is not kept waiting by workers
    who take turns.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def working(self) -> Iterator[None]:
        """For a piece of work, such as a training step; waits while somebody is alone."""
        with self._held("gate", fcntl.LOCK_SH):
            pass
        with self._held("work", fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a timing: begins once all pieces of work have ended, and lets none begin."""
        with self._held("gate", fcntl.LOCK_EX), self._held("work", fcntl.LOCK_EX):
            yield

    def remove(self) -> None:
        """Remove the lock files, once nobody works or measures any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _held(self, name: str, kind: int) -> Iterator[None]:
        handle = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, kind)
            yield
        finally:
            os.close(handle)  # which ends the lock
