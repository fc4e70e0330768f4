"""A list of candidates in place of a search: comparisons of arms over seeds."""

from collections.abc import Sequence

from autodet.search.ask_tell import AskTell, Rules
from autodet.search.candidate import Ask, Candidate

NO_EXTRAS = Rules(controls=0, finalists=0, stop=None)


class FixedList(AskTell):
    """Asks the given candidates in order, each under the name of its group; nothing is stopped early.

    What has been asked is skipped, so a list that was extended continues where the ledger ends.
    """

    def __init__(self, candidates: Sequence[tuple[Candidate, str]], phase: str = "given") -> None:
        """phase: what the asks are recorded under. Raises ValueError if two entries would repeat the same training."""
        super().__init__(NO_EXTRAS)
        groups: dict[str, str] = {}
        for candidate, group in candidates:
            if candidate.key in groups:
                raise ValueError(
                    f"expected candidates that differ, found {candidate.key!r} in group {groups[candidate.key]!r} and "
                    f"again in {group!r}: leave one out, or give it another replicate number"
                )
            groups[candidate.key] = group
        self._candidates = tuple(candidates)
        self._phase = phase

    @property
    def budget(self) -> int:
        """The number of candidates in the list."""
        return len(self._candidates)

    def propose(self) -> Ask | None:
        for candidate, group in self._candidates:
            if candidate.key not in self.history.keys:
                return Ask(len(self.history.asks), candidate, self._phase, group, origin="given")
        return None
