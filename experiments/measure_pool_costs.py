"""What does it cost to train an elastic pool, to take a member, and to read the pool from several trials?

command:   python experiments/measure_pool_costs.py --run RUN
hardware:  as the training that RUN holds; nothing else should run meanwhile
time:      preset cpu about three minutes
expected:  ratios with 95 % intervals, each of times measured alternately in this process; seconds; megabytes

RUN is a finished run of train_teacher_pool.py. Nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from options import main_of, positive, source
from runs import pool_task_of

from autodet.data import Batch
from autodet.detectors import build
from autodet.evaluation import measure_latencies_interleaved
from autodet.results.intervals import mean_interval
from autodet.runtime.cluster import ray_running
from autodet.runtime.weight_cache import SharedWeights, cache_of_this_node, shared_weights
from autodet.teachers import Member, PoolTrainer, Schedule
from autodet.teachers.elastic import member_spec
from autodet.teachers.pool import WEIGHTS, TeacherPool, read_manifest
from autodet.teachers.task import PoolBench
from autodet.training import Trainer
from autodet.training.loop import Clock

ACTIVATIONS = 20  # whose median counts
REPEATS = 3  # of each step; its median counts
SANDWICH, LARGEST = "1*sandwich(1, 2)", "1*largest"


def main(argv: list[str] | None = None) -> int:
    """Measure one thing after the other, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=source, required=True, help="a finished run of train_teacher_pool.py")
    parser.add_argument("--batches", type=positive, default=6, help="steps whose costs are averaged (default: 6)")
    options = parser.parse_args(argv)
    bench = PoolBench(pool_task_of(options.run))
    torch.set_num_threads(bench.task.task.threads)
    torch.set_flush_denormal(True)
    for text, ratios in step_ratios(bench, options.batches).items():
        mean, low, high = mean_interval(ratios)
        print(f"{text}: {mean:.3f} [{low:.3f}, {high:.3f}]")
    for text, seconds in taking(bench, options.run / "pool").items():
        print(f"{text}: {seconds:.3f} s")
    with ray_running("local", cpus=2):
        for text, megabytes in memory(options.run / "pool").items():
            print(f"{text}: {megabytes:.1f} MB")
    return 0


def step_ratios(bench: PoolBench, batches: int) -> dict[str, list[float]]:
    """A ratio for each of some batches: a step of the sandwich to its members' plain steps; the largest member's."""
    members, alone = trainer_of(bench, SANDWICH), trainer_of(bench, LARGEST)
    activation = activation_ms(members)
    found: dict[str, list[float]] = {}
    for step, batch in enumerate(itertools.islice(members.loader.batches(0), batches)):
        plain = {unit.member: plain_trainer(bench, unit.member) for unit in members.units(step, batch.key)}
        runs = {"sandwich": stepping(members, step, batch), "alone": stepping(alone, step, batch)}
        runs |= {str(member): stepping(trainer, step, batch) for member, trainer in plain.items()}
        device, threads = bench.task.task.device, bench.task.task.threads
        times = {k: v.median_ms for k, v in measure_latencies_interleaved(runs, device, 1, REPEATS, threads).items()}
        largest = times[str(bench.task.space.largest)]
        # Repeated, a step finds its members at hand; in a training random ones are new.
        sandwich = times["sandwich"] + activation * max(0, len(plain) - 2)
        ratios = {
            "step of the sandwich / plain steps of its members": sandwich / sum(times[str(m)] for m in plain),
            "step of the sandwich / plain step of the largest": sandwich / largest,
            "step of the largest in the pool / plain step of the largest": times["alone"] / largest,
        }
        for text, ratio in ratios.items():
            found.setdefault(text, []).append(ratio)
    return found


def activation_ms(trainer: PoolTrainer) -> float:
    """Median milliseconds that a member takes to activate which is not at hand."""
    rng, times = random.Random(0), []
    for _ in range(ACTIVATIONS):
        member = trainer.space.sample(rng)
        started = time.perf_counter()
        trainer.elastic.activate(member)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times)


def trainer_of(bench: PoolBench, schedule: str) -> PoolTrainer:
    """An untrained pool's trainer with another schedule, one epoch long."""
    task = bench.task
    settings = replace(task.task.settings, epochs=1)
    pool = replace(task.pool, schedule=Schedule.parse(schedule))
    detector = build(task.task.student)
    loader, device = bench.bench.train_loader, task.task.device
    return PoolTrainer(detector, task.space, loader, settings, pool, task.task.seed, device=device)


def plain_trainer(bench: PoolBench, member: Member) -> Trainer:
    """A trainer of the member as a detector of its own."""
    task = bench.task.task
    detector = build(member_spec(task.student, member))
    return Trainer(detector, bench.bench.train_loader, task.settings, task.seed, device=task.device)


def stepping(trainer: Trainer, step: int, batch: Batch) -> Callable[[], object]:
    """A call that trains one step."""
    trainer.detector.model.train()

    def run() -> None:
        with torch.enable_grad():
            trainer.step(step, batch, Clock())

    return run


def taking(bench: PoolBench, folder: Path) -> dict[str, float]:
    """Seconds to open a pool and to take its largest member, for the first time and again."""
    loader, device = bench.bench.train_loader, bench.task.task.device
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        pool = TeacherPool.open(folder)
        found["opening the pool"] = time.perf_counter() - started
        for text in ("taking the largest member, its norm statistics measured", "taking it again"):
            started = time.perf_counter()
            pool.take(pool.space.largest, loader, Path(cache), device)
            found[text] = time.perf_counter() - started
    return found


def memory(folder: Path) -> dict[str, float]:
    """Megabytes of a pool, and what the cache and one or two trials hold together once each trial reads it."""
    manifest, path = read_manifest(folder), folder / WEIGHTS
    readers, cache, megabytes = start_readers(2), cache_of_this_node(), memory_of_process()

    def held() -> float:
        parts = [process.__ray_call__.remote(megabytes) for process in (*readers, cache)]
        return float(sum(ray.get(parts)))

    before = held()
    found = {"the pool's file": path.stat().st_size / 1e6}
    for count in (1, 2):
        ray.get(readers[count - 1].read.remote(manifest["weights"], str(path)))
        found[f"held by the cache and {count} trial{'s' * (count > 1)} that read it"] = held() - before
    found["a trial's copy of the smallest member"] = ray.get(readers[0].take.remote(manifest))
    return found


def memory_of_process() -> Callable[[object], float]:
    """A function to be called in an actor. Made here, like the class below, so that Ray sends it along."""

    def megabytes(actor: object) -> float:
        """Memory of the process; pages that several processes map count in parts."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Pss:"))

    return megabytes


def start_readers(count: int) -> list[Any]:
    """Trials' processes."""

    class Reader:
        def read(self, hash: str, path: str) -> None:
            self.weights: SharedWeights = shared_weights(hash, Path(path))
            _ = [self.weights(name).sum() for name in self.weights.names]  # every page is touched

        def take(self, manifest: Mapping[str, Any]) -> float:
            pool = TeacherPool.of_manifest(manifest, self.weights)
            state = pool.extract(pool.space.smallest).model.state_dict()
            return sum(int(value.nbytes) for value in state.values()) / 1e6

    return [ray.remote(num_cpus=0.5)(Reader).remote() for _ in range(count)]


if __name__ == "__main__":
    raise SystemExit(main_of(main))
