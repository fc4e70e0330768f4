"""One self-contained page about a run: what was run, found, how good it is, what failed, and how to repeat it."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from autodet.atomic import atomic_write_bytes
from autodet.lease import LAPSE_SECONDS, read_holder
from autodet.ledger import Ledger, is_run
from autodet.object_store import named
from autodet.records import Record, records_from
from autodet.results import page, plots
from autodet.results.facts import with_facts
from autodet.results.frame import found_arm, frame_of, leaderboard, mask_columns, paired_differences
from autodet.results.guidance_page import guidance_sections
from autodet.results.page import points, range_of_points, signed_points
from autodet.results.wording import equations, sentences

BASELINES = ("inherit-only", "undistilled")  # what a comparison is measured against, the first that is there
CAPTIONS = {
    "progress.png": "AP against candidates and against time; a dot is a candidate, stopped ones included.",
    "operations.png": "Which inputs, transforms and distances go with a better AP: an association, not an effect.",
    "comparison.png": "Paired differences over the seeds; an interval that crosses zero shows no difference.",
}
BEST_ROWS, FAILURE_ROWS = 15, 20
STUDENTS = "students"
MASK_AP = "mask AP"


def write_report(run_dir: Path | str, output: Path | str | None = None, baseline: str | None = None) -> Path:
    """Write report.html and pictures/ of a run, also a running one, to `output` or the run folder; return the page.

    baseline: the arm that a comparison's arms are compared with; default: the first of `BASELINES` that it has.
    Pictures that others put into the run's pictures/ are shown too. Raises LedgerError when it is no run.
    """
    run_dir = Path(run_dir)
    target = run_dir if output is None else Path(output)
    ledger = Ledger.open(run_dir)
    records = records_from(ledger.events())
    frame = frame_of(records)
    compared = comparison(frame, baseline)
    (target / "pictures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures(frame, compared).items():
        atomic_write_bytes(target / "pictures" / name, plots.to_png(figure))
    sections = [
        f"<h1>{page.escape(title_of(ledger))}</h1>",
        page.paragraph(state(run_dir, frame), quiet=True),
        _found(frame),
        _students(run_dir / STUDENTS),
        _comparison(compared),
        _best(frame),
        _controls(frame),
        *guidance_sections(with_facts(frame, run_dir)),
        _pictures(run_dir, target),
        _failures(frame, records),
        settings(ledger),
        repeat(ledger, run_dir),
    ]
    path = target / "report.html"
    atomic_write_bytes(path, page.page(title_of(ledger), sections).encode())
    return path


def state(run_dir: Path, frame: pd.DataFrame) -> str:
    """How far a run is, in one line: candidates by status, best AP, and whether a driver is at work."""
    counts = frame["status"].value_counts()
    words = [f"{len(frame)} candidates"] + [f"{count} {status}" for status, count in counts.items()]
    if not frame.empty:
        words.append(f"{frame['seconds'].sum() / 60:.1f} minutes of training")
    holder = read_holder(run_dir / "lease.json")
    if holder is None:
        words.append("no driver at work")
    elif (age := time.time() - holder.heartbeat) <= LAPSE_SECONDS:
        words.append(f"driver at work: process {holder.pid} on {holder.host}")
    else:
        words.append(f"driver lost: process {holder.pid} on {holder.host}, last seen {age / 60:.0f} minutes ago")
    return ", ".join(words)


def figures(frame: pd.DataFrame, compared: tuple[pd.DataFrame, str] | None) -> dict[str, Figure]:
    """The pictures that a run's data allow, by file name."""
    if compared is not None:
        return {"comparison.png": plots.draw_comparison(*compared)}
    drawn = {}
    progress = plots.best_so_far(frame)
    if progress["ap"].notna().any():
        drawn["progress.png"] = plots.draw_best_so_far(progress)
    wins = plots.operation_wins(frame)
    if not wins.empty:
        drawn["operations.png"] = plots.draw_operation_wins(wins)
    return drawn


def comparison(frame: pd.DataFrame, baseline: str | None) -> tuple[pd.DataFrame, str] | None:
    """Paired differences and the baseline they are to; None for a run that compares nothing (phase `compare`)."""
    rows = frame[(frame["phase"] == "compare") & (frame["status"] == "completed")]
    if rows.empty:
        return None
    arms = rows["group"].drop_duplicates().tolist()
    chosen = baseline or next((name for name in BASELINES if name in arms), str(arms[0]))
    return paired_differences(frame, chosen), chosen


def title_of(ledger: Ledger) -> str:
    """The script that made a run, and the name of its folder."""
    script = str(ledger.config.get("script", "run")).replace("_", " ")
    return f"{script}: {ledger.run_dir.resolve().name}"


def _found(frame: pd.DataFrame) -> str:
    arm = found_arm(frame)
    if arm is None:
        return ""
    runs = f"mean of {arm['runs']} runs" if arm["runs"] > 1 else "a single run, so partly luck"
    start = "start from the teacher's" if arm["inherit"] else "are its own"
    masks = f", {points(arm['mask_ap'])} of masks" if "mask_ap" in arm else ""
    summary = f"AP {points(arm['ap'])}{masks} ({runs}); the student's neck and head {start}."
    formula = str(arm["formula"])
    heading = "The formula that was found"
    words = page.bullets(sentences(formula))
    return page.section(
        heading,
        page.preformatted(formula),
        words,
        page.preformatted("\n".join(equations(formula))),
        page.paragraph(summary),
    )


def _students(folder: Path) -> str:
    """The students that a search trained on the full schedule, in a run of their own inside its folder."""
    if not is_run(folder):
        return ""
    records = records_from(Ledger.open(folder).events())
    has_masks = any(record.mask_ap is not None for record in records)
    rows = [
        (
            record.group,
            points(record.ap),
            *([points(record.mask_ap)] if has_masks else []),
            record.status,
            f"weights/{record.weights}.safetensors",
        )
        for record in records
    ]
    note = f"AP ×100, one training each on the full schedule, so seeds decide part of it. Files are in {STUDENTS}/."
    columns = ("student", "AP", *([MASK_AP] if has_masks else []), "status", "file")
    return page.section("Students", page.paragraph(note), page.table(columns, rows))


def _comparison(compared: tuple[pd.DataFrame, str] | None) -> str:
    if compared is None:
        return ""
    data, baseline = compared
    rows = [
        (
            row.arm,
            row.runs,
            points(row.mean),
            *_masks(row, data),
            row.pairs,
            signed_points(row.difference),
            range_of_points(row.low, row.high),
        )
        for row in data.itertuples()
    ]
    note = f"AP ×100. Differences are to {baseline}, paired by seed, with the 95 % t-interval of their mean."
    columns = ("arm", "runs", "mean AP", *_mask_heading(data), "pairs", "difference", "95 % interval")
    return page.section("Comparison", page.paragraph(note), page.table(columns, rows))


def _best(frame: pd.DataFrame) -> str:
    board = leaderboard(frame[frame["origin"] != "control"], BEST_ROWS)
    rows = [
        (
            points(row.ap),
            *_masks(row, board),
            row.runs,
            range_of_points(row.low, row.high),
            row.phase,
            row.first,
            _yes(row.inherit),
            row.formula,
        )
        for row in board.itertuples()
    ]
    note = "AP ×100, mean over runs with 95 % interval. A formula with one run owes part of its place to luck."
    columns = ("AP", *_mask_heading(board), "runs", "95 % interval", "phase", "candidate", "inherited", "formula")
    return page.section(
        "Best candidates", page.paragraph(note, quiet=True), page.table(columns, rows, code=["formula"])
    )


def _controls(frame: pd.DataFrame) -> str:
    board = leaderboard(frame[frame["origin"] == "control"])
    rows = [
        (
            row.formula,
            _yes(row.inherit),
            points(row.ap),
            *_masks(row, board),
            row.runs,
            range_of_points(row.low, row.high),
        )
        for row in board.itertuples()
    ]
    note = "The same training without a searched formula. What is found has to beat these."
    columns = ("formula", "inherited", "AP", *_mask_heading(board), "runs", "95 % interval")
    return page.section("Controls", page.paragraph(note, quiet=True), page.table(columns, rows, code=["formula"]))


def _pictures(run_dir: Path, target: Path) -> str:
    """This run's own pictures first, then what others put into its folder."""
    paths = {path.name: path for folder in (run_dir, target) for path in sorted((folder / "pictures").glob("*.png"))}
    names = [name for name in CAPTIONS if name in paths] + [name for name in paths if name not in CAPTIONS]
    captions = {name: CAPTIONS.get(name, Path(name).stem.replace("_", " ").replace("-", " ")) for name in names}
    return page.section("Pictures", *(page.picture(paths[name].read_bytes(), captions[name]) for name in names))


def failed_candidates(frame: pd.DataFrame, what: str = "formula") -> list[str]:
    """The candidates that failed with their causes, and how many more. what: the column that tells what they were."""
    failed = frame[frame["status"] == "failed"]
    names = ["id", "phase", "cause", what]
    rows = list(failed[names].head(FAILURE_ROWS).itertuples(index=False, name=None))
    parts = [page.table(("candidate", *names[1:]), rows, code=[what])]
    if len(failed) > FAILURE_ROWS:
        parts.append(page.paragraph(f"… and {len(failed) - FAILURE_ROWS} more; summary.csv has all.", quiet=True))
    return parts


def _failures(frame: pd.DataFrame, records: list[Record]) -> str:
    parts = failed_candidates(frame)
    reasons = Counter(reason for record in records for _, reason in record.rejected)
    if reasons:
        parts.append(page.paragraph("Proposals that the probe turned down before any training:"))
        parts.append(
            page.table(("proposals", "reason"), [(count, why) for why, count in reasons.most_common(FAILURE_ROWS)])
        )
    return page.section("Failures", *parts)


def settings(ledger: Ledger) -> str:
    """When a run began, its settings, and how they were changed since."""
    created = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ledger.about["created"]))
    parts = [
        page.paragraph(f"Started {created}."),
        page.preformatted(json.dumps(ledger.config, indent=2, ensure_ascii=False)),
    ]
    for extension in ledger.about["history"]:
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(extension["time"]))
        changes = "; ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in extension["changes"].items())
        parts.append(page.paragraph(f"Changed on resuming, {when}: {changes}"))
    return page.section("Settings", *parts)


def repeat(ledger: Ledger, run_dir: Path, rewrite: bool = True) -> str:
    """The commands that made a run and continue it. rewrite: also the one that writes a search's page again."""
    script = ledger.config.get("script")
    command = ledger.about["about"].get("command")
    lines = [command if isinstance(command, str) else shlex.join(["python", *command])] if command else []
    if script and ledger.config.get("options"):  # a run inside another's folder is continued with it
        lines += [f"python experiments/{script}.py --resume {shlex.quote(named(run_dir))}   # continue this run"]
    if rewrite:
        lines += [f"python experiments/analyze.py {shlex.quote(named(run_dir))}   # write this page again"]
    about = {key: value for key, value in ledger.about["about"].items() if key != "command"}
    facts = json.dumps(about, indent=2, ensure_ascii=False) if about else ""
    return page.section("How to repeat", page.preformatted("\n".join(lines)), page.preformatted(facts) if facts else "")


def _mask_heading(table: pd.DataFrame) -> list[str]:
    """A column beside that of AP, where masks were measured."""
    return [MASK_AP] * len(mask_columns(table))


def _masks(row: Any, table: pd.DataFrame) -> list[object]:
    """What stands there in a row."""
    return [points(getattr(row, name)) for name in mask_columns(table)]


def _yes(value: Any) -> str:
    return "yes" if value else "no"
