"""Searches that divide and conquer has to beat, on the same space, with the same controls, finals and budget."""

from collections.abc import Sequence

from autodet.distill.formula import Formula
from autodet.distill.grammar import MIN_BATCH
from autodet.search.ask_tell import AskTell, Rules
from autodet.search.candidate import Ask
from autodet.search.evolution import Admit, Breeding, Evolution, admit_all
from autodet.search.spaces import GRAMMAR, Spaces


class WholeFormulaSearch(AskTell):
    """Controls, `explore` candidates of one population, finals."""

    def __init__(self, population: Evolution, explore: int, rules: Rules) -> None:
        super().__init__(rules)
        if explore < 1:
            raise ValueError(f"expected a budget of at least 1 candidate to explore, found {explore}")
        self._population, self._explore = population, explore

    @property
    def budget(self) -> int:
        """The most candidates that will be asked, controls and finals included."""
        return self.rules.overhead + self._explore

    def propose(self) -> Ask | None:
        return self._control() or self._exploration() or self._final(self._population.phase)

    def _exploration(self) -> Ask | None:
        if self.history.in_phase[self._population.phase] >= self._explore:
            return None
        return self._population.propose(self.history)


def random_search(
    inputs: Sequence[str],
    seed: int,
    explore: int,
    rules: Rules | None = None,
    admit: Admit = admit_all,
    given: Sequence[Formula] = (),
    min_batch: int = MIN_BATCH,
    spaces: Spaces = GRAMMAR,
) -> WholeFormulaSearch:
    """Formulas on random subsets of the inputs, each drawn anew: evolution that never leaves its first generation."""
    breeding = Breeding(population=max(explore, 1))
    return _whole("random", inputs, seed, explore, breeding, rules, admit, given, min_batch, spaces)


def flat_evolution(
    inputs: Sequence[str],
    seed: int,
    explore: int,
    breeding: Breeding | None = None,
    rules: Rules | None = None,
    admit: Admit = admit_all,
    given: Sequence[Formula] = (),
    min_batch: int = MIN_BATCH,
    spaces: Spaces = GRAMMAR,
) -> WholeFormulaSearch:
    """One population of whole formulas: the same evolution without dividing."""
    return _whole("flat", inputs, seed, explore, breeding or Breeding(), rules, admit, given, min_batch, spaces)


def _whole(
    phase: str,
    inputs: Sequence[str],
    seed: int,
    explore: int,
    breeding: Breeding,
    rules: Rules | None,
    admit: Admit,
    given: Sequence[Formula],
    min_batch: int,
    spaces: Spaces,
) -> WholeFormulaSearch:
    rules = rules or Rules()
    space = spaces.whole(inputs, given, min_batch)
    population = Evolution(phase, phase, seed, rules.inherit, space, breeding, admit)
    return WholeFormulaSearch(population, explore, rules)
