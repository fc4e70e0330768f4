"""A pool's training on Ray Train: the workers' loop, and ``train_pool``, which runs it to its end."""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from ray import train
from ray.exceptions import RayError
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util.metrics import Gauge

from autodet.atomic import atomic_write_bytes
from autodet.object_store import place_of
from autodet.runtime.cluster import warn_of_idle_machines
from autodet.search.session import MachineError
from autodet.teachers.task import PoolBench, PoolTask
from autodet.teachers.trainer import PoolTrainer
from autodet.teachers.workers import DistributedWorkers
from autodet.training import Diverged
from autodet.training.checkpoint import load_checkpoint
from autodet.working_copy import discard, fetch

CHECKPOINT = "checkpoint.pt"
PROGRESS = "progress.jsonl"  # in the run's folder: a line an epoch, rewritten from the history, so that none is twice
DIVERGED = "diverged.txt"
WORKER_FAILURES = 4  # failures of workers, within an epoch, after which the run stops; it goes on with --resume
RESIZE_SECONDS = 5.0  # between looks for machines that joined
TRAIN_FOLDER = "train"  # Ray Train's own files in the run's folder, from which a resumed run goes on
CUT_OFF = f"{TRAIN_FOLDER}.cut-off-"  # begins the names of such folders that a kill left without their list
Workers = int | tuple[int, int]  # a fixed number, or the least and the most


def train_pool(task: PoolTask, run_folder: Path, workers: Workers, gpus_per_worker: float = 0.0) -> Path:
    """Train a pool on Ray Train workers, and return its last checkpoint's file. Ray must be running.

    A run folder that holds a training goes on from its last checkpoint, with any number of workers. Lost workers and
    machines are replaced, or done without where ``workers`` is a pair (elastic). On several machines the folder must be
    on storage that all share. Raises Diverged where the training did, MachineError where more than ``WORKER_FAILURES``
    workers failed without an epoch between them, KeyboardInterrupt on Ctrl-C.
    """
    folder = run_folder.resolve()
    discard(folder / DIVERGED)
    threads = task.task.threads
    scaling: dict[str, Any] = {  # Ray's own types are still those before elastic training
        "num_workers": workers,
        "use_gpu": gpus_per_worker > 0,
        "resources_per_worker": {"CPU": threads} | ({"GPU": gpus_per_worker} if gpus_per_worker else {}),
        "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
    }
    run = train.RunConfig(
        name=TRAIN_FOLDER,
        storage_path=str(place_of(folder) or folder),  # Ray's own way to a store, for checkpoints of several machines
        failure_config=train.FailureConfig(max_failures=WORKER_FAILURES),
        checkpoint_config=train.CheckpointConfig(num_to_keep=2),
    )

    def make() -> TorchTrainer:
        config = {"task": task.to_json(), "folder": str(folder), "rescued": rescued(folder)}
        scale = train.ScalingConfig(**scaling)
        return TorchTrainer(train_on_worker, train_loop_config=config, scaling_config=scale, run_config=run)

    warn_of_idle_machines(threads, gpus_per_worker)
    result = fit_while_it_advances(make, lambda: epochs_done(folder))
    for told in (DIVERGED, PROGRESS):  # by a worker, perhaps on another machine
        fetch(folder / told)
    if (folder / DIVERGED).exists():
        raise Diverged((folder / DIVERGED).read_text())
    assert result.checkpoint is not None  # every epoch left one
    kept = folder / CHECKPOINT
    with result.checkpoint.as_directory() as directory:
        atomic_write_bytes(kept, (Path(directory) / CHECKPOINT).read_bytes())
    return kept


def fit_while_it_advances(make: Callable[[], TorchTrainer], epochs: Callable[[], int]) -> Any:
    """The result of a training, begun again where machines were lost, as long as epochs come to an end between.

    Ray counts a training's lost machines over days. make: the training, which goes on from its last checkpoint.
    """
    while True:
        before = epochs()
        try:
            return _fit(make())
        except MachineError as error:
            if epochs() <= before:
                raise
            logging.warning("%s It has advanced meanwhile, and goes on.", error)


def epochs_done(folder: Path) -> int:
    """Epochs of a run that have ended."""
    fetch(folder / PROGRESS)
    return len((folder / PROGRESS).read_text().splitlines()) if (folder / PROGRESS).exists() else 0


def _fit(trainer: TorchTrainer) -> Any:
    """Ray's own handler of Ctrl-C ends the process with code 0, and stays behind when the training is over."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    except (TrainingFailedError, RayError) as error:
        raise MachineError(
            f"The training's workers failed: {error}. Mend the cause and go on with --resume."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def rescued(folder: Path) -> str | None:
    """The newest checkpoint of a run whose list of them was cut off by a kill; None where Ray finds them itself.

    Ray does not write its list in one step, and with half a list it neither resumes nor starts.
    """
    train_folder = folder / TRAIN_FOLDER
    try:
        json.loads((train_folder / "checkpoint_manager_snapshot.json").read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        train_folder.rename(folder / f"{CUT_OFF}{time.time_ns()}")
    found = folder.glob(f"{CUT_OFF}*/checkpoint_*/{CHECKPOINT}")
    for path in sorted(found, key=lambda path: path.parent.name, reverse=True):  # the name is the time
        with suppress(ValueError):  # it may be cut off as well
            load_checkpoint(path, torch.device("cpu"))
            return str(path)
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove from a run's folder what only a training that goes on needs: checkpoints, gigabytes of a large pool."""
    for leftover in (folder / CHECKPOINT, folder / TRAIN_FOLDER, *folder.glob(f"{CUT_OFF}*")):
        discard(leftover)


def train_on_worker(config: Mapping[str, Any]) -> None:
    """One worker's loop. Its process group has been set up by Ray: gloo on CPUs, NCCL on GPUs.

    A training that diverges does so on all workers at once, as they share every step's gradient. It is told by a file:
    what a worker raises, Ray takes for a lost worker, and tries again.
    """
    try:
        _train_on_worker(config)
    except Diverged as error:
        atomic_write_bytes(Path(config["folder"]) / DIVERGED, str(error).encode())


def _train_on_worker(config: Mapping[str, Any]) -> None:
    task = PoolTask.from_json(config["task"])
    torch.set_num_threads(task.task.threads)
    torch.set_flush_denormal(True)
    bench, workers = PoolBench(task), DistributedWorkers()
    start = train.get_checkpoint()
    if start is None:
        trainer = bench.trainer(workers, Path(config["rescued"]) if config["rescued"] else None)
    else:
        with start.as_directory() as directory:
            trainer = bench.trainer(workers, Path(directory) / CHECKPOINT)
    gauges = _Gauges() if workers.rank == 0 else None

    def on_epoch(trainer: PoolTrainer, entry: Mapping[str, Any]) -> None:
        metrics = {"epoch": entry["epoch"], "workers": workers.count, **entry.get("ap", {})}
        if gauges is None:
            train.report(metrics)
            return
        gauges.show(entry)
        save_progress(Path(config["folder"]), trainer.history)
        with tempfile.TemporaryDirectory() as directory:
            trainer.save(Path(directory) / CHECKPOINT)
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(directory))

    bench.train(trainer, on_epoch)


def save_progress(folder: Path, history: list[dict[str, Any]]) -> None:
    """The history as lines of JSON in the run's folder."""
    atomic_write_bytes(folder / PROGRESS, "".join(json.dumps(entry) + "\n" for entry in history).encode())


class _Gauges:
    """A training's numbers on Ray's dashboard."""

    def __init__(self) -> None:
        names = {"epoch": "epochs done", "images_per_second": "training images a second"}
        self.gauges = {name: Gauge(f"autodet_pool_{name}", text) for name, text in names.items()}
        self.ap = Gauge("autodet_pool_ap", "AP of a member that is watched", tag_keys=("member",))
        self.loss = Gauge(
            "autodet_pool_loss", "the detector's own training loss by kind of member", tag_keys=("member",)
        )

    def show(self, entry: Mapping[str, Any]) -> None:
        for name, gauge in self.gauges.items():
            gauge.set(float(entry[name]))
        for member, ap in entry.get("ap", {}).items():
            self.ap.set(ap, tags={"member": member})
        for role in ("largest", "smallest", "random"):
            own = [name for name in entry["losses"] if name.startswith(f"{role}/") and "/distill/" not in name]
            losses = [entry["losses"][name] for name in own]
            if losses:
                self.loss.set(sum(losses), tags={"member": role})
