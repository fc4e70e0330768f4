"""AP of a pool's members, side by side: each a Ray task that reads the pool through its node's weight cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import ray
import torch

from autodet.atomic import atomic_write_bytes
from autodet.runtime.cluster import finished, warn_of_idle_machines
from autodet.runtime.weight_cache import shared_weights
from autodet.teachers.pool import WEIGHTS, TeacherPool, read_manifest
from autodet.teachers.space import Member
from autodet.teachers.task import PoolBench, PoolTask

MEASURED = "measured.jsonl"  # in the run's folder: a line a member, so that none is measured again after a stop
WORKER_FAILURES = 3  # lost workers of one member before the run stops

# AP (0–1) with a member's own norm statistics, with slices of the largest's, and of masks (None where it has none).
Aps = tuple[float, float, float | None]


def measure_side_by_side(
    task: PoolTask, run_folder: Path, pool_folder: Path, members: Sequence[Member], gpus: float = 0.0
) -> dict[Member, Aps]:
    """AP of members on the task's split. Ray must be running; as many are measured at a time as it has room for.

    Those that the run's folder has from before are not measured again. MachineError with its cause where one fails.
    """
    path = run_folder / MEASURED
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {Member.parse(line["member"]): (line["ap"], line["ap_before"], line.get("mask_ap")) for line in lines}
    # Ray would end a GPU's worker after each task, and the next one would load the data again.
    remote = ray.remote(num_cpus=task.task.threads, num_gpus=gpus, max_retries=WORKER_FAILURES, max_calls=0)(_measure)
    warn_of_idle_machines(task.task.threads, gpus)
    folder = str(pool_folder.resolve())
    pending = {remote.remote(task.to_json(), folder, str(member)): member for member in members if member not in found}
    for member, (ap, before, masks) in finished("measuring", pending):
        logging.info("  AP %.3f, %.3f before its norm statistics were measured", ap, before)
        found[member] = (ap, before, masks)
        lines.append({"member": str(member), "ap": ap, "ap_before": before, "mask_ap": masks})
        atomic_write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return {member: found[member] for member in members}


def _measure(text: str, folder: str, member_text: str) -> Aps:
    bench, member = _bench(text), Member.parse(member_text)
    task = bench.task.task
    torch.set_num_threads(task.threads)
    torch.set_flush_denormal(True)
    manifest = read_manifest(Path(folder))
    pool = TeacherPool.of_manifest(manifest, shared_weights(manifest["weights"], Path(folder) / WEIGHTS))
    raw = pool.extract(member)
    raw.model.to(task.device)
    before = bench.bench.measure(raw).ap or 0.0
    taken = pool.take(member, bench.bench.train_loader, Path(task.cache), task.device)
    metrics = bench.bench.measure(taken)
    return metrics.ap or 0.0, before, metrics.mask_ap


@lru_cache(maxsize=1)
def _bench(text: str) -> PoolBench:
    """Processes that are used again find the data here."""
    return PoolBench(PoolTask.from_json(text))
