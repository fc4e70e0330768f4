"""Writing files so that a reader sees the old content or the new, never a part.

Every writer of the project goes through here: the ledger, checkpoints, caches, reports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodet.object_store import Changed, Version, place_of

TEMPORARY_SUFFIX, NOTE_SUFFIX = ".tmp", ".version"


class WriteError(OSError):
    """A file could not be written; what was there before is untouched and no part of the new content stays."""


def atomic_write_bytes(path: Path | str, data: bytes, *, overwrite: bool = True) -> None:
    """Write `data` to `path` in one step that survives a crash (file and folder are synced).

    With `overwrite=False` an existing file is kept and FileExistsError raised, also when two processes race.
    Raises WriteError (an OSError with the same errno) when the disk is full or the folder cannot be written.
    In a copy of a folder of an object store the content is put there first, and StoreError raised where it cannot be.
    """
    place = place_of(Path(path))
    if place is None:
        write_here(path, data, overwrite=overwrite)
        return
    try:
        version = place.write(data, new=not overwrite)
    except Changed as error:
        raise FileExistsError(str(error)) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)  # made by the driver, on another machine
    write_here(path, data)
    write_note(Path(path), version)


def write_here(path: Path | str, data: bytes, *, overwrite: bool = True) -> None:
    """Write to this machine's disk alone; else as `atomic_write_bytes`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        try:
            _write_synced(temporary, data)
            if overwrite:
                os.replace(temporary, path)
                _sync_folder(path.parent)
            else:
                _place_new(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise
    except OSError as error:
        raise _explained(path, error) from error


def is_final(path: Path) -> bool:
    """Whether a file's content never changes, because its name is a number or a hash of it."""
    return path.parent.name == "events" or (path.parent.name == "weights" and path.suffix == ".safetensors")


def note_of(path: Path) -> str | None:
    """Which version of an object a file of a copy is, as far as that was noted."""
    try:
        return _note(path).read_text()
    except OSError:
        return None


def write_note(path: Path, version: Version | None) -> None:
    """Note which version a file of a copy is; None where it is removed."""
    if version is None or version.tag is None or is_final(path):
        _note(path).unlink(missing_ok=True)
    else:
        write_here(_note(path), version.tag.encode())


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}{NOTE_SUFFIX}")


def atomic_write_json(path: Path | str, value: object, *, overwrite: bool = True) -> None:
    """Write `value` as indented, standard JSON in one step; see `plain_json` for what is accepted."""
    text = json.dumps(plain_json(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write_bytes(path, text.encode(), overwrite=overwrite)


def plain_json(value: object, where: str = "value") -> Any:
    """`value` as JSON would give it back: tuples as lists, keys as text, numbers of numpy or torch as Python's.

    NaN and infinities become null (standard JSON has no word for them); dataclasses become dictionaries.
    Raises TypeError naming the place of a value that JSON cannot hold.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain_json(getattr(value, field.name), f"{where}.{field.name}") for field in fields}
    to_list = getattr(value, "tolist", None)  # numpy and torch, scalars and arrays
    if callable(to_list):
        return plain_json(to_list(), where)
    raise TypeError(
        f"{where}: expected numbers, text, lists or dictionaries, found {type(value).__name__}; "
        "convert it to one of these before it is recorded"
    )


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place_new(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path` unless that name is taken; undo it when the folder cannot be synced."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without hard links: reserve the name first, then move the content over it.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        os.replace(temporary, path)
    try:
        _sync_folder(path.parent)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network disks cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _explained(path: Path, error: OSError) -> WriteError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space, then resume"
    elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        remedy = "make the folder writable or choose another one"
    else:
        remedy = "check the folder, then resume"
    reason = error.strerror or str(error)
    return WriteError(error.errno, f"cannot write ({reason}); nothing half-written was left; {remedy}", str(path))
