"""All twelve numbers against pycocotools used in its own documented way, on random detections."""

import copy
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from autodet.evaluation import Detection, evaluate_detections, per_category_ap
from autodet.records import METRIC_NAMES

CATEGORIES = (2, 17, 90)
SIDES = (12, 60, 150)  # pixels; small, medium and large objects


def random_truth(rng: np.random.Generator, sides: tuple[int, ...]) -> dict[str, Any]:
    """Five images with up to six objects or crowds each; ids start at 1, as pycocotools needs them."""
    images = [{"id": int(id_), "width": 400, "height": 300} for id_ in rng.choice(1000, 5, replace=False)]
    annotations: list[dict[str, Any]] = []
    for image in images[:4]:
        for _ in range(int(rng.integers(2, 7))):
            width, height = (rng.choice(sides) * rng.uniform(0.8, 1.2, 2)).tolist()
            x, y = (rng.uniform(0, 1, 2) * (400 - width, 300 - height)).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice(CATEGORIES)),
                    "bbox": [x, y, width, height],
                    "area": 0.8 * width * height,  # as a mask's: smaller than the box
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": c, "name": str(c)} for c in CATEGORIES]}


def random_detections(rng: np.random.Generator, truth: dict[str, Any]) -> list[Detection]:
    """Up to three shifted copies of every object, some of another class, and false alarms in every image."""
    found = []
    for image in truth["images"]:
        objects = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        rows = [(a["category_id"], a["bbox"]) for a in objects for _ in range(int(rng.integers(0, 4)))]
        rows += [(2, [*rng.uniform(0, 200, 2), *rng.uniform(5, 100, 2)]) for _ in range(3)]
        sizes = np.array([box[2:] * 2 for _, box in rows], dtype=np.float64)
        boxes = np.array([[x, y, x + w, y + h] for _, (x, y, w, h) in rows])
        categories = [c if rng.random() < 0.8 else int(rng.choice(CATEGORIES)) for c, _ in rows]
        moved = boxes + rng.normal(0, 0.06, boxes.shape) * sizes
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        found.append(Detection(image["id"], moved, rng.random(len(rows)), np.array(categories)))
    return found


def direct(truth: dict[str, Any], detections: list[Detection]) -> Any:
    """A COCOeval as pycocotools' own example makes it."""
    coco = COCO()
    coco.dataset = copy.deepcopy(truth) | {"info": {}}
    coco.createIndex()
    results = [
        {"image_id": d.image_id, "category_id": int(c), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(s)}
        for d in detections
        for (x1, y1, x2, y2), s, c in zip(d.boxes.tolist(), d.scores, d.category_ids, strict=True)
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("sides", [SIDES, (60,), (12, 150)])
@pytest.mark.parametrize("seed", range(4))
def test_all_twelve_numbers_equal_direct_use(seed: int, sides: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, sides)
    detections = random_detections(rng, truth)
    evaluation = direct(truth, detections)
    metrics = evaluate_detections(truth, detections).to_json()
    assert len(METRIC_NAMES) == len(evaluation.stats) == 12
    for name, value in zip(METRIC_NAMES, evaluation.stats, strict=True):
        assert metrics[name] == (None if value == -1 else pytest.approx(value, abs=1e-12)), name
    # Else the equality above would say little.
    assert 0 < evaluation.stats[0] < 1
    for index, category in enumerate(CATEGORIES):
        values = evaluation.eval["precision"][:, :, index, 0, 2]
        expected = None if (values == -1).all() else pytest.approx(values[values > -1].mean(), abs=1e-12)
        assert per_category_ap(truth, detections)[category] == expected


def test_every_image_may_be_given_in_any_order() -> None:
    rng = np.random.default_rng(9)
    truth = random_truth(rng, SIDES)
    detections = random_detections(rng, truth)
    assert evaluate_detections(truth, detections[::-1]) == evaluate_detections(truth, detections)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    truth = random_truth(rng, SIDES)
    evaluate_detections(truth, random_detections(rng, truth))
    per_category_ap(truth, [])
    assert capfd.readouterr() == ("", "")
