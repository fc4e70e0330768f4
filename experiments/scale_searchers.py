"""The searchers of a simulation of scale, with made-up results: what a formula or a student gains is drawn by its text.

Budgets are divided as the presets do; populations are larger, as thousands of candidates allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from presets import TEACHER, small

from autodet.detectors import DetectorSpec
from autodet.detectors.arch import ArchError, Stage
from autodet.detectors.spec import SpecError
from autodet.distill import INPUTS
from autodet.distill.formula import Formula
from autodet.distill.grammar import count_terms
from autodet.morphism.actions import Action, Steps
from autodet.records import RelativeCost
from autodet.search import (
    Ask,
    Breeding,
    DivideAndConquer,
    DivideSettings,
    Examined,
    JointSearch,
    JointSettings,
    Prediction,
    Rules,
    Search,
    StopRule,
    Student,
    flat_evolution,
    joint_phases,
    random_search,
    rng_for,
)
from autodet.teachers import PoolSpace

POPULATION = 100
RULES = Rules(stop=StopRule(min_known=4, margin=0.04))
NAMES = tuple(INPUTS)
BASE = small("faster_rcnn", TEACHER, 192)
POOL = PoolSpace.parse("basic-=:16..32/8x1..2-32..64/16x1..2-64..128/32x1..2-128..256/64x1..2@160,192")
TAUGHT = Formula.parse("logits.roi: softmax(c) | kl * 4")
ACTIONS = ("add_block", "remove_block", "widen_stage", "prune_stage", "resize", "keep_proposals")
STEPS = Steps(sizes=(128, 160, 192, 224))


class Case(NamedTuple):
    """A search, and the AP (0–1) that it is told for an ask."""

    search: Search
    ap: Callable[[Ask], float]


def divided(candidates: int, seed: int) -> Case:
    """Divide and conquer that combines the inputs by evolution."""
    return _divided(candidates, seed, predicted=False)


def predicted(candidates: int, seed: int) -> Case:
    """Divide and conquer that combines the inputs by prediction, as search_distiller.py does."""
    return _divided(candidates, seed, predicted=True)


def flat(candidates: int, seed: int) -> Case:
    """One population of whole formulas."""
    explore = candidates - RULES.overhead
    return Case(flat_evolution(NAMES, seed, explore, Breeding(_population(explore)), RULES), formula_ap)


def drawn(candidates: int, seed: int) -> Case:
    """Random formulas."""
    return Case(random_search(NAMES, seed, candidates - RULES.overhead, RULES), formula_ap)


def joint(candidates: int, seed: int) -> Case:
    """The joint search of students and teachers, examined in no time."""
    world = World()
    settings = JointSettings(joint_phases(candidates - 1, ACTIONS), 3, {"latency_ratio": 0.6}, steps=STEPS)
    base = Student(BASE, (), None, "w0", None, 0, cost_of(BASE), 0)
    world.search = JointSearch(base, world, settings, seed, TAUGHT, POOL)
    return Case(world.search, student_ap)


SEARCHERS: dict[str, Callable[[int, int], Case]] = {
    "divide": divided,
    "divide, predicted": predicted,
    "flat": flat,
    "random": drawn,
    "joint": joint,
}
"""Name → the search of that many candidates, its controls and finals included, and its seed."""


def _divided(candidates: int, seed: int, predicted: bool) -> Case:
    """Every input gets as many candidates as the weight phase, which gets what inputs of few terms leave."""
    settings = DivideSettings(rules=RULES)
    replicates = (settings.replicated + len(NAMES) - 1) * (settings.runs - 1)
    explore = candidates - RULES.overhead - replicates
    each = explore // (len(NAMES) + 1)
    model = Prediction(max(2, each // 2)) if predicted else None
    singles = each if model is None else model.singles
    used = sum(min(singles, count_terms(name)) for name in NAMES)
    weights = explore - used - len(NAMES) * (each - singles)
    breeding = Breeding(_population(each))
    settings = replace(settings, budget_per_input=each, weights_budget=weights, formulas=breeding, weights=breeding)
    return Case(DivideAndConquer(NAMES, seed, settings, prediction=model), formula_ap)


def _population(budget: int) -> int:
    return max(1, min(POPULATION, budget // 8))


def formula_ap(ask: Ask) -> float:
    """Each part of a formula gains or loses something of its own; seeds spread the sum by 0.01."""
    parts = [f"{t.input} {part}" for t in ask.candidate.formula.terms for part in (*t.transforms, t.distance, t.weight)]
    return _bounded(0.4 + sum(map(_gain, parts)) + rng_for(1, ask.id).gauss(0, 0.01))


@lru_cache(maxsize=1 << 16)
def _gain(part: str) -> float:
    return rng_for(0, part).gauss(0, 0.004)


def student_ap(ask: Ask) -> float:
    """Wide students of large images that were trained for long know more; each teacher adds something of its own."""
    student = ask.candidate.student
    assert student is not None
    size = math.log(student.cost.latency_ratio)
    taught = _gain(str(student.teacher)) + 0.01 * math.sqrt(min(30, student.epochs))
    return _bounded(0.4 + 0.08 * size + taught + rng_for(1, ask.id).gauss(0, 0.01))


def _bounded(ap: float) -> float:
    return min(1.0, max(0.0, ap))


class World:
    """An ``Examine`` without weights: the student of number 7 has the weights ``w7``."""

    search: JointSearch

    def __call__(self, weights: str, actions: Sequence[Action], draw: int) -> Examined | str:
        spec = self.search.student(int(weights[1:])).spec
        try:
            for action in actions:
                spec = changed(spec, action)
        except (ArchError, SpecError) as error:
            return str(error)
        return Examined(spec, cost_of(spec))


def changed(spec: DetectorSpec, action: Action) -> DetectorSpec:
    """What an action of `ACTIONS` makes of a detector, without its weights."""
    if action.name == "resize":
        return replace(spec, min_size=action.values[0])
    if action.name == "keep_proposals":
        return replace(spec, proposals=(max(spec.proposals[0], action.values[0]), action.values[0]))
    stages, number = list(spec.body.stages), action.values[0] - 1
    width, inner = stages[number].width, stages[number].inner
    if action.name == "add_block":
        inner = (*inner, inner[-1])
    elif action.name == "remove_block":
        inner = inner[:-1]
    else:
        width = action.values[1]
    stages[number] = Stage(width, inner)
    return replace(spec, body=replace(spec.body, stages=tuple(stages)))


def cost_of(spec: DetectorSpec) -> RelativeCost:
    """Latency grows with widths, depths, image size and proposals; the base's is 1."""
    body, base = (sum(stage.width * stage.depth for stage in each.body.stages) for each in (spec, BASE))
    pixels = (spec.min_size / BASE.min_size) ** 2
    ratio = (0.1 + 0.8 * body / base) * pixels + 0.1 * spec.proposals[1] / BASE.proposals[1]
    return RelativeCost(ratio, 0.01, 30 * ratio, 4 * ratio, 4 * body / base)
