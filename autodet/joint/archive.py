"""Which weights of a joint search stay on the disk: those that something may still inherit from, or a user choose."""

from __future__ import annotations

from pathlib import Path

from autodet.search import JointSearch
from autodet.working_copy import discard


def remove_unneeded(folder: Path, search: JointSearch) -> list[str]:
    """Remove the weights of candidates that have ended and are needed no more, since the last call; their hashes.

    So the folder holds those of the front, the best, the base, founders, running children's parents, and those just
    being written.
    """
    return [hash for hash in sorted(search.take_unneeded()) if _removed(folder / f"{hash}.safetensors")]


def remove_strays(folder: Path, search: JointSearch) -> list[str]:
    """Remove all that nothing needs, also of candidates that never ended, as a killed run leaves them.

    Only while nothing runs.
    """
    kept = search.needed()
    search.take_unneeded()  # they go here, all at once: one by one each would be asked for in a store
    found = sorted(folder.glob("*.safetensors"))
    return [path.stem for path in found if path.stem not in kept and _removed(path)]


def _removed(path: Path) -> bool:
    existed = path.exists()
    discard(path)
    return existed
