"""A lock between processes that survives a kill at any moment."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of `path` (created if missing); waits while another process holds it.

    The kernel releases the lock when its holder dies. The file itself stays: deleting it would let a third
    process lock a new file of the same name while the second still holds the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
