"""All twelve numbers against pycocotools used in its own documented way, on random detections."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from autodet.evaluation import Detection, evaluate_detections, per_category_ap
from autodet.evaluation.coco_ap import IouType
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


def with_masks(truth: dict[str, Any], detections: list[Detection], rng: np.random.Generator) -> list[Detection]:
    """Give every object a polygon or run lengths (an ellipse in its box), in place, and every detection an ellipse."""
    for number, entry in enumerate(truth["annotations"]):
        x, y, width, height = entry["bbox"]
        ellipse = elliptic(x, y, x + width, y + height)
        entry["area"] = float(coco_mask.area(ellipse))
        turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        corners = np.stack([x + width / 2 * (1 + np.cos(turns)), y + height / 2 * (1 + np.sin(turns))], axis=1)
        entry["segmentation"] = ellipse if entry["iscrowd"] or number % 3 == 0 else [corners.flatten().tolist()]
    return [
        replace(found, masks=[elliptic(*(box + rng.normal(0, 1, 4)).tolist()) for box in found.boxes])
        for found in detections
    ]


def elliptic(x1: float, y1: float, x2: float, y2: float) -> dict[str, Any]:
    """The run-length code of an ellipse in an image of 400×300."""
    y, x = np.mgrid[0:300, 0:400] + 0.5
    radii = max((x2 - x1) / 2, 0.5), max((y2 - y1) / 2, 0.5)
    inside = ((x - (x1 + x2) / 2) / radii[0]) ** 2 + ((y - (y1 + y2) / 2) / radii[1]) ** 2 <= 1
    code: dict[str, Any] = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    return code


def direct(truth: dict[str, Any], detections: list[Detection], iou_type: IouType = "bbox") -> Any:
    """A COCOeval as pycocotools' own example makes it."""
    coco = COCO()
    coco.dataset = copy.deepcopy(truth) | {"info": {}}
    coco.createIndex()
    results = []
    for d in detections:
        for i, (x1, y1, x2, y2) in enumerate(d.boxes.tolist()):
            entry = {"image_id": d.image_id, "category_id": int(d.category_ids[i]), "score": float(d.scores[i])}
            shape = {"bbox": [x1, y1, x2 - x1, y2 - y1]} if d.masks is None else {"segmentation": d.masks[i]}
            results.append(entry | shape)
    evaluation = COCOeval(coco, coco.loadRes(results), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("sides", [SIDES, (60,), (12, 150)])
@pytest.mark.parametrize("seed", range(4))
def test_all_twelve_numbers_equal_direct_use(seed: int, sides: tuple[int, ...], iou_type: IouType) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, sides)
    detections = random_detections(rng, truth)
    if iou_type == "segm":
        detections = with_masks(truth, detections, rng)
    evaluation = direct(truth, detections, iou_type)
    metrics = evaluate_detections(truth, detections, iou_type).to_json()
    assert len(METRIC_NAMES) == len(evaluation.stats) == 12
    for name, value in zip(METRIC_NAMES, evaluation.stats, strict=True):
        assert metrics[name] == (None if value == -1 else pytest.approx(value, abs=1e-12)), name
    # Else the equality above would say little.
    assert 0 < evaluation.stats[0] < 1
    for index, category in enumerate(CATEGORIES):
        values = evaluation.eval["precision"][:, :, index, 0, 2]
        expected = None if (values == -1).all() else pytest.approx(values[values > -1].mean(), abs=1e-12)
        assert per_category_ap(truth, detections, iou_type)[category] == expected


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
