"""A run's numbers on Ray's dashboard, through Prometheus: what ``cluster/grafana.json`` draws.

Gauges, set anew from what the run knows: a resumed run goes on where its numbers were.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ray.util.metrics import Gauge

from autodet.pareto import Point, hypervolume
from autodet.search import JointSearch
from autodet.search.session import Session

MARGIN = 1.05  # of the base's cost, up to which the front's area is measured, as in the report


class SessionMetrics:
    """Candidates by phase and status, the best AP, and the front's hypervolume of one run; set by its driver."""

    def __init__(self, run: Path) -> None:
        keys = ("run", "phase", "status")
        self._run = {"run": run.name}
        self._candidates = Gauge("autodet_candidates", "candidates by phase and status", tag_keys=keys)
        self._best = Gauge("autodet_best_ap", "AP of the best candidate so far", tag_keys=("run",))
        self._volume = Gauge(
            "autodet_front_hypervolume", "area that a joint search's front dominates", tag_keys=("run",)
        )

    def show(self, session: Session) -> None:
        """Set all of them."""
        running = Counter((ask.phase, "running") for ask in session.running.values())
        gone = {(phase, "running"): 0 for phase, _ in session.ended}  # a gauge keeps its last value
        for (phase, status), number in {**gone, **session.ended, **running}.items():
            self._candidates.set(number, {**self._run, "phase": phase, "status": status})
        if session.best_ap is not None:
            self._best.set(session.best_ap, self._run)
        if isinstance(session.search, JointSearch) and (area := _area(session.search)) is not None:
            self._volume.set(area, self._run)


def _area(search: JointSearch) -> float | None:
    """From AP 0 and ``MARGIN`` times the base's cost; None until the base was measured."""
    points: list[Point] = search.front()
    if not points or not search.asks:
        return None
    return hypervolume(points, (MARGIN * search.cost_of(search.student(0).cost), 0.0))
