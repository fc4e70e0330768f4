"""The joint search: students evolve by actions on trained parents, each with a teacher from an elastic pool.

Joint-DetNAS (CVPR 2021) describes two interleaved processes, student morphism and the choice of a teacher; all rates,
budgets, and the formula as a third gene are ours. Nothing here trains: what a child would be and cost is asked of an
``Examine``, and stands in the ask, so that a search is rebuilt from its ledger without examining anything again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple, Protocol

from autodet.detectors import DetectorSpec
from autodet.distill.formula import Formula
from autodet.morphism.actions import TRIMMING, Action, actions_text, draw_action
from autodet.pareto import Front, Point, crowding
from autodet.records import RelativeCost
from autodet.search.candidate import EMPTY, FINISHED, WAIT, Answer, Ask, Candidate, Status, Student, rng_for
from autodet.search.evolution import Space
from autodet.search.joint_settings import JointSettings, Phase
from autodet.teachers import Member, PoolSpace

ATTEMPTS = 8  # proposals that are turned down before the parent is trained on as it is
SLACK = 0.03  # of AP, that a cheaper parent may lack of the best one's, or of the base's where cost is the aim
TRIMS = 2  # actions that are added to a child beyond the limits, one after another
RANDOM_TIMES = 5  # as many attempts where all children are the base's, most of which are beyond a strict limit
CHEAPER = 0.98  # of its parent's cost, which a child beyond a limit must be below
BASE, FOUNDERS = "base", "founders"  # the phases of ask 0, and of other students without parents


class Examined(NamedTuple):
    """What a child would be, and cost."""

    spec: DetectorSpec
    cost: RelativeCost


class Examine(Protocol):
    """Asked before anything is trained."""

    def __call__(self, weights: str, actions: Sequence[Action], draw: int) -> Examined | str:
        """The child of the student with weights of this hash, or why there is none. draw: seed of the actions."""
        ...


Comparable = Callable[[Formula, DetectorSpec, Member], Formula]


def every_term(formula: Formula, student: DetectorSpec, teacher: Member) -> Formula:
    """A ``Comparable`` that leaves nothing out."""
    return formula


class JointSearch:
    """A `Search` over students; see the module. Ask 0 is the base itself, measured and not trained, as founders are."""

    def __init__(
        self,
        base: Student,
        examine: Examine,
        settings: JointSettings,
        seed: int,
        formula: Formula,
        teachers: PoolSpace | None = None,
        formulas: Space | None = None,
        founders: Sequence[Student] = (),
        comparable: Comparable = every_term,
    ) -> None:
        """base: without parent, actions and teacher. formula: what teachers teach by. teachers: None for a search
        without any. formulas: how a formula is changed, where ``settings.formula`` is above 0. founders: students
        without parents that are measured after the base, such as members of the pool; children may descend from them.
        comparable: leaves out of a formula what a student cannot be compared on with a teacher.
        """
        if teachers is None and any(phase.teachers != "none" for phase in settings.phases):
            raise ValueError("expected a pool of teachers, found none: give one, or let all phases have no teachers")
        if settings.formula and formulas is None:
            raise ValueError("expected a space of formulas, found none, though formulas may change")
        self.settings, self._seed, self._examine = settings, seed, examine
        self._formula, self._teachers, self._formulas = formula, teachers, formulas
        self._given, self._comparable = [base, *founders], comparable
        self.asks: list[Ask] = []
        self.ends: dict[int, Status] = {}
        self.weights: dict[int, str] = {}  # of completed candidates, by number
        self._points: dict[int, Point] = {}
        self._front = Front()
        self._best: Point | None = None
        self._running: set[int] = set()
        self._kept: set[str] = set()  # hashes of completed candidates that were needed when last looked at
        self._arms: dict[str, int] = {}  # arm → replicates asked

    @property
    def budget(self) -> int:
        """The candidates that will be asked, the base and the founders included."""
        return len(self._given) + sum(phase.budget for phase in self.settings.phases)

    def ask(self) -> Answer:
        """The next child; the base and the founders first, of which children need one that has ended."""
        running, number = bool(self._running), len(self.asks)
        if number < len(self._given):
            phase_name = FOUNDERS if number else BASE
            candidate = Candidate(EMPTY, self.settings.inherit, 0, self._given[number])
            return self._commit(Ask(number, candidate, phase_name, phase_name, origin="given"))
        phase = self._phase()
        if phase is None or not (self._points or running):
            return WAIT if running else FINISHED
        return self._commit(self._child(phase)) if self._points else WAIT

    def replay(self, ask: Ask) -> None:
        """Take a recorded ask into the state. Raises ValueError unless it is the next one."""
        if ask.id != len(self.asks):
            raise ValueError(f"expected ask number {len(self.asks)}, found {ask.id}: replay a ledger in order")
        self._commit(ask)

    def report(self, id: int, epoch: int, ap: float | None) -> bool:
        """Children are trained to their end: they are short."""
        return False

    def tell(self, id: int, ap: float | None, status: Status = "completed", weights: str | None = None) -> None:
        """Note the end of a candidate. Raises ValueError for a number not asked, or told before."""
        if not 0 <= id < len(self.asks) or id in self.ends:
            raise ValueError(f"expected a candidate that was asked and has not ended, found {id}")
        fine = status == "completed" and ap is not None and math.isfinite(ap) and weights is not None
        self.ends[id] = status if fine or status != "completed" else "failed"
        self._running.remove(id)
        if fine:
            assert ap is not None and weights is not None
            self.weights[id] = weights
            self._kept.add(weights)
            self._take_in(Point(id, self.cost_of(self.student(id).cost), ap))

    def _take_in(self, point: Point) -> None:
        self._points[point.id] = point
        self._front.add(point)
        if point.id == 0 and self.settings.aim == "cost":
            self._best = next(iter(self.ranked()), None)  # what is as accurate as the base was not known before
        elif self._suits(point) and (self._best is None or self._order(point) < self._order(self._best)):
            self._best = point

    def student(self, id: int) -> Student:
        """The student of an ask."""
        student = self.asks[id].candidate.student
        assert student is not None
        return student

    def cost_of(self, cost: RelativeCost) -> float:
        """The one of the front."""
        return float(getattr(cost, self.settings.cost))

    def front(self) -> list[Point]:
        """The archive: what no completed candidate is better than in both aims, by rising cost."""
        return list(self._front.points)

    def ranked(self) -> list[Point]:
        """The candidates within the limits that suit the aim, the best one first."""
        # Not of the front alone, whose cost may not be the limited one.
        return sorted(filter(self._suits, self._points.values()), key=self._order)

    def best(self) -> Point | None:
        """The first of them; None where there is none."""
        return self._best

    def _suits(self, point: Point) -> bool:
        base = self._points.get(0)
        accurate = self.settings.aim == "accuracy" or (base is not None and point.ap >= base.ap)
        return accurate and self.within(self.student(point.id).cost)

    def _order(self, point: Point) -> tuple[float, float, int]:
        aims = (point.cost, -point.ap) if self.settings.aim == "cost" else (-point.ap, point.cost)
        return *aims, point.id

    def needed(self) -> set[str]:
        """Hashes of the weights that something may still inherit from, or that a user may choose."""
        best = [] if self._best is None else [self._best]
        kept = {self.weights[point.id] for point in (*self._front.points, *best)}
        running = {self.student(id).weights for id in self._running}
        return kept | running | {student.weights for student in self._given}

    def take_unneeded(self) -> set[str]:
        """Hashes of completed candidates' weights that nothing will need again; each is told once."""
        unneeded = self._kept - self.needed()
        self._kept -= unneeded
        return unneeded

    def _commit(self, ask: Ask) -> Ask:
        if ask.id < len(self._given) and ask.candidate.student is not None:
            self._given[ask.id] = ask.candidate.student  # of a resumed run: as they were timed when it began
        self.asks.append(ask)
        self._running.add(ask.id)
        arm = ask.candidate.arm
        self._arms[arm] = self._arms.get(arm, 0) + 1
        return ask

    def _phase(self) -> Phase | None:
        """The phase that the next child belongs to; None once all are asked. The next begins without waiting."""
        asked = len(self.asks) - len(self._given)
        for phase in self.settings.phases:
            if asked < phase.budget:
                return phase
            asked -= phase.budget
        return None

    def _child(self, phase: Phase) -> Ask:
        number = len(self.asks)
        rejected: list[tuple[str, str]] = []
        for parent, drawn, teacher, formula, draw in self._draws(phase, number):
            weights, before = self.weights[parent], self.student(parent)
            for actions in self._trimmed(parent, drawn, phase, draw):
                # A second timing of the same detector would only differ by chance.
                examined = self._examine(weights, actions, draw) if actions else Examined(before.spec, before.cost)
                if isinstance(examined, str):
                    rejected.append((actions_text(actions), examined))
                    break
                reason = self._refused(examined.cost, before.cost, actions, phase)
                if reason is None:
                    candidate = self._candidate(parent, actions, examined, teacher, formula, draw)
                    asked = (number, candidate, phase.name, phase.name, self._generation(parent), (parent,), "child")
                    return Ask(*asked, tuple(rejected))  # type: ignore[arg-type]
                rejected.append((actions_text(actions), reason))
        raise AssertionError("the last draw is the parent as it is, which cannot be refused")

    def _candidate(
        self,
        parent: int,
        actions: tuple[Action, ...],
        examined: Examined,
        teacher: Member | None,
        formula: Formula,
        draw: int,
    ) -> Candidate:
        epochs = self.settings.epochs + (self.student(parent).epochs if self.settings.inherit else 0)
        if teacher is not None and self._teachers and examined.spec.min_size in self._teachers.sizes:
            teacher = replace(teacher, size=examined.spec.min_size)  # one that sees what the student sees
        taught = EMPTY if teacher is None else self._comparable(formula, examined.spec, teacher)
        inherited = (parent, self.weights[parent], teacher if taught.terms else None)
        student = Student(examined.spec, actions, *inherited, draw, examined.cost, epochs)
        candidate = Candidate(taught, self.settings.inherit, 0, student)
        return replace(candidate, replicate=self._arms.get(candidate.arm, 0))

    def _draws(
        self, phase: Phase, number: int
    ) -> Iterator[tuple[int, tuple[Action, ...], Member | None, Formula, int]]:
        """Children in the order in which they should be tried; at last a parent that is only trained on."""
        rng = rng_for(self._seed, number, phase.name)
        attempts = ATTEMPTS * (RANDOM_TIMES if phase.parents == "base" else 1)
        for attempt in range(attempts + 1):
            parent = self._parent(phase, rng)
            change = rng.random()
            only_teacher = self.settings.student <= change < self.settings.student + self.settings.teacher
            changes_teacher = change >= self.settings.student
            # Beyond the limits training alone leads nowhere, and without a choice of teachers nothing else can change.
            stays = only_teacher and phase.teachers == "searched" and self.within(self.student(parent).cost)
            actions: tuple[Action, ...] = ()
            if phase.actions and attempt < attempts and not stays:
                actions = self._actions(parent, phase, rng)
            teacher = self._teacher(parent, phase, changes_teacher, rng)
            yield parent, actions, teacher, self._taught(parent, rng), rng.getrandbits(31)

    def _parent(self, phase: Phase, rng: Random) -> int:
        if phase.parents == "base" and 0 in self._points:
            return 0
        best, points = self._best, self._front.points
        done = len(self.asks) / self.budget
        if best is not None and (phase.parents == "best" or rng.random() < self.settings.focus * done):
            return best.id
        useful = [point for point in points if self._leads_on(point, best)] or points
        return rng.choices(useful, crowding(useful))[0].id

    def _leads_on(self, point: Point, best: Point | None) -> bool:
        """Whether a point of the front may still lead to a better one for the aim."""
        if self.settings.aim == "accuracy":
            return best is None or point.cost >= best.cost or point.ap >= best.ap - SLACK
        base = self._points.get(0)
        return base is None or point.ap >= base.ap - SLACK

    def _actions(self, parent: int, phase: Phase, rng: Random) -> tuple[Action, ...]:
        """Different actions on the parent, each drawn for the parent as it is; ``derive`` says whether they agree."""
        spec, found = self.student(parent).spec, dict[str, Action]()
        for _ in range(rng.randint(1, self.settings.most_actions)):
            action = draw_action(spec, rng, self.settings.steps, phase.actions)
            if action is not None:
                found.setdefault(action.name, action)
        return tuple(found.values())

    def _trimmed(
        self, parent: int, actions: tuple[Action, ...], phase: Phase, draw: int
    ) -> Iterator[tuple[Action, ...]]:
        """The actions, and with one after another that makes the child cheaper, for where it is beyond the limits.

        So that a child can grow in one place and pay for it in another, though its parent is at the limit [ours].
        """
        yield actions
        spec, rng = self.student(parent).spec, Random(draw)
        smaller = self.settings.steps.below(spec)
        for _ in range(TRIMS if actions else 0):
            names = [name for name in TRIMMING if name in phase.actions and all(a.name != name for a in actions)]
            action = draw_action(spec, rng, smaller, names) if names else None
            if action is None:
                return
            actions = (*actions, action)
            yield actions

    def _teacher(self, parent: int, phase: Phase, changes: bool, rng: Random) -> Member | None:
        if phase.teachers == "none" or self._teachers is None:
            return None
        if phase.teachers == "largest":
            return self._teachers.largest
        before = self.student(parent).teacher
        if phase.teachers == "random" or changes or before is None:
            return self._teachers.sample(rng)
        return before

    def _taught(self, parent: int, rng: Random) -> Formula:
        """The search's formula; where formulas may change, the parent's or a mutation of it."""
        if self._formulas is None:
            return self._formula
        before = self.asks[parent].candidate.formula
        formula = before if before.terms else self._formula
        return self._formulas.mutate(formula, rng).canonical() if rng.random() < self.settings.formula else formula

    def _refused(self, cost: RelativeCost, parent: RelativeCost, actions: Sequence[Action], phase: Phase) -> str | None:
        """Why a child is too expensive: beyond a limit, and not on the way to it either.

        Where all are children of the base, nothing is on its way.
        """
        for name, limit in self.settings.limits.items():
            now, before = getattr(cost, name), getattr(parent, name)
            if now > limit and actions and (phase.parents == "base" or now > CHEAPER * before):
                return f"{name} {now:.3g} is above {limit:.3g}, and not below its parent's {before:.3g}"
        return None

    def within(self, cost: RelativeCost) -> bool:
        """Whether a cost is within all limits."""
        return all(getattr(cost, name) <= limit for name, limit in self.settings.limits.items())

    def _generation(self, parent: int) -> int:
        return self.asks[parent].generation + 1
