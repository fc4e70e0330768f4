"""Local copies of folders in object stores: made, brought up to date, and read from; see `autodet.object_store`."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autodet.atomic import write_here
from autodet.object_store import declare_copy, is_url, place_of

ROOT = "AUTODET_COPIES"  # environment: where copies lie, the same path on all machines; default ~/.cache/autodet/copies
# What is not brought: checkpoints, which trials fetch themselves; Ray's own files; the lease, which is never a copy.
LEFT = ("trials/", "ray/", "train/", "lease.json")
FILES = (".safetensors", ".pth", ".pt")
THREADS = 32

logger = logging.getLogger(__name__)


def local_path(text: str) -> Path:
    """A path as it is; of a URL of a folder or a file of weights, the local copy, up to date. An option's type."""
    if not is_url(text):
        return Path(text)
    root = os.environ.get(ROOT) or "~/.cache/autodet/copies"
    path = Path(root).expanduser().resolve() / text.rstrip("/").replace("://", "/")
    is_file = path.suffix in FILES
    declare_copy(path.parent if is_file else path, text.rpartition("/")[0] if is_file else text)
    (fetch if is_file else update)(path)
    return path


def update(folder: Path) -> None:
    """Bring a copy up to date: what the store has, and nothing else.

    Files with a hash or a number for a name never change, and are brought once.
    """
    place = place_of(folder)
    if place is None:
        return
    there = {key: size for key, size in place.files() if not key.startswith(LEFT)}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        key = path.relative_to(folder).as_posix()
        if key not in there and not key.startswith(LEFT):
            path.unlink()  # of a run that was never recorded there, or removed since
    wanted = [key for key, size in there.items() if not (_is_final(key) and _size(folder / key) == size)]
    if wanted:
        logger.info("fetching %d files of %s", len(wanted), place)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, [folder / key for key in wanted]))


def fetch(path: Path) -> None:
    """Bring a file of a copy as the store has it now; where the store has none, a local one goes."""
    place = place_of(path)
    if place is None:
        return
    found = place.read()
    if found is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_here(path, found[0])


def fetch_missing(path: Path) -> None:
    """Bring a file that never changes, where it is not here yet."""
    if not path.exists():
        fetch(path)


def discard(path: Path) -> None:
    """Remove a file or a whole folder, in the store first; nothing where there is none."""
    place = place_of(path)
    if place is not None:
        place.remove()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_final(key: str) -> bool:
    folder, _, name = key.rpartition("/")
    return folder == "events" or (folder.endswith("weights") and name.endswith(".safetensors"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
