"""A server and a folder of its own on it, for tests of runs in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from s3_server import make_bucket, s3_server
from store_machines import reach

NUMBERS = count()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def url(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in a bucket of its own; copies lie below tmp_path."""
    reach(server, tmp_path / "copies", monkeypatch)
    bucket = f"bucket-{next(NUMBERS)}"
    make_bucket(server, bucket)
    return f"s3://{bucket}/runs/a"
