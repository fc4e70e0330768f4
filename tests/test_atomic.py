import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodet.atomic import WriteError, atomic_write_bytes, atomic_write_json, plain_json
from autodet.records import Metrics


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"one")
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["file"]


def test_keeps_an_existing_file_when_told_to(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"one", overwrite=False)
    with pytest.raises(FileExistsError):
        atomic_write_bytes(path, b"two", overwrite=False)
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(WriteError, match="free some space") as caught:
        atomic_write_bytes(path, b"new")
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and str(path) in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_new_file_is_taken_back_when_its_folder_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, []

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        full_disk() if len(calls) == 2 else sync(descriptor)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(WriteError):
        atomic_write_bytes(tmp_path / "file", b"new", overwrite=False)
    assert os.listdir(tmp_path) == []


def test_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    atomic_write_bytes(tmp_path / "file", b"one", overwrite=False)
    with pytest.raises(FileExistsError):
        atomic_write_bytes(tmp_path / "file", b"two", overwrite=False)
    assert (tmp_path / "file").read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    atomic_write_bytes(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_json_is_standard(tmp_path: Path) -> None:
    value = {"a": (1, np.float32(0.5)), 2: float("nan"), "p": Path("x/y"), "m": np.arange(2), "n": [float("inf")]}
    atomic_write_json(tmp_path / "file", value)

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    read = json.loads((tmp_path / "file").read_text(), parse_constant=refuse)
    assert read == {"a": [1, 0.5], "2": None, "p": "x/y", "m": [0, 1], "n": [None]} == plain_json(value)
    assert plain_json(Metrics(ap=0.5))["ap"] == 0.5


def test_json_names_the_place_of_what_it_cannot_hold() -> None:
    with pytest.raises(TypeError, match=r"payload\.a\[1\].*found set"):
        plain_json({"a": [1, {2}]}, "payload")


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
