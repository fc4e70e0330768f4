"""Fronts of two aims: a cost that should be low and an AP that should be high."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A candidate's number, cost and AP."""

    id: int
    cost: float
    ap: float


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other is at least as good as in both aims and better in one, by rising cost.

    Of equal points the first asked stays.
    """
    found: list[Point] = []
    for point in sorted(points, key=_order):
        if not found or point.ap > found[-1].ap:
            found.append(point)
    return found


class Front:
    """A front that is kept while points come in, in any order: what `front` makes of all of them.

    points: by rising cost, and so by rising AP; not to be changed from outside.
    """

    def __init__(self, points: Iterable[Point] = ()) -> None:
        self.points: list[Point] = []
        for point in points:
            self.add(point)

    def add(self, point: Point) -> None:
        """Take in a point, which may be dominated, or dominate others."""
        start = bisect_left(self.points, (point.cost, -point.ap, point.id), key=_order)
        if start and self.points[start - 1].ap >= point.ap:
            return  # by that which costs next to it, or as much
        end = start
        while end < len(self.points) and self.points[end].ap <= point.ap:
            end += 1
        self.points[start:end] = [point]


def _order(point: Point) -> tuple[float, float, int]:
    """By cost; of equal ones the more accurate first, then the one asked first."""
    return point.cost, -point.ap, point.id


def hypervolume(points: Iterable[Point], reference: tuple[float, float]) -> float:
    """The area that a front dominates up to a reference (cost, AP) that is worse in both (Zitzler & Thiele 1999)."""
    worst, least = reference
    area, below = 0.0, least
    for point in front(point for point in points if point.cost < worst and point.ap > least):
        area += (worst - point.cost) * (point.ap - below)
        below = point.ap
    return area


def crowding(points: Sequence[Point]) -> list[float]:
    """How much room each point of a front has: its neighbours' distance in both aims, each over the front's range.

    Points are in order of cost. The outer ones, infinite in NSGA-II (Deb et al. 2002), get as much as the roomiest
    inner one, so that the numbers can be weights of a draw [ours].
    """
    if len(points) < 3:
        return [1.0] * len(points)
    cost = points[-1].cost - points[0].cost
    ap = points[-1].ap - points[0].ap
    neighbours = zip(points, points[2:], strict=False)
    inner = [(after.cost - before.cost) / cost + (after.ap - before.ap) / ap for before, after in neighbours]
    return [max(inner), *inner, max(inner)]
