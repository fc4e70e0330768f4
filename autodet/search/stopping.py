"""Early stopping of candidates that fall clearly behind."""

import math
from dataclasses import dataclass, field

from autodet.search.ranking import Ordered, middle


@dataclass(frozen=True)
class StopRule:
    """When to stop: never before `min_epochs`, nor before `min_known` others of the group reported the same epoch;
    then if the AP (0–1) is more than `margin` below their median."""

    min_epochs: int = 1
    min_known: int = 4
    margin: float = 0.05

    def __post_init__(self) -> None:
        if self.min_epochs < 1 or self.min_known < 1 or self.margin < 0:
            raise ValueError(f"expected min_epochs and min_known of at least 1 and margin of at least 0, found {self}")


@dataclass
class _Reported:
    """What a group's candidates reported at one epoch."""

    by_id: dict[int, float] = field(default_factory=dict)
    ordered: Ordered[float] = field(default_factory=Ordered)


class MedianStop:
    """The median rule of Vizier (Golovin et al. 2017, section 3.2), on the AP of the epoch instead of a running mean.

    A candidate is compared with those of its own group at the same epoch, so that inputs of different strength do not
    push each other out. At later epochs only candidates that were not stopped are left to compare with, which makes
    the rule stricter there; the margin is for that and for the spread between seeds.
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule
        self._known: dict[tuple[str, int], _Reported] = {}

    def report(self, group: str, id: int, epoch: int, ap: float) -> bool:
        """Note an AP and say whether to stop. Repeating a report replaces it; an AP that is not finite is ignored."""
        if not math.isfinite(ap):
            return False
        known = self._known.setdefault((group, epoch), _Reported())
        if id in known.by_id:
            known.ordered.remove(known.by_id[id])
        others = len(known.ordered)
        known_enough = epoch >= self.rule.min_epochs and others >= self.rule.min_known
        stop = known_enough and ap < middle(known.ordered) - self.rule.margin
        known.by_id[id] = ap
        known.ordered.add(ap)
        return stop
