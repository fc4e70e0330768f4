"""Random terms and formulas, mutation and crossover: the space that a search walks through.

A term of the grammar has at most one transform of each slot A, B, C, in this order (DetKDS), a distance and a weight.
It is built by successive choices among what is valid at that point, so nothing is sampled in vain. ``choose`` makes
each choice; with a random generator it samples, with ``trial.suggest_categorical`` Optuna's define-by-run spans the
same space. A choice has a name ``<input>/<gene>@<kind>`` and the same name always comes with the same options (for
the same ``min_batch`` and weights), which Optuna requires.

``min_batch`` is the smallest batch that a worker sees: operations that need more images are not offered. Rates of
mutation and crossover are ours; the paper's are not known.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TypeAlias

from autodet.distill.distances import DISTANCES
from autodet.distill.formula import INPUTS, Formula, Op, Term
from autodet.distill.transforms import TRANSFORMS
from autodet.distill.values import Kind, Operation, Param, ParamValue

WEIGHTS: tuple[float, ...] = (0.1, 0.5, 1, 5, 10, 20, 50)  # formula phase (DetKDS, public code)
WEIGHT_PHASE_FEATURES: tuple[float, ...] = (0, 1, 2, 5, 10)  # weight phase (DetKDS, public code and figure)
WEIGHT_PHASE_RESPONSES: tuple[float, ...] = (0, 0.1, 1, 2, 5)
MIN_BATCH = 3  # from here on every operation of the language means something
WEIGHT_MUTATION = 0.3  # share of mutations that change the weight, which decides as much as the operations
SLOTS = ("A", "B", "C")
NONE = "none"
DRAWN = 1 << 14  # terms that are remembered: draws come back to the same ones

Choose: TypeAlias = Callable[[str, Sequence[ParamValue]], ParamValue]
Genes: TypeAlias = dict[str, ParamValue]  # "B": "pool", "B.pool.k": 2, "distance": "l1", "weight": 6


def term_from_choices(
    choose: Choose, input: str, min_batch: int = MIN_BATCH, weights: Sequence[float] = WEIGHTS
) -> Term:
    """A valid term on an input from the answers of ``choose(name, options)``."""
    kind = INPUTS[input].kind
    chain = []
    for slot in SLOTS:
        op = _chosen_op(choose, f"{input}/{slot}", _slot(slot, kind, min_batch), kind, min_batch)
        if op is not None:
            chain.append(op)
            kind = TRANSFORMS[op.name].produces(kind, op.arguments())
    distance = _chosen_op(choose, f"{input}/distance", _distances(kind, min_batch), kind, min_batch)
    assert distance is not None  # "none" is not among the distances
    return _term(input, tuple(chain), distance, float(choose(f"{input}/weight", weights)))


def formula_from_choices(
    choose: Choose, inputs: Sequence[str], min_batch: int = MIN_BATCH, weights: Sequence[float] = WEIGHTS
) -> Formula:
    """A valid formula with one term on each of a non-empty choice of the inputs."""
    subsets = [c for size in range(1, len(inputs) + 1) for c in itertools.combinations(inputs, size)]
    if not subsets:
        raise ValueError("A formula needs at least one knowledge input to choose from; found none.")
    used = str(choose("inputs", ["+".join(subset) for subset in subsets])).split("+")
    return Formula(tuple(term_from_choices(choose, name, min_batch, weights) for name in used)).canonical()


def random_term(input: str, rng: random.Random, min_batch: int = MIN_BATCH, weights: Sequence[float] = WEIGHTS) -> Term:
    """A term of the grammar; every choice is uniform among its options."""
    return term_from_choices(lambda _, options: rng.choice(options), input, min_batch, weights)


def mutate_term(term: Term, rng: random.Random, min_batch: int = MIN_BATCH, weights: Sequence[float] = WEIGHTS) -> Term:
    """Change one gene: an operation, a parameter, the distance or the weight. The result always means something else.

    Genes that the change makes invalid (a distance on a kind that is no longer there) are drawn anew; numbers that the
    grammar would not sample, such as a tuned weight, stay as they are. ValueError: the term is not of the grammar.
    """
    options: dict[str, Sequence[ParamValue]] = {}
    genes = _genes(_rebuilt(term.input, _alternatives(_genes(term)), rng, min_batch, weights, options))
    changeable = [name for name in options if any(option != genes[name] for option in options[name])]
    reweigh = "weight" in changeable and rng.random() < WEIGHT_MUTATION
    gene = "weight" if reweigh else rng.choice(changeable)
    changed = rng.choice([option for option in options[gene] if option != genes[gene]])
    return _rebuilt(term.input, _alternatives({**genes, gene: changed}), rng, min_batch, weights)


def crossover_terms(
    a: Term, b: Term, rng: random.Random, min_batch: int = MIN_BATCH, weights: Sequence[float] = WEIGHTS
) -> Term:
    """Each gene from either parent; where that does not fit, from the other one, or else drawn anew.

    ValueError: the parents have different inputs, or are not of the grammar.
    """
    if a.input != b.input:
        raise ValueError(f"Expected two terms on the same input; found {a.input} and {b.input}.")
    one, other = _genes(a), _genes(b)
    wanted = {}
    for gene in sorted({*one, *other}):  # sorted: the order of a set would make the draw depend on the process
        pair = [genes[gene] for genes in (one, other) if gene in genes]
        wanted[gene] = pair if rng.random() < 0.5 else pair[::-1]
    return _rebuilt(a.input, wanted, rng, min_batch, weights)


def random_formula(
    inputs: Sequence[str], rng: random.Random, min_batch: int = MIN_BATCH, weights: Sequence[float] = WEIGHTS
) -> Formula:
    """A formula with one term on each of a random non-empty choice of the inputs."""
    return formula_from_choices(lambda _, options: rng.choice(options), inputs, min_batch, weights)


def mutate_formula(
    formula: Formula,
    inputs: Sequence[str],
    rng: random.Random,
    min_batch: int = MIN_BATCH,
    weights: Sequence[float] = WEIGHTS,
) -> Formula:
    """Mutate one term (twice as likely), add one on an unused input, or drop one; the result means something else."""
    terms = list(formula.canonical().terms)
    missing = [name for name in inputs if name not in {term.input for term in terms}]
    actions = ["mutate"] * 2 * bool(terms) + ["add"] * bool(missing) + ["drop"] * (len(terms) > 1)
    if not actions:
        raise ValueError("Nothing can be changed: the formula has no term and there is no input to add one on.")
    action = rng.choice(actions)
    if action == "add":
        terms.append(random_term(rng.choice(missing), rng, min_batch, weights))
    else:
        index = rng.randrange(len(terms))
        terms[index : index + 1] = [] if action == "drop" else [mutate_term(terms[index], rng, min_batch, weights)]
    return Formula(tuple(terms)).canonical()


def crossover_formulas(
    a: Formula, b: Formula, rng: random.Random, min_batch: int = MIN_BATCH, weights: Sequence[float] = WEIGHTS
) -> Formula:
    """Terms on the same input are crossed; a term that only one parent has is kept half of the time.

    Empty only where both parents are.
    """
    terms: list[Term] = []
    alone: list[Term] = []
    for name in INPUTS:
        one, other = ([term for term in f.terms if term.input == name] for f in (a, b))
        terms += [crossover_terms(x, y, rng, min_batch, weights) for x, y in zip(one, other, strict=False)]
        alone += one[len(other) :] + other[len(one) :]
    kept = [term for term in alone if rng.random() < 0.5]
    if not terms and not kept and alone:
        kept = [rng.choice(alone)]
    return Formula((*terms, *kept)).canonical()


def count_terms(input: str, min_batch: int = MIN_BATCH, weights: Sequence[float] = WEIGHTS) -> int:
    """How many different terms the grammar spans on an input."""
    kinds = {INPUTS[input].kind: 1}  # how many chains of transforms lead to each kind
    for slot in SLOTS:
        longer: dict[Kind, int] = dict(kinds)
        for kind, chains in kinds.items():
            for op in _every_op(_slot(slot, kind, min_batch), kind, min_batch):
                after = TRANSFORMS[op.name].produces(kind, op.arguments())
                longer[after] = longer.get(after, 0) + chains
        kinds = longer
    bodies = 0
    for kind, chains in kinds.items():
        bodies += chains * sum(1 for _ in _every_op(_distances(kind, min_batch), kind, min_batch))
    return bodies * len(weights)


def terms_of(input: str, min_batch: int = MIN_BATCH) -> Iterator[Term]:
    """Every term that the grammar spans on an input, with weight 1; those of equal transforms follow one another."""
    for chain, kind in _every_chain(SLOTS, INPUTS[input].kind, min_batch):
        for distance in _every_op(_distances(kind, min_batch), kind, min_batch):
            yield Term(input, chain, distance).canonical()


def _every_chain(slots: Sequence[str], kind: Kind, min_batch: int) -> Iterator[tuple[tuple[Op, ...], Kind]]:
    """Every choice for the slots, none included, and the kind that it ends in."""
    if not slots:
        yield (), kind
        return
    yield from _every_chain(slots[1:], kind, min_batch)
    for op in _every_op(_slot(slots[0], kind, min_batch), kind, min_batch):
        after = TRANSFORMS[op.name].produces(kind, op.arguments())
        for rest, last in _every_chain(slots[1:], after, min_batch):
            yield (op, *rest), last


@lru_cache(maxsize=DRAWN)
def _term(input: str, chain: tuple[Op, ...], distance: Op, weight: float) -> Term:
    """The canonical term; equal ones are one object, which knows its text."""
    return Term(input, chain, distance, weight).canonical()


@cache
def _slot(slot: str, kind: Kind, min_batch: int) -> Mapping[str, Operation]:
    found = {name: t for name, t in TRANSFORMS.items() if t.slot == slot and _possible(t, kind, min_batch)}
    return MappingProxyType(found)


@cache
def _distances(kind: Kind, min_batch: int) -> Mapping[str, Operation]:
    return MappingProxyType({name: d for name, d in DISTANCES.items() if _possible(d, kind, min_batch)})


def _possible(spec: Operation, kind: Kind, min_batch: int) -> bool:
    fits = spec.accepts(kind) and not (spec.axis == "n" and spec.batch_rows > min_batch)
    return fits and all(_param_options(spec, param, kind, min_batch) for param in spec.params)


@cache
def _param_options(spec: Operation, param: Param, kind: Kind, min_batch: int) -> tuple[ParamValue, ...]:
    return tuple(option for option in param.options(kind) if option != "n" or spec.batch_rows <= min_batch)


def _every_op(specs: Mapping[str, Operation], kind: Kind, min_batch: int) -> Iterator[Op]:
    for name, spec in specs.items():
        for values in itertools.product(*(_param_options(spec, param, kind, min_batch) for param in spec.params)):
            yield Op(name, tuple((param.name, value) for param, value in zip(spec.params, values, strict=True)))


def _chosen_op(choose: Choose, name: str, specs: Mapping[str, Operation], kind: Kind, min_batch: int) -> Op | None:
    """One of the operations with its parameters; a slot may also stay empty."""
    options = list(specs) if name.endswith("/distance") else [NONE, *specs]
    chosen = str(choose(f"{name}@{kind}", options))
    if chosen == NONE:
        return None
    spec = specs[chosen]
    params = []
    for param in spec.params:
        gene = f"{name}.{chosen}.{param.name}"
        gene = f"{gene}@{kind}" if param.type == "axis" else gene
        params.append((param.name, choose(gene, _param_options(spec, param, kind, min_batch))))
    return _op(chosen, tuple(params))


@lru_cache(maxsize=DRAWN)
def _op(name: str, params: tuple[tuple[str, ParamValue], ...]) -> Op:
    """Equal operations are one object, which knows its canonical form."""
    return Op(name, params)


def _genes(term: Term) -> Genes:
    """The choices that lead to a term."""
    slots = [TRANSFORMS[op.name].slot for op in term.transforms]
    if slots != sorted(set(slots)):
        raise ValueError(
            f"Expected at most one transform of each slot A, B, C, in this order; found '{term.body}' with slots "
            f"{', '.join(slots)}. Mutation and crossover work within the grammar only."
        )
    genes: Genes = dict.fromkeys(SLOTS, NONE)
    for role, op in [*zip(slots, term.transforms, strict=True), ("distance", term.distance)]:
        genes[role] = op.name
        genes.update({f"{role}.{op.name}.{name}": value for name, value in op.arguments().items()})
    return {**genes, "weight": term.weight}


def _alternatives(genes: Genes) -> dict[str, list[ParamValue]]:
    return {gene: [value] for gene, value in genes.items()}


def _rebuilt(
    input: str,
    wanted: Mapping[str, Sequence[ParamValue]],
    rng: random.Random,
    min_batch: int,
    weights: Sequence[float],
    seen: dict[str, Sequence[ParamValue]] | None = None,
) -> Term:
    """The term of the first valid wanted value of each gene; drawn where there is none. ``seen`` gets the options."""

    def choose(name: str, options: Sequence[ParamValue]) -> ParamValue:
        gene = name.split("/", 1)[1].split("@")[0]
        if seen is not None:
            seen[gene] = options
        for value in wanted.get(gene, ()):
            if value in options or not isinstance(value, str):
                return value
        return rng.choice(options)

    return term_from_choices(choose, input, min_batch, weights)
