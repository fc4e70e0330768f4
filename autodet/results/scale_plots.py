"""How searches scale: latency by the length of the history, utilisation by the number of workers."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from autodet.results.plots import COLOURS, DPI, GREY, STYLES, label_axes

LENGTHS = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
RECENT = 0.2  # of the candidates up to a length: whose answers count for it
AIM_MS, AIM_ORACLE = 10.0, 0.95


def latencies_by_history(answers: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of latencies at each of `LENGTHS` that the history came close to.

    answers: one row an answer, with call (ask, report, tell), history (candidates asked before) and ms. Returns columns
    history, call, answers (their number), p50, p99, max (ms).
    """
    longest, rows = answers["history"].max(), []
    for length in LENGTHS:
        recent = answers[answers["history"].between((1 - RECENT) * length, length)]
        if longest < (1 - RECENT / 2) * length:
            break
        for call, found in recent.groupby("call", observed=True)["ms"]:
            rows.append((length, str(call), len(found), found.median(), found.quantile(0.99), found.max()))
    return pd.DataFrame(rows, columns=["history", "call", "answers", "p50", "p99", "max"])


def draw_scale(table: pd.DataFrame, latency: pd.DataFrame) -> Figure:
    """Left the latency of asks by the history, with the most workers; right how far workers are kept busy.

    table: searcher, workers, oracle (0–1). latency: `latencies_by_history` with searcher and workers.
    """
    figure = Figure(figsize=(10, 4.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    asks = latency[latency["call"] == "ask"]
    for (name, rows), colour in zip(table.groupby("searcher", sort=False), COLOURS, strict=False):
        mine = asks[(asks["searcher"] == name) & (asks["workers"] == rows["workers"].max())]
        left.plot(mine["history"], mine["p50"], color=colour, linewidth=1.8, marker="o", markersize=3, label=str(name))
        left.plot(mine["history"], mine["p99"], color=colour, linewidth=1.2, linestyle=STYLES[3])
        right.plot(rows["workers"], rows["oracle"] * 100, color=colour, linewidth=1.8, marker="o", markersize=3)
    left.axhline(AIM_MS, color=GREY, linewidth=1)
    right.axhline(AIM_ORACLE * 100, color=GREY, linewidth=1)
    left.set_xscale("log")
    left.set_yscale("log")
    right.set_xscale("log")
    right.set_ylim(min(90.0, table["oracle"].min() * 100), 100.5)
    label_axes(left, "candidates asked before", "ms of an ask: median, dotted 99 %\n(grey: the aim)")
    label_axes(right, "workers", "% of the oracle's speed (grey: the aim)")
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure
