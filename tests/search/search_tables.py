"""Tables that nobody trained: what terms add, pairs that help or hinder each other, limits, and chance."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from autodet.distill.formula import Formula
from autodet.records import Record
from autodet.search import rng_for
from autodet.search.grid import Grid, GridInput
from autodet.search.table_file import read_table, write_table
from autodet.search.tabular import Table, by_hash

SMALL = Grid(
    (
        GridInput("global", ("l2", "l1", "pearson(nhw)"), (1.0, 10.0)),
        GridInput("logits.roi", ("softmax(c, t=2) | kl", "l2"), (1.0, 10.0)),
    )
)
"""6 and 4 terms: 7 · 5 - 1 = 34 formulas."""
EPOCHS, CHECKS = 6, (2, 4)


def made_ap(formula: Formula, seed: int, noise: float, replicate: int = 0) -> float:
    """0.2 and what the terms add, less the more they add, plus what pairs do, plus the seed's chance."""
    total = sum(_gain(term.input, term.body, seed) + _weight(term.body, term.weight, seed) for term in formula.terms)
    limited = 1 - math.exp(-total / 2) if total > 0 else total  # saturates: from 1 point on, a third is lost
    pairs = itertools.combinations(formula.terms, 2)
    joint = sum(rng_for(seed, "pair", a.body, b.body).gauss(0, 0.2) for a, b in pairs)
    return 0.2 + 0.02 * (limited + joint) + rng_for(seed, str(formula), replicate).gauss(0, noise)


def _gain(input: str, body: str, seed: int) -> float:
    return rng_for(seed, input).uniform(0.0, 0.6) + rng_for(seed, body).gauss(0, 0.5)


def _weight(body: str, weight: float, seed: int) -> float:
    return 0.2 * math.log10(weight) * (rng_for(seed, "weight").gauss(0, 1) + rng_for(seed, body, "weight").gauss(0, 1))


def records(
    grid: Grid, seed: int = 0, noise: float = 0.004, replicated: int = 0, failing: str | None = None
) -> list[Record]:
    """A training of each formula, two more of the first ones; those whose text holds `failing` fail after 3 epochs."""
    formulas = by_hash(grid.formulas())
    trainings = [(f, 0) for f in formulas] + [(f, r) for r in (1, 2) for f in formulas[:replicated]]
    return [
        _record(n, f, r, made_ap(f, seed, noise, r), failing is not None and failing in str(f))
        for n, (f, r) in enumerate(trainings)
    ]


def _record(number: int, formula: Formula, replicate: int, ap: float, fails: bool) -> Record:
    curve = tuple((epoch, round(ap * epoch / EPOCHS, 6)) for epoch in CHECKS if epoch <= 3 or not fails)
    values: dict[str, Any] = {"metrics": None, "seed": replicate, "weights": None, "asked_at": 0.0, "told_at": 1.0}
    values |= {"phase": "table", "group": "grid", "generation": 0, "parents": (), "origin": "given"}
    return Record(
        id=number,
        formula=str(formula),
        inherit=True,
        replicate=replicate,
        status="failed" if fails else "completed",
        ap=None if fails else round(ap, 6),
        epochs=3 if fails else EPOCHS,
        seconds=12.5,
        cause="diverged" if fails else None,
        ap_by_epoch=curve,
        **values,
    )


def made_table(path: Path, grid: Grid = SMALL, **options: Any) -> Table:
    """A table that was written and read. options: of `records`."""
    provenance = {"data": "made", "grid": {i.input: {"bodies": i.bodies, "weights": i.weights} for i in grid.inputs}}
    write_table(path, records(grid, **options), provenance)
    return read_table(path)
