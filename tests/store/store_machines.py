"""Other machines, and other processes, as seen by the tests of one."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import pytest
from s3_server import settings_of

from autodet import object_store
from autodet.object_store import COPIED, copies, declare_copy
from autodet.working_copy import ROOT, local_path, read_path, update

NUMBERS = count()
ASKED = {"candidate": {"formula": "none", "inherit": False, "replicate": 0}, "phase": "divide", "group": "global"}


def reach(server: str, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be a client of a server that has no copies yet."""
    for name, value in settings_of(server, copies).items():
        monkeypatch.setenv(name, value)
    object_store._store.cache_clear()


def other_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's copy on a machine that has never seen it, brought up to date."""
    monkeypatch.setenv(ROOT, f"{os.environ[ROOT]}-{next(NUMBERS)}")
    monkeypatch.setenv(COPIED, "{}")
    folder = local_path(url)
    update(folder)
    return folder


def read_by_another_process(url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's copy of the run, on this machine."""
    ours = copies()
    monkeypatch.setenv(COPIED, "{}")
    other = read_path(url)
    for folder, copied in ours.items():
        declare_copy(Path(folder), copied)
    return other
