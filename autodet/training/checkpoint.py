"""Checkpoints of a training in progress: atomic to write, never unpickled to read."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from autodet.atomic import atomic_write_bytes


class DamagedCheckpoint(ValueError):  # noqa: N818 - the name is the state it reports
    """A file that is truncated, or no checkpoint."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain numbers to one file; an interrupted write leaves the former file in place."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, buffer.getvalue())


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state; DamagedCheckpoint naming the file where it is truncated or not ours."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # torch's own words on a refused pickle advise to load it unsafely.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "cut off, or not only tensors and numbers" if unsafe else (str(error) or "empty").splitlines()[0]
        message = f"{path} is no readable checkpoint ({reason}). Delete it to train from the start."
        raise DamagedCheckpoint(message) from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(
            f"{path} is no checkpoint: it holds a {type(state).__name__}. Delete it to train from the start."
        )
    return state
