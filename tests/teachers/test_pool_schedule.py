"""Schedules as values: what they train when, and their texts."""

from __future__ import annotations

import random

import pytest
from pool_cases import space_of

from autodet.teachers.schedule import Phase, Schedule, ScheduleError, members_of_step


def test_shrinking_opens_evenly_and_trains_the_whole_for_longest() -> None:
    schedule = Schedule.shrinking(40, largest=10, random=2)
    assert str(schedule) == (
        "10*largest > 3*sandwich(0.25, 2) > 3*sandwich(0.5, 2) > 3*sandwich(0.75, 2) > 21*sandwich(1, 2)"
    )
    assert schedule.epochs == 40 and schedule.sorted_at == 10
    assert [schedule.phase_at(epoch).open for epoch in (0, 9, 10, 12, 13, 39, 99)] == [0, 0, 0.25, 0.25, 0.5, 1, 1]
    assert list(schedule.openings) == [0, 10, 13, 16, 19]
    even = Schedule.shrinking(30, largest=10, whole=0.25)
    assert [phase.epochs for phase in even.phases] == [10, 5, 5, 5, 5]
    assert str(Schedule.shrinking(5, largest=1, openings=1)) == "1*largest > 4*sandwich(1, 2)"


def test_the_steps_of_a_phase_are_as_large_as_its_sandwich() -> None:
    schedule = Schedule.parse("3*largest > 2*sandwich(0.5, 2) > 1*uniform(1, 3)")
    assert schedule.steps == [(3, 0, 1), (2, 0.5, 4), (1, 1, 3)]


def test_what_does_not_divide_is_spread_over_the_openings() -> None:
    schedule = Schedule.shrinking(10, largest=3, openings=4, whole=0.3)
    assert [phase.epochs for phase in schedule.phases] == [3, 2, 1, 2, 2]
    assert schedule.epochs == 10
    tight = Schedule.shrinking(6, largest=2, openings=4, whole=0.9)  # each opening has an epoch at least
    assert [phase.epochs for phase in tight.phases] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "3*largest",
        "2*sandwich(1, 0)",
        "2*sandwich(0.8333333333333334, 1)",
        "4*uniform(0.5, 3) > 1*largest",
        "1*largest > 2*sandwich(0.25, 2)",
    ],
)
def test_a_schedule_survives_printing_and_parsing(text: str) -> None:
    assert str(Schedule.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "largest", "0*largest", "2*sandwich", "2*sandwich(2, 1)", "2*uniform(1, 0)", "2*dance(1, 1)", "x*largest"],
)
def test_what_is_no_schedule_is_refused_by_its_part(text: str) -> None:
    with pytest.raises(ScheduleError, match="Expected"):
        Schedule.parse(f"1*largest > {text}")


def test_too_few_epochs_are_refused() -> None:
    with pytest.raises(ScheduleError, match="1 for each of 4 openings, found 2 of 5"):
        Schedule.shrinking(5, largest=2)
    with pytest.raises(ScheduleError, match="at least one phase"):
        Schedule(())


def test_a_step_of_the_sandwich_trains_largest_smallest_and_random_members() -> None:
    space = space_of("tied")
    rng = random.Random(0)
    for share in (0.5, 1.0):
        part = space.opened(share)
        for _ in range(20):
            members = list(members_of_step(space, Phase(1, share, 3), rng))
            assert members[:2] == [space.largest, part.smallest]
            assert len(members) == len(set(members)) <= 5
            assert all(part.why_outside(member) is None for member in members)


def test_the_other_kinds_of_steps() -> None:
    space = space_of("tied")
    assert list(members_of_step(space, Phase(1), random.Random(0))) == [space.largest]
    uniform = [set(members_of_step(space, Phase(1, 1, 2, sandwich=False), random.Random(seed))) for seed in range(40)]
    assert len(set.union(*uniform)) > 40 and not all(space.largest in members for members in uniform)


def test_the_table_says_what_each_phase_opens() -> None:
    lines = Schedule.shrinking(6, largest=2, openings=2).table(space_of("tied")).split("\n")
    assert lines[0].split() == ["epochs", "1", "to", "2", "1", "members", "basic-16:16x2-16x3(12)-16x2-24x1@64"]
    assert lines[2].startswith("epochs    4 to 6") and f"{space_of('tied').count:,} members" in lines[2]
