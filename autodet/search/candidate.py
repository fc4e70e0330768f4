"""What a search proposes, and the interface that every search has."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

from autodet.detectors import DetectorSpec
from autodet.distill.formula import Formula
from autodet.morphism.actions import Action, actions_text, parse_actions
from autodet.records import RelativeCost
from autodet.teachers import Member

Status = Literal["completed", "stopped", "failed"]
Origin = Literal["random", "mutation", "crossover", "replicate", "control", "given", "child"]

EMPTY = Formula(())
"""The formula without terms: no distillation, the control of every search."""


class Signal(Enum):
    """What `ask` answers when it has no candidate."""

    WAIT = "wait"
    FINISHED = "finished"


WAIT: Literal[Signal.WAIT] = Signal.WAIT
"""Nothing can be decided before a running candidate reports its end: ask again after the next `tell`."""
FINISHED: Literal[Signal.FINISHED] = Signal.FINISHED
"""The budget is spent and nothing is running: no later `ask` will have a candidate."""


@dataclass(frozen=True)
class Student:
    """A student of a joint search: what it is, which it descends from and by what, and who teaches it.

    spec: after the actions. parent: number of the ask that it descends from, None for the base itself; weights: hash of
    the parent's, or of the base's own. draw: seed of its random choices. cost: as measured when it was proposed.
    epochs: of its whole lineage, its own included.
    """

    spec: DetectorSpec
    actions: tuple[Action, ...]
    parent: int | None
    weights: str
    teacher: Member | None
    draw: int
    cost: RelativeCost
    epochs: int

    @cached_property
    def arm(self) -> str:
        """What replicates have in common."""
        return f"{self.weights} | {actions_text(self.actions)} | {self.spec.body} | {self.teacher}"

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": str(self.spec),
            "actions": actions_text(self.actions),
            "parent": self.parent,
            "weights": self.weights,
            "teacher": None if self.teacher is None else str(self.teacher),
            "draw": self.draw,
            "cost": self.cost.to_json(),
            "epochs": self.epochs,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Student":
        return Student(
            spec=DetectorSpec.parse(data["spec"]),
            actions=parse_actions(data["actions"]),
            parent=data["parent"],
            weights=data["weights"],
            teacher=None if data["teacher"] is None else Member.parse(data["teacher"]),
            draw=int(data["draw"]),
            cost=RelativeCost.from_json(data["cost"]),
            epochs=int(data["epochs"]),
        )


@dataclass(frozen=True)
class Candidate:
    """One training to be done. `replicate` chooses its seeds: equal numbers mean equal batches and initialisation.

    inherit: whether the student starts from others' weights: its teacher's neck and head, or, in a joint search, all
    that its parent has. student: None where all candidates of a search train the same one.
    """

    formula: Formula
    inherit: bool
    replicate: int = 0
    student: Student | None = None

    @cached_property
    def arm(self) -> str:
        """What replicates have in common: the formula in canonical form, whether the student inherits, and which."""
        student = "" if self.student is None else f" | {self.student.arm}"
        return f"{self.formula.key} | inherit={int(self.inherit)}{student}"

    @property
    def key(self) -> str:
        """Equal for candidates that would repeat the same training."""
        return f"{self.arm} | replicate={self.replicate}"

    def to_json(self) -> dict[str, Any]:
        values = {"formula": str(self.formula), "inherit": self.inherit, "replicate": self.replicate}
        return values if self.student is None else values | {"student": self.student.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Candidate":
        student = None if data.get("student") is None else Student.from_json(data["student"])
        return Candidate(Formula.parse(data["formula"]), bool(data["inherit"]), int(data["replicate"]), student)


@dataclass(frozen=True)
class Ask:
    """A candidate with its number (0, 1, …) and where it comes from.

    `parents` are numbers of earlier asks. `rejected` lists the formulas (in a joint search the actions), each with the
    reason, that were turned down before this one was found.
    """

    id: int
    candidate: Candidate
    phase: str
    group: str
    generation: int = 0
    parents: tuple[int, ...] = ()
    origin: Origin = "random"
    rejected: tuple[tuple[str, str], ...] = ()

    def to_payload(self) -> dict[str, Any]:
        """The payload of the ledger's `asked` event; the number is the event's own."""
        return {
            "candidate": self.candidate.to_json(),
            "phase": self.phase,
            "group": self.group,
            "generation": self.generation,
            "parents": list(self.parents),
            "origin": self.origin,
            "rejected": [list(pair) for pair in self.rejected],
        }

    @staticmethod
    def from_payload(id: int, payload: Mapping[str, Any]) -> "Ask":
        return Ask(
            id=id,
            candidate=Candidate.from_json(payload["candidate"]),
            phase=payload["phase"],
            group=payload["group"],
            generation=payload["generation"],
            parents=tuple(payload["parents"]),
            origin=payload["origin"],
            rejected=tuple((formula, reason) for formula, reason in payload["rejected"]),
        )


Answer: TypeAlias = Ask | Literal[Signal.WAIT, Signal.FINISHED]


class Search(Protocol):
    """A search that knows nothing of who trains its candidates, nor of Ray.

    Its state is a fold over `ask` (or `replay`), `report` and `tell` in the order in which they happened, and every
    random choice follows from the seed and the number of the ask. So a search rebuilt from a ledger continues exactly
    where the recorded one was.
    """

    def ask(self) -> Answer:
        """The next candidate, WAIT or FINISHED. WAIT and FINISHED leave the state as it was."""
        ...

    def replay(self, ask: Ask) -> None:
        """Take a recorded ask into the state without computing it again."""
        ...

    def report(self, id: int, epoch: int, ap: float) -> bool:
        """Note the AP (0–1) after `epoch` epochs of candidate `id`; True means: stop it."""
        ...

    def tell(self, id: int, ap: float | None, status: Status = "completed", weights: str | None = None) -> None:
        """The end of candidate `id`: its final AP (0–1), its last AP if it was stopped, None if it failed.

        weights: the hash under which its weights were kept.
        """
        ...


def rng_for(seed: int, *parts: int | str) -> random.Random:
    """A generator that depends on nothing but its arguments, in every process and Python version."""
    return random.Random("/".join(str(part) for part in (seed, *parts)))
