"""How long does a worker wait between two candidates: with autodet, and with Ray Tune alone?

command:   python experiments/measure_overhead.py [--candidates 8] [--rounds 3] [--data DIR --preset cpu]
hardware:  two cores, on which nothing else should run
time:      demo about eight minutes
expected:  seconds that a worker spends between two trainings, as a mean with its 95 % interval over the rounds and as a
           share of a training and of one of 30 s; seconds until the first training begins

Both train the same students (a search's, without a teacher) by turns within one run. With Ray Tune alone each
candidate is a function trainable in a process of its own, as Tune runs them unless told otherwise, which reads data and
decoded images itself and reports each epoch; nothing is recorded elsewhere. Neither counts what training itself takes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import pandas as pd
import torch
from options import data_options, main_of, positive
from presets import Preset, preset_of
from ray import tune
from runs import data_folder, for_data

from autodet.distill import Formula
from autodet.ledger import Ledger
from autodet.results.intervals import mean_interval
from autodet.runtime.cluster import ray_running
from autodet.runtime.tune_search import run_session
from autodet.search import Candidate, FixedList, Session
from autodet.training import Epoch, Task, Workbench

LONG = 30.0  # seconds of a candidate that the aim is stated for


@dataclass(frozen=True)
class Training:
    """One training's seconds, and when it ended (unix time)."""

    seconds: float
    ended: float


def main(argv: list[str] | None = None) -> int:
    """Measure by turns, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    data_options(parser)
    parser.add_argument("--candidates", type=positive, default=8, help="of each round (default: 8)")
    parser.add_argument("--rounds", type=positive, default=3, help="of each kind, by turns (default: 3)")
    options = parser.parse_args(argv)
    preset = preset_of(options.preset, options.family)
    if options.candidates <= preset.workers:
        raise ValueError(f"--candidates {options.candidates}: the {preset.workers} workers' first ones do not count.")
    task = overhead_task(options, preset)
    candidates = [Candidate(Formula(()), inherit=False, replicate=index) for index in range(options.candidates)]
    rows = []
    Workbench(task)  # decodes the images, once for all
    for number in range(options.rounds):
        for name, run in (("autodet", with_autodet), ("Ray Tune alone", with_tune)):
            with tempfile.TemporaryDirectory() as folder, ray_running(cpus=preset.workers * preset.threads):
                started = time.time()
                trainings = run(task, candidates, Path(folder), preset)
            rows.append({"round": number, "of": name, **summary(trainings, started, preset.workers)})
            print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print()
    print(table(pd.DataFrame(rows)).to_string(index=False))
    return 0


def overhead_task(options: argparse.Namespace, preset: Preset) -> Task:
    """The search's task without a teacher."""
    data = data_folder(options, preset)
    return Task(
        data=str(data),
        cache=str(options.cache.resolve()),
        student=for_data(preset.student, data),
        settings=preset.proxy,
        fraction=preset.fraction,
        device=preset.device,
        threads=preset.threads,
    )


def with_autodet(task: Task, candidates: Sequence[Candidate], folder: Path, preset: Preset) -> list[Training]:
    """A session's run."""
    with Ledger.create(folder / "run", {}) as ledger:
        session = Session(ledger, FixedList([(candidate, "none") for candidate in candidates]))
        run_session(session, task, folder / "run", preset.workers, preset.gpus)
        told = [event for event in ledger.events() if event.kind == "told"]
    return [Training(event.payload["seconds"], event.time) for event in told]


def with_tune(task: Task, candidates: Sequence[Candidate], folder: Path, preset: Preset) -> list[Training]:
    """The same trainings as Tune's own documentation would have them."""
    text = task.to_json()

    def train(config: Mapping[str, int]) -> None:
        task = Task.from_json(text)
        torch.set_num_threads(task.threads)
        torch.set_flush_denormal(True)
        bench = Workbench(task)

        def on_epoch(epoch: Epoch, ap: float | None) -> None:
            tune.report({"epoch": epoch.number, "ap": ap or 0.0})

        outcome = bench.run(Formula(()), False, config["replicate"], folder / str(config["replicate"]), on_epoch)
        tune.report({"ap": outcome.metrics.ap, "seconds": outcome.seconds, "ended": time.time()})

    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": task.threads, "gpu": preset.gpus}),
        param_space={"replicate": tune.grid_search([candidate.replicate for candidate in candidates])},
        tune_config=tune.TuneConfig(max_concurrent_trials=preset.workers),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    found = tuner.fit()
    if found.errors:
        raise RuntimeError(f"A training of Ray Tune alone failed: {found.errors[0]}")
    metrics = [found[index].metrics or {} for index in range(len(found))]
    return [Training(float(row["seconds"]), float(row["ended"])) for row in metrics]


def summary(trainings: Sequence[Training], started: float, workers: int) -> dict[str, float]:
    """Means over candidates. A worker's next training follows the one that ended ``workers`` before it began."""
    begins = sorted(training.ended - training.seconds for training in trainings)
    ends = sorted(training.ended for training in trainings)
    waits = [begin - end for begin, end in zip(begins[workers:], ends, strict=False)]
    return {
        "training_s": round(mean(training.seconds for training in trainings), 3),
        "between_s": round(mean(waits), 3),
        "first_s": round(begins[0] - started, 3),
    }


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each kind, with intervals over the rounds."""
    lines = []
    for name, group in rows.groupby("of", sort=False):
        middle, low, high = mean_interval(group["between_s"].to_list())
        training = group["training_s"].mean()
        lines.append(
            {
                "of": name,
                "training s": f"{training:.1f}",
                "between two s": f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                "of a training": f"{middle / training:.1%}",
                f"of one of {LONG:.0f} s": f"{middle / LONG:.1%}",
                "until the first s": f"{group['first_s'].mean():.1f}",
            }
        )
    return pd.DataFrame(lines)


if __name__ == "__main__":
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    raise SystemExit(main_of(main))
