import itertools
import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from results_runs import asked, comparison_run, search_run, told

from autodet.ledger import Ledger
from autodet.results import plots
from autodet.results.detections import TINT, Panel, draw_detections, place_tags, tinted
from autodet.results.frame import paired_differences, rank_agreement, read_records, read_run


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height from a PNG's header."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_best_so_far_equals_brute_force(tmp_path: Path) -> None:
    dice = random.Random(0)
    with Ledger.create(tmp_path, {}) as ledger:
        for id in range(40):
            ledger.append("asked", id, asked("none", dice.choice(["divide", "weights"]), dice.choice(["a", "b"])))
        for id in dice.sample(range(40), 35):
            status = dice.choice(["completed", "completed", "stopped", "failed"])
            ledger.append("told", id, told(None if status == "failed" else dice.random(), status))
    data = plots.best_so_far(read_run(tmp_path))
    first = read_records(tmp_path)[0].asked_at
    rows = sorted((row for row in read_records(tmp_path) if row.told_at is not None), key=lambda row: row.told_at or 0)
    assert len(data) == 35 and data["candidates"].tolist() == list(range(1, 36))
    for i, row in enumerate(rows):
        same = [r for r in rows[: i + 1] if (r.phase, r.group) == (row.phase, row.group)]
        expected = max((r.ap for r in same if r.status == "completed" and r.ap is not None), default=math.nan)
        assert data["best"].iloc[i] == pytest.approx(expected, nan_ok=True)
        assert data["series"].iloc[i] == f"{row.phase}: {row.group}"
        assert row.told_at is not None
        assert data["seconds"].iloc[i] == pytest.approx(row.told_at - first, abs=1e-5)


def test_operation_wins_by_hand(tmp_path: Path) -> None:
    search_run(tmp_path)
    data = plots.operation_wins(read_run(tmp_path)).set_index(["kind", "name"])
    assert data.loc[("transform", "catt"), "count"] == 2
    assert data.loc[("transform", "catt"), "ap"] == pytest.approx(0.42)
    assert data.loc[("distance", "kl"), "ap"] == pytest.approx(0.45) and data.isna().loc[("distance", "kl"), "low"]
    assert ("distance", "l2") not in data.index, "a stopped candidate's AP is of another length"
    assert set(data.loc["input"].index) == {"global", "logits.roi"}


def test_a_candidate_counts_once_for_a_name_it_uses_twice(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}) as ledger:
        ledger.append("asked", 0, asked("global: l1 * 1; logits.rpn: norm(n) > norm(c) | l1 * 2"))
        ledger.append("told", 0, told(0.5))
    data = plots.operation_wins(read_run(tmp_path)).set_index("name")
    assert data["count"].to_dict() == {"l1": 1, "global": 1, "logits.rpn": 1, "(none)": 1, "norm": 1}


def test_every_picture_is_drawn_also_without_data(tmp_path: Path) -> None:
    search_run(tmp_path / "run")
    Ledger.create(tmp_path / "empty", {}).close()
    for name in ("run", "empty"):
        frame = read_run(tmp_path / name)
        drawn = [
            plots.draw_best_so_far(plots.best_so_far(frame)),
            plots.draw_operation_wins(plots.operation_wins(frame)),
            plots.draw_rank_agreement(rank_agreement(frame, frame)),
        ]
        assert all(min(size_of(plots.to_png(figure))) > 100 for figure in drawn)
    arms = paired_differences(read_run(comparison_run(tmp_path / "c", {"a": [0.1, 0.2], "b": [0.2, 0.4]})), "a")
    assert size_of(plots.to_png(plots.draw_comparison(arms, "a")))[0] > 400


def test_tags_never_overlap_and_stay_in_the_image() -> None:
    dice = np.random.default_rng(0)
    corner = dice.uniform(0, 80, (60, 2))
    boxes = np.concatenate([corner, corner + dice.uniform(5, 20, (60, 2))], axis=1)
    sizes = np.tile([14.0, 6.0], (60, 1))
    places = [place for place in place_tags(boxes, sizes, 100, 100) if place is not None]
    assert 10 < len(places) < 60
    assert all(0 <= x <= 86 and 0 <= y <= 94 for x, y in places)
    assert all(abs(a[0] - b[0]) >= 14 or abs(a[1] - b[1]) >= 6 for a, b in itertools.combinations(places, 2))


def test_first_tag_lies_above_its_box() -> None:
    assert place_tags(np.array([[10.0, 20, 30, 40]]), np.array([[8.0, 5.0]]), 100, 100) == [(10, 15)]
    assert place_tags(np.array([[10.0, 2, 30, 40]]), np.array([[8.0, 5.0]]), 100, 100) == [(10, 2)]
    assert place_tags(np.zeros((0, 4)), np.zeros((0, 2)), 100, 100) == []


@pytest.mark.parametrize("classes", [2, 12])
def test_detections_side_by_side(classes: int) -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    boxes = np.array([[5, 5, 20, 20], [30, 10, 50, 35]], np.float32)
    labels = np.array([1, classes], np.int64)
    truth = Panel("ground truth", image, boxes, labels)
    empty = Panel("student", image, boxes[:0], labels[:0], boxes[:0, 0])
    found = Panel("teacher", image, boxes, labels, np.array([0.5, 0.9], np.float32))
    names = {i: f"class {i}" for i in range(1, classes + 1)}
    figure = draw_detections([[truth, empty, found]] * 2, names)
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts[2] == (["0.90", "0.50"] if classes == 2 else ["class 12 0.90", "class 1 0.50"])
    assert texts[1] == [] and len(figure.axes) == 6
    assert size_of(plots.to_png(figure))[0] > 900


def test_masks_are_blended_in_by_the_colour_of_their_class_the_surest_last() -> None:
    image = np.full((4, 6, 3), 200, np.uint8)
    masks = np.zeros((2, 4, 6), dtype=bool)
    masks[0, :, :4], masks[1, :, 2:5] = True, True
    panel = Panel("found", image, np.zeros((2, 4)), np.array([2, 1]), np.array([0.9, 0.5], np.float32), masks)
    pixels = tinted(panel, {1: 0, 2: 1})
    first, second = ((1 - TINT) * 200 + TINT * np.array(colour) for colour in ((213, 94, 0), (0, 114, 178)))
    np.testing.assert_allclose(pixels[:, :4], np.broadcast_to(second, (4, 4, 3)), atol=1)
    np.testing.assert_allclose(pixels[:, 4], np.broadcast_to(first, (4, 3)), atol=1)
    assert (pixels[:, 5] == 200).all() and (image == 200).all()
    none = Panel("found", image, np.zeros((0, 4)), np.zeros(0, np.int64), masks=np.zeros((0, 4, 6), dtype=bool))
    assert np.array_equal(tinted(none, {}), image)


def test_rows_of_detections_must_be_alike() -> None:
    with pytest.raises(ValueError, match=r"found lengths \[\]"):
        draw_detections([], {})
