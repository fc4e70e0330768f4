import re
from pathlib import Path

import pandas as pd
import pytest
from guidance_runs import Row, again, arm, control, write_run
from results_runs import HOSTILE

from autodet.results import guidance_plots
from autodet.results.facts import read_runs
from autodet.results.guidance_page import tables_of, write_guidance
from autodet.results.guidance_tables import TITLES, text_of
from autodet.results.plots import to_png
from autodet.results.report import write_report

FORMULAS = ["global: catt | l1 * 1", "global: l2 * 1", "logits.roi: kl * 1", "fg: norm(c) | l1 * 1"]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two searches, the second without controls, and a comparison."""
    rows = [Row(formula, ap) for formula, ap in zip(FORMULAS, (0.4, 0.3, 0.45, 0.2), strict=True)]
    controls = [control(0.3), control(0.31, 1)]
    compared = [*arm("inherit-only", "none", [0.3, 0.3]), *arm("from a.1", FORMULAS[0], [0.33, 0.35])]
    return [
        write_run(tmp_path / "a.1", [*controls, *rows, again(FORMULAS[0], 0.42, 1)]),
        write_run(tmp_path / "<b>", [*rows, Row(HOSTILE, "failed")]),
        write_run(tmp_path / "compare", compared),
    ]


def test_pictures_show_runs_and_counts(runs: list[Path]) -> None:
    tables = tables_of(read_runs(runs))
    figure = guidance_plots.draw_inputs(tables["inputs"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["logits.roi", "global", "fg"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a.1"], "a run without controls has no gain"
    assert axes.get_xlim()[0] < -0.1 * 100 < 0.15 * 100 < axes.get_xlim()[1]
    panels = guidance_plots.draw_operations(tables["operations"]).axes
    assert "l1  (3)" in [label.get_text() for label in panels[-1].get_yticklabels()]
    assert to_png(figure).startswith(b"\x89PNG")


def test_pictures_without_content_are_drawn(tmp_path: Path) -> None:
    tables = tables_of(read_runs([write_run(tmp_path, [])]))
    assert to_png(guidance_plots.draw_inputs(tables["inputs"]))
    assert to_png(guidance_plots.draw_operations(tables["operations"]))


def test_page_and_tables_are_written(runs: list[Path], tmp_path: Path) -> None:
    path, tables = write_guidance(runs, tmp_path / "out")
    page = path.read_text()
    assert all(title in page for title in TITLES.values())
    assert page.count("data:image/png;base64,") == 2 and "second-hand" in page and "+4.0" in page
    assert "<b>" not in page and "&lt;b&gt;" in page and "<script" not in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []
    for name in tables:
        table = pd.read_csv(tmp_path / "out" / f"{name}.csv")
        assert len(table) == len(tables[name]) > 0 and list(table.columns) == list(tables[name].columns)
    text = text_of(tables)
    assert all(words in text for words in ("1 choosing seed\n", "1 fresh seed\n", "no control", "from a.1"))


def test_a_run_without_content_makes_a_page_too(tmp_path: Path) -> None:
    path, _ = write_guidance([write_run(tmp_path / "empty", [])], tmp_path / "out")
    assert "<h2>" not in path.read_text()


def test_a_search_s_own_report_has_inputs_operations_and_cost(runs: list[Path]) -> None:
    page = write_report(runs[0]).read_text()
    for name in ("inputs", "operations", "runs", "phases"):
        assert TITLES[name] in page
    assert TITLES["inputs"] not in write_report(runs[2]).read_text()
