import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from compare_distillers import print_table
from results_runs import HOSTILE, asked, comparison_run, search_run, told

from autodet.ledger import Ledger
from autodet.results.frame import read_run
from autodet.results.plots import best_so_far, draw_best_so_far, to_png
from autodet.results.report import write_report


@pytest.fixture(scope="module")
def analyze() -> ModuleType:
    path = Path(__file__).parents[2] / "experiments" / "analyze.py"
    spec = importlib.util.spec_from_file_location("analyze", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report_tells_the_run_and_needs_nothing_beside_itself(tmp_path: Path) -> None:
    search_run(tmp_path)
    page = write_report(tmp_path).read_text()
    for words in ("7 candidates", "1 failed", "Diverged: &lt;nan&gt;", "loss &lt;NaN&gt;", "python a.py", "Controls"):
        assert words in page
    assert "logits.roi: softmax(c, t=2) | kl * 1" in page and "Kullback" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == [] and "://" not in page
    assert page.count("data:image/png;base64,") == 2


def test_report_escapes_what_comes_from_outside(tmp_path: Path) -> None:
    search_run(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in page and HOSTILE not in page


def test_found_formula_is_escaped_too(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        ledger.append("asked", 0, asked(HOSTILE))
        ledger.append("told", 0, told(0.5))
    assert "<script" not in write_report(tmp_path).read_text()


def test_report_of_an_empty_and_of_a_running_run(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        assert "0 candidates, driver at work" in write_report(tmp_path).read_text()
        ledger.append("asked", 0, asked("none"))
        assert "1 running" in write_report(tmp_path).read_text()


def test_pictures_that_others_left_are_shown_once(tmp_path: Path) -> None:
    search_run(tmp_path / "run")
    (tmp_path / "run" / "pictures").mkdir()
    picture = to_png(draw_best_so_far(best_so_far(read_run(tmp_path / "run"))))
    (tmp_path / "run" / "pictures" / "detections_on_test.png").write_bytes(picture)
    for _ in range(2):
        page = write_report(tmp_path / "run", tmp_path / "out").read_text()
        assert page.count("data:image/png;base64,") == 3 and "detections on test" in page
    assert sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir()) == ["detections_on_test.png"]


def test_comparison_report(tmp_path: Path) -> None:
    comparison_run(tmp_path, {"undistilled": [0.4, 0.42], "inherit-only": [0.5, 0.52], "found": [0.51, 0.54]})
    page = write_report(tmp_path).read_text()
    assert "Differences are to inherit-only" in page and "+1.5" in page and "-10.0" in page
    assert "formula that was found" not in page
    assert "Differences are to undistilled" in write_report(tmp_path, baseline="undistilled").read_text()


def test_analyze_prints_and_writes(analyze: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search_run(tmp_path / "all" / "search")
    comparison_run(tmp_path / "all" / "compare", {"inherit-only": [0.5, 0.52], "found": [0.51, 0.54]})
    assert analyze.main([str(tmp_path / "all"), "--csv", str(tmp_path / "x" / "all.csv")]) == 0
    printed = capsys.readouterr().out
    assert "7 candidates" in printed and "compared with inherit-only" in printed and "logits.roi: softmax" in printed
    for name in ("search", "compare"):
        made = {path.name for path in (tmp_path / "all" / name).iterdir()}
        assert {"summary.csv", "records.jsonl", "pictures", "report.html"} <= made
    table = pd.read_csv(tmp_path / "x" / "all.csv")
    assert len(table) == 11 and table.columns[0] == "run" and table["run"].nunique() == 2


def test_analyze_guides_where_runs_are_several(
    analyze: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    search_run(first)
    search_run(first / "students")
    assert analyze.main([str(first)]) == 0  # a search and its students are one
    assert "guidance: " not in capsys.readouterr().out
    search_run(second)
    assert analyze.main([str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "Which inputs help alone" in printed and "second-hand" in printed and "first/students" in printed
    made = {path.name for path in (tmp_path / "runs" / "guidance").iterdir()}
    assert made >= {"guidance.html", "pictures", "inputs.csv", "operations.csv", "runs.csv", "transfers.csv"}


@pytest.mark.parametrize(
    ("masks", "heading", "found"), [(True, "AP masks runs", "60.00 30.00 2"), (False, "AP runs", "60.00 2")]
)
def test_a_comparisons_table_has_the_aps_of_masks_beside_those_of_boxes(
    masks: bool, heading: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(comparison_run(tmp_path / "c", {"inherit-only": [0.5, 0.5], "found": [0.6, 0.6]}, masks))
    first, second = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:3])
    assert first.startswith(f"arm {heading} difference")
    assert second.startswith(f"found {found} +10.00")


def test_analyze_leaves_the_run_alone_with_output(analyze: ModuleType, tmp_path: Path) -> None:
    search_run(tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    arguments = [str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--long", str(tmp_path / "run")]
    assert analyze.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    assert (tmp_path / "out" / "report.html").exists() and (
        tmp_path / "out" / "pictures" / "rank_agreement.png"
    ).exists()


def test_analyze_says_what_is_no_run(analyze: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main([str(tmp_path / "absent")]) == 2
    assert "absent: expected a run, or a folder of runs, found no such folder" in capsys.readouterr().err
    comparison_run(tmp_path / "c", {"a": [0.5]})
    assert analyze.main([str(tmp_path / "c"), "--baseline", "b"]) == 2
    assert "found 'b'" in capsys.readouterr().err
