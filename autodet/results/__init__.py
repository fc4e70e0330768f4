"""From a run's ledger to tables, pictures and one HTML page. Reads any run, also a running or a killed one."""

from autodet.results.frame import (
    best,
    find_runs,
    found_arm,
    leaderboard,
    paired_differences,
    rank_agreement,
    read_events,
    read_run,
)
from autodet.results.report import write_report

__all__ = [
    "best",
    "find_runs",
    "found_arm",
    "leaderboard",
    "paired_differences",
    "rank_agreement",
    "read_events",
    "read_run",
    "write_report",
]
