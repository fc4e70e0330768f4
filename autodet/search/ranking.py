"""Candidates kept in order of how good they look, so that no ask has to go through the whole history.

What a candidate is ranked by depends on the median of all, which moves with every result; but among candidates with
equally many runs the order is that of their means, whatever the median is. So each number of runs has a list of its
own, and the best of all are among the first of each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

PRIOR_RUNS = 1.0
"""How many runs the prior of `score_of` counts for. 1 says that seeds spread the AP as much as formulas do, which is
what small data sets show; a choice of ours."""

Value = TypeVar("Value", float, tuple[float, int])


class Ordered(Generic[Value]):
    """Values in rising order. A change moves what lies behind it in memory: microseconds for 100,000 values."""

    def __init__(self) -> None:
        self.values: list[Value] = []

    def add(self, value: Value) -> None:
        insort(self.values, value)

    def remove(self, value: Value) -> None:
        """Take out one that was added."""
        del self.values[bisect_left(self.values, value)]

    def __len__(self) -> int:
        return len(self.values)


def middle(ordered: Ordered[float]) -> float:
    """The median of values of which there is at least one, as `statistics.median` computes it."""
    values, half = ordered.values, len(ordered) // 2
    return values[half] if len(ordered) % 2 else (values[half - 1] + values[half]) / 2


class Measured(NamedTuple):
    """What is known of a candidate. id: of its first ask; fitness: replicate → fitness of that run; mean: of these."""

    id: int
    completed: bool
    fitness: Mapping[int, float]
    mean: float


def score_of(mean: float, runs: int, centre: float) -> float:
    """A mean drawn towards the centre, the more the fewer runs it rests on."""
    return centre + (mean - centre) * runs / (runs + PRIOR_RUNS)


class Ranking:
    """Measured candidates of which the best can be told without sorting them all."""

    def __init__(self) -> None:
        self._lists: dict[tuple[bool, int], Ordered[tuple[float, int]]] = {}  # (-mean, id)

    def add(self, measured: Measured) -> None:
        ordered = self._lists.setdefault((measured.completed, len(measured.fitness)), Ordered())
        ordered.add((-measured.mean, measured.id))

    def remove(self, measured: Measured) -> None:
        """Take out one that was added."""
        self._lists[measured.completed, len(measured.fitness)].remove((-measured.mean, measured.id))

    def best(self, count: int, centre: float, completed: bool = False) -> list[int]:
        """Numbers of the best `count` candidates, the best first. completed: leave out those that were stopped.

        A completed one is better than a stopped one, then the score decides; of equals the earlier one is better.
        """
        ranks = [
            (done, score_of(-negative, runs, centre), -id)
            for (done, runs), ordered in self._lists.items()
            if done or not completed
            for negative, id in _first(ordered.values, count, runs, centre)
        ]
        return [-id for _, _, id in sorted(ranks, reverse=True)[:count]]


def _first(values: list[tuple[float, int]], count: int, runs: int, centre: float) -> list[tuple[float, int]]:
    """The first `count`, and those behind whose scores are equal to the last one's: close means may round to one."""
    end = min(count, len(values))
    if 0 < end < len(values):
        last = score_of(-values[end - 1][0], runs, centre)
        while end < len(values) and score_of(-values[end][0], runs, centre) == last:
            end += 1
    return values[:end]
