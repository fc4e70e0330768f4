"""The comparison of searchers on a tiny table, as a user would run it, and what goes into a table."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import get_args

import build_table
import compare_searchers
import pandas as pd
import pytest
from search_tables import SMALL, made_table
from searchers import SEARCHERS

from autodet.detectors import DetectorSpec
from autodet.search import TableError, read_table
from autodet.search.tabular import Half
from autodet.training import Task, TrainSettings


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    made_table(path, replicated=5, failing="pearson(nhw) * 10")
    return path


def test_all_searchers_are_compared(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--table", str(table), "--seeds", "3", "--budget", "28", "--workers", "1", "--output", str(tmp_path)]
    assert compare_searchers.main(options) == 0
    said = capsys.readouterr().out
    assert "34 formulas" in said and "best 1% (1 formulas)" in said and "after 18 evaluations on average" in said
    assert "divide, predicted minus TPE" in said and "regret in AP points" in said
    summary = pd.read_csv(tmp_path / "searchers.csv")
    assert list(summary["searcher"]) == list(SEARCHERS) and (summary["seeds"] == 3).all()
    assert {"reached", "mean", "low", "high", "regret_after_28"} <= set(summary.columns)
    assert (tmp_path / "searchers.png").stat().st_size > 10_000


def test_several_processes_find_the_same(table: Path) -> None:
    read = read_table(table)
    one, two = (compare_searchers.run_all(read, seeds=2, budget=12, workers=workers) for workers in (1, 2))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize("name", list(SEARCHERS))
@pytest.mark.parametrize("half", get_args(Half)[:2])
def test_every_searcher_stays_in_the_table_and_pays_once(table: Path, name: str, half: Half) -> None:
    """Every value that it is given is of the table, and none comes more often than the table holds it."""
    part = read_table(table).half(half)
    aps = SEARCHERS[name](part, 1, len(part.aps))
    left = list(part.aps.values())
    for ap in aps:
        left.remove(ap)
    assert aps == SEARCHERS[name](part, 1, len(part.aps))
    if name == "TPE":
        assert aps[-1] == part.best  # all of the table is within the budget
    assert len(aps) <= len(part.aps)


def test_half_a_table_is_a_smaller_one(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds", "1", "--budget", "12", "--workers", "1", "--output", str(tmp_path), "--half", "second"]
    assert compare_searchers.main(["--table", str(table), *options]) == 0
    said = capsys.readouterr().out
    assert f"{len(read_table(table).half('second').aps)} formulas" in said


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("formula,ap\n")
    with pytest.raises(TableError, match="line 1"):
        compare_searchers.main(["--table", str(tmp_path / "bad.csv")])


def test_every_formula_is_trained_once_and_some_again() -> None:
    candidates = build_table.trainings(SMALL, inherit=True, replicated=4, replicates=3)
    assert len(candidates) == len({candidate.key for candidate in candidates}) == 34 + 4 * 2
    assert [c.replicate for c in candidates] == [0] * 34 + [1] * 4 + [2] * 4
    assert [c.formula for c in candidates[34:38]] == [c.formula for c in candidates[:4]]
    assert build_table.GRID.count == 440


def test_the_proxy_is_made_cheaper_as_asked(tiny_spec: DetectorSpec) -> None:
    task = Task("data", "cache", tiny_spec, TrainSettings(16), fraction=0.5, checks=(8, 12))
    same = argparse.Namespace(epochs=None, size=None, fraction=None, seed=1)
    assert build_table.cheaper(task, same).checks == (8, 12)
    assert build_table.cheaper(task, same).seed == build_table.FRESH_SEEDS + 1
    less = argparse.Namespace(epochs=6, size=48, fraction=0.1, seed=0)
    cheap = build_table.cheaper(task, less)
    assert (cheap.settings.epochs, cheap.checks, cheap.fraction, cheap.student.min_size) == (6, (3, 4), 0.1, 48)
    assert build_table.cheaper(task, argparse.Namespace(epochs=1, size=None, fraction=None, seed=0)).checks == ()


def test_the_command_of_a_table_names_no_folders() -> None:
    words = ["/home/me/experiments/build_table.py", "--run", "/home/me/runs/one", "--epochs", "6"]
    assert build_table.command(words) == "python experiments/build_table.py --run one --epochs 6"


def test_the_spread_of_seeds_is_said(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_table.print_summary(table, read_table(table))
    said = capsys.readouterr().out
    assert "34 formulas, 44 trainings" in said and not math.isnan(float(said.split("of seeds ")[1].split()[0]))
