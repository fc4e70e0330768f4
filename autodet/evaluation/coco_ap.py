"""The numbers of the COCO evaluation, of boxes and of masks, by pycocotools, quiet and with its traps closed.

Detections are given in pixels of the original images. What pycocotools would pass over in silence is an error here: NaN
scores or boxes, unknown images and categories, an image twice. Annotation ids are renumbered, because an annotation
with id 0 counts as never matched. pycocotools prints; its output is discarded by redirecting stdout for that time.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import area as mask_area
from torch import Tensor

from autodet.data import Batch, CocoDataset, Loader
from autodet.evaluation.masks import encoded_masks
from autodet.records import METRIC_NAMES, Metrics

IouType = Literal["bbox", "segm"]
Array = npt.NDArray[Any]


class DetectionError(ValueError):
    """Detections that cannot be scored: not finite, malformed, or of an unknown image or category."""


@dataclass(frozen=True)
class Detection:
    """All detections of one image.

    boxes: N×4 xyxy in pixels of the original image; scores: N; category_ids: N, as in the ground truth.
    masks: for "segm" only, N run-length encodings as of ``pycocotools.mask.encode``, of the original image's size.
    """

    image_id: int
    boxes: Array
    scores: Array
    category_ids: Array
    masks: Sequence[Mapping[str, Any]] | None = None


def evaluate_detections(
    truth: Mapping[str, Any], detections: Sequence[Detection], iou_type: IouType = "bbox"
) -> Metrics:
    """The twelve COCO numbers, 0–1; None where the ground truth has no object of that size.

    truth: a COCO dictionary (images, annotations, categories), left as it is. Images without a Detection count as
    images where nothing was found; no detections at all score 0. Raises DetectionError.
    """
    evaluation = _run(truth, detections, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    numbers = (float(value) for value in evaluation.stats)
    return Metrics(**{name: _or_none(value) for name, value in zip(METRIC_NAMES, numbers, strict=True)})


def per_category_ap(
    truth: Mapping[str, Any], detections: Sequence[Detection], iou_type: IouType = "bbox"
) -> dict[int, float | None]:
    """Category id → AP (mean over IoU 0.5–0.95, all sizes, 100 detections); None where the truth has no such object."""
    evaluation = _run(truth, detections, iou_type)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU × recall × category; -1 where there is no truth
    means = precision.mean(axis=(0, 1))
    return {int(id_): _or_none(float(mean)) for id_, mean in zip(evaluation.params.catIds, means, strict=True)}


def evaluate(
    detect: Callable[[Batch], Sequence[Mapping[str, Tensor]]],
    loader: Loader,
    dataset: CocoDataset,
    label_to_category: Mapping[int, int],
    batch_size: int = 8,
) -> Metrics:
    """COCO metrics of a detector on a data set; of masks too where detector and data have them.

    detect: batch → for each image ``boxes`` N×4 xyxy in pixels of the batch's image, ``scores`` N, ``labels`` N, and
    ``masks`` N×1×H×W in 0–1 at the size of the batch's image, where it gives any. It puts the detector into evaluation
    mode and moves images to its device. loader: of ``dataset``. label_to_category: label → category id; detections with
    other labels are dropped, since the data has no such class.
    """
    found, truth = [], dataset.coco_dict()
    with_masks = all("segmentation" in annotation for annotation in truth["annotations"])
    for batch in loader.eval_batches(batch_size):
        outputs = detect(batch)
        for output, image, target in zip(outputs, batch.images, batch.targets, strict=True):
            found.append(_detection(output, image, target, label_to_category, with_masks))
    metrics = evaluate_detections(truth, found)
    if not found or any(detection.masks is None for detection in found):
        return metrics
    return metrics.with_masks(evaluate_detections(truth, found, "segm"))


def to_original(boxes: Tensor, resized_hw: tuple[int, int], original_hw: tuple[int, int]) -> Tensor:
    """Boxes N×4 xyxy in pixels of the resized image → in pixels of the original one; sizes are (height, width)."""
    y, x = (original / resized for original, resized in zip(original_hw, resized_hw, strict=True))
    return boxes * boxes.new_tensor([x, y, x, y])


def _detection(
    output: Mapping[str, Tensor],
    image: Tensor,
    target: Mapping[str, Tensor],
    label_to_category: Mapping[int, int],
    with_masks: bool,
) -> Detection:
    resized = (int(image.shape[-2]), int(image.shape[-1]))
    height, width = (int(size) for size in target["orig_size"])
    boxes = to_original(output["boxes"].detach().double(), resized, (height, width)).cpu().numpy()
    labels = output["labels"].tolist()
    known = np.array([label in label_to_category for label in labels], dtype=bool)
    categories = np.array([label_to_category[label] for label in labels if label in label_to_category], dtype=np.int64)
    scores = output["scores"].detach().double().cpu().numpy()
    masks = None
    if with_masks and "masks" in output:  # encoded here, image by image: a split's in full would not fit a memory
        masks = encoded_masks(output["masks"][torch.from_numpy(known)], (height, width))
    return Detection(int(target["image_id"]), boxes[known], scores[known], categories, masks)


def _run(truth: Mapping[str, Any], detections: Sequence[Detection], iou_type: IouType) -> Any:
    """A COCOeval that has evaluated and accumulated."""
    if iou_type not in get_args(IouType):
        raise ValueError(f"expected the IoU type {' or '.join(get_args(IouType))}, found {iou_type!r}")
    _check(truth, detections, iou_type)
    annotations = [{**entry, "id": number} for number, entry in enumerate(truth["annotations"], start=1)]
    results = [entry for detection in detections for entry in _entries(detection, iou_type)]
    results = [{**entry, "id": number} for number, entry in enumerate(results, start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(truth, annotations), _index(truth, results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _index(truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
    """pycocotools' index; built directly since its ``loadRes`` fails on an empty list of results."""
    coco = COCO()
    coco.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": annotations}
    coco.createIndex()
    return coco


def _entries(detection: Detection, iou_type: IouType) -> list[dict[str, Any]]:
    """One result a box, as pycocotools wants it: xywh, with the area that puts it into a size class."""
    boxes = np.asarray(detection.boxes, dtype=np.float64).reshape(-1, 4)
    entries = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        entry: dict[str, Any] = {
            "image_id": detection.image_id,
            "category_id": int(detection.category_ids[i]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "score": float(detection.scores[i]),
            "iscrowd": 0,
        }
        if iou_type == "segm" and detection.masks is not None:
            # As pycocotools itself: with masks the size class follows the mask.
            entry |= {"segmentation": dict(detection.masks[i]), "area": float(mask_area(detection.masks[i]))}
        entries.append(entry)
    return entries


def _check(truth: Mapping[str, Any], detections: Sequence[Detection], iou_type: IouType) -> None:
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    counts = Counter(detection.image_id for detection in detections)
    twice = [id_ for id_, count in counts.items() if count > 1]
    if twice:
        raise DetectionError(f"expected one Detection an image, found more for image ids {twice[:5]}; join them")
    unknown = [id_ for id_ in counts if id_ not in images]
    if unknown:
        raise DetectionError(f"expected detections of the ground truth's images, found unknown image ids {unknown[:5]}")
    for detection in detections:
        problem = _problem(detection, categories, iou_type)
        if problem is not None:
            raise DetectionError(f"image {detection.image_id}: {problem}")


def _problem(detection: Detection, categories: set[int], iou_type: IouType) -> str | None:
    """What is wrong with the detections of one image, or None."""
    boxes, scores = np.asarray(detection.boxes), np.asarray(detection.scores)
    count = len(scores)
    if boxes.size != 4 * count or len(detection.category_ids) != count:
        sizes = f"boxes {boxes.shape}, scores {scores.shape}, category_ids {len(detection.category_ids)}"
        return f"expected N×4 boxes, N scores and N category_ids, found {sizes}"
    for name, values in (("scores", scores), ("boxes", boxes)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            return f"expected finite {name}, found {bad} that are NaN or infinite; the detector has probably diverged"
    if count and bool((boxes.reshape(-1, 4)[:, 2:] < boxes.reshape(-1, 4)[:, :2]).any()):
        return "expected boxes as x1, y1, x2, y2, found some with x2 < x1 or y2 < y1; convert them from x, y, w, h"
    unknown = sorted(set(np.asarray(detection.category_ids).tolist()) - categories)
    if unknown:
        return f"expected the ground truth's category ids, found {unknown[:5]}; map labels to category ids"
    if iou_type == "segm" and len(detection.masks or ()) != count:
        return f"expected {count} masks for 'segm', found {len(detection.masks or ())}"
    return None


def _or_none(value: float) -> float | None:
    """pycocotools writes -1 where there is no ground truth."""
    return None if value < 0 else value
