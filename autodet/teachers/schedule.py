"""What a pool's training does when: a value that can be printed and plotted before it runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from autodet.teachers.space import Member, PoolSpace


class ScheduleError(ValueError):
    """A schedule that cannot be run, or a text that describes none."""


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs whose steps train the same kinds of members.

    open: share of the space's ranges that members come from (0: the largest member alone). random: random members a
    step. sandwich: whether a step also trains the largest and the smallest member of the open part, and the largest
    teaches the others (Yu et al. 2020, BigNAS, sandwich rule and inplace distillation).
    Text: ``<epochs>*largest``, ``<epochs>*sandwich(<open>, <random>)``, ``<epochs>*uniform(<open>, <random>)``.
    """

    epochs: int
    open: float = 0.0
    random: int = 0
    sandwich: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 <= self.open <= 1 or self.random < 0:
            raise ScheduleError(f"Expected epochs ≥ 1, open in [0, 1] and random ≥ 0, found {self!r}.")
        if not self.sandwich and self.random < 1:
            raise ScheduleError(f"Expected a sandwich or random members, or nothing is trained, found {self!r}.")

    def __str__(self) -> str:
        if self.sandwich and self.open == 0 and self.random == 0:
            return f"{self.epochs}*largest"
        kind = "sandwich" if self.sandwich else "uniform"
        share = repr(float(self.open)).removesuffix(".0")
        return f"{self.epochs}*{kind}({share}, {self.random})"

    @classmethod
    def parse(cls, text: str) -> Phase:
        """The inverse of ``str``; ScheduleError where it is none."""
        epochs, _, rest = text.strip().partition("*")
        kind, _, values = rest.partition("(")
        try:
            if kind == "largest" and not values:
                return cls(int(epochs))
            share, members = values.removesuffix(")").split(",")
            if kind not in ("sandwich", "uniform") or not values.endswith(")"):
                raise ValueError
            return cls(int(epochs), float(share), int(members), kind == "sandwich")
        except ValueError as error:
            if isinstance(error, ScheduleError):
                raise
            raise ScheduleError(
                f"Expected <epochs>*largest, <epochs>*sandwich(<open>, <random>) or <epochs>*uniform(<open>, <random>),"
                f" found {text.strip()!r}."
            ) from None


@dataclass(frozen=True)
class Schedule:
    """The phases of one training, in order. Text: the phases' texts with `` > `` between them."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise ScheduleError("Expected at least one phase, found none.")

    @classmethod
    def shrinking(cls, epochs: int, largest: int, random: int = 2, openings: int = 4, whole: float = 0.7) -> Schedule:
        """Integrated progressive shrinking (Joint-DetNAS, Yao et al. 2021): depth and width open together, in one run.

        The first ``largest`` epochs train the largest member alone; then each of ``openings`` phases opens as much of
        the space. The last has the share ``whole`` of these epochs, as it alone trains all members; the others are
        equally long. How "integrated" was meant, and all shares, are [ours].
        """
        rest = epochs - largest
        if largest < 1 or openings < 1 or rest < openings:
            raise ScheduleError(
                f"Expected at least 1 epoch for the largest member and 1 for each of {openings} openings, found"
                f" {largest} of {epochs}."
            )
        steps = openings - 1
        before = max(steps, rest - round(whole * rest)) if steps else 0
        ends = [round(before * part / max(1, steps)) for part in range(steps + 1)] + [rest]
        shrinking = [Phase(ends[i + 1] - ends[i], (i + 1) / openings, random) for i in range(openings)]
        return cls((Phase(largest), *shrinking))

    @property
    def epochs(self) -> int:
        """Of all phases together."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def steps(self) -> list[tuple[int, float, int]]:
        """Of each phase its epochs, its open share, and how many members a step trains at most."""
        return [(p.epochs, p.open, p.random + (2 if p.open else 1) * p.sandwich) for p in self.phases]

    @property
    def openings(self) -> dict[int, Phase]:
        """First epoch (0-based) of each phase → the phase."""
        found, start = {}, 0
        for phase in self.phases:
            found[start] = phase
            start += phase.epochs
        return found

    def phase_at(self, epoch: int) -> Phase:
        """The phase of an epoch (0-based); the last one's beyond the end."""
        return [phase for start, phase in self.openings.items() if start <= epoch][-1]

    @property
    def sorted_at(self) -> int | None:
        """The first epoch (0-based) that trains others than the largest member: channels are sorted before it."""
        return next((start for start, phase in self.openings.items() if phase.open > 0), None)

    def table(self, space: PoolSpace) -> str:
        """One line a phase: its epochs, and from which members to which it trains."""
        lines = []
        for start, phase in self.openings.items():
            part = space.opened(phase.open)
            members = f"{part.smallest} … {part.largest}" if part.count > 1 else str(part.largest)
            lines.append(f"epochs {start + 1:>4} to {start + phase.epochs:<4} {part.count:>8,} members  {members}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return " > ".join(map(str, self.phases))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The inverse of ``str``; ScheduleError names the part that is wrong."""
        return cls(tuple(Phase.parse(part) for part in text.split(">")))


def members_of_step(space: PoolSpace, phase: Phase, rng: random.Random) -> Iterator[Member]:
    """The members that a step trains, largest first where there is a sandwich, each once."""
    part = space.opened(phase.open)
    chosen = [part.largest, part.smallest] if phase.sandwich else []
    chosen += [part.sample(rng) for _ in range(phase.random)]
    yield from dict.fromkeys(chosen)
