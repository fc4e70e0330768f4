"""COCO AP against a brute-force computation, on perfect detections, and the traps of pycocotools."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask
from torch import Tensor

from autodet.data import Batch, BatchPlan, CocoDataset, ImageCache, Loader, label_of, read_dataset
from autodet.evaluation import Detection, DetectionError, evaluate, evaluate_detections, per_category_ap, to_original
from autodet.records import Metrics

COCO_TINY = Path(__file__).parents[2] / "../shared/data/coco_tiny"
needs_coco_tiny = pytest.mark.skipif(not COCO_TINY.is_dir(), reason="the data set coco_tiny is not there")

Box = list[float]


def truth_of(boxes: dict[int, list[tuple[int, Box]]], first_id: int = 1, **more: Any) -> dict[str, Any]:
    """image id → (category id, xyxy); categories 3 and 7."""
    entries = [(image, category, box) for image, found in boxes.items() for category, box in found]
    return {
        "images": [{"id": image, "width": 200, "height": 200} for image in boxes],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {
                "id": first_id + number,
                "image_id": image,
                "category_id": category,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": (box[2] - box[0]) * (box[3] - box[1]),
                "iscrowd": 0,
                **more,
            }
            for number, (image, category, box) in enumerate(entries)
        ],
    }


def detection(image: int, found: list[tuple[int, Box, float]]) -> Detection:
    boxes = np.array([box for _, box, _ in found], dtype=np.float64).reshape(-1, 4)
    scores = np.array([score for *_, score in found])
    return Detection(image, boxes, scores, np.array([category for category, *_ in found], dtype=np.int64))


def iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


Truth = dict[int, list[tuple[int, Box]]]
Found = dict[int, list[tuple[int, Box, float]]]


def brute_force(truth: Truth, found: Found, category: int, threshold: float) -> tuple[float, float]:
    """(AP, recall) of one category: matched greedily by score, precision interpolated at 101 recalls."""
    scored = sorted(
        ((s, i, b) for i, list_ in found.items() for c, b, s in list_ if c == category), key=lambda x: -x[0]
    )
    open_ = {i: [b for c, b in list_ if c == category] for i, list_ in truth.items()}
    total = sum(map(len, open_.values()))
    hits: list[bool] = []
    for _, image, box in scored:
        best = max(open_[image], key=lambda other: iou(box, other), default=None)
        hit = best is not None and iou(box, best) >= threshold
        if hit and best is not None:
            open_[image].remove(best)
        hits.append(hit)
    points = [(sum(hits[: n + 1]) / total, sum(hits[: n + 1]) / (n + 1)) for n in range(len(hits))]
    # COCO's recalls are these rounded numbers: 7 of 10 found does not reach its 0.7000000000000001.
    precision = [max((p for r, p in points if r >= recall), default=0.0) for recall in np.linspace(0, 1, 101)]
    return sum(precision) / 101, sum(hits) / total


def random_case(seed: int) -> tuple[Truth, Found]:
    rng = np.random.default_rng(seed)
    truth: Truth = {}
    found: Found = {}
    for image in (11, 5, 8):
        corners = rng.integers(0, 100, size=(6, 2))
        boxes = [
            [float(x), float(y), float(x + rng.integers(20, 90)), float(y + rng.integers(20, 90))] for x, y in corners
        ]
        truth[image] = [(int(rng.choice([3, 7])), box) for box in boxes[:4]] + [(3, boxes[4]), (7, boxes[5])]
        moved = [[v + float(d) for v, d in zip(box, rng.normal(0, 4, 4), strict=True)] for box in boxes + boxes[:3]]
        found[image] = [
            (int(rng.choice([c, 3, 7])), box, float(rng.random()))
            for (c, _), box in zip(truth[image] * 2, moved, strict=False)
        ]
    return truth, found


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_brute_force(seed: int) -> None:
    truth, found = random_case(seed)
    detections = [detection(image, list_) for image, list_ in found.items()]
    thresholds = [0.5 + 0.05 * k for k in range(10)]
    expected = {c: [brute_force(truth, found, c, t) for t in thresholds] for c in (3, 7)}
    metrics = evaluate_detections(truth_of(truth), detections)
    aps = {c: [ap for ap, _ in list_] for c, list_ in expected.items()}
    assert 0.1 < np.mean([*aps.values()]) < 0.9
    assert metrics.ap == pytest.approx(np.mean([*aps.values()]), abs=1e-9)
    assert metrics.ap50 == pytest.approx(np.mean([aps[3][0], aps[7][0]]), abs=1e-9)
    assert metrics.ap75 == pytest.approx(np.mean([aps[3][5], aps[7][5]]), abs=1e-9)
    assert metrics.ar100 == pytest.approx(np.mean([[r for _, r in list_] for list_ in expected.values()]), abs=1e-9)
    by_category = per_category_ap(truth_of(truth), detections)
    assert by_category == {c: pytest.approx(np.mean(aps[c]), abs=1e-9) for c in (3, 7)}


def perfect(truth: dict[str, Any]) -> list[Detection]:
    found: Found = {image["id"]: [] for image in truth["images"]}
    for entry in truth["annotations"]:
        x, y, w, h = entry["bbox"]
        found[entry["image_id"]].append((entry["category_id"], [x, y, x + w, y + h], 1.0))
    return [detection(image, list_) for image, list_ in found.items()]


def test_annotation_id_0_counts_like_any_other() -> None:
    truth = truth_of({1: [(3, [10, 10, 60, 60])], 2: [(3, [10, 10, 50, 50]), (7, [100, 100, 150, 190])]}, first_id=0)
    assert evaluate_detections(truth, perfect(truth)).ap == pytest.approx(1.0)


def test_repeated_annotation_ids_count_one_by_one() -> None:
    truth = truth_of({1: [(3, [10, 10, 60, 60])], 2: [(3, [10, 10, 50, 50])]})
    for entry in truth["annotations"]:
        entry["id"] = 5
    assert evaluate_detections(truth, perfect(truth)).ap == pytest.approx(1.0)


def test_sizes_without_objects_are_none_and_the_truth_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    truth = truth_of({1: [(3, [10, 10, 60, 60])]})
    before = copy.deepcopy(truth)
    metrics = evaluate_detections(truth, perfect(truth))
    assert (metrics.ap, metrics.ap50, metrics.ap_medium, metrics.ar1) == pytest.approx((1.0,) * 4)
    assert metrics.ap_small is None and metrics.ap_large is None and metrics.ar_small is None
    assert per_category_ap(truth, perfect(truth)) == {3: pytest.approx(1.0), 7: None}
    assert truth == before
    assert capsys.readouterr().out == ""


def test_nothing_found_scores_zero() -> None:
    truth = truth_of({1: [(3, [10, 10, 60, 60])], 2: []})
    for nothing in ([], [detection(1, []), detection(2, [])]):
        metrics = evaluate_detections(truth, nothing)
        assert metrics.ap == metrics.ap50 == metrics.ar100 == metrics.ap_medium == 0.0


def test_nothing_to_find_has_no_ap() -> None:
    assert evaluate_detections(truth_of({1: []}), [detection(1, [(3, [0, 0, 9, 9], 0.5)])]) == Metrics()


def test_detections_inside_a_crowd_are_ignored() -> None:
    truth = truth_of({1: [(3, [10, 10, 60, 60]), (3, [100, 100, 190, 190])]})
    truth["annotations"][1]["iscrowd"] = 1
    inside = [(3, [110.0 + k, 110.0, 150.0, 150.0], 0.99) for k in range(5)]
    found = detection(1, [(3, [10, 10, 60, 60], 0.5), *inside])
    assert evaluate_detections(truth, [found]).ap == pytest.approx(1.0)
    truth["annotations"][1]["iscrowd"] = 0
    assert (evaluate_detections(truth, [found]).ap or 0.0) < 0.3


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([detection(1, [(3, [0, 0, 9, 9], math.nan)])], "image 1: expected finite scores, found 1"),
        ([detection(1, [(3, [0, 0, 9, math.inf], 0.5)])], "image 1: expected finite boxes, found 1"),
        ([detection(1, [(3, [50, 50, 20, 90], 0.5)])], "x2 < x1"),
        ([detection(1, [(4, [0, 0, 9, 9], 0.5)])], r"category ids, found \[4\]"),
        ([detection(9, [(3, [0, 0, 9, 9], 0.5)])], r"unknown image ids \[9\]"),
        ([detection(1, []), detection(1, [])], "one Detection an image"),
        ([Detection(1, np.zeros((2, 4)), np.zeros(1), np.full(1, 3))], "N×4 boxes"),
    ],
)
def test_what_cannot_be_scored_is_an_error(found: list[Detection], words: str) -> None:
    with pytest.raises(DetectionError, match=words):
        evaluate_detections(truth_of({1: [(3, [10, 10, 60, 60])]}), found)


def test_masks() -> None:
    polygon = [[10.0, 10.0, 60.0, 10.0, 60.0, 60.0, 10.0, 60.0]]
    truth = truth_of({1: [(3, [10, 10, 60, 60])]}, segmentation=polygon)
    half = np.zeros((200, 200), dtype=np.uint8, order="F")
    half[10:60, 10:41] = 1  # 62 % of the object: a match at 0.5, 0.55 and 0.6
    found = perfect(truth)[0]
    for masks, expected in ((mask.frPyObjects(polygon, 200, 200), 1.0), ([mask.encode(half)], 0.3)):
        with_masks = Detection(1, found.boxes, found.scores, found.category_ids, masks)
        assert evaluate_detections(truth, [with_masks], "segm").ap == pytest.approx(expected)
    with pytest.raises(DetectionError, match="expected 1 masks"):
        evaluate_detections(truth, [found], "segm")
    with pytest.raises(ValueError, match="found 'keypoints'"):
        evaluate_detections(truth, [found], "keypoints")  # type: ignore[arg-type]


def test_to_original() -> None:
    boxes = torch.tensor([[0.0, 0.0, 50.0, 40.0], [10.0, 20.0, 30.0, 40.0]])
    expected = torch.tensor([[0.0, 0.0, 200.0, 80.0], [40.0, 40.0, 120.0, 80.0]])
    torch.testing.assert_close(to_original(boxes, (40, 50), (80, 200)), expected)


class StubLoader:
    """One batch of two images at half their size."""

    def eval_batches(self, batch_size: int) -> list[Batch]:
        targets = [{"image_id": torch.tensor(i), "orig_size": torch.tensor([200, 200])} for i in (1, 2)]
        return [Batch(None, [torch.zeros(3, 100, 100)] * 2, targets)]  # type: ignore[arg-type]


class StubDataset:
    def coco_dict(self) -> dict[str, Any]:
        return truth_of({1: [(3, [10, 10, 60, 60])], 2: [(7, [100, 100, 150, 190])]})


def test_evaluate_scales_boxes_maps_labels_and_drops_foreign_ones() -> None:
    def detect(batch: Batch) -> list[dict[str, Tensor]]:
        foreign = [0.0, 0.0, 9.0, 9.0]
        boxes = ([[5.0, 5, 30, 30], foreign], [[50.0, 50, 75, 95], foreign])
        return [
            {"boxes": torch.tensor(b), "scores": torch.tensor([0.5, 0.9]), "labels": torch.tensor([label, 55])}
            for b, label in zip(boxes, (1, 2), strict=True)
        ]

    loader, dataset = StubLoader(), StubDataset()
    assert evaluate(detect, loader, dataset, {1: 3, 2: 7}).ap == pytest.approx(1.0)  # type: ignore[arg-type]
    assert evaluate(detect, loader, dataset, {1: 7, 2: 3}).ap == 0.0  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def coco_tiny() -> CocoDataset:
    return read_dataset(COCO_TINY, required=("val",))["val"]


@needs_coco_tiny
def test_ground_truth_as_detections_is_perfect_on_every_class(coco_tiny: CocoDataset) -> None:
    truth = json.loads((COCO_TINY / "annotations/instances_val2017.json").read_text())
    assert any(entry["iscrowd"] for entry in truth["annotations"])
    present = {entry["category_id"] for entry in truth["annotations"] if not entry["iscrowd"]}
    for number, entry in enumerate(truth["annotations"]):
        entry["id"] = number
    for ground in (truth, coco_tiny.coco_dict()):
        by_category = per_category_ap(ground, perfect(ground))
        assert {id_ for id_, ap in by_category.items() if ap is not None} == present
        assert all(ap == pytest.approx(1.0) for ap in by_category.values() if ap is not None)
    metrics = evaluate_detections(truth, perfect(truth))
    values = (metrics.ap, metrics.ap50, metrics.ap75, metrics.ap_small, metrics.ap_medium, metrics.ap_large)
    assert values == pytest.approx((1.0,) * 6)


@needs_coco_tiny
def test_the_loaders_targets_as_detections_are_perfect(coco_tiny: CocoDataset, tmp_path: Path) -> None:
    """Through cache, resizing and back: crowds are not among the targets, and not missed either."""
    dataset = coco_tiny.subset(0.25, seed=0)
    labels = label_of(dataset.categories)
    loader = Loader(ImageCache(dataset, 160, 256, tmp_path), dataset, labels, BatchPlan(4, 0))

    def detect(batch: Batch) -> list[dict[str, Tensor]]:
        return [t | {"scores": torch.full((len(t["labels"]),), 0.9)} for t in batch.targets]

    metrics = evaluate(detect, loader, dataset, {label: id_ for id_, label in labels.items()}, 4)
    assert metrics.ap == pytest.approx(1.0)
