"""Data comes to a machine's disk whole, once, or not at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cluster_files import CLUSTER

from autodet import object_store


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """cluster/fetch_data.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("fetch_data", CLUSTER / "fetch_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder that looks like a data set."""
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    (folder / "train.json").write_text("{}")
    (folder / "images" / "1.jpg").write_bytes(b"picture")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_copied_once(script: ModuleType, source: Path, tmp_path: Path, capsys: Any) -> None:
    there = tmp_path / "local" / "data"
    assert script.main([str(source), str(there)]) == 0
    assert content(there) == content(source) != {}
    (source / "train.json").write_text("{} changed")
    assert script.main([str(source), str(there)]) == 0
    assert "is here already" in capsys.readouterr().out and content(there)["train.json"] == b"{}"


def test_a_bucket_is_copied(script: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    from obstore.store import LocalStore

    asked = []

    def store(url: str) -> Any:
        asked.append(url)
        return LocalStore(source)

    monkeypatch.setattr(object_store, "_store", store)
    assert script.main(["s3://bucket/coco/", str(tmp_path / "data")]) == 0
    assert content(tmp_path / "data") == content(source) and set(asked) == {"s3://bucket/coco"}


@pytest.mark.parametrize("wrong", ["nowhere", "empty", "http://example.com/coco"])
def test_what_cannot_be_fetched_leaves_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, wrong: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "local").mkdir()
    assert script.main([wrong, "local/data"]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot fetch {wrong}: ")
    assert list((tmp_path / "local").iterdir()) == []


def test_a_copy_that_breaks_off_is_not_taken_for_data(
    script: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: str, folder: Path, **__: Any) -> None:
        (folder / "train.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(script.shutil, "copytree", full_disk)
    assert script.main([str(source), str(tmp_path / "data")]) == 1
    assert list(tmp_path.iterdir()) == [source]
