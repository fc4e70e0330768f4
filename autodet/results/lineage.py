"""Who descends from whom in a joint search, which candidates are worth their cost, and both as one table.

Reads records alone. A joint search's record has its student's JSON values (`search.candidate.Student`); records without
a student are left out, or have empty values. AP is 0–1; latency ratios are to the base of the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from autodet import pareto
from autodet.detectors import DetectorSpec
from autodet.pareto import Point
from autodet.records import Record
from autodet.results.frame import REAL, TEXT, WHOLE

COST = "latency_ratio"
MARGIN = 1.05  # of the base's cost: the reference that hypervolumes are measured up to
COSTS = ("latency_ratio", "latency_spread", "latency_ms", "macs_g", "params_m")
COLUMNS: dict[str, str] = {
    "id": WHOLE,
    "parent": "Int64",
    "phase": TEXT,
    "status": TEXT,
    "ap": REAL,
    "gain": REAL,
    **dict.fromkeys(COSTS, REAL),
    "epochs": "Int64",
    "seconds": REAL,
    "actions": TEXT,
    "teacher": TEXT,
    "formula": TEXT,
    "family": TEXT,
    "body": TEXT,
    "neck_width": "Int64",
    "head_width": "Int64",
    "head_depth": "Int64",
    "pixels": "Int64",
    "proposals": "Int64",
    "on_front": "bool",
    "cause": TEXT,
}


def parent_of(record: Record) -> int | None:
    """The number of the candidate that a student descends from; None for the base."""
    parent = (record.student or {}).get("parent")
    return None if parent is None else int(parent)


def cost_of(record: Record, cost: str = COST) -> float | None:
    """One of `COSTS`, in its unit; None where the record has none."""
    value = ((record.student or {}).get("cost") or {}).get(cost)
    return None if value is None else float(value)


def actions_of(record: Record) -> str:
    """The text of what was changed of the parent; "base" for the base itself, "founder" for others without parents."""
    if record.student is None:
        return ""
    if parent_of(record) is None:
        return "founder" if record.phase == "founders" else "base"
    return str(record.student["actions"])


def teacher_of(record: Record) -> str:
    """The text of the pool's member that taught; "none" where nobody did."""
    return "" if record.student is None else str(record.student.get("teacher") or "none")


def base_of(records: Iterable[Record]) -> Record | None:
    """The first student without a parent."""
    return next((record for record in records if record.student is not None and parent_of(record) is None), None)


def evaluated(records: Iterable[Record], cost: str = COST) -> list[tuple[float, float, Record]]:
    """(cost, AP, record) of the completed candidates of which both are known, in their order."""
    found = []
    for record in records:
        value = cost_of(record, cost)
        if record.status == "completed" and record.ap is not None and value is not None:
            found.append((value, record.ap, record))
    return found


def front(records: Iterable[Record], cost: str = COST) -> list[Record]:
    """The completed candidates that none is at least as good as in cost and AP and better in one, by rising cost.

    Of equal ones the first asked stays, as in the search.
    """
    known = {record.id: record for _, _, record in evaluated(records, cost)}
    points = (Point(record.id, value, ap) for value, ap, record in evaluated(records, cost))
    return [known[point.id] for point in pareto.front(points)]


def lineage(records: Iterable[Record], id: int) -> list[Record]:
    """The candidate `id` after its parent, and so on: the base or a founder is first. ValueError if one is missing."""
    known = {record.id: record for record in records}
    found: list[Record] = []
    wanted: int | None = id
    while wanted is not None:
        if wanted not in known or (found and wanted >= found[-1].id):
            of = f"the parent of {found[-1].id}" if found else "the candidate to trace"
            raise ValueError(f"expected {of} among the run's earlier candidates, found {wanted}; correct the number")
        found.append(known[wanted])
        wanted = parent_of(known[wanted])
    return found[::-1]


def gain_of(record: Record, parent: Record | None) -> float | None:
    """AP of a completed candidate minus its parent's; None where one of them is unknown."""
    if parent is None or record.status != "completed" or record.ap is None or parent.ap is None:
        return None
    return record.ap - parent.ap


def joint_frame(records: Sequence[Record], cost: str = COST) -> pd.DataFrame:
    """One row a candidate, columns `COLUMNS`; missing values where a record has no student or has not ended.

    gain: AP minus the parent's. latency_ratio, macs_g (10⁹) and so on: see `records.RelativeCost`. epochs: of the whole
    lineage; seconds: of this candidate's training. pixels: shorter side of the images; proposals: at evaluation, of
    two-stage detectors. on_front: by ``cost``. mask_ap: a further column, where masks were measured.
    """
    known = {record.id: record for record in records}
    best = {record.id for record in front(records, cost)}
    rows = [_row(record, known, record.id in best) for record in records]
    masks = {"mask_ap": REAL} if any(record.mask_ap is not None for record in records) else {}
    columns = COLUMNS | masks
    return pd.DataFrame(rows, columns=list(columns), dtype="object").astype(columns)


def _row(record: Record, known: dict[int, Record], on_front: bool) -> dict[str, Any]:
    parent = parent_of(record)
    row: dict[str, Any] = {name: getattr(record, name) for name in ("id", "phase", "status", "ap", "formula", "cause")}
    row |= {"mask_ap": record.mask_ap, "parent": parent, "seconds": record.seconds, "on_front": on_front}
    row["gain"] = None if parent is None else gain_of(record, known.get(parent))
    row |= {name: cost_of(record, name) for name in COSTS}
    if record.student is None:
        return row
    row |= {"epochs": record.student["epochs"], "actions": actions_of(record), "teacher": teacher_of(record)}
    return row | _architecture(DetectorSpec.parse(record.student["spec"]))


def _architecture(spec: DetectorSpec) -> dict[str, Any]:
    """What tells one student from another; fields that its family does not have are left out."""
    row = {"family": spec.family, "body": str(spec.body), "neck_width": spec.neck_width, "pixels": spec.min_size}
    if spec.two_stage:
        return row | {"head_width": spec.head_width, "proposals": spec.proposals[1]}
    return row | {"head_depth": spec.head_depth}


def hypervolume_progress(records: Sequence[Record], cost: str = COST) -> pd.DataFrame:
    """The front's growth: one row a candidate that has ended, in the order in which they ended; empty without a base.

    Columns: candidates (ended so far, the base included), id, status, hypervolume (of those completed so far, up to the
    base's cost · `MARGIN` and AP 0; in units of cost times AP of 0–1).
    """
    columns = ["candidates", "id", "status", "hypervolume"]
    base = base_of(records)
    worst = None if base is None else cost_of(base, cost)
    if worst is None:
        return pd.DataFrame(columns=columns)
    ended = sorted((r for r in records if r.told_at is not None), key=lambda r: (r.told_at or 0.0, r.id))
    rows, points = [], list[Point]()
    for count, record in enumerate(ended, 1):
        points += [Point(record.id, value, ap) for value, ap, _ in evaluated([record], cost)]
        rows.append((count, record.id, record.status, pareto.hypervolume(points, (worst * MARGIN, 0.0))))
    return pd.DataFrame(rows, columns=columns)
