import math
from pathlib import Path

import numpy as np
import pytest
from guidance_runs import Row, write_run

from autodet.results.facts import read_runs
from autodet.results.guidance import alone
from autodet.results.intervals import student_t_quantile
from autodet.results.operation_ranks import SLOTS, difference_interval, operations, percentiles, slots_of

GLOBAL = [
    Row("global: catt > pool(2) > norm(c) | l1 * 1", 0.5),
    Row("global: catt | l2 * 1", 0.4),
    Row("global: norm(hw) | l1 * 1", 0.4),
    Row("global: l1 * 5", "0.9"),  # stopped: its AP is of another length
    Row("global: satt | l1 * 1", "failed"),
]
ROI = [Row("logits.roi: root | l1 * 1", 0.3), Row("logits.roi: kl * 1", 0.1)]


def test_percentiles_are_within_run_and_input(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", GLOBAL + ROI), write_run(tmp_path / "b", [Row("global: l1 * 1", 0.9)])]
    ranked = percentiles(alone(read_runs(runs)))
    # Ranks 5, 3.5, 3.5, 2, 1 of 5 and 2, 1 of 2: the only one of its run says nothing.
    assert ranked["percentile"].tolist() == pytest.approx([90, 60, 60, 30, 10, 75, 25])
    assert set(ranked["run"]) == {"a"}


def test_operations_by_hand(tmp_path: Path) -> None:
    table = operations(read_runs([write_run(tmp_path, GLOBAL + ROI)])).set_index(["slot", "operation"])
    catt = table.xs(("A", "catt"))
    assert (catt["count"], catt["groups"], catt["percentile"]) == (2, 1, 75)
    assert catt["without"] == pytest.approx(100 / 3) and catt["difference"] == pytest.approx(75 - 100 / 3)
    assert catt[["low", "high", "difference_low"]].isna().all(), "two candidates have no interval"
    l1 = table.xs(("distance", "l1"))
    half = 2.776445 * math.sqrt(1070 / 5)  # 90, 60, 30, 10, 75: mean 53, variance 1070
    assert (l1["low"], l1["high"]) == pytest.approx((53 - half, 53 + half))
    # `l1` is everywhere but in one of each group; `none` of slot B has no contrast among the logits.
    assert table.loc[("distance", "l1"), "count"] == 5 and table.loc[("distance", "l1"), "groups"] == 2
    assert table.loc[("B", "none"), "count"] == 4 and table.loc[("B", "none"), "groups"] == 1
    assert table.loc[("A", "none"), "count"] == 2, "all logits have an empty slot A, so they do not count"
    single = table.xs(("distance", "kl"))
    assert single["count"] == 1 and single["difference"] == -50
    assert single[["low", "high", "difference_low", "difference_high"]].isna().all()


def test_intervals_stay_within_what_is_possible(tmp_path: Path) -> None:
    rows = [Row(f"global: tanh | l1 * {weight}", ap) for weight, ap in ((1, 0.9), (2, 0.8), (5, 0.1))]
    table = operations(read_runs([write_run(tmp_path, [*rows, Row("global: l2 * 1", 0.2)])])).set_index("operation")
    # 87.5, 62.5 and 12.5: mean 54.2, half-width 95.
    assert (table.loc["tanh", "low"], table.loc["tanh", "high"]) == (0, 100)


def test_candidates_of_equal_ap_say_nothing(tmp_path: Path) -> None:
    rows = [Row("global: tanh | l1 * 1", 0.0), Row("global: l1 * 1", 0.0)]
    assert operations(read_runs([write_run(tmp_path, rows)])).empty


def test_best_first_within_a_slot(tmp_path: Path) -> None:
    table = operations(read_runs([write_run(tmp_path, GLOBAL)]))
    assert table["slot"].drop_duplicates().tolist() == ["A", "B", "C", "distance"]
    for _, rows in table.groupby("slot"):
        assert rows["percentile"].is_monotonic_decreasing
    assert operations(read_runs([write_run(tmp_path / "one", GLOBAL[:1])])).empty


def test_slots_of_a_formula() -> None:
    assert slots_of("global: mean(c, p=2) > norm(hw) | l2") == {
        ("A", "none"),
        ("B", "mean"),
        ("C", "norm"),
        ("distance", "l2"),
    }
    assert slots_of("none") == set()


def test_welch_by_hand() -> None:
    first, second = [1.0, 2.0, 3.0], [2.0, 6.0, 4.0, 8.0]
    errors = 1 / 3, (20 / 3) / 4  # variances 1 and 20/3
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 2 + errors[1] ** 2 / 3)
    assert math.floor(freedom) == 4
    half = student_t_quantile(0.975, 4) * math.sqrt(sum(errors))
    assert difference_interval(first, second) == pytest.approx((-3, -3 - half, -3 + half))
    assert difference_interval([1.0] * 3, [3.0] * 3) == (-2, -2, -2)
    assert np.isnan(difference_interval([1.0, 2.0], second)).tolist() == [False, True, True]
    assert np.isnan(difference_interval([1.0], [])).all()


def test_slots_are_those_of_the_grammar() -> None:
    transforms = pytest.importorskip("autodet.distill.transforms").TRANSFORMS
    for slot in ("A", "B"):
        assert set(SLOTS[slot]) == {name for name, transform in transforms.items() if transform.slot == slot}
