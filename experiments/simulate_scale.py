"""Do the searchers keep thousands of workers busy, and stay quick, small and recoverable over 100,000 candidates?

command:   python experiments/simulate_scale.py [--workers 10 100 1000 2000] [--candidates 100000] [--searchers …]
hardware:  one core; nothing is trained: evaluations take made-up, heavy-tailed times on a virtual clock
time:      about an hour with the defaults; minutes with --candidates 5000 --predicted 500
expected:  at 1,000 workers, with 100 evaluations each, at least 95 % of the oracle; `ask` below 10 ms at 100,000
           candidates, about 0.1 s where the inputs are combined by prediction; rebuilding a search from the ledger of
           100,000 candidates below 30 s

Each searcher runs with each number of workers in a process of its own. Times are in evaluations: 1 is what one takes on
average. Some of them fail, or lose their worker and begin again (`scale_simulation.Times`). What a child of the joint
search costs is made up too: timing it, which the driver does, comes on top. What workers wait for is the beginning,
where little is known, and it takes the same time however long the run is: with few candidates a worker it is a large
share.

utilisation  share of the workers' time that went into evaluations until the last one started; the drain is left out
oracle       when the same evaluations would have started the last of them had no worker ever waited for a decision
             (each, in the same order, on the first free worker), divided by when it did start
waited       the difference: evaluations that each worker could have done meanwhile
latency      processor ms of one answer of the search (1 % of them take longer than p99), among the last fifth of the
             candidates up to each length of the history
driver       ms of a candidate: the search's answers, and recording its three events until the disk has them for sure
             (real candidates report every epoch); what this serves is workers, at 300 s an evaluation
memory       of the search, and of session and ledger where there is one
rebuilding   seconds until a search is as its ledger says: files, just written and so in memory, read and checked,
             then replayed
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import pandas as pd
from options import main_of, positive
from scale_ledger import Recorded, durable_ms, rebuilt, without_sync
from scale_searchers import SEARCHERS
from scale_simulation import Tail, Timed, Times, beside_oracle, simulate, utilisation

from autodet.atomic import atomic_write_bytes
from autodet.ledger import Ledger
from autodet.results.plots import to_png
from autodet.results.scale_plots import draw_scale, latencies_by_history
from autodet.search import Session, Status

T = TypeVar("T")
SHOWN = (1_000, 3_000, 10_000, 100_000)  # lengths of the history in the printed table; the CSV has more
PREDICTED = 3000  # candidates where the inputs are combined by prediction, whose asks take a tenth of a second
EVALUATION = 300.0  # mean seconds of an evaluation, for the number of workers that a driver can serve


@dataclass(frozen=True)
class Job:
    """One simulated run. ledger: a folder for its events, from which it is rebuilt; None: it records nothing."""

    searcher: str
    workers: int
    candidates: int
    times: Times
    ledger: Path | None = None


def main(argv: list[str] | None = None) -> int:
    """Simulate every searcher with every number of workers; print, and write, what was measured."""
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of the processes: one thread's time is all
    rows, latencies = [], []
    with tempfile.TemporaryDirectory(dir=options.output) as scratch:
        event_ms = durable_ms(Path(scratch) / "durable")
        for job in jobs(options, Path(scratch)):
            run = here if options.here else apart
            row, latency = run(measured, job)
            row |= driver_of(row, event_ms)
            if job.ledger is not None:
                row |= run(recovered, job)
                shutil.rmtree(job.ledger)
            rows.append(row)
            latencies.append(latency)
            print(said(row), flush=True)
    table, latency = pd.DataFrame(rows), pd.concat(latencies, ignore_index=True)
    print_tables(table, latency)
    for name, frame in (("scale.csv", table), ("latency.csv", latency)):
        atomic_write_bytes(options.output / name, frame.to_csv(index=False).encode())
    atomic_write_bytes(options.output / "scale.png", to_png(draw_scale(table, latency)))
    print(f"\n{options.output / 'scale.png'}, {options.output / 'scale.csv'}, {options.output / 'latency.csv'}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    add = parser.add_argument
    add("--workers", type=positive, nargs="+", default=[10, 100, 1000, 2000], help="(default: 10 100 1000 2000)")
    add("--candidates", type=positive, default=100_000, help="of each run (default: 100000)")
    add("--predicted", type=positive, default=PREDICTED, help=f"the same by prediction (default: {PREDICTED})")
    add("--searchers", nargs="+", choices=list(SEARCHERS), default=list(SEARCHERS), help="(default: all)")
    add("--seed", type=int, default=0, help="decides times, failures and results (default: 0)")
    add("--failures", type=float, default=0.05, help="share of evaluations that fail, or lose their worker (0.05)")
    add("--tail", choices=get_args(Tail), default="lognormal", help="of the times (default: lognormal)")
    add(
        "--rebuild", type=int, default=1000, metavar="WORKERS", help="whose run is recorded and rebuilt (1000; 0: none)"
    )
    add("--here", action="store_true", help="all in this process, so that memory says nothing; for tests")
    add("--output", type=Path, default=Path("runs/simulate-scale"), help="folder of the results")
    return parser.parse_args(argv)


def said(row: dict[str, Any]) -> str:
    """One run as a line."""
    rebuilding = f", rebuilt in {row['rebuild_s']:.1f} s" if "rebuild_s" in row else ""
    return (
        f"{row['searcher']:18} {row['workers']:5} workers: {row['candidates']} candidates, {row['oracle']:.1%} of the "
        f"oracle, {row['answers_ms']:.2f} ms a candidate, {row['memory_mb']:.0f} MB{rebuilding}"
    )


def jobs(options: argparse.Namespace, scratch: Path) -> list[Job]:
    """The runs. Where the inputs are combined by prediction, with fewer candidates."""
    times = Times(options.seed, options.failures, options.tail)
    found = []
    for searcher in options.searchers:
        most = options.predicted if "predicted" in searcher else options.candidates
        for workers in options.workers:
            ledger = scratch / "run" if workers == options.rebuild else None
            found.append(Job(searcher, workers, min(most, options.candidates), times, ledger))
    return found


def apart(measure: Callable[[Job], T], job: Job) -> T:
    """What is measured of a job in a fresh process, which holds nothing of other runs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, job).result()


def here(measure: Callable[[Job], T], job: Job) -> T:
    """The same in this process."""
    return measure(job)


def measured(job: Job) -> tuple[dict[str, Any], pd.DataFrame]:
    """One run: a row of numbers, and its latencies by the length of the history."""
    case = SEARCHERS[job.searcher](job.candidates, job.times.seed)
    search, before = Timed(case.search), memory_mb()
    if job.ledger is None:
        spans = simulate(search, job.workers, job.times, case.ap)
    else:
        with without_sync(), Ledger.create(job.ledger, {}) as ledger:
            spans = simulate(Recorded(Session(ledger, search)), job.workers, job.times, case.ap)
    grown, answers = memory_mb() - before, search.latencies()
    ended = Counter(span.status for span in spans)
    row: dict[str, Any] = {
        "searcher": job.searcher,
        "workers": job.workers,
        "candidates": len(spans),
        **{status: ended[status] for status in get_args(Status)},
        "last_start": max(span.start for span in spans),
        "utilisation": utilisation(spans, job.workers),
        "oracle": beside_oracle(spans, job.workers),
        "waited": max(span.start for span in spans) * (1 - beside_oracle(spans, job.workers)),
        "answers_ms": answers["ms"].sum() / len(spans),
        "memory_mb": grown,
        "state_mb": len(pickle.dumps(case.search)) / 1e6,
    }
    return row, latencies_by_history(answers).assign(searcher=job.searcher, workers=job.workers)


def recovered(job: Job) -> dict[str, Any]:
    """What rebuilding a search from the ledger of a run takes."""
    assert job.ledger is not None
    found = rebuilt(job.ledger, SEARCHERS[job.searcher](job.candidates, job.times.seed).search)
    return {
        "events": found.events,
        "ledger_mb": found.megabytes,
        "read_s": found.reading,
        "replay_s": found.replaying,
        "rebuild_s": found.reading + found.replaying,
        "rebuild_cpu_s": found.processor,
    }


def driver_of(row: dict[str, Any], event_ms: float) -> dict[str, float]:
    """What a candidate takes the driver: asked, reported unless it failed, and told, each until the disk has it."""
    events = 3 - row["failed"] / row["candidates"]
    driver_ms = row["answers_ms"] + events * event_ms
    return {"event_ms": event_ms, "driver_ms": driver_ms, "serves": 1000 * EVALUATION / driver_ms}


def memory_mb() -> float:
    """What this process holds in memory, in 10⁶ bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def print_tables(table: pd.DataFrame, latency: pd.DataFrame) -> None:
    """Utilisation, latency, and what recovery takes."""
    for title, columns in (
        ("Workers", ["candidates", "completed", "stopped", "failed", "last_start", "utilisation", "oracle", "waited"]),
        ("Driver", ["answers_ms", "event_ms", "driver_ms", "serves", "memory_mb", "state_mb"]),
        ("Rebuilding", ["events", "ledger_mb", "read_s", "replay_s", "rebuild_s", "rebuild_cpu_s"]),
    ):
        if set(columns) <= set(table):
            print(f"\n{title}\n{text_of(table[['searcher', 'workers', *columns]].dropna())}")
    wide = latency[latency["history"].isin(SHOWN)]
    wide = wide.pivot(index=["searcher", "workers", "call"], columns="history", values=["p50", "p99", "max"])
    wide = wide.swaplevel(axis=1)[[length for length in SHOWN if length in set(latency["history"])]]
    print(f"\nLatency, processor ms, by history\n{wide.to_string(float_format='%.2f')}")


def text_of(table: pd.DataFrame) -> str:
    """A table as text."""
    return table.to_string(index=False, float_format=lambda value: f"{value:.4g}")


if __name__ == "__main__":
    raise SystemExit(main_of(main))
