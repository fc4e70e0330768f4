"""A round of chaos: a search on a cluster of several nodes, while processes are killed and nodes come and go.

command:   PYTHONPATH=.:tests:tests/store:tests/detectors python tests/chaos/chaos.py distiller|joint [--rounds 20]
           [--seed 0] [--faults 6] [--store] [--output DIR]

Each round starts a cluster on this machine, a driver, and at random moments one fault after another. A driver that died
is started again with the same command. In the end the run must be what a run without faults is: see ``check``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detector_cases import small_spec, stirred
from ray.cluster_utils import Cluster
from s3_server import make_bucket, s3_server, settings_of

from autodet import object_store
from autodet.data import read_dataset, write_shapes
from autodet.detectors import save_detector
from autodet.ledger import Ledger
from autodet.object_store import COPIED, place_of
from autodet.records import Record, records_from
from autodet.results.lineage import front
from autodet.teachers import PoolSpace
from autodet.teachers.pool import save_pool
from autodet.working_copy import ROOT, local_path, read_path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SPACE = PoolSpace.parse("basic-=:8..16/8x1-16x1..2-16x1-16x1@64")
PAUSE = (1.0, 5.0)  # seconds between two faults
LONGEST = 600.0  # seconds of a round
LOST_SOON = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}  # a node that does not answer
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@dataclass
class Nodes:
    """A cluster whose head runs no trials, and nodes of one CPU each."""

    cluster: Any  # ray.cluster_utils.Cluster
    workers: list[Any] = field(default_factory=list)

    def add(self) -> None:
        """A node joins."""
        self.workers.append(self.cluster.add_node(num_cpus=1))

    def replace(self, rng: random.Random) -> str:
        """A node is lost, with everything on it, and another one joins."""
        lost = self.workers.pop(rng.randrange(len(self.workers)))
        self.cluster.remove_node(lost, allow_graceful=False)
        self.add()
        return "a node"

    def processes(self, *titles: str) -> list[int]:
        """Processes of this cluster whose title begins so."""
        raylets = {info.process.pid for node in self.workers for info in node.all_processes.get("raylet", [])}
        return [pid for pid, title, parent in _processes() if parent in raylets and title.startswith(titles)]


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """A running cluster with so many nodes beside its head."""
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": LOST_SOON})
    try:
        found = Nodes(cluster)
        for _ in range(count):
            found.add()
        yield found
    finally:
        cluster.shutdown()


class Driver:
    """The script, started as often as it dies."""

    def __init__(self, command: Sequence[str], address: str, log: Path) -> None:
        self.command, self.log = list(command), log
        self.environment = os.environ | ENVIRONMENT | {"RAY_ADDRESS": address}
        self.starts = 0
        self.start()

    def start(self) -> None:
        """Begin, or go on."""
        self.starts += 1
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)

    def kill(self, rng: random.Random) -> str:
        """``kill -9``, and the same command again."""
        self.process.kill()
        self.process.wait()
        self.start()
        return "the driver"


def kill_one(pids: Callable[[], list[int]], what: str) -> Callable[[random.Random], str]:
    """A fault: one of these processes is killed, where there is one."""

    def kill(rng: random.Random) -> str:
        found = pids()
        if not found:
            return ""
        os.kill(rng.choice(found), signal.SIGKILL)
        return what

    return kill


@contextmanager
def bucket(folder: Path) -> Iterator[str]:
    """The URL of a run in an S3-compatible store of this machine."""
    with s3_server() as address:
        make_bucket(address, "bucket")
        settings = settings_of(address, folder / "copies")
        before = {name: os.environ.get(name) for name in settings}
        os.environ |= settings
        object_store._store.cache_clear()  # another round's server was elsewhere
        try:
            yield "s3://bucket/run"
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ |= {} if value is None else {name: value}


def one_round(
    kind: str, folder: Path, seed: int, faults: int, budget: int = 16, store: bool = False, workers: int = 2
) -> dict[str, Any]:
    """Run a search to its end through faults; what happened. AssertionError where something was lost.

    store: the run lies in an object store, from which a machine without a copy reads it in the end. workers: nodes,
    each of which trains a candidate at a time.
    """
    with bucket(folder) if store else nullcontext(str(folder / "run")) as output:
        command = commands(folder, output, budget, workers)[kind]
        found = _one_round(kind, folder, local_path(output), command, seed, faults, workers)
        if store:
            os.environ |= {ROOT: str(folder / "elsewhere"), COPIED: "{}"}
        return found | {"candidates": len(check(read_path(output)))}


def _one_round(
    kind: str, folder: Path, run: Path, command: Sequence[str], seed: int, faults: int, workers: int
) -> dict[str, Any]:
    rng = random.Random(seed)
    done: list[str] = []
    with nodes(workers) as cluster:
        driver = Driver(command, cluster.cluster.address, folder / "driver.log")
        trials = kill_one(lambda: cluster.processes("ray::distiller/", "ray::joint/", "ray::ImplicitFunc"), "a trial")
        caches = kill_one(lambda: cluster.processes("ray::WeightCache"), "a cache")
        kinds = [cluster.replace, driver.kill, trials, *([caches] if kind == "joint" else [])]
        order = [kinds[i % len(kinds)] for i in range(faults)]
        rng.shuffle(order)
        deadline = time.monotonic() + LONGEST
        while driver.process.poll() is None:
            assert time.monotonic() < deadline, f"not finished after {LONGEST:.0f} s and {done}; see {driver.log}"
            time.sleep(rng.uniform(*PAUSE))
            if order and driver.process.poll() is None and begun(run) and (what := order[-1](rng)):
                done.append(what)
                order.pop()
        assert driver.process.returncode == 0, f"the driver ended with {driver.process.returncode}; see {driver.log}"
    return {"kind": kind, "seed": seed, "faults": done, "left": len(order)}


def check(run: Path) -> list[Record]:
    """Every candidate exactly once, none lost, all weights that the front names there, and nothing left behind.

    Reading a ledger refuses gaps, repeated numbers, and candidates that were told twice or never asked.
    """
    records = records_from(Ledger.open(run).events())
    assert [record.id for record in records] == list(range(len(records))) and records
    unfinished = [(record.id, record.status, record.cause) for record in records if record.status != "completed"]
    assert not unfinished, f"candidates without a result: {unfinished}"
    place = place_of(run)
    files = (
        [found.name for found in place.files()] if place else [str(path.relative_to(run)) for path in run.rglob("*")]
    )
    assert not [name for name in files if name.startswith("trials/")], "checkpoints of candidates that have ended"
    assert not [name for name in files if name.endswith(".tmp")] and "lease.json" not in files
    kept = {path.stem for path in (run / "weights").glob("*.safetensors")}
    named = {record.weights for record in front(records)} if kept else set()
    assert named <= kept, f"weights that the front names are not there: {named - kept}"
    assert len(kept) <= len(named) + 4, f"weights that nothing descends from any more: {kept - named}"
    return records


def commands(folder: Path, output: str, budget: int, workers: int) -> dict[str, list[str]]:
    """The drivers' commands by kind, on small data that is made here. budget: candidates, about."""
    torch.manual_seed(0)
    data = write_shapes(folder / "data", 8, 4, 4, size=(96, 64), seed=3)
    labels = tuple((category.id, category.name) for category in read_dataset(data)["train"].categories)
    spec = small_spec("faster_rcnn").with_labels(labels)
    save_detector(folder / "base.safetensors", stirred(spec))
    pool = PoolSpace.parse(str(SPACE))
    largest = type(spec)(**{**vars(spec), "body": pool.largest.body})
    save_pool(folder / "pool", stirred(largest), pool, {"recipe": {"epochs": 1}})
    common = ["--address", "auto", "--or-resume", "--preset", "smoke", "--data", str(data), "--seed", "1"]
    common += ["--cache", str(folder / "cache"), "--output", output, "--workers", str(workers)]
    distiller = ["--budget-per-input", str(budget // 2), "--weights-budget", str(budget // 2)]
    distiller += ["--inputs", "global", "--no-students"]
    joint = ["--base", str(folder / "base.safetensors"), "--pool", str(folder / "pool"), "--budget", str(budget)]
    joint += ["--formula", "global: l2 * 0.1", "--epochs", "2", "--founders", "0"]
    scripts = {"distiller": ("search_distiller.py", distiller), "joint": ("upgrade_detector.py", joint)}
    return {kind: [sys.executable, str(EXPERIMENTS / name), *common, *more] for kind, (name, more) in scripts.items()}


def begun(run: Path) -> bool:
    """Whether a candidate has been asked: faults before that only delay the start."""
    return any((run / "events").glob("*.json"))


def _processes() -> Iterator[tuple[int, str, int]]:
    """Number, title and parent of all processes."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue  # it has ended meanwhile
            yield int(folder.name), title, parent


def main() -> int:
    """Rounds one after another; a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("distiller", "joint"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=6)
    parser.add_argument("--store", action="store_true", help="runs lie in an object store of this machine")
    parser.add_argument("--output", type=Path, help="keep the runs there (default: a temporary folder)")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seed, options.seed + options.rounds):
            folder = (options.output or Path(temporary)) / f"{options.kind}-{seed}"
            folder.mkdir(parents=True)
            started = time.monotonic()
            result = one_round(options.kind, folder, seed, options.faults, store=options.store)
            print(json.dumps(result | {"seconds": round(time.monotonic() - started)}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
