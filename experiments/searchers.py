"""The searchers that are compared on a table, at equal numbers of evaluations."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from autodet.distill import Formula
from autodet.search import AskTell, Breeding, DivideAndConquer, DivideSettings, Rules, flat_evolution, random_search
from autodet.search.candidate import Candidate
from autodet.search.prediction import Prediction
from autodet.search.replay import run_serial
from autodet.search.tabular import Table

Evaluate = Callable[[Table, int, int], list[float | None]]
"""Table, seed, budget → the AP (0–1) of each evaluation in order, None for a failure."""

BARE = Rules(controls=0, finalists=0, stop=None)
"""No controls, replicates, finals or early stopping: every evaluation is one training of a new formula."""
IN_VAIN = 8
"""How often in a row TPE may ask for what it knows, or what the table does not hold; then it is given a new formula."""
SINGLES = 4  # of each input, as many as four generations of one need; all of them may be combined
TOGETHER = Breeding(population=4)
INHERIT = True  # a table's trainings are all of one kind, so that it makes no difference here


def divide(table: Table, seed: int, budget: int, prediction: Prediction | None = None) -> list[float | None]:
    """Divide and conquer, combining by evolution or by prediction."""
    names, spaces = table.grid.names, table.grid.spaces
    left = max(budget - SINGLES * len(names), 4 * TOGETHER.population)
    settings = DivideSettings(SINGLES, left, Breeding(1), TOGETHER, replicated=0, runs=1, top=SINGLES, rules=BARE)
    search = DivideAndConquer(names, seed, settings, table.admit, spaces=spaces, prediction=prediction)
    return replayed(search, table, budget)


def divide_predicted(table: Table, seed: int, budget: int) -> list[float | None]:
    """Divide and conquer with the additive model in its second phase."""
    return divide(table, seed, budget, Prediction())


def flat(table: Table, seed: int, budget: int) -> list[float | None]:
    """One population of whole formulas."""
    grid = table.grid
    search = flat_evolution(grid.names, seed, budget, Breeding(), BARE, table.admit, spaces=grid.spaces)
    return replayed(search, table, budget)


def draws(table: Table, seed: int, budget: int) -> list[float | None]:
    """Formulas drawn evenly, none twice."""
    grid = table.grid
    return replayed(random_search(grid.names, seed, budget, BARE, table.admit, spaces=grid.spaces), table, budget)


def replayed(search: AskTell, table: Table, budget: int) -> list[float | None]:
    """The first `budget` evaluations of a search, one at a time."""
    events = run_serial(search, table.objective)
    return [event.payload["ap"] for event in events if event.kind == "told"][:budget]


def tpe(table: Table, seed: int, budget: int) -> list[float | None]:
    """Optuna's TPE with its defaults, by ask and tell: what Ray's OptunaSearch wraps, one at a time.

    Our searches never ask for a formula twice, and draw again what is refused. So may TPE: what it knows already, and
    what the table does not hold, is not counted, nor told again (which would leave it worse off). After `IN_VAIN` such
    asks in a row it is given a formula that is new, as our populations draw at random at last. It ends early once it
    has found the best of all, which nothing can change.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    rest = [Formula.parse(text) for text in table.aps]
    random.Random(seed).shuffle(rest)
    found: dict[str, float | None] = {}
    in_vain = 0
    while len(found) < min(budget, len(table.aps)) and table.best not in found.values():
        if in_vain == IN_VAIN:
            study.enqueue_trial(table.grid.choices_of(next(f for f in rest if str(f) not in found)))
        trial: Any = study.ask()
        formula = table.grid.from_choices(trial.suggest_categorical)
        new = table.admit(formula) is None and str(formula) not in found
        in_vain = 0 if new else in_vain + 1
        if new:
            found[str(formula)] = final_ap(table, formula)
        if new and found[str(formula)] is not None:
            study.tell(trial, found[str(formula)])
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)  # which TPE does not learn from
    return list(found.values())


def final_ap(table: Table, formula: Formula) -> float | None:
    """The AP that an evaluation ends with."""
    return table.objective(Candidate(formula, INHERIT))[-1]


SEARCHERS: dict[str, Evaluate] = {
    "divide, predicted": divide_predicted,
    "divide": divide,
    "flat evolution": flat,
    "random": draws,
    "TPE": tpe,
}
