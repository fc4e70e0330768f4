"""Orders that are kept while results come in, against sorting everything each time."""

from __future__ import annotations

import random
from collections.abc import Mapping
from statistics import fmean, median

import pytest
from search_objective import INPUTS

from autodet.distill.formula import Formula
from autodet.distill.grammar import random_formula
from autodet.search import EMPTY, Ask, Candidate, History, Standing, Status
from autodet.search.ranking import Measured, Ordered, Ranking, middle, score_of

Group = tuple[str, str]
GROUPS: list[Group] = [("formula", "global"), ("formula", "logits.roi"), ("weights", "weights"), ("final", "after 9")]


def test_a_median_is_kept_while_values_come_and_go() -> None:
    rng, ordered, values = random.Random(0), Ordered[float](), list[float]()
    for _ in range(400):
        if values and rng.random() < 0.4:
            ordered.remove(values.pop(rng.randrange(len(values))))
        else:
            values.append(rng.choice((rng.random(), 0.5)))
            ordered.add(values[-1])
        assert ordered.values == sorted(values)
        if values:
            assert middle(ordered) == median(values)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_are_those_of_a_full_sort(seed: int) -> None:
    """Means lie so close together that many scores round to the same number: then the earlier candidate is better."""
    rng, ranking, known = random.Random(seed), Ranking(), dict[int, Measured]()
    for id in range(300):
        mean = 0.3 + rng.randrange(8) * 2.0**-54 + rng.randrange(2)
        known[id] = Measured(id, rng.random() < 0.8, dict.fromkeys(range(rng.randint(1, 3)), mean), mean)
        ranking.add(known[id])
        if id % 3 == 2:
            ranking.remove(known.pop(rng.choice(list(known))))
    for centre in (0.0, 0.7, 1e9):
        ranks = {m.id: (m.completed, score_of(m.mean, len(m.fitness), centre), -m.id) for m in known.values()}
        order = sorted(ranks, key=ranks.__getitem__, reverse=True)
        for count in (0, 1, 7, 60, 1000):
            assert ranking.best(count, centre) == order[:count]
            completed = [id for id in order if known[id].completed]
            assert ranking.best(count, centre, completed=True) == completed[:count]


def measured_anew(history: History, aps: Mapping[int, float]) -> list[Standing]:
    """All standings, best first, from what was asked and told alone."""
    runs: dict[str, dict[int, float]] = {}
    stopped: dict[str, float] = {}
    for id, status in history.ends.items():
        candidate = history.asks[id].candidate
        if status == "completed":
            runs.setdefault(candidate.arm, {})[candidate.replicate] = aps[id]
        elif status == "stopped":
            stopped[candidate.arm] = aps[id]
    control = runs.pop(Candidate(EMPTY, True).arm, {})
    usual = fmean(control.values()) if control else 0.0
    all_runs = {arm: runs.get(arm) or {0: stopped[arm]} for arm in (*stopped, *runs)}
    fitness = {arm: {r: ap - control.get(r, usual) for r, ap in found.items()} for arm, found in all_runs.items()}
    fitness.pop(Candidate(EMPTY, True).arm, None)
    means = {arm: fmean(values.values()) for arm, values in fitness.items()}
    centre = median(means.values()) if means else 0.0
    standings = []
    for arm, values in fitness.items():
        score = centre + (means[arm] - centre) * len(values) / (len(values) + 1)
        first = history.asks[history.first(arm)]
        standings.append(Standing(first.id, first.candidate, arm in runs, values, score))
    return sorted(standings, key=lambda standing: standing.rank, reverse=True)


def random_step(history: History, aps: dict[int, float], rng: random.Random) -> None:
    """Ask for a new formula, a replicate of a known one, or a control; or tell one that runs."""
    running = list(history.open)
    if running and rng.random() < 0.5:
        id = rng.choice(running)
        status: Status = rng.choice(("completed", "completed", "completed", "stopped", "failed"))
        aps[id] = round(rng.uniform(0.2, 0.6), 2)
        history.tell(id, None if status == "failed" else aps[id], status)
        return
    number, known = len(history.asks), [a.candidate for a in history.asks if a.candidate.formula.terms]
    if rng.random() < 0.1:
        candidate = Candidate(EMPTY, True, sum(not ask.candidate.formula.terms for ask in history.asks))
        history.commit(Ask(number, candidate, "control", "control", origin="control"))
    elif known and rng.random() < 0.3:
        arm = rng.choice(known)
        again = Candidate(arm.formula, True, len(history.replicates(arm.arm)))
        history.commit(Ask(number, again, *GROUPS[3], origin="replicate"))
    else:
        candidate = Candidate(random_formula(INPUTS, rng).canonical(), True)
        if candidate.key not in history.keys:
            history.commit(Ask(number, candidate, *rng.choice(GROUPS[:3])))


@pytest.mark.parametrize("seed", range(4))
def test_a_history_is_measured_as_if_everything_were_looked_at_each_time(seed: int) -> None:
    rng, history, aps = random.Random(seed), History(), dict[int, float]()
    for step in range(400):
        random_step(history, aps, rng)
        assert list(history.open) == [ask.id for ask in history.asks if ask.id not in history.ends]
        if step % 7:
            continue
        expected = measured_anew(history, aps)
        assert history.standings() == expected
        assert history.best(5) == [standing for standing in expected if standing.completed][:5]
        for group in GROUPS:
            arms = {ask.candidate.arm for ask in history.asks if (ask.phase, ask.group) == group}
            ended = {history.asks[id].candidate.arm for id in history.ends if group_of(history, id) == group}
            assert set(history.arms(*group)) == arms
            mine = [standing for standing in expected if standing.candidate.arm in ended]
            assert history.best_in_group(*group, 3) == mine[:3]
            assert history.best_in_group(*group, 3, completed=True) == [s for s in mine if s.completed][:3]
            firsts = [s for s in expected if s.completed and 0 in s.fitness and group_of(history, s.id) == group]
            assert list(history.first_runs(*group)) == sorted((-s.fitness[0], s.id) for s in firsts)


def group_of(history: History, id: int) -> Group:
    return history.asks[id].phase, history.asks[id].group


def test_of_a_long_history_the_best_and_the_latest_are_kept() -> None:
    history = History()
    for id in range(20):
        history.commit(Ask(id, Candidate(Formula.parse(f"global: l2 * {id + 1}"), True), "p", "p"))
    for id in range(20):
        history.tell(id, (7 * id % 20) / 20, "failed" if id == 19 else "completed")
    every = history.standings()
    assert history.standings(19) == every == history.standings(100)
    found = history.standings(6)
    assert found == [standing for standing in every if standing in found] and len(found) == 6
    assert {standing.id for standing in found} == {s.id for s in every[:3]} | {18, 16, 15}  # 17 is among the best
    assert 17 in {s.id for s in every[:3]}
