"""A finite part of the formula language, small enough that every formula of it can be trained once.

    {"global": {"bodies": ["pearson(nhw)", "softmax(hw, t=4) | kl"], "weights": [2, 20]}, "logits.roi": {…}}

For each input a few bodies, each with every one of a few weights; every input may be off. All formulas are the product
of these choices without the empty one. ``Grid.spaces`` lets the searches move in it as they do in the whole grammar.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import prod
from random import Random

from autodet.distill.formula import Formula, FormulaError, Term
from autodet.distill.values import ParamValue
from autodet.search.evolution import Space
from autodet.search.spaces import Spaces, choice_space

OFF = "off"
EXPECTED = '{"INPUT": {"bodies": ["l2", …], "weights": [1, …]}, …}'
DROP = 0.25
"""How often a mutation of a term that is not the only one drops it, instead of changing its body or its weight."""


@dataclass(frozen=True)
class GridInput:
    """The terms on one input. bodies: as in a formula, without input and weight: ``softmax(hw, t=4) | kl``."""

    input: str
    bodies: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.bodies or not self.weights or not min(self.weights) > 0:
            raise ValueError(f"grid, {self.input}: expected at least one body and only weights above 0, found {self}")
        if len(set(self.terms)) < len(self.bodies) * len(self.weights):
            raise ValueError(f"grid, {self.input}: expected terms of different meaning, found {self}: drop repetitions")

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Every body with every weight, in canonical form; the weights of the first body first."""
        return tuple(replace(self._term(body), weight=weight) for body in self.bodies for weight in self.weights)

    def _term(self, body: str) -> Term:
        text = f"{self.input}: {body} * 1"  # a second weight cannot be read
        try:
            terms = Formula.parse(text).terms
        except FormulaError as error:
            raise ValueError(f"grid, {self.input}: expected a body without weight, found {body!r}. {error}") from error
        if len(terms) != 1:
            raise ValueError(f"grid, {self.input}: expected one body, found {body!r}: list each by itself")
        return terms[0].canonical()

    def varied(self, term: Term, rng: Random) -> Term:
        """The term with another body or with another weight, each half of the time; as it is if it has no other."""
        bodies = [other for other in self.terms if other.weight == term.weight and other.body != term.body]
        weights = [other for other in self.terms if other.body == term.body and other.weight != term.weight]
        genes = [gene for gene in (bodies, weights) if gene]
        return rng.choice(rng.choice(genes)) if genes else term


@dataclass(frozen=True)
class Grid:
    """The formulas that take, on each input, one of its terms or none; never none on all."""

    inputs: tuple[GridInput, ...]

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"expected a grid of different inputs, at least one, found {list(self.names)}")

    @classmethod
    def from_json(cls, text: str) -> Grid:
        """The inverse of ``to_json``; ValueError says what is wrong."""
        try:
            entries = json.loads(text).items()
            inputs = [GridInput(n, tuple(e["bodies"]), tuple(map(float, e["weights"]))) for n, e in entries]
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"expected a grid as {EXPECTED}, found {text[:80]!r} ({error!r})") from error
        return cls(tuple(inputs))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({one.input: {"bodies": one.bodies, "weights": one.weights} for one in self.inputs})

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that a formula may use."""
        return tuple(one.input for one in self.inputs)

    @property
    def count(self) -> int:
        """The number of formulas."""
        return prod(len(one.terms) + 1 for one in self.inputs) - 1

    def formulas(self) -> Iterator[Formula]:
        """Every formula once, in canonical form."""
        for chosen in itertools.product(*((None, *one.terms) for one in self.inputs)):
            if any(chosen):
                yield formula_of(chosen)

    def __contains__(self, formula: Formula) -> bool:
        terms = formula.canonical().terms
        known = {term for one in self.inputs for term in one.terms}
        return bool(terms) and set(terms) <= known and len({term.input for term in terms}) == len(terms)

    def __getitem__(self, input: str) -> GridInput:
        """The terms on an input. KeyError where the grid does not have it."""
        for one in self.inputs:
            if one.input == input:
                return one
        raise KeyError(f"the grid has the inputs {', '.join(self.names)}, found {input!r}")

    def from_choices(self, choose: Callable[[str, Sequence[ParamValue]], ParamValue]) -> Formula:
        """The formula of the answers of ``choose(name, options)``: for each input a body, or off, and a weight.

        The same name always comes with the same options, as Optuna's define-by-run requires. All off is empty.
        """
        chosen: list[Term | None] = []
        for one in self.inputs:
            body = choose(f"{one.input}/body", (OFF, *one.bodies))
            if body != OFF:
                weight = float(choose(f"{one.input}/weight", one.weights))
                chosen.append(one.terms[one.bodies.index(str(body)) * len(one.weights) + one.weights.index(weight)])
        return formula_of(chosen)

    def choices_of(self, formula: Formula) -> dict[str, ParamValue]:
        """The answers, by name, that ``from_choices`` makes this formula of."""
        terms = {term.input: term for term in formula.canonical().terms}
        answers: dict[str, ParamValue] = {f"{name}/body": OFF for name in self.names}
        for name, term in terms.items():
            answers[f"{name}/body"] = self[name].bodies[self[name].terms.index(term) // len(self[name].weights)]
            answers[f"{name}/weight"] = term.weight
        return answers

    @property
    def spaces(self) -> Spaces:
        """Where searches move. A whole formula is drawn evenly from all of them, so mostly with many inputs."""
        return Spaces(partial(_single, self), partial(_combined, self), partial(_whole, self))


def formula_of(chosen: Iterable[Term | None]) -> Formula:
    """The formula of the terms that are not None."""
    return _canonical(tuple(term for term in chosen if term is not None))


@lru_cache(maxsize=1 << 16)
def _canonical(terms: tuple[Term, ...]) -> Formula:
    """Kept, because a search of a grid draws the same formulas again and again."""
    return Formula(terms).canonical()


def _single(grid: Grid, input: str, given: Sequence[Formula], min_batch: int) -> Space:
    """One term of the grid. min_batch: see ``_checked``."""
    one = grid[input]
    _checked(grid, given, min_batch)
    terms = tuple(Formula((term,)) for formula in given for term in formula.terms if term.input == input)
    return Space(partial(_draw_single, one), partial(_vary_single, one), _cross_single, terms)


def _whole(grid: Grid, inputs: Sequence[str], given: Sequence[Formula], min_batch: int) -> Space:
    part = Grid(tuple(grid[input] for input in inputs))
    _checked(part, given, min_batch)
    return Space(partial(_draw, part), partial(_vary, part), partial(_cross, part), tuple(given))


def _combined(grid: Grid, terms: Mapping[str, Sequence[Term]]) -> Space:
    """For each input the bodies of its terms with every weight, or none."""
    bodies = {input: {term.body for term in found} for input, found in terms.items() if found}
    choices = {i: (None, *(term for term in grid[i].terms if term.body in known)) for i, known in bodies.items()}
    return choice_space(choices, [found[0] for found in terms.values() if found])


def _checked(grid: Grid, given: Sequence[Formula], min_batch: int) -> None:
    """A grid is searched as it is: ValueError where a worker's smallest batch is too small for a part of it."""
    needed = max(term.min_batch for one in grid.inputs for term in one.terms)
    if needed > min_batch:
        raise ValueError(f"the grid has terms that need batches of {needed} images, found {min_batch}: drop them")
    for formula in given:
        if formula not in grid:
            raise ValueError(f"expected given formulas of the grid, found '{formula}': add it to the grid, or drop it")


def _draw_single(one: GridInput, rng: Random) -> Formula:
    return Formula((rng.choice(one.terms),))


def _vary_single(one: GridInput, formula: Formula, rng: Random) -> Formula:
    return Formula((one.varied(formula.terms[0], rng),))


def _cross_single(a: Formula, b: Formula, rng: Random) -> Formula:
    body, weight = rng.choice(((a, b), (b, a)))
    return Formula((replace(body.terms[0], weight=weight.terms[0].weight),))


def _draw(grid: Grid, rng: Random) -> Formula:
    """May come out empty, which a population draws again."""
    return formula_of([rng.choice((None, *one.terms)) for one in grid.inputs])


def _vary(grid: Grid, formula: Formula, rng: Random) -> Formula:
    """Change, drop or add the term of one input."""
    terms = {term.input: term for term in formula.terms}
    one = rng.choice(grid.inputs)
    old = terms.pop(one.input, None)
    if old is None:
        terms[one.input] = rng.choice(one.terms)
    elif not terms or rng.random() >= DROP:
        terms[one.input] = one.varied(old, rng)
    return formula_of(terms.values())


def _cross(grid: Grid, a: Formula, b: Formula, rng: Random) -> Formula:
    """Each input's term, or its absence, from either parent."""
    first, second = ({term.input: term for term in formula.terms} for formula in (a, b))
    return formula_of([rng.choice((first, second)).get(name) for name in grid.names])
