"""Fronts against brute force, the area they dominate against counting, crowding against NSGA-II's definition."""

import random

import pytest

from autodet.pareto import Front, Point, crowding, front, hypervolume


def points_of(seed: int, count: int = 40) -> list[Point]:
    rng = random.Random(seed)
    return [Point(i, rng.randint(1, 12) / 10, rng.randint(0, 12) / 20) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_dominates(seed: int) -> None:
    points = points_of(seed)
    expected = [
        p
        for p in points
        if not any(
            q.cost <= p.cost and q.ap >= p.ap and ((q.cost, q.ap) != (p.cost, p.ap) or q.id < p.id) for q in points
        )
    ]
    assert sorted(front(points)) == sorted(expected)
    assert [p.cost for p in front(points)] == sorted(p.cost for p in expected)


@pytest.mark.parametrize("seed", range(5))
def test_a_front_that_is_kept_is_the_front_of_all_points_so_far(seed: int) -> None:
    points = points_of(seed, 120)
    random.Random(seed).shuffle(points)  # numbers do not come in order: a slow candidate ends late
    kept = Front()
    for count, point in enumerate(points, 1):
        kept.add(point)
        assert kept.points == front(points[:count])
    assert Front(points).points == kept.points


@pytest.mark.parametrize("seed", range(5))
def test_the_hypervolume_is_the_area_counted_on_a_grid(seed: int) -> None:
    points = points_of(seed)
    cells = [(cost / 10, ap / 20) for cost in range(1, 12) for ap in range(1, 13)]  # their corners of least aim
    dominated = sum(any(p.cost <= cost and p.ap >= ap for p in points) for cost, ap in cells)
    assert hypervolume(points, (1.2, 0.0)) == pytest.approx(dominated * 0.1 * 0.05)


def test_what_is_no_better_than_the_reference_counts_nothing() -> None:
    assert hypervolume([Point(0, 2.0, 0.5), Point(1, 0.5, -0.1)], (1.0, 0.0)) == 0.0
    assert hypervolume([], (1.0, 0.0)) == 0.0


def test_crowding_is_the_room_between_neighbours() -> None:
    points = [Point(0, 0.2, 0.1), Point(1, 0.3, 0.3), Point(2, 0.8, 0.4), Point(3, 1.2, 0.6)]
    inner = [(0.8 - 0.2) / 1.0 + (0.4 - 0.1) / 0.5, (1.2 - 0.3) / 1.0 + (0.6 - 0.3) / 0.5]
    assert crowding(points) == pytest.approx([max(inner), *inner, max(inner)])
    assert crowding(points[:2]) == [1.0, 1.0]
