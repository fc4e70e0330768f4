"""Ask/tell searches over formulas and students, and the session that joins one to its ledger; no Ray, no training."""

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
    Student,
    rng_for,
)
from autodet.search.divide_conquer import DivideAndConquer, DivideSettings
from autodet.search.evolution import Admit, Breeding, Evolution, Space, admit_all
from autodet.search.fixed import FixedList
from autodet.search.grid import Grid, GridInput
from autodet.search.history import History, Standing
from autodet.search.joint import Examine, Examined, JointSearch
from autodet.search.joint_settings import JointSettings, Phase, joint_phases, pipeline_phases, random_phases
from autodet.search.prediction import Prediction
from autodet.search.replay import Objective, rebuild, run_serial
from autodet.search.session import Session
from autodet.search.spaces import GRAMMAR, Spaces
from autodet.search.stopping import MedianStop, StopRule
from autodet.search.table_file import read_table, write_table
from autodet.search.tabular import Table, TableError

__all__ = [
    "EMPTY",
    "FINISHED",
    "GRAMMAR",
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
    "Examine",
    "Examined",
    "FixedList",
    "Grid",
    "GridInput",
    "History",
    "JointSearch",
    "JointSettings",
    "MedianStop",
    "Objective",
    "Phase",
    "Prediction",
    "Rules",
    "Search",
    "Session",
    "Signal",
    "Space",
    "Spaces",
    "Standing",
    "Status",
    "StopRule",
    "Student",
    "Table",
    "TableError",
    "WholeFormulaSearch",
    "admit_all",
    "flat_evolution",
    "joint_phases",
    "pipeline_phases",
    "random_phases",
    "random_search",
    "read_table",
    "rebuild",
    "rng_for",
    "run_serial",
    "write_table",
]
