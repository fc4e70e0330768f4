"""Plain trainings side by side, each a Ray task that goes on from its checkpoint when its worker is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ray
import torch

from autodet.runtime.cluster import finished, warn_of_idle_machines
from autodet.training import Task, train_plain

WORKER_FAILURES = 3  # lost workers of one training before the run stops


def train_side_by_side(tasks: Mapping[str, Task], folder: Path, gpus: float = 0.0) -> dict[str, Path]:
    """Train each task's detector without a teacher; name → its file in ``folder/<name>``. Ray must be running.

    As many run at a time as Ray has CPUs (GPUs) for; a task takes ``task.threads``. Trainings that ended before are not
    repeated. MachineError with its cause where one fails.
    """
    pending, files = {}, {}
    for name, task in tasks.items():
        place = (folder / name).resolve()
        if ended := sorted(place.glob("*.safetensors")):
            files[name] = ended[0]
            continue
        warn_of_idle_machines(task.threads, gpus)
        remote = ray.remote(num_cpus=task.threads, num_gpus=gpus, max_retries=WORKER_FAILURES)(_train)
        pending[remote.remote(replace(task, weights=str(place)).to_json(), str(place))] = name
    files |= {name: Path(file) for name, file in finished("training", pending)}
    return {name: files[name] for name in tasks}


def _train(text: str, folder: str) -> str:
    """The file of a finished training."""
    torch.set_flush_denormal(True)
    return str(train_plain(Task.from_json(text), Path(folder)))
