"""What several runs teach together, as tables to print, CSV files, pictures and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from autodet.atomic import atomic_write_bytes
from autodet.results import page
from autodet.results.facts import read_runs
from autodet.results.guidance import input_ranks, inputs_alone, transfers
from autodet.results.guidance_plots import draw_inputs, draw_operations
from autodet.results.guidance_tables import TITLES, Tables, section
from autodet.results.hours import WHOLE, costs
from autodet.results.operation_ranks import operations
from autodet.results.plots import to_png

PICTURES = {
    "inputs.png": "Gain of the best formula of each input alone, run by run; an interval that crosses zero shows none.",
    "operations.png": "Transforms and distances by percentile within run and input: an association, not an effect.",
}


def tables_of(frame: pd.DataFrame) -> Tables:
    """All tables of guidance by name, from the frame of `facts.read_runs`; those without content are empty."""
    inputs, cost = inputs_alone(frame), costs(frame)
    whole = cost["phase"] == WHOLE
    return {
        "runs": cost[whole].drop(columns="phase"),
        "inputs": inputs,
        "input_ranks": input_ranks(inputs),
        "operations": operations(frame),
        "transfers": transfers(frame),
        "phases": cost.loc[~whole, ["run", "phase", "candidates", "completed", "hours", "unit"]],
    }


def write_guidance(runs: Sequence[Path], output: Path) -> tuple[Path, Tables]:
    """Write guidance.html, pictures/ and a CSV file a table into `output`; the page, and the tables.

    Raises LedgerError when one of `runs` is damaged or none.
    """
    frame = read_runs(runs)
    tables = tables_of(frame)
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        atomic_write_bytes(output / f"{name}.csv", table.to_csv(index=False).encode())
    sections = [section(name, tables) for name in TITLES]
    drawn = {name: to_png(figure) for name, figure in figures(tables).items()}
    for name, png in drawn.items():
        atomic_write_bytes(output / "pictures" / name, png)
    pictures = page.section("Pictures", *(page.picture(png, PICTURES[name]) for name, png in drawn.items()))
    title = f"Guidance from {frame['run'].nunique()} runs"
    path = output / "guidance.html"
    atomic_write_bytes(path, page.page(title, [f"<h1>{title}</h1>", pictures, *sections]).encode())
    return path, tables


def guidance_sections(run: pd.DataFrame) -> list[str]:
    """What one run tells by itself, for its report: inputs, operations and cost."""
    tables = tables_of(run)
    return [section(name, tables) for name in ("inputs", "operations", "runs", "phases")]


def figures(tables: Tables) -> dict[str, Figure]:
    """The pictures that the tables allow, by file name."""
    drawn = {}
    if tables["inputs"]["gain"].notna().any():
        drawn["inputs.png"] = draw_inputs(tables["inputs"])
    if len(tables["operations"]):
        drawn["operations.png"] = draw_operations(tables["operations"])
    return drawn
