"""What a search has asked and been told, and how good each formula looks in the light of it."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from autodet.distill.formula import Formula
from autodet.search.candidate import EMPTY, Ask, Candidate, Status
from autodet.search.ranking import Measured, Ordered, Ranking, middle, score_of

Group = tuple[str, str]
"""Phase and group of an ask."""

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
    """The events of a search. Nothing here is random, and nothing depends on time.

    What searches ask for is kept up to date as results come in: an ask that went through all of a long history would
    keep workers waiting.
    """

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.ends: dict[int, Status] = {}  # by number, in the order told
        self.open: dict[int, Ask] = {}  # those that have not ended, in the order asked
        self.keys: set[str] = set()
        self.refused: set[str] = set()
        self.in_group: Counter[Group] = Counter()
        self.in_phase: Counter[str] = Counter()
        self._ended_in_phase: Counter[str] = Counter()
        self._arms: list[str] = []  # by number
        self._arms_of: dict[Group, dict[str, None]] = {}  # in the order asked
        self._replicates: dict[str, list[int]] = {}  # arm → numbers of its asks
        self._completed: dict[str, dict[int, float]] = {}  # arm → replicate → AP
        self._stopped: dict[str, float] = {}
        self._measured: dict[str, Measured] = {}  # arm → what its runs say beside the controls'; no controls
        self._means: Ordered[float] = Ordered()
        self._all = Ranking()
        self._ended: defaultdict[Group, Ranking] = defaultdict(Ranking)
        self._first_runs: defaultdict[Group, Ordered[tuple[float, int]]] = defaultdict(Ordered)
        self._standings: list[Standing] | None = None

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
        self.open[ask.id] = ask
        self.keys.add(key)
        self.refused.update(formula for formula, _ in ask.rejected)
        self.in_group[ask.phase, ask.group] += 1
        self.in_phase[ask.phase] += 1
        self._arms.append(arm)
        self._arms_of.setdefault((ask.phase, ask.group), {})[arm] = None
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
        candidate, arm = self.asks[id].candidate, self._arms[id]
        # All arms are measured beside the controls.
        changed = [arm] if candidate.formula.terms else list(self._measured) if status == "completed" else []
        for each in changed:
            self._forget(each)
        self.ends[id] = status
        del self.open[id]
        self._ended_in_phase[self.asks[id].phase] += 1
        if ap is not None and status == "completed":
            self._completed.setdefault(arm, {})[candidate.replicate] = ap
        elif ap is not None and status == "stopped":
            self._stopped[arm] = ap
        for each in changed:
            self._measure(each)
        self._standings = None

    def _forget(self, arm: str) -> None:
        """Take an arm out of all orders."""
        measured = self._measured.pop(arm, None)
        if measured is not None:
            self._means.remove(measured.mean)
            for ranking in self._rankings(arm):
                ranking.remove(measured)
            if (first := _first_run(measured)) is not None:
                self._first_runs[self._group(measured.id)].remove(first)

    def _measure(self, arm: str) -> None:
        """Put an arm into all orders, if it completed or was stopped."""
        if arm not in self._completed and arm not in self._stopped:
            return
        runs = self._completed.get(arm) or {0: self._stopped[arm]}
        fitness = _paired(runs, self.control(self._candidate(arm).inherit))
        measured = Measured(self.first(arm), arm in self._completed, fitness, fmean(fitness.values()))
        self._measured[arm] = measured
        self._means.add(measured.mean)
        for ranking in self._rankings(arm):
            ranking.add(measured)
        if (first := _first_run(measured)) is not None:
            self._first_runs[self._group(measured.id)].add(first)

    def _rankings(self, arm: str) -> list[Ranking]:
        """That of all, and those of the groups in which a run of the arm has ended."""
        groups = {self._group(id) for id in self._replicates[arm] if id in self.ends}
        return [self._all, *(self._ended[group] for group in groups)]

    def _group(self, id: int) -> Group:
        return self.asks[id].phase, self.asks[id].group

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
        return bool(self.open)

    def ended(self, phase: str) -> float:
        """The share of the phase's asks that have ended; 1 if there are none."""
        return self._ended_in_phase[phase] / self.in_phase[phase] if self.in_phase[phase] else 1.0

    def arms(self, phase: str, group: str) -> list[str]:
        """The arms asked in this group, in order."""
        return list(self._arms_of.get((phase, group), ()))

    def standings(self, most: int | None = None) -> list[Standing]:
        """Every formula that completed or was stopped, best first; controls and failures are left out.

        most: of more than these, only the best half of that number, and of the others those that ended last. All of a
        long history take a while: where a few best ones will do, see `best`.
        """
        if most is not None and len(self._measured) > most:
            found = dict.fromkeys(self._all.best((most + 1) // 2, self._centre))
            latest = (self.first(self._arms[id]) for id in reversed(self.ends) if self._arms[id] in self._measured)
            while len(found) < most:
                found[next(latest)] = None
            return sorted(map(self._standing, found), key=lambda standing: standing.rank, reverse=True)
        if self._standings is None:
            every = (self._standing(measured.id) for measured in self._measured.values())
            self._standings = sorted(every, key=lambda standing: standing.rank, reverse=True)
        return list(self._standings)

    def best(self, count: int) -> list[Standing]:
        """The best of those that completed, the best first."""
        return [self._standing(id) for id in self._all.best(count, self._centre, completed=True)]

    def best_in_group(self, phase: str, group: str, count: int, completed: bool = False) -> list[Standing]:
        """The best of one group's candidates, the best first. completed: leave out those that were stopped."""
        return [self._standing(id) for id in self._ended[phase, group].best(count, self._centre, completed)]

    def first_runs(self, phase: str, group: str) -> Sequence[tuple[float, int]]:
        """A group's arms by replicate 0 alone, where that completed: (minus its fitness, number), the best first."""
        return self._first_runs[phase, group].values

    def runs(self, arm: str) -> Mapping[int, float]:
        """Replicate → AP of an arm's completed runs."""
        return self._completed.get(arm, {})

    def control(self, inherit: bool) -> Mapping[int, float]:
        """Replicate → AP of the completed runs without distillation."""
        return self.runs(CONTROL_ARMS[inherit])

    def _candidate(self, arm: str) -> Candidate:
        return self.asks[self.first(arm)].candidate

    @property
    def _centre(self) -> float:
        return middle(self._means) if self._means.values else 0.0

    def _standing(self, id: int) -> Standing:
        measured = self._measured[self._arms[id]]
        score = score_of(measured.mean, len(measured.fitness), self._centre)
        return Standing(id, self.asks[id].candidate, measured.completed, measured.fitness, score)


def _first_run(measured: Measured) -> tuple[float, int] | None:
    """What replicate 0 alone is ordered by, the best first; None where it did not complete."""
    return (-measured.fitness[0], measured.id) if measured.completed and 0 in measured.fitness else None


def _paired(runs: Mapping[int, float], control: Mapping[int, float]) -> dict[int, float]:
    """AP minus the control's at the same replicate; where that is not known, minus the mean of the known ones.

    All differences of one moment therefore have the same zero, and are plain APs while no control is known.
    """
    usual = fmean(control.values()) if control else 0.0
    return {replicate: ap - control.get(replicate, usual) for replicate, ap in sorted(runs.items())}
