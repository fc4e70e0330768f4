"""A pool's training on Ray Train: a killed worker changes nothing but the time."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detector_cases import small_spec
from ray.train import WorkerGroupError

from autodet.data.shapes import CATEGORY_IDS
from autodet.distill import Formula
from autodet.runtime import pool_training
from autodet.runtime.pool_training import PROGRESS, train_pool
from autodet.search.session import MachineError
from autodet.teachers import PoolSettings, PoolSpace, Schedule
from autodet.teachers.task import PoolBench, PoolTask
from autodet.teachers.trainer import PoolTrainer
from autodet.training import Diverged, Task, TrainSettings

LABELS = tuple((id_, name) for name, id_ in CATEGORY_IDS.items())


@pytest.fixture
def task(shapes_folder: Path, tmp_path: Path) -> PoolTask:
    space = PoolSpace.parse("basic-=:8..16/8x1..2-8..16/8x1-16x1..2-16x1@64")
    schedule = Schedule.parse("2*largest > 10*sandwich(1, 2)")
    spec = replace(small_spec("fcos", LABELS), body=space.largest.body)
    settings = TrainSettings(schedule.epochs, batch_size=4, ema=0.9)
    plain = Task(str(shapes_folder), str(tmp_path / "cache"), spec, settings, fixed_batches=False)
    return PoolTask(plain, space, PoolSettings(schedule, Formula.parse("global: l2 * 0.1")), check_every=6)


def kill_a_worker(folder: Path, after: int, killed: list[int]) -> None:
    """Kill one of Ray Train's workers once some epochs are done."""
    while not (folder / PROGRESS).exists() or len((folder / PROGRESS).read_text().splitlines()) < after:
        time.sleep(0.05)
    titles = {path.parent.name: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    workers = [int(pid) for pid, title in titles.items() if b"RayTrainWorker" in title]
    os.kill(workers[-1], signal.SIGKILL)
    killed.append(workers[-1])


@pytest.mark.usefixtures("ray_cluster")
def test_after_a_worker_was_killed_the_pool_is_the_same(task: PoolTask, tmp_path: Path) -> None:
    """Two workers, one of which is lost, against one process that does everything; and no epoch counts twice."""
    folder = tmp_path / "run"
    folder.mkdir()
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(folder, 3, killed), daemon=True)
    killer.start()
    checkpoint = train_pool(task, folder, workers=2)
    killer.join(timeout=1)
    assert len(killed) == 1
    bench = PoolBench(task)
    alone = bench.trainer()
    bench.train(alone, lambda trainer, entry: None)
    together = bench.trainer(checkpoint=checkpoint)
    history = [json.loads(line) for line in (folder / PROGRESS).read_text().splitlines()]
    assert [entry["epoch"] for entry in history] == list(range(1, task.task.settings.epochs + 1))
    assert_same(together, alone)
    assert history[-1]["ap"].keys() == {"largest", "smallest", "random 1", "random 2"}
    for ours, theirs in zip(history, alone.history, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3, abs=1e-4)


def assert_same(one: PoolTrainer, other: PoolTrainer) -> None:
    """Up to rounding: sums come in another order, and AdamW divides small gradients by small numbers."""
    expected = dict(other.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-3)
        assert float((parameter - expected[name]).abs().mean().detach()) < 1e-5, name


class Fails:
    """A training that ends with an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def fit(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray leaves one of its own behind
        raise self.error


@pytest.mark.parametrize(
    ("error", "becomes"),
    [(SystemExit(0), KeyboardInterrupt), (WorkerGroupError("full disk", {0: OSError("full disk")}), MachineError)],
)
def test_how_a_training_ends_is_told_in_our_words(error: BaseException, becomes: type[BaseException]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(becomes) as told:
        pool_training._fit(Fails(error))  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is handler
    assert becomes is KeyboardInterrupt or "full disk" in str(told.value)


def test_a_diverged_training_is_told_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(config: object) -> None:
        raise Diverged("The gradient's norm is nan at step 7.")

    monkeypatch.setattr(pool_training, "_train_on_worker", diverge)
    pool_training.train_on_worker({"folder": str(tmp_path)})
    assert (tmp_path / pool_training.DIVERGED).read_text() == "The gradient's norm is nan at step 7."
