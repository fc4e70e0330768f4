"""A table of trainings that were done once, which searches can be compared on in seconds.

A search of the table sees the training of replicate 0, epoch by epoch, and is judged by it. Other replicates, which a
part of the formulas may have, say how far seeds spread what it saw. `table_file` reads and writes tables.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import stdev, variance
from typing import Any, Literal

from autodet.distill.formula import Formula
from autodet.search.candidate import Candidate
from autodet.search.grid import Grid

Half = Literal["all", "first", "second"]
TOP = 0.01


class TableError(ValueError):
    """A table that cannot be read; the message names file, line, value, and what to do."""


@dataclass(frozen=True)
class Row:
    """One training. formula: canonical text; curve: (epochs done, AP) where it was measured before the last epoch."""

    formula: str
    replicate: int
    status: str
    ap: float | None
    curve: tuple[tuple[int, float], ...]
    epochs: int
    seconds: float


@dataclass(frozen=True)
class Table:
    """Trainings by formula and replicate, and where they come from."""

    rows: tuple[Row, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @cached_property
    def aps(self) -> dict[str, float | None]:
        """Formula → AP of its replicate 0, None where that failed."""
        return {row.formula: row.ap for row in self.rows if row.replicate == 0}

    @cached_property
    def _rows(self) -> dict[tuple[str, int], Row]:
        return {(row.formula, row.replicate): row for row in self.rows}

    @cached_property
    def grid(self) -> Grid:
        """The grid whose formulas were trained. TableError where the provenance does not hold it."""
        if "grid" not in self.provenance:
            raise TableError("expected the table's provenance to hold its 'grid': write it with build_table.py")
        return Grid.from_json(json.dumps(self.provenance["grid"]))

    def objective(self, candidate: Candidate) -> list[float | None]:
        """The AP after each epoch, for `replay.run_serial`: NaN where it was not measured, None where it failed."""
        row = self._rows.get((str(candidate.formula), candidate.replicate))
        if row is None:
            raise TableError(
                f"expected a training of the table, found '{candidate.formula}', replicate {candidate.replicate}: "
                "search without controls, replicates and finals, and pass the table's admit to the search"
            )
        curve: list[float | None] = [math.nan] * row.epochs
        for epoch, ap in row.curve:
            curve[epoch - 1] = ap
        return [*curve, None] if row.ap is None else [*curve[:-1], row.ap]

    def admit(self, formula: Formula) -> str | None:
        """For searches: None for a formula of the table, else why it is refused, which costs nothing."""
        return None if str(formula.canonical()) in self.aps else "not in this part of the table"

    @cached_property
    def best(self) -> float:
        """The highest AP, 0–1."""
        return self.threshold(0)

    def threshold(self, share: float = TOP) -> float:
        """The AP that the best `share` of all formulas reach, at least one formula; failures count as formulas."""
        known = sorted((ap for ap in self.aps.values() if ap is not None), reverse=True)
        if not known:
            raise TableError("expected a table with a completed training, found none: build it anew")
        return known[min(max(1, int(share * len(self.aps))), len(known)) - 1]

    def half(self, which: Half) -> Table:
        """The rows of one half. Formulas of two or more terms are in either, by a hash of their text.

        Formulas of one term are in both, since divide and conquer begins with them. What was tuned on one half can so
        be judged on combinations that it has not seen.
        """
        if which == "all":
            return self
        bit = ("first", "second").index(which)
        return replace(self, rows=tuple(r for r in self.rows if ";" not in r.formula or _hash(r.formula) % 2 == bit))

    def spreads(self) -> tuple[float, float, int]:
        """Standard deviation of AP between formulas and between seeds, and the number of formulas the latter is from.

        The first is of replicate 0, so seeds are part of it. The second is NaN without formulas of several replicates.
        """
        between = [ap for ap in self.aps.values() if ap is not None]
        runs: dict[str, list[float]] = {}
        for row in self.rows:
            if row.ap is not None:
                runs.setdefault(row.formula, []).append(row.ap)
        within = [(len(aps) - 1, variance(aps)) for aps in runs.values() if len(aps) > 1]
        degrees = sum(free for free, _ in within)
        pooled = math.sqrt(sum(free * each for free, each in within) / degrees) if degrees else math.nan
        return stdev(between) if len(between) > 1 else math.nan, pooled, len(within)


def by_hash(formulas: Iterable[Formula]) -> list[Formula]:
    """The formulas in an order that has nothing to do with what they are: any first N are evenly spread."""
    return sorted(formulas, key=lambda formula: _hash(str(formula.canonical())))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
