"""Recorded runs with chosen formulas and APs, for the tests of guidance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results_runs import asked, told

from autodet.ledger import Ledger


class Row(NamedTuple):
    """One candidate. outcome: its AP when it completed; `failed`, `running`, or a stopped one's AP as text."""

    formula: str
    outcome: float | str
    replicate: int = 0
    phase: str = "formula"
    group: str = ""
    origin: str = "random"


def control(ap: float, replicate: int = 0) -> Row:
    """A student without distillation."""
    return Row("none", ap, replicate, "control", "control", "control")


def again(formula: str, ap: float, replicate: int) -> Row:
    """A formula with another seed."""
    return Row(formula, ap, replicate, "replicate", "after 3", "replicate")


def arm(name: str, formula: str, aps: Sequence[float]) -> list[Row]:
    """An arm of a comparison, an AP a seed."""
    return [Row(formula, ap, seed, "compare", name, "given") for seed, ap in enumerate(aps)]


def write_run(folder: Path, rows: Sequence[Row], config: Mapping[str, Any] | None = None, seconds: float = 2.0) -> Path:
    """The run of these candidates, each of which took so many seconds."""
    with Ledger.create(folder, config or {}) as ledger:
        for id, row in enumerate(rows):
            payload = asked(row.formula, row.phase, row.group, replicate=row.replicate, origin=row.origin)
            ledger.append("asked", id, payload)
            if row.outcome == "failed":
                ledger.append("told", id, told(None, "failed", cause="Diverged", seconds=seconds))
            elif row.outcome != "running":
                status = "stopped" if isinstance(row.outcome, str) else "completed"
                ledger.append("told", id, told(float(row.outcome), status, seconds=seconds))
    return folder
