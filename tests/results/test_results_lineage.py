import itertools
import random
from dataclasses import replace

import pytest
from made_joint_runs import BASE, FORMULA, TEACHERS, Step, base, large_search, records_of, small_search

from autodet.results.lineage import (
    COLUMNS,
    actions_of,
    base_of,
    cost_of,
    front,
    hypervolume_progress,
    joint_frame,
    lineage,
    parent_of,
    teacher_of,
)


def random_search(seed: int) -> list[Step]:
    """Children on a coarse grid, so that equal costs and APs are common."""
    dice = random.Random(seed)
    steps = [base(0.3)]
    for _ in range(25):
        status = dice.choice(["completed", "completed", "completed", "stopped", "failed", None])
        ap = dice.choice([0.1, 0.2, 0.3, 0.4]) if status in ("completed", "stopped") else None
        steps.append(Step(dice.choice([0.4, 0.6, 0.8, 1.0, 1.2]), ap, 0, status=status))
    return steps


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cost", ["latency_ratio", "macs_g"])
def test_front_equals_brute_force(seed: int, cost: str) -> None:
    records = records_of(random_search(seed))
    points = {r.id: (cost_of(r, cost) or 0.0, r.ap or 0.0) for r in records if r.status == "completed"}
    expected = [
        id
        for id, (price, ap) in points.items()
        if not any(
            other[0] <= price and other[1] >= ap and (other != (price, ap) or number < id)
            for number, other in points.items()
            if number != id
        )
    ]
    found = front(records, cost)
    assert sorted(record.id for record in found) == sorted(expected)
    assert [cost_of(r, cost) for r in found] == sorted(cost_of(r, cost) or 0.0 for r in found)


def test_hypervolume_grows_with_the_front_and_counts_all_that_ended() -> None:
    data = hypervolume_progress(records_of(small_search()))
    assert data["candidates"].tolist() == [1, 2, 3, 4, 5, 6] and data["id"].tolist() == [0, 1, 2, 3, 4, 5]
    first = 0.05 * 0.31
    second = first + 0.2 * 0.33 + 0.05 * 0.02
    fourth = 0.45 * 0.35
    assert data["hypervolume"].tolist() == pytest.approx([first, second, second, fourth, fourth, fourth])
    assert hypervolume_progress([]).empty


def test_lineage_goes_from_the_base_to_the_candidate() -> None:
    records = records_of(large_search(40, seed=2))
    for record in records:
        path = lineage(records, record.id)
        assert path[0].id == 0 and path[-1].id == record.id
        assert all(parent_of(child) == parent.id for parent, child in itertools.pairwise(path))
    assert [record.id for record in lineage(records_of(small_search()), 6)] == [0, 1, 3, 6]


def test_a_missing_ancestor_is_named() -> None:
    records = records_of(small_search())
    with pytest.raises(ValueError, match="the candidate to trace among the run's earlier candidates, found 99"):
        lineage(records, 99)
    with pytest.raises(ValueError, match="the parent of 6 among the run's earlier candidates, found 3"):
        lineage([record for record in records if record.id != 3], 6)
    circle = records_of([base(), Step(0.5, 0.2, parent=1)])
    with pytest.raises(ValueError, match="the parent of 1"):
        lineage(circle, 1)


def test_frame_has_the_numbers_of_the_records() -> None:
    frame = joint_frame(records_of(small_search())).set_index("id")
    assert [name for name in COLUMNS if name != "id"] == frame.columns.tolist() and len(frame) == 7
    row = frame.loc[3]
    assert (row["parent"], row["phase"], row["status"], row["epochs"]) == (1, "joint", "completed", 12)
    assert (row["ap"], row["latency_ratio"], row["seconds"]) == (0.35, 0.6, 90.0)
    assert row["gain"] == pytest.approx(0.02) and row["latency_ms"] == pytest.approx(20.4)
    assert row["macs_g"] == pytest.approx(0.66) and row["params_m"] == pytest.approx(1.32)
    assert (row["actions"], row["teacher"]) == ("prune_neck(width=48) > resize(pixels=160)", TEACHERS[0])
    assert row["formula"] == FORMULA and row["body"] == "basic-32:32x2(24,32)-64x2-128x3-256x1"
    assert (row["neck_width"], row["head_width"], row["pixels"], row["proposals"]) == (48, 256, 160, 300)
    assert frame["head_depth"].isna().all(), "only one-stage detectors have one"
    assert frame.index[frame["on_front"]].tolist() == [2, 3]
    assert frame.loc[[0, 4, 5, 6], "gain"].isna().all() and frame["parent"].isna().tolist() == [True] + [False] * 6


def test_masks_have_a_column_of_their_own_where_they_were_measured() -> None:
    steps = small_search()
    steps[3] = replace(steps[3], mask_ap=0.28)
    frame = joint_frame(records_of(steps)).set_index("id")
    assert frame.loc[3, "mask_ap"] == 0.28 and frame["mask_ap"].notna().sum() == 1
    assert front(records_of(steps)) == front(records_of(steps)) != [] and "mask_ap" not in COLUMNS


def test_the_base_is_named_and_has_no_teacher() -> None:
    records = records_of(small_search())
    first = base_of(reversed(records))
    assert first is not None and first.id == 0
    assert actions_of(first) == "base" and teacher_of(first) == "none" and str(BASE) == (first.student or {})["spec"]


def test_other_searches_records_have_empty_values() -> None:
    records = [replace(record, student=None) for record in records_of(small_search())]
    frame = joint_frame(records)
    assert len(frame) == 7 and frame["latency_ratio"].isna().all() and not frame["on_front"].any()
    assert front(records) == [] and base_of(records) is None and hypervolume_progress(records).empty
    assert joint_frame([]).columns.tolist() == list(COLUMNS)
