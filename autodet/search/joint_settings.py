"""What a joint search may do and how much of it: phases, rates and limits; the controls are other phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from autodet.morphism.actions import ALL, PRUNING, SETTINGS, STRUCTURE, Steps, check_actions

TEACHERS = ("searched", "random", "largest", "none")
COSTS = ("latency_ratio", "macs_g", "params_m")


@dataclass(frozen=True)
class Phase:
    """A part of a search. budget: children; actions: names of those that may be drawn; teachers: of `TEACHERS`.

    parents: from the front, the best one within the limits, or always the base.
    """

    name: str
    budget: int
    actions: tuple[str, ...] = ALL
    teachers: Literal["searched", "random", "largest", "none"] = "searched"
    parents: Literal["front", "best", "base"] = "front"

    def __post_init__(self) -> None:
        check_actions(self.actions)
        if self.budget < 1 or self.teachers not in TEACHERS:
            raise ValueError(f"expected a budget of at least 1 and teachers among {', '.join(TEACHERS)}, found {self}")


@dataclass(frozen=True)
class JointSettings:
    """A joint search's settings.

    epochs: that a child is trained; limits: of costs (see `RelativeCost`), such as {"latency_ratio": 0.6}; cost: the
    front's. aim: the most accurate within the limits, or the cheapest that is at least as accurate as the base.
    most_actions: at once, drawn evenly from 1 on. student, teacher: how often only these change, else both do; formula:
    how often the formula changes as well. focus: how often the best one so far is the parent at the end, rising from
    never at the beginning. inherit: whether children start from their parents' weights.
    """

    phases: tuple[Phase, ...]
    epochs: int
    limits: Mapping[str, float] = field(default_factory=dict)
    cost: Literal["latency_ratio", "macs_g", "params_m"] = "latency_ratio"
    aim: Literal["accuracy", "cost"] = "accuracy"
    steps: Steps = field(default_factory=Steps)
    most_actions: int = 3
    student: float = 0.6
    teacher: float = 0.2
    formula: float = 0.0
    focus: float = 0.5
    inherit: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.limits, self.cost) if name not in COSTS]
        if unknown:
            raise ValueError(f"expected costs among {', '.join(COSTS)}, found {unknown[0]!r}")
        if not self.phases or self.epochs < 1 or self.most_actions < 1 or self.student + self.teacher > 1:
            raise ValueError(f"expected phases, epochs and actions, and rates of at most 1 in sum, found {self}")


def joint_phases(budget: int, actions: Sequence[str] = ALL) -> tuple[Phase, ...]:
    """Joint-DetNAS: student and teacher together, all the time; a fifth of it on the detector's settings, first.

    Settings keep all weights, so their children are soon trained, and which widths are best depends on them [ours].
    """
    settings = tuple(name for name in SETTINGS if name in actions)
    first = budget // 5 if settings else 0
    phases = (Phase("settings", first, settings),) if first else ()
    return (*phases, Phase("joint", budget - first, tuple(actions)))


def pipeline_phases(budget: int) -> tuple[Phase, ...]:
    """The control: architecture, then pruning, then distillation of the best one; a third of the budget each."""
    part = budget // 3
    return (
        Phase("nas", part, STRUCTURE, "none"),
        Phase("prune", part, PRUNING, "none"),
        Phase("distil", budget - 2 * part, (), "largest", "best"),
    )


def random_phases(budget: int, actions: Sequence[str] = ALL) -> tuple[Phase, ...]:
    """The control: random children of the base alone."""
    return (Phase("random", budget, tuple(actions), "random", "base"),)
