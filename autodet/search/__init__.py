"""Ask/tell searches over distillation formulas, and the session that joins one to its ledger; no Ray, no training."""

from autodet.search.ask_tell import AskTell, Best, Rules
from autodet.search.baselines import WholeFormulaSearch, flat_evolution, random_search
from autodet.search.candidate import (
    EMPTY,
    FINISHED,
    WAIT,
    Answer,
    Ask,
    Candidate,
    Search,
    Signal,
    Status,
    rng_for,
)
from autodet.search.divide_conquer import DivideAndConquer, DivideSettings
from autodet.search.evolution import Admit, Breeding, Evolution, Space, admit_all
from autodet.search.fixed import FixedList
from autodet.search.history import History, Standing
from autodet.search.replay import Objective, rebuild, run_serial
from autodet.search.session import Session
from autodet.search.stopping import MedianStop, StopRule

__all__ = [
    "EMPTY",
    "FINISHED",
    "WAIT",
    "Admit",
    "Answer",
    "Ask",
    "AskTell",
    "Best",
    "Breeding",
    "Candidate",
    "DivideAndConquer",
    "DivideSettings",
    "Evolution",
    "FixedList",
    "History",
    "MedianStop",
    "Objective",
    "Rules",
    "Search",
    "Session",
    "Signal",
    "Space",
    "Standing",
    "Status",
    "StopRule",
    "WholeFormulaSearch",
    "admit_all",
    "flat_evolution",
    "random_search",
    "rebuild",
    "rng_for",
    "run_serial",
]
