import math
from pathlib import Path

import pandas as pd
import pytest
from results_runs import asked, comparison_run, search_run, told

from autodet.ledger import Ledger, LedgerError
from autodet.results.frame import (
    COLUMNS,
    best,
    find_runs,
    found_arm,
    leaderboard,
    paired_differences,
    rank_agreement,
    read_events,
    read_records,
    read_run,
)
from autodet.results.live import live_text
from autodet.results.report import write_report

FOUND = "global: l2 * 1"


def test_running_run_is_read_while_its_writer_writes(tmp_path: Path) -> None:
    with search_run(tmp_path / "run", close=False) as ledger:
        frame = read_run(tmp_path / "run")
        assert frame["status"].tolist() == ["completed"] * 4 + ["stopped", "failed", "running"]
        ledger.append("told", 6, told(0.5))
        assert read_run(tmp_path / "run")["status"].iloc[6] == "completed"
    row = frame.iloc[6]
    assert math.isnan(row["ap"]) and pd.isna(row["told_at"]) and row["epochs"] == 1 and row["seconds"] == 0.5
    assert frame["rejected"].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert frame["ap50"].iloc[1] == pytest.approx(0.6) and frame["extra.scale"].iloc[2] == 1.5


def test_columns_have_one_type_whatever_the_run_holds(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "empty", {}).close()
    search_run(tmp_path / "run")
    empty, full = read_run(tmp_path / "empty"), read_run(tmp_path / "run")
    assert len(empty) == 0 and list(empty.columns) == list(COLUMNS)
    assert [str(full[name].dtype) for name in COLUMNS] == [str(empty[name].dtype) for name in COLUMNS]
    assert full["ap"].dtype == "float64" and full["inherit"].dtype == "bool" and full["id"].dtype == "int64"
    assert str(full["asked_at"].dt.tz) == "UTC"
    assert best(empty) is None and found_arm(empty) is None and leaderboard(empty).empty


def test_events_as_a_frame(tmp_path: Path) -> None:
    search_run(tmp_path)
    events = read_events(tmp_path)
    assert events["number"].tolist() == list(range(len(events)))
    assert events["kind"].value_counts().to_dict() == {"asked": 7, "reported": 7, "told": 6}
    assert events.loc[events["kind"] == "reported", "epoch"].tolist() == [1] * 7


def test_best_is_a_completed_candidate(tmp_path: Path) -> None:
    search_run(tmp_path)
    frame = read_run(tmp_path)
    everywhere, controls = best(frame), best(frame, "control")
    assert everywhere is not None and everywhere["id"] == 2  # not the stopped one with 0.6
    assert controls is not None and controls["id"] == 0
    assert best(frame, "weights") is None


def test_leaderboard_is_the_mean_over_runs(tmp_path: Path) -> None:
    search_run(tmp_path)
    board = leaderboard(read_run(tmp_path))
    assert board["runs"].tolist() == [1, 2, 1] and board["first"].tolist() == [2, 1, 0]
    assert board["ap"].tolist() == pytest.approx([0.45, 0.42, 0.30])
    assert board["high"].iloc[1] - board["ap"].iloc[1] == pytest.approx(12.7062 * 0.02, rel=1e-4)
    assert len(leaderboard(read_run(tmp_path), 1)) == 1


def masked_run(folder: Path) -> None:
    """Two runs of one formula and a control, whose masks were measured, and a failure."""
    with Ledger.create(folder, {}) as ledger:
        steps = [(FOUND, told(0.4, mask_ap=0.3)), (FOUND, told(0.5, mask_ap=0.34)), ("none", told(0.2, mask_ap=0.1))]
        for id, (formula, result) in enumerate([*steps, (FOUND, told(None, "failed", cause="lost"))]):
            ledger.append("asked", id, asked(formula, "compare", formula.split(":")[0], replicate=id % 2))
            ledger.append("told", id, result)


def test_masks_stand_beside_boxes_only_where_they_were_measured(tmp_path: Path) -> None:
    masked_run(tmp_path / "masks")
    search_run(tmp_path / "boxes")
    frame, plain = read_run(tmp_path / "masks"), read_run(tmp_path / "boxes")
    assert set(frame.columns) - set(plain.columns) >= {"mask_ap", "mask_ap50"} and frame["mask_ap50"].isna().all()
    assert frame["mask_ap"].dtype == "float64" and frame["mask_ap"].isna().tolist() == [False, False, False, True]
    board = leaderboard(frame)
    assert board["formula"].tolist() == [FOUND, "none"]  # by the AP of boxes
    assert board["mask_ap"].tolist() == pytest.approx([0.32, 0.1])
    compared = paired_differences(frame, "none").set_index("arm")["mask_ap"]
    assert compared.to_dict() == pytest.approx({"global": 0.32, "none": 0.1})
    for table in (leaderboard(plain), paired_differences(plain, "control")):
        assert "mask_ap" not in table
    report, boxes = (write_report(tmp_path / name).read_text() for name in ("masks", "boxes"))
    assert "mask AP" in report and "32.0" in report and "mask AP" not in boxes
    shown = live_text(tmp_path / "masks", read_records(tmp_path / "masks"), 0.0)
    assert "AP 0.5000, masks 0.3400" in shown


def test_found_formula_is_chosen_among_equals_once_finals_ran(tmp_path: Path) -> None:
    search_run(tmp_path)
    before = found_arm(read_run(tmp_path))
    assert before is not None and before["formula"].startswith("logits.roi")
    with Ledger.resume(tmp_path) as ledger:
        ledger.append("asked", 7, asked("global: catt > pool(2) | l1 * 2", "final", replicate=2, origin="replicate"))
        ledger.append("told", 7, told(0.43))
    after = found_arm(read_run(tmp_path))
    assert after is not None and after["formula"] == "global: catt > pool(2) | l1 * 2" and after["runs"] == 3


def test_paired_differences_by_hand(tmp_path: Path) -> None:
    arms = {"inherit-only": [0.50, 0.52, 0.54], "found": [0.51, 0.54, 0.57], "short": [0.49]}
    table = paired_differences(read_run(comparison_run(tmp_path, arms)), "inherit-only").set_index("arm")
    found = table.loc["found"]
    assert found["mean"] == pytest.approx(0.54) and found["pairs"] == 3
    half = 4.302653 * 0.01 / math.sqrt(3)  # differences 0.01, 0.02, 0.03: mean 0.02, s = 0.01, t(2) = 4.303
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((0.02, 0.02 - half, 0.02 + half))
    assert table.loc["short", "difference"] == pytest.approx(-0.01) and table.loc["short"].isna()["low"]
    assert table.loc["inherit-only", "difference"] == 0 and table.index[0] == "found"


def test_pairs_are_matched_by_seed_and_other_phases_left_out(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        steps = [("a", 1, 0.5), ("a", 0, 0.1), ("b", 0, 0.2), ("b", 1, 0.6), ("b", 2, 0.9)]
        for id, (arm, seed, ap) in enumerate(steps):
            ledger.append("asked", id, asked("none", "compare", arm, replicate=seed))
            ledger.append("told", id, told(ap))
        ledger.append("asked", 5, asked("none", "tune", "b", replicate=0))
        ledger.append("told", 5, told(0.99))
    row = paired_differences(read_run(tmp_path), "a").set_index("arm").loc["b"]
    assert row["difference"] == pytest.approx(0.1) and row["pairs"] == 2 and row["runs"] == 3


def test_unknown_baseline_is_named_with_what_there_is(tmp_path: Path) -> None:
    comparison_run(tmp_path, {"a": [0.1], "b": [0.2]})
    with pytest.raises(ValueError, match=r"a, b.*found 'c'"):
        paired_differences(read_run(tmp_path), "c")


def test_rank_agreement_joins_the_means_of_both(tmp_path: Path) -> None:
    for name, shift in (("proxy", 0.0), ("long", 0.1)):
        with Ledger.create(tmp_path / name, {}) as ledger:
            for id, (formula, ap) in enumerate([("x", 0.1), ("x", 0.3), ("y", 0.4), (name, 0.5)]):
                ledger.append("asked", id, asked(formula, replicate=id))
                ledger.append("told", id, told(ap + shift))
    pairs = rank_agreement(read_run(tmp_path / "proxy"), read_run(tmp_path / "long"))
    assert pairs["formula"].tolist() == ["y", "x"]
    assert pairs["proxy"].tolist() == pytest.approx([0.4, 0.2]) and pairs["long"].tolist() == pytest.approx([0.5, 0.3])


def test_runs_are_found_in_a_folder_of_runs(tmp_path: Path) -> None:
    for name in ("tune", "compare"):
        Ledger.create(tmp_path / "all" / name, {}).close()
    (tmp_path / "all" / "weights").mkdir()
    assert find_runs(tmp_path / "all") == [tmp_path / "all" / "compare", tmp_path / "all" / "tune"]
    assert find_runs(tmp_path / "all" / "tune") == [tmp_path / "all" / "tune"]
    for wrong, found in (("all/weights", "neither"), ("absent", "no such folder")):
        with pytest.raises(LedgerError, match=found):
            find_runs(tmp_path / wrong)
    with pytest.raises(LedgerError, match="expected a run folder"):
        read_run(tmp_path / "all")
