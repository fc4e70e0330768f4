"""The file of a table: one line of provenance, ``# {…}`` in JSON, then CSV with a row for each formula and replicate.

    formula, replicate, status, ap, ap@8, ap@12, epochs, seconds

AP is 0–1, ``ap@8`` that after 8 epochs; empty where it was not measured. A training is ``completed`` or ``failed``, and
a failed one has no ``ap``. epochs and seconds: what the training took.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autodet.atomic import atomic_write_bytes, plain_json
from autodet.distill.formula import Formula, FormulaError
from autodet.records import Record
from autodet.search.tabular import Row, Table, TableError

COLUMNS = ("formula", "replicate", "status", "ap")
LAST_COLUMNS = ("epochs", "seconds")
CHECK = "ap@"
STATUSES = ("completed", "failed")
LARGEST = 2_000_000  # bytes: a table is kept with the code


def write_table(path: Path, records: Sequence[Record], provenance: Mapping[str, Any]) -> None:
    """Write a run's records as a table; ValueError where it would be larger than 2 MB, or one has not ended."""
    for record in records:
        if record.status not in STATUSES:
            raise ValueError(
                f"{path}: expected trainings that were not stopped, found '{record.formula}' {record.status}"
            )
    checks = sorted({epoch for r in records for epoch, ap in r.ap_by_epoch if ap is not None and epoch < r.epochs})
    text = io.StringIO()
    text.write(f"# {json.dumps(plain_json(provenance), ensure_ascii=False)}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"{CHECK}{epoch}" for epoch in checks), *LAST_COLUMNS])
    for record in records:
        curve = dict(record.ap_by_epoch)
        measured = [_number(curve.get(epoch)) for epoch in checks]
        first = [str(Formula.parse(record.formula).canonical()), record.replicate, record.status, _number(record.ap)]
        writer.writerow([*first, *measured, record.epochs, f"{record.seconds:.2f}"])
    data = text.getvalue().encode()
    if len(data) > LARGEST:
        raise ValueError(f"{path}: expected a table of at most {LARGEST} bytes, found {len(data)}: use a smaller grid")
    atomic_write_bytes(path, data)


def _number(ap: float | None) -> str:
    return "" if ap is None else f"{ap:.6f}"


def read_table(path: Path) -> Table:
    """Read a table. TableError where it is none; OSError where it cannot be opened."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: expected text in UTF-8, found other bytes ({error}): restore it") from error
    provenance = _provenance(path, lines)
    header = next(csv.reader(lines[1:2]), [])
    checks = _checks(path, header)
    rows = [_row(path, number, cells, checks) for number, cells in _cells(lines[2:])]
    _check_repeats(path, rows)
    return Table(tuple(rows), provenance)


def _cells(lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Each row with the number of its line, from 1; blank lines are passed over."""
    for number, line in enumerate(lines, start=3):
        if line.strip():
            yield number, next(csv.reader([line]))


def _provenance(path: Path, lines: Sequence[str]) -> dict[str, Any]:
    try:
        provenance = json.loads(lines[0].removeprefix("# ")) if lines and lines[0].startswith("# ") else None
    except json.JSONDecodeError as error:
        raise _error(
            path, 1, f"expected provenance in JSON after '# ', found damage ({error})", "restore it"
        ) from error
    if not isinstance(provenance, dict):
        found = lines[0][:60] if lines else "an empty file"
        raise _error(path, 1, f"expected provenance, '# {{…}}', found {found!r}", "write the table with build_table.py")
    return provenance


def _checks(path: Path, header: Sequence[str]) -> list[int]:
    """The epochs of the columns ``ap@…``."""
    middle = header[len(COLUMNS) : -len(LAST_COLUMNS)]
    checks = [int(name.removeprefix(CHECK)) for name in middle if name.removeprefix(CHECK).isdecimal()]
    if list(header) != [*COLUMNS, *(f"{CHECK}{epoch}" for epoch in sorted(set(checks))), *LAST_COLUMNS]:
        columns = ",".join((*COLUMNS, f"{CHECK}EPOCH…", *LAST_COLUMNS))
        raise _error(path, 2, f"expected the columns {columns}, found {','.join(header)!r}", "restore the header")
    return checks


def _row(path: Path, line: int, cells: Sequence[str], checks: Sequence[int]) -> Row:
    count = len(COLUMNS) + len(checks) + len(LAST_COLUMNS)
    if len(cells) != count:
        raise _error(path, line, f"expected {count} values, found {len(cells)}", "restore the row, or leave it out")
    try:
        formula = str(Formula.parse(cells[0]).canonical())
    except FormulaError as error:
        raise _error(path, line, f"cannot read the formula {cells[0]!r}. {error}", "mend it") from error
    replicate, epochs = _whole(path, line, "replicate", cells[1]), _whole(path, line, "epochs", cells[-2])
    ap, *curve = (_share(path, line, cell) for cell in cells[3:-2])
    seconds = _decimal(path, line, "seconds", cells[-1])
    _check_status(path, line, cells[2], ap)
    measured = tuple((epoch, value) for epoch, value in zip(checks, curve, strict=True) if value is not None)
    if any(epoch > epochs for epoch, _ in measured) or (ap is not None and epochs < 1):
        raise _error(path, line, f"expected no AP later than 'epochs', found {epochs}", "mend either")
    return Row(formula, replicate, cells[2], ap, measured, epochs, seconds)


def _check_status(path: Path, line: int, status: str, ap: float | None) -> None:
    if status not in STATUSES:
        remedy = "train the formula to its end; a table has no early stopping"
        raise _error(path, line, f"expected status completed or failed, found {status!r}", remedy)
    if (status == "completed") != (ap is not None):
        raise _error(path, line, f"expected an 'ap' exactly where the status is completed, found {status}", "mend it")


def _check_repeats(path: Path, rows: Sequence[Row]) -> None:
    """Each training once, and a replicate 0 of every formula."""
    trainings = Counter((row.formula, row.replicate) for row in rows)
    for (formula, replicate), count in trainings.items():
        if count > 1:
            problem = f"expected each training once, found replicate {replicate} of '{formula}' {count} times"
            raise TableError(f"{path}: {problem}; leave the others out")
    missing = {formula for formula, _ in trainings} - {formula for formula, replicate in trainings if replicate == 0}
    if missing:
        raise TableError(f"{path}: expected replicate 0 of every formula, found none of '{min(missing)}'; train it")


def _whole(path: Path, line: int, name: str, cell: str) -> int:
    if not cell.isdecimal():
        raise _error(path, line, f"expected a whole number of at least 0 as {name}, found {cell!r}", "mend it")
    return int(cell)


def _decimal(path: Path, line: int, name: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise _error(path, line, f"expected a number of at least 0 as {name}, found {cell!r}", "mend it")
    return value


def _share(path: Path, line: int, cell: str) -> float | None:
    if not cell:
        return None
    value = _decimal(path, line, "AP", cell)
    if value > 1:
        raise _error(path, line, f"expected an AP in 0–1, found {cell}", "divide percentages by 100")
    return value


def _error(path: Path, line: int, problem: str, remedy: str) -> TableError:
    return TableError(f"{path}, line {line}: {problem}; {remedy}")
