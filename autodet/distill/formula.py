"""The formula language: Op, Term, Formula; reading, checking, printing, and the canonical form.

    global: catt > pool(2) > norm(n) | l1 * 6; logits.roi: softmax(c, t=2) | kl * 4

A term compares student and teacher on one knowledge input: transforms in order, one distance, one weight (1 where
none is given). The first parameter of an operation may be, and is printed, without its name. ``none`` is the formula
without terms. Meaning, reduction and random draws are in ``terms.term_loss``; typing is in ``typing_of``.
Inputs, transforms and distances are the lists at the ends of ``inputs``, ``transforms`` and ``distances``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

from autodet.distill.distances import DISTANCES
from autodet.distill.inputs import INPUTS
from autodet.distill.syntax import FormulaError, OperationText, TermText, is_number, read_operation, read_terms
from autodet.distill.transforms import TRANSFORMS
from autodet.distill.values import Kind, Operation, Param, ParamValue

__all__ = ["FORMULA_VERSION", "INPUTS", "Formula", "FormulaError", "Op", "Term", "typing_of"]

FORMULA_VERSION = 2  # raise it when a text comes to mean something else: keys of old records must not match
SpecT = TypeVar("SpecT", bound=Operation)
READ = 1 << 14  # terms and operations whose texts are remembered: a child has most of its parent's

# Nothing here ever changes, and searches ask for texts and canonical forms of the same things again and again: what was
# computed of an object stays with it.


@dataclass(frozen=True)
class Op:
    """A transform or distance with its parameters, in the order of its definition; defaults may be left out."""

    name: str
    params: tuple[tuple[str, ParamValue], ...] = ()

    def arguments(self) -> dict[str, ParamValue]:
        """Every parameter by name, defaults filled in. The operation must be valid."""
        given = dict(self.params)
        filled = {p.name: given.get(p.name, p.default) for p in _operation(self.name).params}
        return {name: value for name, value in filled.items() if value is not None}

    def canonical(self) -> Op:
        """Each parameter in its type, defaults dropped."""
        return self._simplest or self

    @cached_property
    def _simplest(self) -> Op | None:
        """The canonical form; None where this is one."""
        arguments = self.arguments()
        kept = ((p, p.normalised(arguments[p.name])) for p in _operation(self.name).params)
        return _simple(Op(self.name, tuple((p.name, value) for p, value in kept if value != p.default)))

    @property
    def axis(self) -> str | None:
        """The axis that the operation works along, None for one that works element by element or within a map."""
        chosen = self.arguments().get("axis", _operation(self.name).axis)
        return chosen if chosen is None else str(chosen)

    @property
    def min_batch(self) -> int:
        """Images that a batch needs for the operation to mean anything."""
        return _operation(self.name).batch_rows if self.axis == "n" else 1

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        first = next((p.name for p in _operation(self.name).params), None)
        words = [_word(value) if name == first else f"{name}={_word(value)}" for name, value in self.params]
        return f"{self.name}({', '.join(words)})" if words else self.name


@dataclass(frozen=True)
class Term:
    """``input: transforms | distance * weight``."""

    input: str
    transforms: tuple[Op, ...]
    distance: Op
    weight: float = 1.0

    @cached_property
    def body(self) -> str:
        """The text without the weight: what the term compares."""
        chain = " > ".join(str(op) for op in self.transforms)
        return f"{self.input}: {chain} | {self.distance}" if chain else f"{self.input}: {self.distance}"

    @property
    def min_batch(self) -> int:
        """Images that every worker's batch needs."""
        return max(op.min_batch for op in (*self.transforms, self.distance))

    @property
    def batch_dependent(self) -> bool:
        """Whether the loss of a batch is something else than the mean of its images' losses."""
        return any("n" in (op.axis or "") for op in (*self.transforms, self.distance))

    def canonical(self) -> Term:
        """The simplest term of the same meaning: what does nothing is dropped."""
        return self._simplest or self

    @cached_property
    def _simplest(self) -> Term | None:
        """The canonical form; None where this is one."""
        chain: list[Op] = []
        for op in (op.canonical() for op in self.transforms):
            spec = TRANSFORMS[op.name]
            repeated = spec.idempotent and bool(chain) and chain[-1] == op
            if not repeated and (spec.identity is None or op.arguments().get(spec.identity[0]) != spec.identity[1]):
                chain.append(op)
        return _simple(Term(self.input, tuple(chain), self.distance.canonical(), float(self.weight)))

    def __str__(self) -> str:
        return f"{self.body} * {_word(self.weight)}"


@dataclass(frozen=True)
class Formula:
    """A sum of terms; the empty one is no distillation."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Formula:
        """Read and check a formula; FormulaError says which term, where, why, and what would be valid."""
        try:
            formula = cls(tuple(_read_term(part) for part in text.split(";")))
        except FormulaError:  # or "none"; of the whole text it can be said where
            formula = cls(tuple(_bound_term(term, number) for number, term in enumerate(read_terms(text), 1)))
        formula.validate()
        return formula

    def validate(self) -> None:
        """Raise FormulaError unless every term is complete, fits its input's kind and has a weight ≥ 0."""
        for number, term in enumerate(self.terms, 1):
            if "checked" not in vars(term):
                typing_of(term, f"Term {number}")
                vars(term)["checked"] = True

    def canonical(self) -> Formula:
        """The one form of all formulas of equal meaning; random masks count as equal where their expectation is.

        Defaults and operations without effect are dropped, equal bodies merged by adding their weights, terms of
        weight zero dropped, and the rest sorted by text. Equivalences that hold only up to rounding are not sought.
        """
        return self._simplest or self

    @cached_property
    def _simplest(self) -> Formula | None:
        """The canonical form; None where this is one."""
        self.validate()
        weights: dict[str, float] = {}
        bodies: dict[str, Term] = {}
        for term in (term.canonical() for term in self.terms):
            bodies[term.body] = term
            weights[term.body] = weights.get(term.body, 0.0) + term.weight
        merged = [(bodies[body], float(f"{weights[body]:.12g}")) for body in sorted(bodies)]
        return _simple(Formula(tuple(_weighing(term, weight) for term, weight in merged if weight > 0)))

    @property
    def key(self) -> str:
        """Equal for formulas of equal meaning, with the language's version: ``v2 global: l2 * 1``."""
        return f"v{FORMULA_VERSION} {self.canonical()}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The knowledge inputs that have a weight, in the order of ``INPUTS``."""
        used = {term.input for term in self.terms if term.weight > 0}
        return tuple(name for name in INPUTS if name in used)

    @property
    def min_batch(self) -> int:
        """Images that every worker's batch needs for the formula to mean anything; 1 for most."""
        return max((term.min_batch for term in self.terms), default=1)

    @property
    def batch_dependent(self) -> bool:
        """Whether the formula compares images of a batch with one another, so that the batch size changes it."""
        return any(term.batch_dependent for term in self.terms)

    def __str__(self) -> str:
        return "; ".join(str(term) for term in self.terms) or "none"


SimpleT = TypeVar("SimpleT", Op, Term, Formula)


def _simple(value: SimpleT) -> SimpleT:
    """A new value, known to be in canonical form."""
    vars(value)["_simplest"] = None
    return value


def _weighing(term: Term, weight: float) -> Term:
    """A term in canonical form with another weight; the same object where it is the same one."""
    return term if term.weight == weight else _simple(Term(term.input, term.transforms, term.distance, weight))


@lru_cache(maxsize=READ)
def _read_term(text: str) -> Term:
    """The one term of a text, or FormulaError, which cannot say where. Its operations are shared by all such terms."""
    name, _, rest = text.partition(":")
    rest, star, weight = rest.partition("*")
    chain, _, distance = rest.rpartition("|")
    if name.strip() not in INPUTS or (star and not is_number(weight.strip())):
        raise FormulaError(f"Expected a term such as 'global: norm(c) | l2 * 1', found {text!r}.")
    transforms = tuple(_read_op(part, "transform") for part in chain.split(">")) if chain.strip() else ()
    return Term(name.strip(), transforms, _read_op(distance, "distance"), float(weight) if star else 1.0)


@lru_cache(maxsize=READ)
def _read_op(text: str, role: str) -> Op:
    return _bound(read_operation(text), 1, role, TRANSFORMS if role == "transform" else DISTANCES)


def typing_of(term: Term, where: str = "The term") -> tuple[Kind, ...]:
    """The kinds along a term: its input's, then what each transform produces. FormulaError where they do not fit."""
    if term.input not in INPUTS:
        raise FormulaError(f"{where}: {_unknown('input', term.input, INPUTS)}")
    kinds = [INPUTS[term.input].kind]
    for op in term.transforms:
        spec = _fitting(op, kinds[-1], "transform", TRANSFORMS, where)
        kinds.append(spec.produces(kinds[-1], op.arguments()))
    _fitting(term.distance, kinds[-1], "distance", DISTANCES, where)
    if not (isinstance(term.weight, (int, float)) and math.isfinite(term.weight) and term.weight >= 0):
        raise FormulaError(f"{where}: expected a finite weight of at least 0, found {term.weight!r}.")
    return tuple(kinds)


def _fitting(op: Op, kind: Kind, role: str, table: Mapping[str, SpecT], where: str) -> SpecT:
    """The operation's definition, if the operation is complete and defined on the kind."""
    spec = table.get(op.name)
    if spec is None:
        raise FormulaError(f"{where}: {_unknown(role, op.name, table)}")
    _check_params(op, spec, where)
    if not spec.accepts(kind):
        valid = ", ".join(name for name, other in table.items() if other.accepts(kind)) or "no transform"
        raise FormulaError(f"{where}: {role} '{op}' is not defined on a {kind}. Valid on a {kind}: {valid}.")
    axis = op.arguments().get("axis")
    if axis is not None and axis not in kind.axes:
        valid = ", ".join(str(option) for p in spec.params if p.type == "axis" for option in p.options(kind))
        raise FormulaError(f"{where}: '{op}' works along {axis}, which a {kind} does not have. Valid: {valid}.")
    return spec


def _check_params(op: Op, spec: Operation, where: str) -> None:
    given = dict(op.params)
    known = {param.name: param for param in spec.params}
    for name, value in op.params:
        if name not in known:
            raise FormulaError(f"{where}: {op.name} has no parameter {name!r}. {_usage(op.name)}")
        try:
            known[name].normalised(value)
        except ValueError as error:
            raise FormulaError(f"{where}: parameter {name!r} of {op.name}: {error}. {_usage(op.name)}") from None
    for param in spec.params:
        if param.default is None and param.name not in given:
            raise FormulaError(f"{where}: {op.name} needs its parameter {param.name!r}. {_usage(op.name)}")


def _bound_term(text: TermText, number: int) -> Term:
    if text.input not in INPUTS:
        raise FormulaError(f"Term {number}, character {text.position}: {_unknown('input', text.input, INPUTS)}")
    transforms = tuple(_bound(op, number, "transform", TRANSFORMS) for op in text.transforms)
    return Term(text.input, transforms, _bound(text.distance, number, "distance", DISTANCES), text.weight)


def _bound(text: OperationText, number: int, role: str, table: Mapping[str, Operation]) -> Op:
    """Give each argument its parameter's name."""
    if text.name not in table:
        raise FormulaError(f"Term {number}, character {text.position}: {_unknown(role, text.name, table)}")
    params = table[text.name].params
    given: dict[str, ParamValue] = {}
    for index, argument in enumerate(text.arguments):
        where = f"Term {number}, character {argument.position}"
        if argument.name is None and index >= len(params):
            raise FormulaError(f"{where}: {text.name} takes at most {len(params)} of these. {_usage(text.name)}")
        if argument.name is None and index > 0 and text.arguments[index - 1].name is not None:
            raise FormulaError(f"{where}: a parameter without a name follows one with a name. {_usage(text.name)}")
        name = params[index].name if argument.name is None else argument.name
        if name in given:
            raise FormulaError(f"{where}: {text.name} is given {name!r} twice. {_usage(text.name)}")
        given[name] = argument.value
    _check_params(Op(text.name, tuple(given.items())), table[text.name], f"Term {number}, character {text.position}")
    return Op(text.name, tuple((p.name, p.normalised(given[p.name])) for p in params if p.name in given))


def _unknown(role: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    others: dict[str, Iterable[str]] = {"transform": DISTANCES, "distance": TRANSFORMS}
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    if name in others.get(role, ()):
        other = "distance" if role == "transform" else "transform"
        hint = f" It is a {other}; distances stand after '|', transforms before it."
    else:
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"unknown {role} {name!r}.{hint} Known: {', '.join(names)}."


def _usage(name: str) -> str:
    params = _operation(name).params
    words = ", ".join(_describe(p) for p in params)
    return f"Usage: {name}({words})." if words else f"Usage: {name}, without parameters."


def _describe(param: Param) -> str:
    return param.name if param.default is None else f"{param.name}={_word(param.default)}"


def _operation(name: str) -> Operation:
    return TRANSFORMS[name] if name in TRANSFORMS else DISTANCES[name]


def _word(value: ParamValue) -> str:
    """Shortest text that reads back as the same number: 6 for 6.0."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)
