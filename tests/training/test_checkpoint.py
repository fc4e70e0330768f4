"""Checkpoints: round trip, damaged files, files that would run code, interrupted writes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from autodet.training.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
STATE = {"epoch": 3, "model": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {"betas": (0.9, 0.999), "lr": None}}


def test_tensors_and_numbers_come_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    state = load_checkpoint(path, CPU)
    assert torch.equal(state["model"].pop("w"), torch.arange(6.0).view(2, 3))
    assert state == {"epoch": 3, "model": {}, "optimizer": {"betas": (0.9, 0.999), "lr": None}}


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no readable checkpoint.*Delete it"):
        load_checkpoint(path, CPU)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x00" * 400])
def test_a_file_of_another_kind_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no readable checkpoint"):
        load_checkpoint(path, CPU)


def test_a_file_that_holds_something_else_is_an_error(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is no checkpoint: it holds a Tensor"):
        load_checkpoint(tmp_path / "weights.pt", CPU)


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name, write in (
        ("a.pt", torch.save),
        ("b.pt", lambda state, path: path.write_bytes(pickle.dumps(state, protocol=2))),
    ):
        write({"model": Trap(trace)}, tmp_path / name)
        with pytest.raises(ValueError, match="no readable checkpoint"):
            load_checkpoint(tmp_path / name, CPU)
    assert not trace.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert trace.exists()  # the trap works


def test_an_interrupted_write_keeps_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})

    def killed(*_: Any) -> None:
        raise OSError("interrupted")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="interrupted"):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path, CPU) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
