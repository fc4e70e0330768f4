"""Fronts of two aims: a cost that should be low and an AP that should be high."""

from __future__ import annotations

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
    for point in sorted(points, key=lambda point: (point.cost, -point.ap, point.id)):
        if not found or point.ap > found[-1].ap:
            found.append(point)
    return found


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
