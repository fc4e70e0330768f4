"""One self-contained page about a joint search: what it derived from the base, at what cost, how, and what failed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from autodet.atomic import atomic_write_bytes
from autodet.ledger import Ledger
from autodet.records import Record, records_from
from autodet.results import page
from autodet.results.joint_plots import (
    draw_architectures,
    draw_front,
    draw_hypervolume,
    draw_lineage,
    draw_teachers,
    teacher_gains,
)
from autodet.results.lineage import (
    COST,
    MARGIN,
    actions_of,
    base_of,
    cost_of,
    evaluated,
    gain_of,
    hypervolume_progress,
    joint_frame,
    lineage,
    teacher_of,
)
from autodet.results.page import Number, points, signed_points
from autodet.results.plots import to_png
from autodet.results.report import FAILURE_ROWS, MASK_AP, failed_candidates, repeat, settings, state, title_of

DASH = "–"
SAME = "as above"
DETECTIONS = "detections.png"
CAPTIONS = {
    "front.png": "AP against the cost; the steps are the front, the numbered path is the lineage.",
    "architectures.png": "Base and derived detector, blocks compared by their place in the stage.",
    "lineage.png": "How the derived detector came about; grey dots are siblings that were not taken further.",
    "teachers.png": "AP gain over the parent by teacher: an association, not an effect. Bars are medians, numbered "
    "orange dots the derived detector's lineage; what lost far more than others lies on the left edge.",
    "hypervolume.png": f"The area that the front dominates, up to AP 0 and {MARGIN:g} times the base's cost.",
    DETECTIONS: "The same images seen by each detector.",
}


def write_joint_report(
    run_dir: Path,
    derived: int | None,
    table: Sequence[Mapping[str, object]] = (),
    target: float | None = None,
    output: Path | None = None,
    notes: Sequence[str] = (),
    marks: Mapping[str, tuple[float, float]] | None = None,
    split: str | None = None,
) -> Path:
    """Write report.html and pictures/ of a joint search, also a running one, to `output` or its folder; the page.

    derived: number of the candidate that is handed over, None while there is none. table: rows with the same keys,
    None for what is unknown, shown as they are. target: a latency ratio; notes: lines that tell how the detector is
    used; marks: name → (the front's cost, AP of 0–1 on the search's split) of other detectors in its picture.
    split: what the table is of. Raises LedgerError when it is no run, ValueError when it has no candidate `derived`.
    """
    ledger = Ledger.open(run_dir)
    records = records_from(ledger.events())
    folder = Path(run_dir) if output is None else Path(output)
    cost = ledger.config.get("options", {}).get("front") or COST
    drawn = {name: to_png(figure) for name, figure in joint_figures(records, derived, target, marks, cost).items()}
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, png in drawn.items():
        atomic_write_bytes(folder / "pictures" / name, png)
    detections = Path(run_dir) / "pictures" / DETECTIONS
    if detections.is_file():
        drawn[DETECTIONS] = detections.read_bytes()
    frame, title = joint_frame(records, cost), title_of(ledger)
    sections = [
        f"<h1>{page.escape(title)}</h1>",
        page.paragraph(state(Path(run_dir), frame), quiet=True),
        _result(table, derived, split),
        page.section("How to use it", page.preformatted("\n".join(notes)) if notes else ""),
        page.section("Front", _summary(records, derived), _picture(drawn, "front.png")),
        page.section("Architecture before and after", _picture(drawn, "architectures.png")),
        page.section("Lineage", _picture(drawn, "lineage.png"), _steps(records, derived)),
        page.section("Teachers", _picture(drawn, "teachers.png")),
        page.section("Growth of the front", _picture(drawn, "hypervolume.png")),
        page.section("Detections", _picture(drawn, DETECTIONS)),
        page.section("Failures", *failed_candidates(frame, "actions"), *_refused(records)),
        settings(ledger),
        repeat(ledger, Path(run_dir), rewrite=False),
    ]
    path = folder / "report.html"
    atomic_write_bytes(path, page.page(title, sections).encode())
    return path


def joint_figures(
    records: Sequence[Record],
    derived: int | None,
    target: float | None = None,
    marks: Mapping[str, tuple[float, float]] | None = None,
    cost: str = COST,
) -> dict[str, Figure]:
    """The pictures that a search's records allow, by file name. cost: the front's, one of `lineage.COSTS`."""
    drawn: dict[str, Figure] = {}
    if evaluated(records):
        drawn["front.png"] = draw_front(records, derived, target if cost == COST else None, marks, cost)
    if derived is not None:
        path = lineage(records, derived)
        base = base_of(records) or path[0]
        titles = _titled("base", base), _titled("derived", path[-1])
        drawn["architectures.png"] = draw_architectures(_spec(base), _spec(path[-1]), titles)
        drawn["lineage.png"] = draw_lineage(records, derived)
    if (teacher_gains(records)["teacher"] != "none").any():
        drawn["teachers.png"] = draw_teachers(records, derived)
    progress = hypervolume_progress(records, cost)
    if len(progress) > 1 and (progress["hypervolume"] > 0).any():
        drawn["hypervolume.png"] = draw_hypervolume(records, cost)
    return drawn


def _spec(record: Record) -> str:
    if record.student is None:
        raise ValueError(f"expected a candidate of a joint search, found candidate {record.id} without a student")
    return str(record.student["spec"])


def _titled(name: str, record: Record) -> str:
    """`derived: AP 41.3, ratio 0.27`, as far as known."""
    ratio = cost_of(record)
    known = [] if record.ap is None else [f"AP {points(record.ap)}"]
    known += [] if record.mask_ap is None else [f"masks {points(record.mask_ap)}"]
    known += [] if ratio is None else [f"ratio {ratio:.2f}"]
    return f"{name}: {', '.join(known)}" if known else name


def _picture(drawn: Mapping[str, bytes], name: str) -> str:
    return page.picture(drawn[name], CAPTIONS[name]) if name in drawn else ""


def _result(table: Sequence[Mapping[str, object]], derived: int | None, split: str | None) -> str:
    none = page.paragraph("No detector has been derived yet.") if derived is None else ""
    said = page.paragraph(of_split(split)) if split is not None else ""
    return page.section("Result", none, said, result_table(table))


def of_split(split: str) -> str:
    """Which images a table of results is of, and what follows from that."""
    chosen = ", which the choice was made on: what is best there is so by luck in part" if split == "val" else ""
    return f"On the {split} split{chosen}:"


def result_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as a table; a dash for None, numbers of a column with the same decimals."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [_cells([row.get(name) for row in rows]) for name in names]
    return page.table(names, list(zip(*columns, strict=True)))


def _cells(values: Sequence[object]) -> list[object]:
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if not numbers:
        return [Number(DASH) if value is None else value for value in values]
    top = max(map(abs, numbers))
    decimals = 3 if top < 1 else 2 if top < 10 else 1 if top < 1000 else 0
    return [_cell(value, decimals) for value in values]


def _cell(value: object, decimals: int) -> object:
    """A number or dash of a column of numbers; whole numbers and text stay as they are."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Number(DASH)
    return Number(f"{value:.{decimals}f}") if isinstance(value, float) else value


def _summary(records: Sequence[Record], derived: int | None) -> str:
    """What the search itself measured, in words."""
    chosen = next((record for record in records if record.id == derived), None)
    sides = [("base", base_of(records)), ("derived", chosen)]
    known = [_titled(name, record) for name, record in sides if record is not None and record.ap is not None]
    if not known:
        return ""
    note = "Ratios are latencies over the base's. AP is of the split that the search chose by, so partly luck."
    return page.paragraph(f"{'; '.join(known)}. {note}")


def _steps(records: Sequence[Record], derived: int | None) -> str:
    """The lineage as a table, in which the formula stands where it changes."""
    rows: list[tuple[object, ...]] = []
    before: Record | None = None
    path = [] if derived is None else lineage(records, derived)
    has_masks = any(record.mask_ap is not None for record in path)
    for record in path:
        ratio, gain = cost_of(record), gain_of(record, before)
        masks = [points(record.mask_ap)] if has_masks else []
        numbers = (points(record.ap), *masks, signed_points(gain), Number(DASH if ratio is None else f"{ratio:.2f}"))
        formula = SAME if before is not None and record.formula == before.formula else record.formula
        epochs = (record.student or {}).get("epochs", DASH)
        rows.append((record.id, actions_of(record), *numbers, epochs, teacher_of(record), formula))
        before = record
    heading = [MASK_AP] if has_masks else []
    columns = ("candidate", "actions", "AP", *heading, "gain", "ratio", "epochs", "teacher", "formula")
    return page.table(columns, rows, code=["actions", "teacher", "formula"])


def _refused(records: Sequence[Record]) -> list[str]:
    """Proposals that were turned down, by reason; reasons that differ only in their numbers are one."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        for _, reason in record.rejected:
            reasons.setdefault(re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", reason), []).append(reason)
    if not reasons:
        return []
    ordered = sorted(reasons.values(), key=len, reverse=True)
    rows = [(len(found), found[0]) for found in ordered[:FAILURE_ROWS]]
    intro = "Proposals that were turned down before any training (numbers are those of the first one):"
    return [page.paragraph(intro), page.table(("proposals", "reason"), rows)]
