"""From a run's ledger to tables, pictures and one HTML page. Reads any run, also a running or a killed one."""

from autodet.results.facts import read_runs
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
from autodet.results.guidance import input_ranks, inputs_alone, transfers
from autodet.results.guidance_page import write_guidance
from autodet.results.hours import costs
from autodet.results.operation_ranks import operations
from autodet.results.report import write_report

__all__ = [
    "best",
    "costs",
    "find_runs",
    "found_arm",
    "input_ranks",
    "inputs_alone",
    "leaderboard",
    "operations",
    "paired_differences",
    "rank_agreement",
    "read_events",
    "read_run",
    "read_runs",
    "transfers",
    "write_guidance",
    "write_report",
]
