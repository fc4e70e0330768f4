"""Asynchronous evolution of formulas: one population, one child at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from autodet.distill.formula import Formula
from autodet.search.candidate import Ask, Candidate, Origin, rng_for
from autodet.search.history import History, Standing

Admit = Callable[[Formula], str | None]
"""The probe: None if the formula may be trained, else the reason why not. Must answer the same for the same formula."""

BREEDING_ATTEMPTS = 24
RANDOM_ATTEMPTS = 96
"""Draws that may turn out to be known or refused before a population gives up its breeding, and its space."""


@dataclass(frozen=True)
class Space:
    """How formulas of a space are drawn and varied; `given` are asked before any is drawn.

    size: the most formulas that can come of it, None where that is not known.
    """

    random: Callable[[Random], Formula]
    mutate: Callable[[Formula, Random], Formula]
    crossover: Callable[[Formula, Formula, Random], Formula]
    given: tuple[Formula, ...] = ()
    size: int | None = None


@dataclass(frozen=True)
class Breeding:
    """Sizes and rates of evolution. The papers do not state theirs: these are ours.

    `tournament`: how many members a parent has to beat; `crossover`: the chance of two parents instead of one.
    """

    population: int = 6
    tournament: int = 3
    crossover: float = 0.3

    def __post_init__(self) -> None:
        if self.population < 1 or self.tournament < 1 or not 0 <= self.crossover <= 1:
            raise ValueError(f"expected population and tournament of at least 1 and crossover in 0–1, found {self}")


@dataclass(frozen=True)
class Evolution:
    """Steady-state evolution with tournament selection (Goldberg & Deb 1991).

    The first `population` asks are the space's given formulas and random ones. Each later ask is a child, by mutation
    or crossover, of tournament winners among the best `population` members known at that moment; no ask waits for a
    generation. A key is never asked twice: a child that is known or refused is drawn again, at last at random.

    Why the best members and not the youngest, as in regularised evolution (Real et al. 2019): ageing forgets a member
    that was merely lucky, but also every good one, and then pays to find it again. Budgets here are four to twenty
    generations, not hundreds. On the tests' synthetic objective (110 candidates, 12 seeds, whole and divided formulas,
    populations of 4 and 6, noise of 0, 0.01 and 0.02 AP) the best members led to better formulas in 11 of 12 settings,
    the twelfth being among the noisiest. Luck is met by `Standing.score`, by replicates, and by finals instead.
    """

    phase: str
    group: str
    seed: int
    inherit: bool
    space: Space
    breeding: Breeding
    admit: Admit

    def propose(
        self, history: History, founders: Sequence[Standing] = (), rejected: list[tuple[str, str]] | None = None
    ) -> Ask | None:
        """The next ask, or None if no new formula was found in a bounded number of draws.

        `founders` are members that another group has evaluated, in addition to this group's own.
        `rejected` collects what the probe turned down on the way (formula, reason), and is stored in the ask.
        """
        if history.in_group[self.phase, self.group] == self.space.size:
            return None  # all were asked: drawing them again and again would take a while
        rejected = [] if rejected is None else rejected
        turned_down = {text for text, _ in rejected}
        index = history.in_group[self.phase, self.group]
        for drawn, parents, origin in self._draws(history, founders, index):
            formula = drawn.canonical()
            candidate = Candidate(formula, self.inherit)
            if not formula.terms or candidate.key in history.keys:
                continue
            if str(formula) in history.refused or str(formula) in turned_down:
                continue
            reason = self.admit(formula)
            if reason is None:
                generation, number = index // self.breeding.population, len(history.asks)
                return Ask(number, candidate, self.phase, self.group, generation, parents, origin, tuple(rejected))
            rejected.append((str(formula), reason))
            turned_down.add(str(formula))
        return None

    def _draws(
        self, history: History, founders: Sequence[Standing], index: int
    ) -> Iterator[tuple[Formula, tuple[int, ...], Origin]]:
        """Formulas in the order in which they should be tried, with parents and origin."""
        rng = rng_for(self.seed, len(history.asks), self.group)
        if index < self.breeding.population:
            yield from ((formula, (), "given") for formula in self.space.given)
        else:
            members = self._members(history, founders)
            for _ in range(BREEDING_ATTEMPTS if members else 0):
                yield self._child(members, rng)
        for _ in range(RANDOM_ATTEMPTS):
            yield self.space.random(rng), (), "random"

    def _members(self, history: History, founders: Sequence[Standing]) -> list[Standing]:
        population = self.breeding.population
        known = [*founders, *history.best_in_group(self.phase, self.group, population)]
        return sorted(known, key=lambda member: member.rank, reverse=True)[:population]

    def _child(self, members: Sequence[Standing], rng: Random) -> tuple[Formula, tuple[int, ...], Origin]:
        first = self._winner(members, rng)
        others = [member for member in members if member.id != first.id]
        if others and rng.random() < self.breeding.crossover:
            second = self._winner(others, rng)
            return self.space.crossover(first.formula, second.formula, rng), (first.id, second.id), "crossover"
        return self.space.mutate(first.formula, rng), (first.id,), "mutation"

    def _winner(self, members: Sequence[Standing], rng: Random) -> Standing:
        entrants = rng.sample(members, min(self.breeding.tournament, len(members)))
        return max(entrants, key=lambda member: member.rank)


def admit_all(formula: Formula) -> str | None:
    """The probe that turns nothing down."""
    return None
