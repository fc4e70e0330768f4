"""Divide and conquer: a formula for each knowledge input alone, then the weights of the best ones together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from autodet.distill.formula import Formula, Term
from autodet.distill.grammar import MIN_BATCH
from autodet.search.ask_tell import SOFT_CHANGE, AskTell, Rules
from autodet.search.candidate import Ask
from autodet.search.evolution import Admit, Breeding, Evolution, admit_all
from autodet.search.prediction import KNOWN, PredictedPhase, Prediction
from autodet.search.spaces import GRAMMAR, Spaces

GENERATIONS = 4
"""Least number of generations of a population. With fewer, evolution is little more than random search: the public
code's budget was smaller than its population."""


@dataclass(frozen=True)
class DivideSettings:
    """Budgets in candidates. The papers do not state theirs: these are ours.

    `replicated` best formulas overall, and the best of each input, are brought to `runs` runs before the weights;
    `top`: how many formulas of each input the weight phase may choose from.
    """

    budget_per_input: int = 24
    weights_budget: int = 24
    formulas: Breeding = field(default_factory=Breeding)
    weights: Breeding = field(default_factory=Breeding)
    replicated: int = 5
    runs: int = 3
    top: int = 2
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        _check_generations("budget_per_input", self.budget_per_input, self.formulas.population)
        if self.weights_budget:
            _check_generations("weights_budget", self.weights_budget, self.weights.population)
        if self.replicated < 0 or self.runs < 1 or self.top < 1:
            raise ValueError(f"expected replicated of at least 0, runs and top of at least 1, found {self}")


def _check_generations(name: str, budget: int, population: int) -> None:
    if budget < GENERATIONS * population:
        raise ValueError(
            f"expected {name} of at least {GENERATIONS} generations of {population} = {GENERATIONS * population}, "
            f"found {budget}: raise it, or make the population smaller"
        )


class DivideAndConquer(AskTell):
    """DetKDS's search: controls, one population for each input, replicates, weights, finals.

    The populations of the inputs run side by side, each input in turn. The best formulas are repeated with other
    seeds before the weight phase builds on them, and the finalists before the winner is named. Phases follow from what
    has been asked and told, and change softly: a phase starts once all of the former are asked and half have ended.
    What the last ones bring is used as soon as it comes. Inputs of which nothing completed are off in the weight phase;
    if that is all of them, the search ends there.

    To extend a search, rebuild it with larger budgets from its events. A larger `weights_budget` continues the weight
    evolution; a larger `budget_per_input` continues the populations first, with replicates of their own, and the
    weights then build on the new terms. Either way finals follow for what looks best then.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        seed: int,
        settings: DivideSettings | None = None,
        admit: Admit = admit_all,
        given: Sequence[Formula] = (),
        min_batch: int = MIN_BATCH,
        spaces: Spaces = GRAMMAR,
        prediction: Prediction | None = None,
    ) -> None:
        """given: formulas, such as published ones, whose terms start the populations of their inputs.

        min_batch: images in the smallest batch of a worker; operations that need more are not offered.
        spaces: what is searched: the whole grammar, or a grid. prediction: combine the inputs by a model instead of by
        evolution; it then starts after fewer single formulas, and gets what they leave of the same budget.
        """
        if not inputs or len(set(inputs)) != len(inputs):
            raise ValueError(f"expected different knowledge inputs, at least one, found {list(inputs)}")
        self.settings = settings or DivideSettings()
        super().__init__(self.settings.rules)
        self.inputs, self._seed, self._admit, self._spaces = tuple(inputs), seed, admit, spaces
        self._min_batch, self._prediction = min_batch, prediction
        breeding, inherit = self.settings.formulas, self.rules.inherit
        self._populations = {
            input: Evolution("formula", input, seed, inherit, spaces.single(input, given, min_batch), breeding, admit)
            for input in inputs
        }

    @property
    def budget(self) -> int:
        """The most candidates that will be asked, controls and replicates included."""
        settings = self.settings
        replicates = self._most_replicated * (settings.runs - 1)
        explored = len(self.inputs) * settings.budget_per_input + settings.weights_budget
        return self.rules.overhead + explored + replicates

    @property
    def _singles(self) -> int:
        """How many formulas of each input are asked alone."""
        most = self.settings.budget_per_input
        return most if self._prediction is None else min(most, self._prediction.singles)

    @property
    def _combinations(self) -> int:
        """The budget of the weight phase: its own, and what the single formulas leave of theirs."""
        left = self.settings.budget_per_input - self._singles
        return self.settings.weights_budget + len(self.inputs) * left

    @property
    def _most_replicated(self) -> int:
        return self.settings.replicated + len(self.inputs) - 1

    def propose(self) -> Ask | None:
        return self._control() or self._formula() or self._replicates() or self._weights() or self._finals()

    def _formula(self) -> Ask | None:
        """The next child of the input that has had the fewest; inputs whose space is exhausted are passed over."""
        rejected: list[tuple[str, str]] = []
        asked = {input: self.history.in_group["formula", input] for input in self.inputs}
        for input in sorted(self.inputs, key=asked.__getitem__):
            if asked[input] < self._singles:
                ask = self._populations[input].propose(self.history, rejected=rejected)
                if ask is not None:
                    return ask
        return None

    def _ready(self) -> bool:
        return self.history.ended("formula") >= SOFT_CHANGE

    def _replicates(self) -> Ask | None:
        """Chosen by replicate 0 alone, as replicates that have come in would make some better founded than others."""
        if not self._ready():
            return None
        history = self.history
        lists = [runs for input in self.inputs if (runs := history.first_runs("formula", input))]
        most = self.settings.replicated
        best = sorted(run for runs in lists for run in runs[:most])[:most]
        best_of_inputs = [runs[0] for runs in sorted(lists, key=lambda runs: runs[-1], reverse=True)]
        arms = [history.asks[id].candidate for _, id in (*best, *best_of_inputs)]
        group = f"after {history.in_phase['formula']}"
        return self._replicate("replicate", group, arms, self._most_replicated, self.settings.runs)

    def _weights(self) -> Ask | None:
        settings = self.settings
        if not self._ready() or self.history.in_phase["weights"] >= self._combinations:
            return None
        founders = {
            input: self.history.best_in_group("formula", input, settings.top, completed=True) for input in self.inputs
        }
        terms: dict[str, list[Term]] = {input: [s.formula.terms[0] for s in best] for input, best in founders.items()}
        if not any(terms.values()):
            return None
        space, inherit = self._spaces.combined(terms), self.rules.inherit
        if self._prediction is not None:
            spaces, pool = (space, self._spaces.whole(self.inputs, (), self._min_batch)), self._prediction.pool
            phase = PredictedPhase("weights", self._seed, inherit, spaces, pool, self._admit)
            return phase.propose(self.history, self.history.standings(KNOWN))
        evolution = Evolution("weights", "weights", self._seed, inherit, space, settings.weights, self._admit)
        return evolution.propose(self.history, [s for best in founders.values() for s in best])

    def _finals(self) -> Ask | None:
        return self._final("formula", "weights") if self._ready() else None
