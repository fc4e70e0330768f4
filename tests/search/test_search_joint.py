"""The joint search on a made-up objective: seeded, asynchronous, rebuilt from its events, within its limits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from detector_cases import small_spec

from autodet.detectors import Arch, DetectorSpec
from autodet.distill.formula import Formula
from autodet.morphism.actions import Action, Steps, actions_text
from autodet.morphism.morph import MorphError
from autodet.pareto import front
from autodet.records import RelativeCost
from autodet.search import (
    FINISHED,
    GRAMMAR,
    WAIT,
    Ask,
    Examined,
    JointSearch,
    JointSettings,
    Phase,
    Student,
    joint_phases,
    pipeline_phases,
    random_phases,
    rng_for,
)
from autodet.teachers import Member, PoolSpace

BASE = replace(small_spec("faster_rcnn"), body=Arch.parse("basic-32:32x2-32x2-48x2-64x2"))
POOL = PoolSpace.parse("basic-=:16..32/8x1..2-32x1-32x1-32x1@64")
TAUGHT = Formula.parse("global: l2")
STEPS = Steps(width=8, sizes=(48, 64), proposals=(5, 10))
LIMITS = {"latency_ratio": 0.6}
Events = list[tuple[str, int, object]]


def width_of(spec: DetectorSpec) -> int:
    return sum(stage.width * stage.depth for stage in spec.body.stages)


def cost_of(spec: DetectorSpec) -> RelativeCost:
    ratio = (0.2 + 0.8 * width_of(spec) / width_of(BASE)) * (0.5 + 0.5 * spec.min_size / BASE.min_size)
    return RelativeCost(ratio, 0.01, 10 * ratio, ratio, ratio)


class World:
    """What students would be, without weights: specs by the hash of their weights."""

    def __init__(self) -> None:
        self.specs = {"base": BASE}
        self.asked: list[str] = []

    def __call__(self, weights: str, actions: Sequence[Action], draw: int) -> Examined | str:
        self.asked.append(actions_text(actions))
        spec = self.specs[weights]
        for action in actions:
            if action.name == "prune_stage":
                number, width = action.values
                stages = list(spec.body.stages)
                stages[number - 1] = replace(stages[number - 1], width=width)
                try:
                    spec = replace(spec, body=replace(spec.body, stages=tuple(stages)))
                except MorphError as error:
                    return str(error)
            elif action.name == "resize":
                spec = replace(spec, min_size=action.values[0])
            elif action.name == "prune_head":
                return "This world has no heads."
        return Examined(spec, cost_of(spec))


def student_of(ask: Ask) -> Student:
    assert ask.candidate.student is not None
    return ask.candidate.student


def ap_of(ask: Ask) -> float:
    """Narrow students know less, trained ones more."""
    student = student_of(ask)
    noise = rng_for(0, ask.id).gauss(0, 0.01)
    return 0.3 + 0.2 * width_of(student.spec) / width_of(BASE) + 0.01 * math.sqrt(min(10, student.epochs)) + noise


def settings(**changes: object) -> JointSettings:
    values: dict[str, object] = {"phases": joint_phases(40), "epochs": 2, "limits": LIMITS, "steps": STEPS}
    return JointSettings(**(values | changes))  # type: ignore[arg-type]


def search_of(seed: int = 0, world: World | None = None, **changes: object) -> JointSearch:
    base = Student(BASE, (), None, "base", None, 0, cost_of(BASE), 0)
    formulas = GRAMMAR.whole(["global"], (), 2)
    return JointSearch(base, world or World(), settings(**changes), seed, TAUGHT, POOL, formulas)


def run(search: JointSearch, world: World, workers: int = 3, seed: int = 0, steps: int = 10_000) -> Events:
    """Ask and tell in the order in which random workers would."""
    rng, running, events = random.Random(seed), list[Ask](), Events()
    for _ in range(steps):
        answer = search.ask() if len(running) < workers else WAIT
        if isinstance(answer, Ask):
            running.append(answer)
            events.append(("asked", answer.id, answer.to_payload()))
            continue
        if not running:
            assert answer is FINISHED
            break
        ask = running.pop(rng.randrange(len(running)))
        failed = ask.id % 11 == 5
        hash = "base" if ask.id == 0 else f"weights-{ask.id}"
        world.specs[hash] = student_of(ask).spec
        search.tell(ask.id, None if failed else ap_of(ask), "failed" if failed else "completed", hash)
        events.append(("told", ask.id, failed))
    return events


def test_the_base_comes_first_and_children_wait_for_it() -> None:
    search = search_of()
    first = search.ask()
    assert isinstance(first, Ask) and first.id == 0 and student_of(first).parent is None
    assert search.ask() is WAIT
    search.tell(0, 0.4, "completed", "base")
    child = search.ask()
    assert isinstance(child, Ask) and student_of(child).parent == 0 and student_of(child).epochs == 2


def test_a_base_that_fails_ends_the_search() -> None:
    search = search_of()
    search.ask()
    search.tell(0, None, "failed")
    assert search.ask() is FINISHED and search.best() is None


def test_it_asks_its_budget_and_finds_a_better_one_within_the_limits() -> None:
    world = World()
    search = search_of(world=world)
    run(search, world)
    assert len(search.asks) == search.budget == 41
    best = search.best()
    assert best is not None and best.cost <= 0.6
    within = [i for i in search.weights if search.student(i).cost.latency_ratio <= 0.6]
    assert best.ap == max(ap_of(search.asks[i]) for i in within)


def test_where_cost_is_the_aim_the_best_is_the_cheapest_that_is_as_accurate_as_the_base() -> None:
    world = World()
    search = search_of(world=world, limits={"latency_ratio": 1.0}, aim="cost")
    run(search, world)
    best, base = search.best(), ap_of(search.asks[0])
    assert best is not None and best.ap >= base
    good = [search.student(id).cost.latency_ratio for id in search.weights if ap_of(search.asks[id]) >= base]
    assert best.cost == min(good)


def test_over_the_limit_only_what_is_on_its_way_down_is_trained() -> None:
    world = World()
    search = search_of(world=world)
    run(search, world)
    for ask in search.asks[1:]:
        student = student_of(ask)
        assert student.parent is not None
        before, now = search.student(student.parent).cost.latency_ratio, student.cost.latency_ratio
        assert now <= 0.6 or now < before or not student.actions
    assert any("is above" in reason for ask in search.asks for _, reason in ask.rejected)
    assert any("has no heads" in reason for ask in search.asks for _, reason in ask.rejected)


def test_a_child_beyond_the_limit_pays_in_another_place_for_what_it_has_grown() -> None:
    world = World()
    phase = Phase("joint", 40, ("resize", "prune_stage"))
    steps = replace(STEPS, sizes=(48, BASE.min_size, 72))
    search = search_of(world=world, limits={"latency_ratio": 1.0}, phases=(phase,), steps=steps, most_actions=1)
    run(search, world)
    paid = [ask for ask in search.asks if len(student_of(ask).actions) > 1]
    assert any(student_of(ask).actions[0].values == (72,) for ask in paid)
    for ask in paid:
        first, *more = student_of(ask).actions
        assert search.student(ask.id).cost.latency_ratio <= 1.0 and len(more) <= 2
        assert any(text == str(first) and "is above" in reason for text, reason in ask.rejected)
        assert all(action.name != "resize" or action.values[0] < 72 for action in more)


def test_parents_are_on_the_front_of_their_moment() -> None:
    world = World()
    search = search_of(world=world)
    ended: dict[int, float] = {}
    rng, running = random.Random(1), list[Ask]()
    while True:
        answer = search.ask() if len(running) < 2 else WAIT
        if isinstance(answer, Ask):
            parent = student_of(answer).parent
            if parent is not None:
                assert parent in [point.id for point in front(search._points.values())]
            running.append(answer)
        elif running:
            ask = running.pop(rng.randrange(len(running)))
            ended[ask.id] = ap_of(ask)
            world.specs[f"w{ask.id}"] = student_of(ask).spec
            search.tell(ask.id, ap_of(ask), "completed", f"w{ask.id}")
        else:
            break
    assert len(ended) == 41


@pytest.mark.parametrize("cut", [1, 7, 30, 60])
def test_rebuilt_from_its_events_it_goes_on_to_the_same_end(cut: int) -> None:
    world = World()
    whole = search_of(formula=0.3)
    whole._examine = world
    events = run(whole, world)
    rebuilt = search_of(formula=0.3)
    rebuilt._examine = World()
    for kind, id, payload in events[:cut]:
        if kind == "asked":
            rebuilt.replay(Ask.from_payload(id, payload))  # type: ignore[arg-type]
        else:
            hash = "base" if id == 0 else f"weights-{id}"
            rebuilt.tell(id, None if payload else ap_of(rebuilt.asks[id]), "failed" if payload else "completed", hash)
    assert not rebuilt._examine.asked
    rebuilt._examine = world
    for kind, id, payload in events[cut:]:
        if kind == "asked":
            answer = rebuilt.ask()
            assert isinstance(answer, Ask) and answer.to_payload() == payload
        else:
            hash = "base" if id == 0 else f"weights-{id}"
            rebuilt.tell(id, None if payload else ap_of(rebuilt.asks[id]), "failed" if payload else "completed", hash)
    assert rebuilt.front() == whole.front() and rebuilt.needed() == whole.needed()


@pytest.mark.parametrize("aim", ["accuracy", "cost"])
@pytest.mark.parametrize("seed", range(3))
def test_front_best_and_needed_weights_are_those_of_all_candidates(aim: str, seed: int) -> None:
    """What is kept up to date, against going through everything; founders may end before the base does."""
    world, rng, removed = World(), random.Random(seed), set[str]()
    base = Student(BASE, (), None, "base", None, 0, cost_of(BASE), 0)
    narrow = replace(BASE, body=Arch.parse("basic-16:16x1-16x1-24x1-32x1"))
    founders = [replace(base, spec=narrow, weights=f"founder{number}", cost=cost_of(narrow)) for number in range(3)]
    limits = {"latency_ratio": 0.8, "macs_g": 0.7} if aim == "accuracy" else {}
    chosen = settings(limits=limits, aim=aim, phases=joint_phases(80))
    search = JointSearch(base, world, chosen, seed, TAUGHT, POOL, founders=founders)
    running: list[Ask] = []
    while True:
        answer = search.ask() if len(running) < 4 else WAIT
        if isinstance(answer, Ask):
            running.append(answer)
        elif not running:
            break
        else:
            ask = running.pop(rng.randrange(len(running)))
            given = student_of(ask).weights if student_of(ask).parent is None else f"w{ask.id}"
            world.specs[given] = student_of(ask).spec
            search.tell(ask.id, ap_of(ask), "failed" if ask.id % 11 == 5 else "completed", given)
            removed |= search.take_unneeded()
        points = search._points.values()
        assert search.front() == front(points)
        assert search.best() == next(iter(search.ranked()), None)
        kept = {search.weights[point.id] for point in (*front(points), *search.ranked()[:1])}
        needed = kept | {student_of(ask).weights for ask in running} | {base.weights, *(f.weights for f in founders)}
        assert search.needed() == needed
        assert set(search.weights.values()) - needed <= removed and not removed & needed
    assert len(search.asks) == search.budget and removed


def test_no_key_is_asked_twice_and_repeats_are_replicates() -> None:
    world = World()
    search = search_of(world=world, phases=(Phase("no-op", 30, (), "largest"),))
    run(search, world)
    keys = [ask.candidate.key for ask in search.asks]
    assert len(set(keys)) == len(keys)
    assert all(student_of(ask).actions == () for ask in search.asks)
    assert any(ask.candidate.replicate > 0 for ask in search.asks)
    assert len({student_of(ask).draw for ask in search.asks}) == len(search.asks)


def test_weights_that_something_may_inherit_from_are_needed_and_others_are_not() -> None:
    world = World()
    search = search_of(world=world)
    run(search, world, workers=4, steps=60)
    running = {student_of(ask).weights for ask in search.asks if ask.id not in search.ends}
    on_front = {search.weights[point.id] for point in search.front()}
    assert search.needed() == running | on_front | {"base"}
    assert set(search.weights.values()) - search.needed()


@pytest.mark.parametrize("teachers", ["none", "largest", "random", "searched"])
def test_teachers_are_as_the_phase_says(teachers: str) -> None:
    world = World()
    search = search_of(world=world, phases=(Phase("x", 40, ("prune_stage",), teachers),))  # type: ignore[arg-type]
    run(search, world)
    chosen = [student_of(ask).teacher for ask in search.asks[1:]]
    if teachers == "none":
        assert set(chosen) == {None}
        assert all(not ask.candidate.formula.terms for ask in search.asks)
    elif teachers == "largest":
        assert set(chosen) == {POOL.largest}
    else:
        assert None not in chosen and len(set(chosen)) > 2
        kept = sum(
            student_of(ask).teacher == search.student(student_of(ask).parent or 0).teacher for ask in search.asks[1:]
        )
        assert (kept > 10) == (teachers == "searched")


def test_a_teacher_sees_images_of_its_students_size_where_the_pool_has_such() -> None:
    world = World()
    base = Student(BASE, (), None, "base", None, 0, cost_of(BASE), 0)
    pool = replace(POOL, sizes=(48, BASE.min_size))
    steps = replace(STEPS, sizes=(40, 48, BASE.min_size))
    search = JointSearch(base, world, settings(steps=steps, limits={"latency_ratio": 1.0}), 0, TAUGHT, pool)
    run(search, world)
    seen = set()
    for ask in search.asks[1:]:
        student = student_of(ask)
        assert student.teacher is not None and student.teacher.size in pool.sizes
        assert student.teacher.size == student.spec.min_size or student.spec.min_size == 40
        seen.add(student.spec.min_size)
    assert seen == {40, 48, BASE.min_size}


def test_the_pipeline_goes_phase_by_phase_and_distils_the_best_one() -> None:
    world = World()
    search = search_of(world=world, phases=pipeline_phases(30))
    run(search, world)
    assert [ask.phase for ask in search.asks] == ["base"] + ["nas"] * 10 + ["prune"] * 10 + ["distil"] * 10
    assert all(student_of(ask).teacher is None for ask in search.asks[:21])
    assert all(student_of(ask).teacher == POOL.largest and not student_of(ask).actions for ask in search.asks[21:])


def test_random_search_has_children_of_the_base_alone() -> None:
    world = World()
    search = search_of(world=world, phases=random_phases(20))
    run(search, world)
    assert {student_of(ask).parent for ask in search.asks[1:]} == {0}


def test_without_inheritance_epochs_do_not_add_up() -> None:
    world = World()
    search = search_of(world=world, inherit=False)
    run(search, world)
    assert {student_of(ask).epochs for ask in search.asks[1:]} == {2}
    assert not any(ask.candidate.inherit for ask in search.asks)


def test_what_cannot_be_compared_is_left_out_of_that_child_alone() -> None:
    def comparable(formula: Formula, student: DetectorSpec, teacher: Member) -> Formula:
        return formula if width_of(student) == width_of(BASE) else Formula(())

    world = World()
    base = Student(BASE, (), None, "base", None, 0, cost_of(BASE), 0)
    search = JointSearch(base, world, settings(), 0, TAUGHT, POOL, comparable=comparable)
    run(search, world)
    for ask in search.asks[1:]:
        assert bool(ask.candidate.formula.terms) == (width_of(student_of(ask).spec) == width_of(BASE))


def test_founders_are_measured_and_children_may_descend_from_them() -> None:
    world = World()
    narrow = replace(BASE, body=Arch.parse("basic-16:16x1-16x1-24x1-32x1"))
    founder = Student(narrow, (), None, "founder", None, 0, cost_of(narrow), 0)
    base = Student(BASE, (), None, "base", None, 0, cost_of(BASE), 0)
    search = JointSearch(base, world, settings(), 0, TAUGHT, POOL, founders=[founder])
    world.specs["founder"] = narrow
    first, second = search.ask(), search.ask()
    assert isinstance(first, Ask) and isinstance(second, Ask) and search.ask() is WAIT
    assert (first.phase, second.phase) == ("base", "founders") and search.budget == 42
    search.tell(1, 0.5, "completed", "founder")
    child = search.ask()
    assert isinstance(child, Ask) and student_of(child).parent == 1
    assert {"base", "founder"} <= search.needed()
    again = JointSearch(base, world, settings(), 0, TAUGHT, POOL, founders=[replace(founder, weights="timed again")])
    for ask in search.asks:
        again.replay(ask)
    assert "timed again" not in again.needed() and "founder" in again.needed()


def test_formulas_change_at_their_rate() -> None:
    world = World()
    search = search_of(world=world, formula=0.5)
    run(search, world)
    assert len({str(ask.candidate.formula) for ask in search.asks[1:]}) > 5
    world = World()
    search = search_of(world=world)
    run(search, world)
    assert {str(ask.candidate.formula) for ask in search.asks[1:]} == {str(TAUGHT)}


def test_mistakes_are_refused() -> None:
    base = Student(BASE, (), None, "base", None, 0, cost_of(BASE), 0)
    with pytest.raises(ValueError, match="expected a pool of teachers"):
        JointSearch(base, World(), settings(), 0, TAUGHT)
    with pytest.raises(ValueError, match="expected a space of formulas"):
        JointSearch(base, World(), settings(formula=0.5), 0, TAUGHT, POOL)
    with pytest.raises(ValueError, match="watts"):
        settings(limits={"watts": 3.0})
    with pytest.raises(MorphError, match="prune_all"):
        Phase("x", 3, ("prune_all",))
    search = search_of()
    with pytest.raises(ValueError, match="asked"):
        search.tell(0, 0.5, "completed", "base")
    with pytest.raises(ValueError, match="ask number 0"):
        search.replay(Ask(1, search_of().ask().candidate, "x", "x"))  # type: ignore[union-attr]


def test_settings_come_first_and_no_search_without_them_has_that_phase() -> None:
    world = World()
    search = search_of(world=world)
    run(search, world)
    phases = [ask.phase for ask in search.asks]
    assert phases == ["base"] + ["settings"] * 8 + ["joint"] * 32
    for ask in search.asks[1:9]:
        assert {action.name for action in student_of(ask).actions} <= {"resize", "keep_proposals"}
    assert [phase.name for phase in joint_phases(4)] == ["joint"] == [phase.name for phase in joint_phases(40, ())]
