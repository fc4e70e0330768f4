import math
from pathlib import Path

import pandas as pd
import pytest
from guidance_runs import Row, again, arm, control, write_run

from autodet.ledger import Ledger
from autodet.results.facts import read_runs, run_names
from autodet.results.gains import gain_over_control, seed_spread
from autodet.results.guidance import alone, input_ranks, inputs_alone, second_hand_agreement, transfers
from autodet.results.hours import costs
from autodet.results.intervals import mean_interval

BEST = "global: catt | l1 * 1"
ROI = "logits.roi: softmax(c, t=2) | kl * 1"
SEARCH = [
    control(0.30),
    control(0.32, 1),
    control(0.31, 2),
    Row(BEST, 0.40),
    Row("global: l2 * 1", 0.36),
    Row("global: gram | l1 * 1", 0.34),
    Row("global: norm(c) | l1 * 1", 0.20),
    Row("global: satt | l1 * 1", "0.5"),
    Row("global: mask(0.5) | l1 * 1", "failed"),
    Row("global: tanh | l1 * 1", "running"),
    Row(ROI, 0.35),
    again(BEST, 0.35, 1),
    again(BEST, 0.36, 2),
    Row("global: catt | l1 * 0.5", 0.9, 0, "weights"),
    again("global: catt | l1 * 0.5", 0.9, 1),
    Row(f"{BEST}; {ROI}", 0.9, 0, "flat"),
]


def test_inputs_alone_by_hand(tmp_path: Path) -> None:
    table = inputs_alone(read_runs([write_run(tmp_path / "search", SEARCH)]))
    assert table["input"].tolist() == ["global", "logits.roi"] and table["rank"].tolist() == [1, 2]
    assert table["of"].tolist() == [2, 2] and set(table["run"]) == {"search"}
    top = table.iloc[0]
    assert (top["candidates"], top["completed"], top["formula"]) == (6, 4, BEST)
    assert (top["best"], top["top3"], top["median"]) == pytest.approx((0.40, 1.10 / 3, 0.35))
    assert (top["gain"], top["pairs"], top["basis"]) == (pytest.approx(0.04), 2, "fresh seeds")  # 0.03 and 0.05
    single = table.iloc[1]
    assert (single["gain"], single["pairs"], single["basis"]) == (pytest.approx(0.05), 1, "fresh seeds")


def test_few_pairs_take_the_spread_of_the_whole_run(tmp_path: Path) -> None:
    frame = read_runs([write_run(tmp_path, SEARCH[:13])])
    # Controls: Σd² = 2 · 0.01²; the formula: 0.40, 0.35, 0.36 around 0.37: Σd² = (9 + 4 + 1) · 0.01². Freedom 2 + 2.
    assert seed_spread(frame) == pytest.approx((0.02, 4))
    row = inputs_alone(frame).iloc[0]
    half = 2.776445 * 0.02 * math.sqrt(2 / 2)
    assert (row["low"], row["high"]) == pytest.approx((0.04 - half, 0.04 + half))


def test_three_pairs_have_an_interval_of_their_own(tmp_path: Path) -> None:
    rows = [*(control(ap, seed) for seed, ap in enumerate((0.3, 0.3, 0.4))), *arm("found", BEST, [0.31, 0.32, 0.43])]
    gain = gain_over_control(read_runs([write_run(tmp_path, rows)]), BEST, True)
    assert gain[:3] == pytest.approx(mean_interval([0.01, 0.02, 0.03])) and gain.pairs == 3


@pytest.mark.parametrize(
    ("controls", "chosen_by", "gain", "basis"),
    [
        ([control(0.3)], {0}, 0.1, "choosing seeds"),
        ([control(0.3)], None, 0.1, "fresh seeds"),
        ([control(0.3, 5), control(0.2, 6)], None, 0.15, "no seed in common"),
        ([], None, math.nan, "no control"),
    ],
)
def test_a_gain_says_what_it_rests_on(
    controls: list[Row], chosen_by: set[int] | None, gain: float, basis: str, tmp_path: Path
) -> None:
    frame = read_runs([write_run(tmp_path, [*controls, Row(BEST, 0.4)])])
    found = gain_over_control(frame, BEST, True, chosen_by)
    assert found.gain == pytest.approx(gain, nan_ok=True) and found.basis == basis and math.isnan(found.low)
    assert gain_over_control(frame, BEST, False).basis == "no control"  # controls that inherit are no control for it


def test_a_formula_counts_once_by_its_first_run(tmp_path: Path) -> None:
    rows = [Row(BEST, 0.2, 1), Row(BEST, 0.4, 0), Row("global: none_such | l1 * 1", 0.3)]
    assert alone(read_runs([write_run(tmp_path, rows)]))["ap"].tolist() == [0.4, 0.3]


def test_an_input_of_which_all_failed_ranks_last(tmp_path: Path) -> None:
    rows = [control(0.3), Row("fg: l1 * 1", "failed"), Row("bg: l1 * 1", "failed"), Row(BEST, 0.1)]
    table = inputs_alone(read_runs([write_run(tmp_path, rows)])).set_index("input")
    assert table["rank"].to_dict() == {"global": 1, "bg": 2.5, "fg": 2.5}
    assert table.loc["fg", "completed"] == 0 and table.loc["fg"].isna()["gain"] and table.loc["fg", "basis"] == ""


def test_runs_without_content_give_empty_tables(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "empty", {}).close()
    write_run(tmp_path / "begun", [Row("none", "running", phase="control", origin="control")])
    for names in ([], ["empty"], ["begun"], ["empty", "begun"]):
        frame = read_runs([tmp_path / name for name in names])
        inputs = inputs_alone(frame)
        assert inputs.empty and input_ranks(inputs).empty and transfers(frame).empty
        assert math.isnan(second_hand_agreement(input_ranks(inputs))[0])
    assert costs(frame)["hours"].tolist() == [0, 0]


def test_ranks_over_runs_and_their_agreement_with_the_published(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [Row(f"{name}: l1 * 1", ap) for name, ap in {"fg": 0.4, "bg": 0.1}.items()])
    rows = {"global": 0.5, "fg": 0.3, "logits.dense": 0.2, "logits.roi": 0.4, "new": 0.6}
    second = write_run(tmp_path / "b", [control(0.25), *(Row(f"{name}: l1 * 1", ap) for name, ap in rows.items())])
    ranks = input_ranks(inputs_alone(read_runs([first, second]))).set_index("input")
    assert ranks["rank"].to_dict() == {"new": 1, "bg": 2, "global": 2, "fg": 2.5, "logits.roi": 3, "logits.dense": 5}
    assert ranks.loc["fg", "runs"] == 2 and ranks.loc["fg", "gain"] == pytest.approx(0.05)
    assert ranks.loc["logits.roi", "second_hand"] == 5 and ranks.isna().loc["new", "second_hand"]
    correlation, families, chance = second_hand_agreement(ranks)
    assert (correlation, families) == pytest.approx((math.sqrt(3) / 2, 3))  # global 2, fg-bg 2 (by bg), logits 3
    assert chance == pytest.approx(2 / 6)  # the tie: two of the six orders agree as well


def test_costs_by_hand(tmp_path: Path) -> None:
    task = {"device": "cpu", "threads": 2, "data": "/d/bccd", "student": {"family": "fcos", "body": "basic-8"}}
    runs = [
        write_run(tmp_path / "cpu", SEARCH[:4], {"task": task | {"teacher": "/t/big.safetensors"}}, seconds=900),
        write_run(tmp_path / "gpu", SEARCH[:2], {"task": task | {"device": "cuda"}}, seconds=1800),
        write_run(tmp_path / "unknown", [Row(BEST, "failed")], seconds=3600),
    ]
    table = costs(read_runs(runs)).set_index(["run", "phase"])
    assert table["hours"].to_dict() == {
        ("cpu", "control"): 1.5,
        ("cpu", "formula"): 0.5,
        ("cpu", "all"): 2.0,
        ("gpu", "control"): 1.0,
        ("gpu", "all"): 1.0,
        ("unknown", "formula"): 1.0,
        ("unknown", "all"): 1.0,
    }
    assert table["unit"].unique().tolist() == ["core-hours", "GPU-hours", "training hours"]
    whole = table.xs(("cpu", "all"))
    assert (whole["pair"], whole["data"]) == ("big → fcos basic-8", "bccd")
    assert (whole["ap"], whole["gain"], whole["basis"]) == (0.40, pytest.approx(0.1), "choosing seeds")
    assert table["ap"].notna().sum() == 1 and table.loc[("unknown", "all"), "completed"] == 0


def test_a_comparison_was_no_choice(tmp_path: Path) -> None:
    rows = [*arm("inherit-only", "none", [0.3, 0.3]), *arm("pkd", ROI, [0.5, 0.5]), *arm("found", BEST, [0.4, 0.4])]
    whole = costs(read_runs([write_run(tmp_path, rows)])).iloc[-1]
    assert (whole["ap"], whole["gain"], whole["basis"]) == (pytest.approx(0.4), pytest.approx(0.1), "fresh seeds")


def test_transfers_by_hand(tmp_path: Path) -> None:
    control_arm, other = arm("inherit-only", "none", [0.50, 0.52, 0.54]), arm("from b.v2", ROI, [0.51, 0.54, 0.57])
    home = [*arm("inherit-only", "none", [0.3, 0.3]), *arm("found", ROI, [0.34, 0.36])]
    runs = [
        write_run(tmp_path / "a", [*control_arm, *arm("found", BEST, [0.53, 0.55, 0.57]), *other]),
        write_run(tmp_path / "b.v2", home),
        write_run(tmp_path / "no-baseline", other),
    ]
    table = transfers(read_runs(runs))
    assert table["run"].tolist() == ["a"] and table["arm"].tolist() == ["from b.v2"] and table["formula"][0] == ROI
    row = table.iloc[0]
    assert tuple(row[["difference", "low", "high"]]) == pytest.approx(mean_interval([0.01, 0.02, 0.03]))
    assert (row["ap"], row["pairs"], row["own"], row["home"]) == pytest.approx((0.54, 3, 0.03, 0.05))
    alone = transfers(read_runs(runs[:1]))
    assert pd.isna(alone["home"][0])


def test_runs_are_told_apart_by_their_names(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("x/search", "y/search", "y/other.1")]
    assert run_names(folders) == ["x/search", "y/search", "other.1"]
    write_run(tmp_path / "search", [])
    write_run(tmp_path / "search" / "students", [])
    assert run_names([tmp_path / "search" / "students"]) == ["search/students"]
    assert run_names([tmp_path / "search", tmp_path / "search"]) == ["search", "search"]


def test_the_facts_of_a_search_and_of_what_starts_from_it(tmp_path: Path) -> None:
    config = {"script": "search_distiller", "student": "fcos basic-8 labels=[]", "options": {"data": "/d/cells"}}
    search = write_run(tmp_path / "cells.1", [control(0.3)], config)
    write_run(tmp_path / "cmp", [], {"script": "compare_distillers", "options": {"run": str(search)}})
    task = {"device": "cuda", "threads": 1, "data": "/d/cells", "student": {"family": "fcos", "body": "basic-8"}}
    task["teacher"] = f"/somewhere/{'a' * 64}.safetensors"
    inner = write_run(tmp_path / "cmp" / "compare", [control(0.3)], {"script": "compare", "task": task})
    frame = read_runs([search, inner])
    assert frame["run"].tolist() == ["cells.1", "cmp/compare"] and frame["data"].tolist() == ["cells", "cells"]
    assert frame["pair"].tolist() == ["cells.1's teacher → fcos basic-8"] * 2
    assert frame["device"].tolist() == ["", "cuda"]
