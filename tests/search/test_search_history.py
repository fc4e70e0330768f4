"""Fitness, score and the choice of the best against hand-made numbers."""

import pytest

from autodet.distill.formula import Formula
from autodet.search import EMPTY, Ask, Candidate, FixedList, History, Standing, Status

A, B, C = (Formula.parse(text) for text in ("global: l1 * 1", "global: l2 * 1", "logits.roi: l1 * 1"))
Run = tuple[Formula, int, float | None, Status]


def told(*runs: Run) -> FixedList:
    search = FixedList([(Candidate(formula, True, replicate), "g") for formula, replicate, _, _ in runs])
    for id, (_, _, ap, status) in enumerate(runs):
        search.ask()
        search.tell(id, ap, status)
    return search


def by_formula(history: History) -> dict[Formula, Standing]:
    return {standing.formula: standing for standing in history.standings()}


def test_fitness_is_the_difference_to_the_control_of_the_same_replicate() -> None:
    history = told(
        (EMPTY, 0, 0.40, "completed"), (EMPTY, 1, 0.30, "completed"),
        (A, 0, 0.45, "completed"), (A, 1, 0.36, "completed"), (A, 2, 0.37, "completed"),
    ).history  # fmt: skip
    standing = by_formula(history)[A]
    assert standing.fitness == pytest.approx({0: 0.05, 1: 0.06, 2: 0.37 - 0.35})  # no control 2: the mean of the others
    assert history.runs(standing.candidate.arm) == {0: 0.45, 1: 0.36, 2: 0.37}
    assert history.control(True) == {0: 0.40, 1: 0.30} and history.control(False) == {}


def test_a_control_that_ends_last_counts_for_all() -> None:
    search = told((A, 0, 0.45, "completed"), (EMPTY, 1, 0.40, "completed"))
    assert by_formula(search.history)[A].fitness == pytest.approx({0: 0.05})
    search.replay(Ask(2, Candidate(EMPTY, True, 0), "control", "control"))
    search.tell(2, 0.42)
    assert by_formula(search.history)[A].fitness == pytest.approx({0: 0.03})


def test_without_a_control_fitness_is_the_ap() -> None:
    history = told((EMPTY, 0, None, "failed"), (A, 0, 0.45, "completed")).history
    assert by_formula(history)[A].fitness == {0: 0.45}


def test_the_score_draws_few_runs_to_the_middle() -> None:
    history = told(
        (A, 0, 0.50, "completed"),
        (B, 0, 0.47, "completed"), (B, 1, 0.48, "completed"), (B, 2, 0.46, "completed"),
        (C, 0, 0.40, "completed"),
    ).history  # fmt: skip
    standings = by_formula(history)
    assert standings[A].score == pytest.approx(0.47 + 0.03 / 2)  # the median is 0.47
    assert standings[B].score == pytest.approx(0.47)
    assert standings[C].score == pytest.approx(0.47 - 0.07 / 2)


def test_stopped_ranks_below_completed_and_failed_nowhere() -> None:
    search = told((A, 0, 0.6, "stopped"), (B, 0, 0.2, "completed"), (C, 0, float("nan"), "completed"))
    assert [standing.formula for standing in search.history.standings()] == [B, A]
    assert search.history.ends == {0: "stopped", 1: "completed", 2: "failed"}
    best = search.best()
    assert best is not None and best == (B, 0.2, 1)


def test_many_good_runs_beat_one_lucky_run() -> None:
    runs: list[Run] = [(B, replicate, 0.49, "completed") for replicate in range(4)]
    best = told((A, 0, 0.50, "completed"), (C, 0, 0.30, "completed"), (C, 1, 0.30, "completed"), *runs).best()
    assert best is not None and best.formula == A  # the median is B's own 0.49, so B cannot be drawn down
    more: list[Run] = [(Formula.parse(f"global: l1 * {w}"), 0, 0.30, "completed") for w in (5, 10)]
    best = told((A, 0, 0.50, "completed"), (C, 0, 0.30, "completed"), *more, *runs).best()
    assert best is not None and (best.formula, best.runs) == (B, 4)
    assert best.ap == pytest.approx(0.49)
