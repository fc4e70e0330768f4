"""What happened in a run?

command:   python experiments/analyze.py RUN [RUN ...] [--output DIR] [--csv PATH]
hardware:  any; reads files only, so also runs that another machine is still writing
time:      seconds
expected:  status and best candidates on the screen; summary.csv, records.jsonl, pictures/ and report.html in the run

RUN is a run's folder or a folder of runs. Nothing that the run itself wrote is changed. Of several runs that do not lie
in one another's folders it also tells what they teach together: which knowledge inputs help alone, which transforms and
distances win, what it cost, and whether formulas found for one pair help another. That goes into guidance/ beside the
first run (or in DIR): guidance.html, pictures/, and a CSV file a table.

With --follow it shows one run in the terminal while it goes on: what runs, how far it is, and the best so far.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pandas as pd
from options import source

from autodet.atomic import atomic_write_bytes
from autodet.ledger import Ledger, LedgerError
from autodet.results.frame import find_runs, frame_of, leaderboard, mask_columns, rank_agreement, read_run
from autodet.results.guidance_page import write_guidance
from autodet.results.guidance_tables import text_of
from autodet.results.joint_report import write_joint_report
from autodet.results.live import Follower, has_driver, live_text
from autodet.results.plots import draw_rank_agreement, to_png
from autodet.results.report import comparison, state, write_report
from autodet.working_copy import read_path, update

FOLLOW_SECONDS = 5.0
FOLLOWED = ("config.json", "events/")  # all that --follow needs of a run


def main(argv: list[str] | None = None) -> int:
    """Analyse every run that is named; 2 on a user's mistake."""
    options = parse(argv)
    try:
        if options.follow:
            return follow(str(options.runs[0]))
        runs = list(dict.fromkeys(run for path in options.runs for run in find_runs(path)))
        frames = {run: analyze(run, output_of(run, runs, options.output), options) for run in runs}
        if options.csv is not None:
            write_csv(frames, options.csv)
        if len(separate(runs)) > 1:
            guide(runs, (options.output or runs[0].resolve().parent) / "guidance")
    except (LedgerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write there and leave the run's folder alone")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="all candidates of all runs as one table")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows of the leaderboard (default: 10)")
    parser.add_argument("--baseline", metavar="ARM", help="arm to compare with (default: inherit-only)")
    parser.add_argument(
        "--long", type=Path, metavar="RUN", help="a run of the same formulas at full length: draws the ranks' agreement"
    )
    parser.add_argument("--follow", action="store_true", help="show one run as it goes on, until its driver ends")
    options = parser.parse_args(argv)
    if options.follow and len(options.runs) > 1:
        parser.error("--follow shows one run")
    if not options.follow:
        options.runs = [source(run) for run in options.runs]
    return options


def follow(named: str, seconds: float = FOLLOW_SECONDS) -> int:
    """Show a run every few seconds until its driver has ended, or Ctrl-C."""
    run = read_path(named, FOLLOWED)
    Ledger.open(run)  # a folder that is no run is refused
    follower, clear = Follower(run), "\033[2J\033[H" if sys.stdout.isatty() else ""
    try:
        while True:
            update(run, FOLLOWED)
            driven = has_driver(run)
            print(f"{clear}{live_text(run, follower.records(), time.time())}\n", flush=True)
            if not driven:
                return 0
            time.sleep(seconds)
    except KeyboardInterrupt:
        return 0


def analyze(run: Path, output: Path, options: argparse.Namespace) -> pd.DataFrame:
    """Print one run and write its views, pictures and report to `output`; return its frame."""
    output.mkdir(parents=True, exist_ok=True)
    frame = frame_of(Ledger.open(run).write_views(output))
    print(f"\n{run}\n{state(run, frame)}")
    if not frame.empty:
        print(frame.groupby(["phase", "status"], sort=False).size().unstack(fill_value=0).to_string())
        print_tables(frame, options)
    if options.long is not None:
        pairs = rank_agreement(frame, read_run(options.long))
        (output / "pictures").mkdir(exist_ok=True)
        atomic_write_bytes(output / "pictures" / "rank_agreement.png", to_png(draw_rank_agreement(pairs)))
    print(f"report: {report_of(run, output, options.baseline)}")
    return frame


def report_of(run: Path, output: Path, baseline: str | None) -> Path:
    """Write the page that suits a run: of a joint search with the final table, once there is one."""
    if Ledger.open(run).config.get("script") != "upgrade_detector":
        return write_report(run, output, baseline)
    final = run / "final.json"
    found = json.loads(final.read_text()) if final.exists() else {"rows": [], "derived": None, "target": None}
    usage, marks = found.get("usage", ()), {name: (x, y) for name, (x, y) in found.get("marks", {}).items()}
    return write_joint_report(
        run, found["derived"], found["rows"], found["target"], output, usage, marks, found.get("split")
    )


def separate(runs: list[Path]) -> list[Path]:
    """The runs that do not lie within another of them, as a search's students and a comparison's parts do."""
    resolved = [run.resolve() for run in runs]
    return [run for run in resolved if not any(other in run.parents for other in resolved)]


def guide(runs: list[Path], output: Path) -> None:
    """Print and write what several runs teach together."""
    path, tables = write_guidance(runs, output)
    with pd.option_context("display.max_colwidth", 60, "display.width", 200):
        print(f"\n{text_of(tables)}")
    print(f"guidance: {path}")


def print_tables(frame: pd.DataFrame, options: argparse.Namespace) -> None:
    """The leaderboard, and the paired differences of a comparison."""
    with pd.option_context("display.max_colwidth", 100, "display.width", 200):
        names = ["ap", *mask_columns(frame), "runs", "phase", "inherit", "formula"]
        board = leaderboard(frame, options.top)[names]
        print(f"\n{board.round(4).to_string(index=False)}" if len(board) else "\nnothing has completed yet")
        compared = comparison(frame, options.baseline)
        if compared is not None:
            print(f"\ncompared with {compared[1]}:\n{compared[0].round(4).to_string(index=False)}")


def output_of(run: Path, runs: list[Path], output: Path | None) -> Path:
    """Where a run's files go: its own folder, or `output`, with a folder a run where there are several."""
    if output is None:
        return run
    if len(runs) == 1:
        return output
    names = [other.name for other in runs]
    resolved = run.resolve()
    return output / (run.name if names.count(run.name) == 1 else f"{resolved.parent.name}-{resolved.name}")


def write_csv(frames: dict[Path, pd.DataFrame], path: Path) -> None:
    """All frames as one table, with the run as first column."""
    tables = [frame.assign(run=str(run)) for run, frame in frames.items()]
    table = pd.concat(tables, ignore_index=True)
    columns = ["run", *(name for name in table.columns if name != "run")]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, table[columns].to_csv(index=False).encode())


if __name__ == "__main__":
    raise SystemExit(main())
