"""Combining inputs by prediction: a model of what each term adds says which combination to train next.

A Gaussian process over formulas (Rasmussen & Williams 2006, chapter 2) whose covariance is a sum over the inputs, with
a smaller part for pairs of inputs (additive processes: Duvenaud et al. 2011), so that a term known from one formula
says something about all formulas that use it. The next formula is the one of the largest expected improvement (Mockus
1978; Jones et al. 1998) among children and fresh draws. Shares of the covariance are ours, and the same for all data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import NormalDist, fmean

import numpy as np
import numpy.typing as npt

from autodet.distill.formula import Formula
from autodet.search.candidate import Ask, Candidate, Origin, rng_for
from autodet.search.evolution import Admit, Space
from autodet.search.history import History, Standing

Array = npt.NDArray[np.float64]
Draw = tuple[Candidate, tuple[int, ...], Origin]

# Variances, where that of the known results is 1. What two terms on the same input share:
USED, BODY, WEIGHT, TERM = 0.5, 0.5, 0.25, 0.25  # being used at all; the body; the weight; the body with this weight
MOST = USED + BODY + WEIGHT + TERM
PAIR = 0.45  # of two inputs together, beyond the sum
LEVEL = 100.0  # of the mean: not known beforehand
NOISE = 0.3  # of one training's result, between seeds
LENGTH = 1.0  # weights that differ by this factor of e share exp(-1) of what equal weights share
# The model's work grows as the cube of what it knows, so of a very long history (as of no preset) it knows the best
# results and the latest. Children of the best are predicted as well as from all, fresh draws too well by about one
# standard deviation. And where more candidates run than it allows for, some repeat what others will tell.
KNOWN = 600  # results
RUNNING = 250  # candidates, those asked last, whose results are allowed for before they come in
PARENTS = 8  # best formulas known, from which children are drawn
NORMAL = NormalDist()


@dataclass(frozen=True)
class Prediction:
    """Sizes. singles: formulas of each input that are trained alone before the model takes over; pool: draws from each
    space, of which the most promising one is asked."""

    singles: int = 2
    pool: int = 48

    def __post_init__(self) -> None:
        if self.singles < 1 or self.pool < 1:
            raise ValueError(f"expected singles and pool of at least 1, found {self}")


@dataclass(frozen=True)
class PredictedPhase:
    """Asks what promises most among draws from its spaces; a formula is never asked twice. One term an input."""

    phase: str
    seed: int
    inherit: bool
    spaces: Sequence[Space]
    pool: int
    admit: Admit

    def propose(self, history: History, known: Sequence[Standing]) -> Ask | None:
        """The next ask, or None if the draws held no new formula that may be trained. known: at least one standing."""
        turned_down: list[tuple[str, str]] = []
        number = len(history.asks)
        draws = self._new(history, known, rng_for(self.seed, number, self.phase))
        promise = self._promise(history, known, [candidate.formula for candidate, _, _ in draws])
        for place in np.argsort(-promise, kind="stable"):
            candidate, parents, origin = draws[place]
            reason = self.admit(candidate.formula)
            if reason is None:
                return Ask(number, candidate, self.phase, self.phase, 0, parents, origin, tuple(turned_down))
            turned_down.append((str(candidate.formula), reason))
        return None

    def _new(self, history: History, known: Sequence[Standing], rng: Random) -> list[Draw]:
        """Different draws that were not asked or refused before."""
        found: dict[str, Draw] = {}
        parents = sorted(known, key=lambda standing: standing.rank, reverse=True)[:PARENTS]
        for space in self.spaces:
            for formula, numbers, origin in self._draws(space, parents, rng):
                candidate = Candidate(formula.canonical(), self.inherit)
                new = candidate.key not in history.keys and str(candidate.formula) not in history.refused
                if new and candidate.formula.terms:
                    found.setdefault(candidate.key, (candidate, numbers, origin))
        return list(found.values())

    def _draws(
        self, space: Space, parents: Sequence[Standing], rng: Random
    ) -> Iterator[tuple[Formula, tuple[int, ...], Origin]]:
        """The space's given formulas; then fresh ones, children by mutation and by crossover, a third each."""
        for formula in space.given:
            yield formula, (), "given"
        for place in range(self.pool):
            first, second = rng.choice(parents), rng.choice(parents)
            if place % 3 == 0:
                yield space.random(rng), (), "random"
            elif place % 3 == 1 or first.id == second.id:
                yield space.mutate(first.formula, rng), (first.id,), "mutation"
            else:
                yield space.crossover(first.formula, second.formula, rng), (first.id, second.id), "crossover"

    def _promise(self, history: History, known: Sequence[Standing], formulas: Sequence[Formula]) -> Array:
        """The expected improvement of each formula over the best one known.

        Candidates that are running are taken to end as predicted, so that others do not repeat what they will tell.
        A stopped one counts with its last AP, which is on the low side.
        """
        results = [fmean(standing.fitness.values()) for standing in known]
        noise = [NOISE / len(standing.fitness) for standing in known]
        running = [ask.candidate.formula for ask in list(history.open.values())[-RUNNING:]]
        running = [formula for formula in running if formula.terms]
        model = Model([*(standing.formula for standing in known), *running], formulas)
        if running:
            results += model.predict(results, noise, slice(len(known), len(known) + len(running)))[0].tolist()
            noise += [NOISE] * len(running)
        return expected_improvement(*model.predict(results, noise, model.wanted), best=max(results))


class Model:
    """What the results of formulas say of one another. The covariances of all are computed once."""

    def __init__(self, known: Sequence[Formula], wanted: Sequence[Formula]) -> None:
        bodies, logs = _encoded((*known, *wanted))
        every, ours = (bodies, logs), (bodies[: len(known)], logs[: len(known)])
        self.wanted = slice(len(known), len(known) + len(wanted))
        self._covariance = covariance(every, ours)  # of all with the known ones
        used = (bodies >= 0).sum(axis=1)
        self._own = LEVEL + used * MOST + PAIR * used * (used - 1) / 2  # of each formula with itself

    def predict(self, results: Sequence[float], noise: Sequence[float], wanted: slice) -> tuple[Array, Array]:
        """Mean and standard deviation of the wanted ones' results, given those of the first known ones.

        noise: variance of each known result, where the variance of all of them is 1.
        """
        count = len(results)
        centre, spread = float(np.mean(results)), float(np.std(results)) or 1.0
        between, ours = self._covariance[wanted, :count], self._covariance[:count, :count]
        weights = np.linalg.solve(ours + np.diag(noise), between.T)  # known × wanted
        mean = weights.T @ ((np.asarray(results) - centre) / spread)
        variance = self._own[wanted] - np.einsum("wk,kw->w", between, weights)
        return centre + spread * mean, spread * np.sqrt(np.maximum(variance, 1e-9))


def covariance(first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    """Of the results of F with those of S encoded formulas, F×S."""
    (bodies, logs), (other_bodies, other_logs) = first, second
    pages, squares = [], []
    for column in range(bodies.shape[1]):
        # Formulas share terms: what two terms have in common is computed once for each pair of different ones.
        ours, our_places = _different(bodies[:, column], logs[:, column])
        theirs, their_places = _different(other_bodies[:, column], other_logs[:, column])
        pages.append(_in_common(ours, theirs)[our_places[:, None], their_places])
        squares.append(pages[-1] ** 2)
    total = _summed(pages)
    pairs = (total**2 - _summed(squares)) / 2  # the sum over pairs of inputs of their products
    summed: Array = LEVEL + total + PAIR * pairs / MOST**2
    return summed


def _summed(pages: Sequence[Array]) -> Array:
    """The sum of all, rounded as numpy's sum of a row is, which adds eight numbers in pairs."""
    if len(pages) == 8:
        pages = [first + second for first, second in zip(pages[::2], pages[1::2], strict=True)]
        return (pages[0] + pages[1]) + (pages[2] + pages[3])
    return sum(pages[1:], pages[0])


def _different(bodies: Array, logs: Array) -> tuple[tuple[Array, Array], npt.NDArray[np.intp]]:
    """The different terms of a column, U each, and the place of each row's term among them."""
    values, places = np.unique(bodies + 1j * logs, return_inverse=True)
    return (values.real, values.imag), places


def _in_common(ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> Array:
    """What terms on one input share, U×V; nothing where the input is off."""
    (bodies, logs), (other_bodies, other_logs) = ours, theirs
    both = (bodies[:, None] >= 0) & (other_bodies[None] >= 0)
    same = bodies[:, None] == other_bodies[None]
    near = np.exp(-np.abs(logs[:, None] - other_logs[None]) / LENGTH)
    found: Array = both * (USED + BODY * same + WEIGHT * near + TERM * same * near)
    return found


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """E[max(result - best, 0)] of normally distributed results."""
    values = []
    for middle, spread in zip(mean - best, deviation, strict=True):
        z = middle / spread
        values.append(middle * NORMAL.cdf(z) + spread * NORMAL.pdf(z))
    return np.array(values)


def _encoded(formulas: Sequence[Formula]) -> tuple[Array, Array]:
    """N×inputs each: the number of the body, -1 where the input is off, and the logarithm of the weight."""
    columns: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for term in (term for formula in formulas for term in formula.terms):
        columns.setdefault(term.input, len(columns))
        numbers.setdefault(term.body, len(numbers))
    bodies, logs = np.full((len(formulas), len(columns)), -1.0), np.zeros((len(formulas), len(columns)))
    for row, formula in enumerate(formulas):
        for term in formula.terms:
            bodies[row, columns[term.input]] = numbers[term.body]
            logs[row, columns[term.input]] = math.log(term.weight)
    return bodies, logs
