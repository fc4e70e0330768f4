"""Many workers on a virtual clock: a real search is asked and told as if its candidates were evaluated.

Time is in evaluations: 1 is what an undisturbed one takes on average. The driver's own time is not part of it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pandas as pd

from autodet.search import FINISHED, Answer, Ask, Search, Status, rng_for

OWN = 0.5  # share of the failures that are the candidate's own; the others are a lost worker's
RETRIES = 3  # how often a candidate whose worker was lost begins again, before it counts as failed
SHAPE = 2.0  # of the Pareto distribution: the largest at which its variance is infinite
CALLS = ("ask", "report", "tell")
Tail = Literal["lognormal", "pareto"]


class Driver(Protocol):
    """What candidates are asked from, and told to: a search, or a session around one."""

    def ask(self) -> Answer: ...

    def report(self, id: int, epoch: int, ap: float) -> bool: ...

    def tell(self, id: int, ap: float | None, status: Status = "completed", weights: str | None = None) -> None: ...


class Trial(NamedTuple):
    """What evaluating a candidate takes. spent: time of one worker, lost attempts included; fails: ends without AP."""

    spent: float
    attempts: int
    fails: bool


MEASURED = Trial(0.05, 1, False)  # of a joint search's base, which is not trained


@dataclass(frozen=True)
class Times:
    """Heavy-tailed times of evaluations that follow from the seed and the candidate's number.

    failures: share of evaluations that end early, at an even share of their time, half of them with the candidate, half
    with the worker. spread: standard deviation of the logarithm (log-normal).
    """

    seed: int = 0
    failures: float = 0.05
    tail: Tail = "lognormal"
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.failures < 1 or self.spread < 0:
            raise ValueError(f"expected failures in 0–1 (below 1) and a spread of at least 0, found {self}")

    def of(self, id: int) -> Trial:
        """What candidate number `id` takes."""
        rng = rng_for(self.seed, id, "time")
        whole = math.exp(rng.gauss(-(self.spread**2) / 2, self.spread))
        if self.tail == "pareto":
            whole = (1 - 1 / SHAPE) * rng.paretovariate(SHAPE)
        if rng.random() < OWN * self.failures:
            return Trial(whole * rng.random(), 1, True)
        spent = 0.0
        for attempt in range(1, RETRIES + 2):
            if rng.random() >= (1 - OWN) * self.failures:
                return Trial(spent + whole, attempt, False)
            spent += whole * rng.random()
        return Trial(spent, RETRIES + 1, True)


class Span(NamedTuple):
    """When a candidate was on a worker, and how it ended."""

    id: int
    start: float
    end: float
    status: Status


def simulate(driver: Driver, workers: int, times: Times, ap_of: Callable[[Ask], float]) -> list[Span]:
    """Evaluate all candidates of a search, at most `workers` at a time; their spans in the order in which they started.

    A worker that is free asks at once; told to wait, it asks again after the next candidate has ended. Each candidate
    reports once, nine tenths of its AP after half of its time. RuntimeError where all wait for nothing.
    """
    clock, numbers = 0.0, itertools.count()
    running: dict[int, tuple[Ask, float, Trial]] = {}
    due: list[tuple[float, int, int, bool]] = []  # time, tie-breaker, candidate, whether it ends
    spans: dict[int, Span] = {}

    def end(id: int, ap: float | None, status: Status) -> None:
        _, start, _ = running.pop(id)
        spans[id] = Span(id, start, clock, status)
        driver.tell(id, ap, status, f"w{id}")

    while True:
        while len(running) < workers and isinstance(answer := driver.ask(), Ask):
            trial = MEASURED if answer.phase == "base" else times.of(answer.id)
            running[answer.id] = answer, clock, trial
            first = clock + trial.spent * (1 if trial.fails else 0.5)
            heapq.heappush(due, (first, next(numbers), answer.id, trial.fails))
        if not due:
            if answer is not FINISHED:
                raise RuntimeError(f"the search answers {answer} although nothing is running")
            return [spans[id] for id in sorted(spans)]
        while due:
            clock, _, id, ends = heapq.heappop(due)
            ask, start, trial = running[id]
            if ends:
                end(id, None if trial.fails else ap_of(ask), "failed" if trial.fails else "completed")
                break
            if driver.report(id, 1, 0.9 * ap_of(ask)):
                end(id, 0.9 * ap_of(ask), "stopped")
                break
            heapq.heappush(due, (start + trial.spent, next(numbers), id, True))


def oracle(spent: Sequence[float], workers: int) -> list[float]:
    """When each evaluation starts where no worker ever waits: in the given order, each on the first free worker.

    No schedule in this order starts any of them earlier.
    """
    free = [0.0] * workers
    return [heapq.heapreplace(free, free[0] + each) for each in spent]


def utilisation(spans: Sequence[Span], workers: int) -> float:
    """The share of the workers' time that went into evaluations, until the last one started: the drain is left out."""
    last = max(span.start for span in spans)
    busy = sum(min(span.end, last) - span.start for span in spans)
    return busy / (workers * last) if last else 1.0


def beside_oracle(spans: Sequence[Span], workers: int) -> float:
    """How much sooner the oracle starts the last one of the same evaluations: 1 where no worker ever waited."""
    last = max(span.start for span in spans)
    ideal = oracle([span.end - span.start for span in spans], workers)[-1]
    return ideal / last if last else 1.0


class Timed:
    """A search that notes how long its answers take, in processor seconds: what else the machine does is left out."""

    def __init__(self, search: Search) -> None:
        self._search, self._asked = search, 0
        self._calls, self._history, self._ms = array("b"), array("l"), array("d")  # small: memory is measured, too

    def ask(self) -> Answer:
        start = time.thread_time()
        answer = self._search.ask()
        self._note(0, start)
        self._asked += isinstance(answer, Ask)
        return answer

    def replay(self, ask: Ask) -> None:
        self._search.replay(ask)
        self._asked += 1

    def report(self, id: int, epoch: int, ap: float) -> bool:
        start = time.thread_time()
        stop = self._search.report(id, epoch, ap)
        self._note(1, start)
        return stop

    def tell(self, id: int, ap: float | None, status: Status = "completed", weights: str | None = None) -> None:
        start = time.thread_time()
        self._search.tell(id, ap, status, weights)
        self._note(2, start)

    def latencies(self) -> pd.DataFrame:
        """One row an answer. Columns: call (ask, report, tell), history (candidates asked before), ms."""
        calls = pd.Categorical.from_codes(np.array(self._calls), pd.Index(CALLS))
        return pd.DataFrame({"call": calls, "history": self._history, "ms": self._ms})

    def _note(self, call: int, start: float) -> None:
        self._ms.append(1000 * (time.thread_time() - start))
        self._calls.append(call)
        self._history.append(self._asked)
