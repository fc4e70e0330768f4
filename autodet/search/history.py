"""What a search has asked and been told, and how good each formula looks in the light of it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from autodet.distill.formula import Formula
from autodet.search.candidate import EMPTY, Ask, Candidate, Status

PRIOR_RUNS = 1.0
"""How many runs the prior of `Standing.score` counts for. 1 says that seeds spread the AP as much as formulas do,
which is what small data sets show; a choice of ours."""

CONTROL_ARMS = {inherit: Candidate(EMPTY, inherit).arm for inherit in (True, False)}


@dataclass(frozen=True)
class Standing:
    """How good a formula looks. `fitness`: replicate → AP minus the control's AP at the same replicate.

    `score` is what candidates are ranked by: the mean fitness, drawn towards the median of all formulas the more, the
    fewer runs it rests on, because the best of many single runs is mostly a lucky one. A stopped candidate has its
    last AP instead and ranks below every completed one.
    """

    id: int
    candidate: Candidate
    completed: bool
    fitness: Mapping[int, float]
    score: float

    @property
    def formula(self) -> Formula:
        return self.candidate.formula

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Larger is better; of equals the earlier one."""
        return self.completed, self.score, -self.id


class History:
    """The events of a search. Nothing here is random, and nothing depends on time."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.ends: dict[int, Status] = {}  # by number, in the order told
        self.keys: set[str] = set()
        self.refused: set[str] = set()
        self.in_group: Counter[tuple[str, str]] = Counter()
        self.in_phase: Counter[str] = Counter()
        self._ended_in_phase: Counter[str] = Counter()
        self._arms: list[str] = []  # by number
        self._replicates: dict[str, list[int]] = {}  # arm → numbers of its asks
        self._completed: dict[str, dict[int, float]] = {}  # arm → replicate → AP
        self._stopped: dict[str, float] = {}
        self._fitness: dict[str, Mapping[int, float]] = {}  # arm → replicate → paired; no controls; filled when needed
        self._standings: dict[str, Standing] | None = None

    def commit(self, ask: Ask) -> None:
        """Take an ask into the state. Raises ValueError if it is not the next one, or repeats a candidate."""
        if ask.id != len(self.asks):
            raise ValueError(
                f"expected ask number {len(self.asks)}, found {ask.id}: replay a ledger whole and in order"
            )
        key, arm = ask.candidate.key, ask.candidate.arm
        if key in self.keys:
            raise ValueError(f"expected a candidate not asked before, found {key!r} again as number {ask.id}")
        self.asks.append(ask)
        self.keys.add(key)
        self.refused.update(formula for formula, _ in ask.rejected)
        self.in_group[ask.phase, ask.group] += 1
        self.in_phase[ask.phase] += 1
        self._arms.append(arm)
        self._replicates.setdefault(arm, []).append(ask.id)

    def tell(self, id: int, ap: float | None, status: Status) -> None:
        """Note the end of a candidate; an AP that is missing or not finite counts as failed, whatever the status.

        Raises ValueError for a candidate that was not asked, or was told before.
        """
        self.get(id)
        if id in self.ends:
            raise ValueError(
                f"expected one end for candidate {id}, found a second: it was told {self.ends[id]!r} before"
            )
        if ap is None or not math.isfinite(ap):
            status = "failed"
        self.ends[id] = status
        self._ended_in_phase[self.asks[id].phase] += 1
        candidate, arm = self.asks[id].candidate, self._arms[id]
        if ap is not None and status == "completed":
            self._completed.setdefault(arm, {})[candidate.replicate] = ap
        elif ap is not None and status == "stopped":
            self._stopped[arm] = ap
        self._forget(arm if candidate.formula.terms else None)

    def _forget(self, arm: str | None) -> None:
        """Measure an arm anew; None: all of them, as a control has changed."""
        self._standings = None
        if arm is None:
            self._fitness.clear()
        else:
            self._fitness.pop(arm, None)

    def get(self, id: int) -> Ask:
        """The ask of this number. Raises ValueError if there is none."""
        if not 0 <= id < len(self.asks):
            raise ValueError(f"expected the number of an asked candidate (0 to {len(self.asks) - 1}), found {id}")
        return self.asks[id]

    def first(self, arm: str) -> int:
        """The number of the first ask of an arm."""
        return self._replicates[arm][0]

    def replicates(self, arm: str) -> set[int]:
        """The replicate numbers of an arm that have been asked."""
        return {self.asks[id].candidate.replicate for id in self._replicates[arm]}

    @property
    def running(self) -> bool:
        return len(self.ends) < len(self.asks)

    def ended(self, phase: str) -> float:
        """The share of the phase's asks that have ended; 1 if there are none."""
        return self._ended_in_phase[phase] / self.in_phase[phase] if self.in_phase[phase] else 1.0

    def arms(self, phase: str, group: str) -> list[str]:
        """The arms asked in this group, in order."""
        mine = (ask.id for ask in self.asks if (ask.phase, ask.group) == (phase, group))
        return list(dict.fromkeys(self._arms[id] for id in mine))

    def standings(self) -> list[Standing]:
        """Every formula that completed or was stopped, best first; controls and failures are left out."""
        return list(self._measured().values())

    def ended_in_group(self, phase: str, group: str) -> list[Standing]:
        """Standings of one group's candidates in the order in which they ended, failures left out."""
        measured = self._measured()
        mine = (id for id in self.ends if (self.asks[id].phase, self.asks[id].group) == (phase, group))
        return [measured[self._arms[id]] for id in mine if self._arms[id] in measured]

    def runs(self, arm: str) -> Mapping[int, float]:
        """Replicate → AP of an arm's completed runs."""
        return self._completed.get(arm, {})

    def control(self, inherit: bool) -> Mapping[int, float]:
        """Replicate → AP of the completed runs without distillation."""
        return self.runs(CONTROL_ARMS[inherit])

    def _candidate(self, arm: str) -> Candidate:
        return self.asks[self.first(arm)].candidate

    def _measured(self) -> dict[str, Standing]:
        if self._standings is None:
            self._standings = self._measure()
        return self._standings

    def _measure(self) -> dict[str, Standing]:
        for arm in (*self._stopped, *self._completed):
            if arm not in self._fitness and self._candidate(arm).formula.terms:
                runs = self._completed.get(arm) or {0: self._stopped[arm]}
                self._fitness[arm] = _paired(runs, self.control(self._candidate(arm).inherit))
        means = {arm: fmean(fitness.values()) for arm, fitness in self._fitness.items()}
        centre = median(means.values()) if means else 0.0
        standings = {arm: self._standing(arm, mean, centre) for arm, mean in means.items()}
        return dict(sorted(standings.items(), key=lambda pair: pair[1].rank, reverse=True))

    def _standing(self, arm: str, mean: float, centre: float) -> Standing:
        id, fitness = self.first(arm), self._fitness[arm]
        score = centre + (mean - centre) * len(fitness) / (len(fitness) + PRIOR_RUNS)
        return Standing(id, self.asks[id].candidate, arm in self._completed, fitness, score)


def _paired(runs: Mapping[int, float], control: Mapping[int, float]) -> dict[int, float]:
    """AP minus the control's at the same replicate; where that is not known, minus the mean of the known ones.

    All differences of one moment therefore have the same zero, and are plain APs while no control is known.
    """
    usual = fmean(control.values()) if control else 0.0
    return {replicate: ap - control.get(replicate, usual) for replicate, ap in sorted(runs.items())}
