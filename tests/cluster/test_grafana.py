"""The Grafana dashboard draws the metrics that the package sets, all of them, and no others."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

from cluster_files import ROOT

PANELS: list[dict[str, Any]] = json.loads((ROOT / "cluster" / "grafana.json").read_text())["panels"]


def queries() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_metric_is_drawn_and_every_drawn_one_is_set() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "autodet" / "runtime").glob("*.py"))
    made = set(re.findall(r'Gauge\(\s*"(autodet_\w+)"', sources))
    made |= {f"autodet_pool_{name}" for name in ("epoch", "images_per_second")}  # named in a loop
    drawn = {name for query in queries() for name in re.findall(r"ray_(autodet_\w+)", query)}
    assert drawn == made and len(made) > 6


def test_labels_in_queries_are_those_that_are_set() -> None:
    known = {"run", "phase", "status", "what", "member"}
    for query in queries():
        if "autodet" in query:
            labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", query))
            grouped = {name.strip() for names in re.findall(r"by \(([^)]*)\)", query) for name in names.split(",")}
            assert labels | grouped <= known


def test_panels_do_not_overlap_and_have_their_own_numbers() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)
