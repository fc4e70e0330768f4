"""Pictures of a pool: its members' AP against their costs, its training, and what measuring norm statistics gains."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from autodet.atomic import atomic_write_bytes
from autodet.results.plots import COLOURS, DPI, GREY, label_axes, to_png

POINTS = 100  # AP in pictures: points
ROLES = ("largest", "smallest", "random")
AXES = {"latency_ms": "latency, ms an image", "macs_g": "multiply-adds, G"}


def save_pool_pictures(folder: Path, members: pd.DataFrame, progress: Sequence[Mapping[str, Any]]) -> None:
    """members.png, training.png, statistics.png in a folder. members: of members.csv; progress: an entry an epoch."""
    save_picture(folder / "members.png", draw_members(members))
    save_picture(folder / "statistics.png", draw_statistics(members))
    save_picture(folder / "training.png", draw_training(progress))


def save_picture(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, to_png(figure))


def draw_members(members: pd.DataFrame) -> Figure:
    """AP of the measured members against latency and multiply-adds; the front of the best for their cost is joined."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI, layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        axes.scatter(members[column], POINTS * members["ap"], s=18, color=COLOURS[0])
        best = front(members, column)
        axes.step(best[column], POINTS * best["ap"], where="post", color=COLOURS[1], linewidth=1)
        label_axes(axes, label, "AP" if column == "latency_ms" else "")
    figure.suptitle(f"{len(members)} members of the pool, AP on {members['split'].iloc[0]}", fontsize=10)
    return figure


def front(members: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The members that no cheaper or equally cheap one equals in AP, cheapest first."""
    ordered = members.sort_values([cost, "ap"], ascending=[True, False])
    before = ordered["ap"].cummax().shift(fill_value=float("-inf"))
    return ordered[ordered["ap"] > before]


def draw_statistics(members: pd.DataFrame) -> Figure:
    """AP of each member before and after its own norm statistics were measured, smallest member first."""
    figure = Figure(figsize=(6, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    ordered = members.sort_values("params_m").reset_index(drop=True)
    for column, colour, label in (("ap_before", GREY, "slices of the largest's"), ("ap", COLOURS[0], "measured")):
        axes.plot(ordered["params_m"], POINTS * ordered[column], "o", markersize=4, color=colour, label=label)
    label_axes(axes, "parameters, M", "AP")
    axes.legend(title="norm statistics", fontsize=8, title_fontsize=8, frameon=False)
    return figure


def draw_training(progress: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses by kind of member, and AP of the members that were watched; dotted lines where the space opened."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI, layout="constrained")
    losses, aps = figure.subplots(1, 2)
    for role, colour in zip(ROLES, COLOURS, strict=False):
        of_role = pd.Series({entry["epoch"]: role_loss(entry, role) for entry in progress}).dropna()
        if not of_role.empty:
            losses.plot(of_role.index, of_role, color=colour, label=role)
    watched = pd.DataFrame({entry["epoch"]: entry["ap"] for entry in progress if "ap" in entry}).T
    for name in watched.columns:
        style = "-" if name in ROLES else "--"
        colour = COLOURS[ROLES.index(name)] if name in ROLES else COLOURS[2]
        aps.plot(watched.index, POINTS * watched[name], style, marker="o", markersize=3, color=colour, label=name)
    for axes, label in ((losses, "training loss, distillation left out"), (aps, "AP")):
        for epoch, share in openings(progress).items():
            axes.axvline(epoch - 0.5, color=GREY, linestyle=":", linewidth=0.8)
            axes.annotate(
                f"{share:.0%}", (epoch - 0.4, 1.0), xycoords=("data", "axes fraction"), fontsize=7, color=GREY
            )
        label_axes(axes, "epoch", label)
        axes.legend(fontsize=8, frameon=False)
    return figure


def draw_against_alone(table: pd.DataFrame, pools: Sequence[str]) -> Figure:
    """AP of members in pools (columns) against the same detectors trained alone; on the line they are equal."""
    figure = Figure(figsize=(4.2, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    aps = table[["alone", *pools]]
    ends = [POINTS * aps.min().min(), POINTS * aps.max().max()]
    axes.plot(ends, ends, color=GREY, linewidth=0.8)
    for pool, colour in zip(pools, itertools.cycle(COLOURS), strict=False):
        axes.scatter(POINTS * table["alone"], POINTS * table[pool], s=18, color=colour, label=pool)
    label_axes(axes, "AP, trained alone", "AP, in the pool")
    if len(pools) > 1:
        axes.legend(fontsize=8, frameon=False)
    return figure


def draw_schedule(phases: Sequence[tuple[int, float, int]]) -> Figure:
    """What a training will do. phases: (epochs, open share 0–1, members a step) in order."""
    figure = Figure(figsize=(6, 2.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    edges = [0, *itertools.accumulate(epochs for epochs, _, _ in phases)]
    axes.stairs([POINTS * share for _, share, _ in phases], edges, fill=True, color=COLOURS[4], alpha=0.5)
    for start, end, (_, share, members) in zip(edges, edges[1:], phases, strict=False):
        axes.annotate(f"{members} a step", ((start + end) / 2, POINTS * share + 3), ha="center", fontsize=8, color=GREY)
    axes.set_ylim(0, 1.15 * POINTS)
    label_axes(axes, "epoch", "share of the space, %")
    return figure


def role_loss(entry: Mapping[str, Any], role: str) -> float | None:
    """The detector's own losses of a kind of member in an epoch; None where none of its kind was trained."""
    own = [value for name, value in entry["losses"].items() if name.startswith(f"{role}/") and "/distill/" not in name]
    return sum(own) if own else None


def openings(progress: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Epoch → share of the space, where it differs from the epoch before."""
    found, before = {}, 0.0
    for entry in progress:
        if entry["open"] != before:
            found[int(entry["epoch"])] = before = float(entry["open"])
    return found
