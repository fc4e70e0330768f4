"""Local copies of folders in object stores: made, brought up to date, and read from; see `autodet.object_store`.

A run's driver and its trials share one path for its copy, on every machine. Who only reads has a copy of its own, since
bringing one up to date under a driver would undo what it is about to write.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from autodet.atomic import is_final, note_of, write_here, write_note
from autodet.object_store import Stored, copy_of, declare_copy, is_url, place_of

ROOT = "AUTODET_COPIES"  # environment: where copies lie, the same path on all machines; default ~/.cache/autodet/copies
READ = "read"  # below it: copies of those who only read
# What is not brought: checkpoints, which trials fetch themselves; Ray's own files; the lease, which is never a copy.
LEFT_FOLDERS, LEASE = {"trials", "ray", "train"}, "lease.json"
FILES = (".safetensors", ".pth", ".pt")
SETTINGS = "config.json"  # of a run; all that is needed before its lease is taken
UNUSED_SECONDS = 3600.0
THREADS = 32

logger = logging.getLogger(__name__)


def local_path(text: str) -> Path:
    """A path as it is; of a run's URL its driver's copy, with the settings alone: `Ledger` brings the rest.

    A path below the copies' root means its URL.
    """
    url = _url_of(text)
    if url is None:
        return Path(text)
    path = copy_of(url) or _root() / url.replace("://", "/")
    if place_of(path) is None:
        declare_copy(path, url)
    fetch(path / SETTINGS)
    return path


def read_path(text: str, only: tuple[str, ...] = ("",)) -> Path:
    """A path as it is; of a URL of a folder or a file of weights, an up-to-date copy to read.

    only: how the names begin that are wanted of a folder. What lies in a run that this process writes is read there.
    """
    url = _url_of(text)
    if url is None:
        return Path(text)
    if (known := copy_of(url)) is not None and not known.is_relative_to(_root() / READ):
        return known
    path = _root() / READ / url.replace("://", "/")
    if place_of(path) is None:
        is_file = path.suffix in FILES
        declare_copy(path.parent if is_file else path, url.rpartition("/")[0] if is_file else url)
    if path.suffix in FILES:
        fetch_changed(path)
    else:
        update(path, only)
    return path


def update(folder: Path, only: tuple[str, ...] = ("",)) -> None:
    """Bring a copy up to date: what the store has below it, and nothing else.

    For the one who writes there, or a copy to read. only: how the names begin that are brought.
    """
    place = place_of(folder)
    if place is None:
        return
    there = {found.name: found for found in place.files() if _is_wanted(found.name, only)}
    for path in [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]:
        name = path.relative_to(folder).as_posix()
        if name not in there and _is_wanted(name, only):
            _remove_here(path)  # of a run that was never recorded there, or removed since
    wanted = [folder / name for name, found in there.items() if not _is_current(folder / name, found)]
    if wanted:
        logger.info("fetching %d files of %s", len(wanted), place)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, wanted))


def fetch(path: Path) -> None:
    """Bring a file of a copy as the store has it now; where the store has none, a local one goes."""
    place = place_of(path)
    if place is None:
        return
    found = place.read()
    if found is None:
        if not path.is_dir():
            _remove_here(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_here(path, found[0])
    write_note(path, found[1])


def fetch_changed(path: Path) -> None:
    """Bring a file of a copy, unless it is here as the store has it."""
    place = place_of(path)
    if place is None:
        return
    if is_final(path):
        if path.exists():
            os.utime(path)  # it is in use, see `spare`
            return
    elif path.exists() and (version := place.version()) is not None and note_of(path) == version.tag:
        return
    fetch(path)


def discard(path: Path) -> None:
    """Remove a file or a whole folder, in the store first; nothing where there is none."""
    place = place_of(path)
    if place is not None:
        place.remove()
    _remove_here(path)


def move(source: Path, target: Path) -> None:
    """Give a file another name. In a copy the new one is in the store before the old one goes."""
    place = place_of(target)
    if place is None:
        os.replace(source, target)
        return
    content = source.read_bytes()
    version = place.write(content)
    write_here(target, content)
    write_note(target, version)
    discard(source)


def spare(run: Path, trial: Path) -> None:
    """Remove from a copy on this machine's disk an ended trial's files, and weights that nobody used lately.

    The store has them, and `fetch_changed` brings back what is needed after all.
    """
    if place_of(run) is None:
        return
    shutil.rmtree(trial, ignore_errors=True)
    for path in (run / "weights").glob("*.safetensors"):
        with suppress(OSError):  # another trial of this machine does the same
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                path.unlink()


def _root() -> Path:
    return Path(os.environ.get(ROOT) or "~/.cache/autodet/copies").expanduser().resolve()


def _url_of(text: str) -> str | None:
    """The URL that a text names, also by the path of its copy; None for any other path."""
    if is_url(text):
        return text.rstrip("/")
    path = Path(os.path.abspath(text))
    for root in (_root() / READ, _root()):
        if path.is_relative_to(root) and len(parts := path.relative_to(root).parts) > 1:
            return f"{parts[0]}://{'/'.join(parts[1:])}"
    return None


def _is_wanted(name: str, only: tuple[str, ...]) -> bool:
    *folders, last = name.split("/")
    return name.startswith(only) and last != LEASE and LEFT_FOLDERS.isdisjoint(folders)


def _is_current(path: Path, stored: Stored) -> bool:
    try:
        same_size = path.stat().st_size == stored.size
    except OSError:
        return False
    return same_size and (is_final(path) or note_of(path) == stored.tag)


def _remove_here(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    path.unlink(missing_ok=True)
    write_note(path, None)
