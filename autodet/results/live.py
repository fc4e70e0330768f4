"""A running search as a text that fits a terminal: counts, what runs now, the best so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from autodet.event_files import new_events
from autodet.lease import LAPSE_SECONDS, read_holder
from autodet.records import Event, Record, records_from

SHOWN = 8  # rows of each table
WIDTH = 110  # characters of a line


class Follower:
    """Reads a run's events as they come; each file once."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._events: list[Event] = []

    def records(self) -> list[Record]:
        """The candidates as they are now."""
        self._events += new_events(self.run_dir, len(self._events))
        return records_from(self._events)


def has_driver(run_dir: Path) -> bool:
    """Whether somebody holds the run's lease, even one that is not heard of any more."""
    return read_holder(run_dir / "lease.json") is not None


def live_text(run_dir: Path, records: Sequence[Record], now: float) -> str:
    """The whole view. now: unix seconds."""
    running = [record for record in records if record.status == "running"]
    done = [record for record in records if record.status == "completed" and record.ap is not None]
    best = sorted(done, key=lambda record: (-(record.ap or 0.0), record.id))[:SHOWN]
    lines = [str(run_dir), _driver(run_dir, now), "", *_counts(records), "", "running now:"]
    lines += [_running_line(record, now) for record in running[-SHOWN:]] or ["  nothing"]
    shown = [_line(record, f"AP {record.ap:.4f}{_masks(record)}{_cost(record)}") for record in best]
    lines += ["", "best so far:", *(shown or ["  nothing has completed yet"])]
    failed = [record for record in records if record.status == "failed"]
    lines += ["", *(_line(record, f"failed: {record.cause}") for record in failed[-2:])] if failed else []
    return "\n".join(line[:WIDTH] for line in lines)


def _driver(run_dir: Path, now: float) -> str:
    holder = read_holder(run_dir / "lease.json")
    if holder is None:
        return "no driver at work"
    silent = now - holder.heartbeat
    heard = "" if silent <= LAPSE_SECONDS else f", not heard of for {silent / 60:.0f} min"
    return f"driver: process {holder.pid} on {holder.host}{heard}"


def _counts(records: Sequence[Record]) -> list[str]:
    """A line a phase: how many candidates of each status; then how fast candidates end."""
    phases = dict.fromkeys(record.phase for record in records)
    lines = []
    for phase in phases:
        counts = Counter(record.status for record in records if record.phase == phase)
        lines.append(f"  {phase:12} " + ", ".join(f"{number} {status}" for status, number in sorted(counts.items())))
    ends = sorted(record.told_at for record in records if record.told_at is not None)[-20:]
    if len(ends) > 1 and ends[-1] > ends[0]:
        lines.append(f"  {'pace':12} {60 * (len(ends) - 1) / (ends[-1] - ends[0]):.1f} candidates a minute lately")
    return lines or ["  nothing was asked yet"]


def _running_line(record: Record, now: float) -> str:
    measured = [ap for _, ap in record.ap_by_epoch if ap is not None]
    ap = f", AP {measured[-1]:.3f}" if measured else ""
    return _line(record, f"epoch {record.epochs} done{ap}, {max(0.0, now - record.asked_at) / 60:.1f} min")


def _line(record: Record, text: str) -> str:
    place = record.phase if record.group in ("", record.phase) else f"{record.phase}/{record.group}"
    what = record.formula if record.student is None else str(record.student["actions"])
    return f"  {record.id:5} {place:24} {text:34} {what}"


def _masks(record: Record) -> str:
    return "" if record.mask_ap is None else f", masks {record.mask_ap:.4f}"


def _cost(record: Record) -> str:
    return "" if record.student is None else f" at {record.student['cost']['latency_ratio']:.0%}"
