"""What all searches share: keeping the history, early stopping, controls and replicates."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

from autodet.distill.formula import Formula
from autodet.search.candidate import EMPTY, FINISHED, WAIT, Answer, Ask, Candidate, Status
from autodet.search.history import History
from autodet.search.stopping import MedianStop, StopRule

SOFT_CHANGE = 0.5
"""A phase may start when this share of the former one has ended: no worker waits, yet enough is known to go by."""
STOPPABLE = ("given", "random", "mutation", "crossover")
"""Origins that early stopping applies to: not controls and replicates, whose final AP is what they are for."""


@dataclass(frozen=True)
class Rules:
    """What all searches of a comparison should have in common.

    `inherit`: students start with the teacher's neck and head. `controls`: runs without distillation at the start, one
    a replicate number; `other_controls`: as many again with the opposite of `inherit`. `finalists`: formulas that are
    brought to `final_runs` runs each at the end, so that the winner is chosen among equals.
    """

    inherit: bool = True
    controls: int = 3
    other_controls: bool = False
    finalists: int = 3
    final_runs: int = 3
    stop: StopRule | None = field(default_factory=StopRule)

    def __post_init__(self) -> None:
        if min(self.controls, self.finalists) < 0 or self.final_runs < 1:
            raise ValueError(
                f"expected controls and finalists of at least 0 and final_runs of at least 1, found {self}"
            )

    @property
    def control_candidates(self) -> list[Candidate]:
        kinds = (self.inherit, not self.inherit) if self.other_controls else (self.inherit,)
        return [Candidate(EMPTY, inherit, replicate) for inherit in kinds for replicate in range(self.controls)]

    @property
    def overhead(self) -> int:
        """The most candidates that controls and finals come to."""
        return len(self.control_candidates) + self.finalists * (self.final_runs - 1)


class Best(NamedTuple):
    """A formula with the mean AP (0–1) of its completed runs, and their number."""

    formula: Formula
    ap: float
    runs: int


class AskTell(ABC):
    """The `Search` protocol around one decision, `propose`, that reads the history and changes nothing."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.history = History()
        self._stop = MedianStop(rules.stop) if rules.stop else None

    @abstractmethod
    def propose(self) -> Ask | None:
        """The next ask, or None if there is nothing to ask as things stand."""

    @property
    @abstractmethod
    def budget(self) -> int:
        """The most candidates that will be asked, controls and replicates included."""

    def ask(self) -> Answer:
        """The next candidate; WAIT while a running one may still change what to do, else FINISHED."""
        proposal = self.propose()
        if proposal is None:
            return WAIT if self.history.running else FINISHED
        self.history.commit(proposal)
        return proposal

    def replay(self, ask: Ask) -> None:
        """Take a recorded ask into the state. Raises ValueError unless it is the next one and new."""
        self.history.commit(ask)

    def report(self, id: int, epoch: int, ap: float | None) -> bool:
        """Note the AP after `epoch` epochs; True means: stop. Without an AP that is finite the answer is False."""
        ask = self.history.get(id)
        if self._stop is None or ap is None or ask.origin not in STOPPABLE:
            return False
        return self._stop.report(f"{ask.phase}/{ask.group}", id, epoch, ap)

    def tell(self, id: int, ap: float | None, status: Status = "completed", weights: str | None = None) -> None:
        """Note the end of a candidate. Raises ValueError for a number not asked, or told before."""
        self.history.tell(id, ap, status)

    def best(self) -> Best | None:
        """The best formula, None while nothing has completed.

        Once finals have been run, only formulas with the largest number of runs are eligible. Before, the mean is
        drawn towards the middle where runs are few (`Standing.score`). Runs without distillation are not considered:
        compare with `history.control`.
        """
        standings = [standing for standing in self.history.standings() if standing.completed]
        if self.history.in_phase["final"] and self.history.ended("final") == 1:
            most = max((len(standing.fitness) for standing in standings), default=0)
            standings = [standing for standing in standings if len(standing.fitness) == most]
        if not standings:
            return None
        runs = self.history.runs(standings[0].candidate.arm)
        return Best(standings[0].formula, fmean(runs.values()), len(runs))

    def _control(self) -> Ask | None:
        missing = [c for c in self.rules.control_candidates if c.key not in self.history.keys]
        return Ask(len(self.history.asks), missing[0], "control", "control", origin="control") if missing else None

    def _final(self, *explored: str) -> Ask | None:
        """A missing run of the formulas that look best, once enough of the `explored` phases has ended.

        The group carries the number of candidates explored, so that an extended budget gets finals of its own.
        """
        if self.history.ended(explored[-1]) < SOFT_CHANGE:
            return None
        group = f"after {sum(self.history.in_phase[phase] for phase in explored)}"
        best = [standing.candidate for standing in self.history.best(self.rules.finalists)]
        return self._replicate("final", group, best, self.rules.finalists, self.rules.final_runs)

    def _replicate(self, phase: str, group: str, chosen: Sequence[Candidate], most: int, runs: int) -> Ask | None:
        """The first run that is missing: of arms begun in this group, then of `chosen`, of `most` arms in all."""
        arms = dict.fromkeys([*self.history.arms(phase, group), *(candidate.arm for candidate in chosen)])
        for arm in list(arms)[:most]:
            missing = set(range(runs)) - self.history.replicates(arm)
            if missing:
                first = self.history.first(arm)
                candidate = replace(self.history.asks[first].candidate, replicate=min(missing))
                return Ask(len(self.history.asks), candidate, phase, group, 0, (first,), "replicate")
        return None
