import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_joint_runs import BASE, TEACHERS, Step, base, joint_run, large_search, records_of, small_search
from matplotlib.figure import Figure

from autodet.detectors import Arch
from autodet.ledger import Ledger
from autodet.records import Record
from autodet.results import joint_plots
from autodet.results.derived_plots import settings_of
from autodet.results.joint_report import joint_figures, result_table, write_joint_report
from autodet.results.labels import place_labels
from autodet.results.lineage import actions_of, cost_of, front, lineage
from autodet.results.plots import to_png


@pytest.fixture(scope="module")
def searched() -> list[Record]:
    return records_of(large_search(60, seed=0))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def line(figure: Figure, label: str) -> tuple[list[float], list[float]]:
    """Data of the line that the legend names so."""
    found = next(line for line in figure.axes[0].lines if line.get_label() == label)
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def test_front_shows_all_completed_candidates_and_the_lineage(searched: list[Record]) -> None:
    derived = front(searched)[-1].id
    figure = joint_plots.draw_front(searched, derived, 0.6, {"base, same settings": (0.75, 0.32)})
    dots = sum(len(np.asarray(found.get_offsets())) for found in figure.axes[0].collections)
    assert dots == sum(record.status == "completed" for record in searched) - 1, "the base has its own mark"
    path = lineage(searched, derived)
    assert line(figure, "lineage")[0] == pytest.approx([cost_of(record) for record in path])
    assert line(figure, "lineage")[1] == pytest.approx([100 * (record.ap or 0) for record in path])
    best = [cost_of(record) for record in front(searched)]
    assert line(figure, "front")[0][:-1] == pytest.approx(best)
    assert line(figure, "target ratio 0.6")[0] == [0.6, 0.6]
    assert {"base", f"derived ({derived})", "base, same settings"} <= set(texts(figure))


def test_a_lineage_of_detectors_with_masks_tells_their_ap_beside_that_of_boxes(tmp_path: Path) -> None:
    masked = [replace(step, mask_ap=None if step.ap is None else step.ap - 0.05) for step in small_search()]
    page = write_joint_report(joint_run(tmp_path / "masks", masked), 3).read_text()
    plain = write_joint_report(joint_run(tmp_path / "boxes", small_search()), 3).read_text()
    assert ">mask AP</th>" in page and "derived: AP 35.0, masks 30.0" in page
    assert ">mask AP</th>" not in plain and "derived: AP 35.0, ratio" in plain


def test_a_front_by_macs_is_drawn_by_macs(tmp_path: Path) -> None:
    run = joint_run(tmp_path / "run", small_search(), {"script": "upgrade_detector", "options": {"front": "macs_g"}})
    records = records_of(small_search())
    figure = joint_figures(records, 3, 0.6, cost="macs_g")["front.png"]
    assert figure.axes[0].get_xlabel().startswith("MACs")
    assert line(figure, "front")[0][:-1] == pytest.approx([cost_of(r, "macs_g") for r in front(records, "macs_g")])
    assert not any(str(found.get_label()).startswith("target") for found in figure.axes[0].lines)
    assert "Growth of the front" in write_joint_report(run, 3).read_text()


def test_a_founder_is_a_candidate_and_the_base_stays_the_base() -> None:
    founder = Step(0.5, 0.34, None, "keep", replace(BASE, neck_width=40), 35, phase="founders", teacher=None)
    records = records_of([base(), founder, Step(0.45, 0.35, 1, "prune_neck(width=32)", epochs=41)])
    figures = joint_figures(records, 2)
    dots = sum(len(np.asarray(found.get_offsets())) for found in figures["front.png"].axes[0].collections)
    assert dots == 2
    shown = " ".join(axes.get_title() for axes in figures["architectures.png"].axes)
    shown += " ".join(texts(figures["architectures.png"]))
    assert "AP 31.0, ratio 1.00" in shown and "AP 34.0" not in shown
    assert [actions_of(record) for record in lineage(records, 2)] == ["founder", "prune_neck(width=32)"]


def test_hopeless_candidates_do_not_squeeze_the_rest() -> None:
    steps = [base(), *(Step(0.5 + i / 100, 0.3 + i / 1000) for i in range(20)), Step(0.4, 0.001)]
    axes = joint_plots.draw_front(records_of(steps)).axes[0]
    assert axes.get_ylim()[0] > 25


def test_phases_of_a_pipeline_are_told_apart() -> None:
    steps = [base(), *(replace(Step(0.8, 0.3), phase=phase) for phase in ("nas", "prune", "nas"))]
    figure = joint_plots.draw_front(records_of(steps))
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert {"candidates: nas", "candidates: prune"} <= set(labels)


def test_labels_cover_neither_one_another_nor_dots() -> None:
    dice = np.random.default_rng(0)
    dots = [(float(x), float(y)) for x, y in dice.uniform(0, 300, (60, 2))]
    corners = place_labels(dots, [(20.0, 10.0)] * 60, 300, 300)
    places = [corner for corner in corners if corner is not None]
    assert 30 < len(places) <= 60 and all(0 <= x <= 280 and 0 <= y <= 290 for x, y in places)
    assert all(abs(a[0] - b[0]) >= 20 or abs(a[1] - b[1]) >= 10 for a, b in itertools.combinations(places, 2))
    assert not any(x < a < x + 20 and y < b < y + 10 for x, y in places for a, b in dots)


def test_a_label_avoids_lines_where_it_can() -> None:
    level = [(float(x), 50.0) for x in range(100)]
    (free,) = place_labels([(50.0, 50.0)], [(20.0, 10.0)], 100, 100, lines=level)
    assert free is not None and (free[1] > 50 or free[1] + 10 < 50)
    everywhere = [(float(x), float(y)) for x in range(0, 100, 5) for y in range(0, 100, 5)]
    assert place_labels([(50.0, 50.0)], [(20.0, 10.0)], 100, 100, lines=everywhere) == [(57.0, 45.0)]


def test_lineage_lists_every_step_with_its_numbers(searched: list[Record]) -> None:
    derived = max(searched, key=lambda record: len(lineage(searched, record.id))).id
    path = lineage(searched, derived)
    assert len(path) >= 25
    figure = joint_plots.draw_lineage(searched, derived)
    written = texts(figure)
    for record in path[1:]:
        assert str(record.id) in written and str((record.student or {})["epochs"]) in written
        assert f"{cost_of(record):.2f}" in written and (record.student or {})["actions"].split(" > ")[0] in written
    assert "base" in written and figure.get_size_inches()[1] < 0.7 * len(path) + 1


def test_lineage_rows_do_not_overlap(searched: list[Record]) -> None:
    axes = joint_plots.draw_lineage(searched, front(searched)[-1].id).axes[0]
    for column in ("teacher", "what was changed"):
        x = next(text.get_position()[0] for text in axes.texts if text.get_text() == column)
        heights = sorted(text.get_position()[1] for text in axes.texts if text.get_position()[0] == x)
        assert min(b - a for a, b in itertools.pairwise(heights)) > 0.15


def test_many_siblings_are_counted() -> None:
    steps = [base(), *(Step(0.9, 0.3) for _ in range(12)), Step(0.5, 0.35, 1)]
    written = texts(joint_plots.draw_lineage(records_of(steps), 13))
    assert "+5" in written


def test_architectures_write_widths_and_what_changed() -> None:
    derived = replace(BASE, body=Arch.parse("basic-32:32x2(24,32)-64x2-128x3-256x1"), neck_width=48).at_size(160)
    figure = joint_plots.draw_architectures(str(BASE), str(derived))
    written = texts(figure)
    assert written.count("32, inner 24") == 1 and written.count("128, inner 128") == 5
    assert written.count("no block") == 2, "one side has a block more in stage 3, the other in stage 4"
    orange = {text.get_text() for text in figure.axes[0].texts if text.get_color() == joint_plots.ORANGE}
    assert {"32, inner 24", "48", "160, longer side to 267", "neck width", "image size"} <= orange
    assert "64, inner 64" not in orange and "256" not in orange


def test_settings_name_whatever_differs() -> None:
    other = replace(BASE, rpn_depth=2, score_threshold=0.2)
    assert settings_of(BASE, BASE).keys() == {"neck width", "head width", "proposals", "image size"}
    assert settings_of(BASE, other)["rpn depth"] == "1" and settings_of(other, BASE)["score threshold"] == "0.2"


def test_teachers_gains_are_over_the_parent() -> None:
    data = joint_plots.teacher_gains(records_of(small_search())).set_index("id")
    assert data.index.tolist() == [1, 2, 3]
    assert data["gain"].tolist() == pytest.approx([0.02, 0.05, 0.02])
    assert data["teacher"].tolist() == [TEACHERS[1], TEACHERS[0], TEACHERS[0]]


def test_rare_teachers_share_a_row() -> None:
    steps = [base(), *(replace(Step(0.9, 0.3 + i / 1000), teacher=f"basic-{i}") for i in range(1, 31))]
    figure = joint_plots.draw_teachers(records_of(steps), 30)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == joint_plots.TEACHER_ROWS + 1 and names[0] == "16 other teachers  (16)"
    assert "basic-30  (1)" in names, "the lineage's own teachers have rows"


def test_report_is_complete_and_in_order(tmp_path: Path) -> None:
    run = joint_run(tmp_path / "run", large_search(30, seed=1))
    (run / "pictures").mkdir()
    (run / "pictures" / "detections.png").write_bytes(to_png(Figure(figsize=(2, 2))))
    records = records_of(large_search(30, seed=1))
    derived = front(records)[-1].id
    rows = [{"detector": "base", "AP": 31.0, "AP S": None}, {"detector": "derived", "AP": 35.25, "AP S": None}]
    page = write_joint_report(run, derived, rows, 0.6, notes=["detect(detector, [image])", "<i>"]).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        *("Result", "How to use it", "Front", "Architecture before and after", "Lineage", "Teachers"),
        *("Growth of the front", "Detections", "Failures", "Settings", "How to repeat"),
    ]
    assert page.count("data:image/png;base64,") == 6
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == [] and "://" not in page
    for words in (
        "31 candidates",
        "35.2",
        "&lt;i&gt;",
        "python derive.py",
        "base: AP 31.0, ratio 1.00",
        "width=device",
    ):
        assert words in page
    listed = page[page.index("<th>actions") : page.index("<h2>Teachers")]
    steps = [int(id) for id in re.findall(r'<tr><td class="number">(\d+)</td>', listed)]
    assert steps == [record.id for record in lineage(records, derived)]
    made = {path.name for path in (run / "pictures").iterdir()}
    names = {"front.png", "lineage.png", "architectures.png", "teachers.png", "hypervolume.png", "detections.png"}
    assert made == names


def test_report_escapes_and_counts_refusals(tmp_path: Path) -> None:
    run = joint_run(tmp_path / "run", small_search())
    page = write_joint_report(run, 3, output=tmp_path / "out").read_text()
    assert "<script" not in page and "<b>" not in page and "too <large>" not in page
    assert "prune_neck(width=&lt;script&gt;) &amp; more" in page and "Diverged: &lt;nan&gt; in &lt;script&gt;" in page
    assert '<td class="number">2</td><td>latency_ratio 0.91 is above 0.6</td>' in page
    assert '<td class="number">1</td><td>too &lt;large&gt;</td>' in page
    assert not (run / "report.html").exists() and (tmp_path / "out" / "pictures" / "front.png").exists()


@pytest.mark.parametrize(
    ("steps", "pictures"),
    [
        ([], 0),
        ([base(None, None)], 0),
        ([base(None, "failed", "out of <memory>")], 0),
        ([base()], 1),
        ([base(), Step(0.5, None, 0, status=None)], 1),
        ([base(None, "failed", "x"), Step(0.5, None, 0, status="failed", cause="y")], 0),
    ],
)
def test_report_of_a_run_with_little_in_it(tmp_path: Path, steps: list[Step], pictures: int) -> None:
    page = write_joint_report(joint_run(tmp_path, steps), None).read_text()
    assert page.count("data:image/png;base64,") == pictures and f"{len(steps)} candidates" in page
    assert "No detector has been derived yet." in page and "Settings" in page and "<memory>" not in page


def test_report_of_a_running_run_and_of_the_base_alone(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "run", {}) as ledger:
        ledger.append("asked", 0, base().asked())
        assert "driver at work" in write_joint_report(tmp_path / "run", None).read_text()
        ledger.append("told", 0, base().told())
    assert set(joint_figures(records_of([base()]), 0)) == {"front.png", "architectures.png", "lineage.png"}
    with pytest.raises(ValueError, match="found 7"):
        write_joint_report(tmp_path / "run", 7)


def test_columns_of_the_final_table_have_the_same_decimals() -> None:
    rows = [{"a": 1.0, "b": 30.0, "c": 0.25, "d": 7, "e": None}, {"a": 0.716, "b": None, "c": float("nan"), "d": 0}]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", result_table(rows))
    assert cells == ["1.00", "30.0", "0.250", "7", "–", "0.72", "–", "–", "0", "–"]
    assert result_table([]) == ""
