"""Every family learns ten images by heart, boxes and masks; from fresh weights, by the trainer that everything uses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_cases import families, small_spec
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from autodet.data import read_dataset, write_shapes
from autodet.data.masks import resized_masks
from autodet.data.shapes import CATEGORY_IDS
from autodet.detectors import Arch, DetectorSpec
from autodet.distill import Formula
from autodet.evaluation import evaluate_detections
from autodet.evaluation.coco_ap import Detection
from autodet.evaluation.masks import encoded_masks
from autodet.training import Task, TrainSettings, Workbench

LABELS = tuple((id_, name) for name, id_ in CATEGORY_IDS.items())
ONE_STAGE: dict[str, Any] = {"levels": (4, 8, 16, 32, 64, 128), "head_depth": 2, "candidates": 300}
TWO_STAGE: dict[str, Any] = {
    "anchor_sizes": (8, 16, 24, 32, 64),
    "head_width": 64,
    "roi_size": 5,
    "proposals_before_nms": (300, 200),
    "proposals": (200, 100),
    "regions_per_image": 64,
}
SIDES = {"retinanet": 2.0, "fcos": 0.5, "gfl": 2.0, "reppoints": 2.0}  # of anchors, in strides


def learner(family: str) -> DetectorSpec:
    """A detector for objects of a few pixels; hidden ones have no location of a coarser level inside."""
    spec = small_spec(family, LABELS)
    changes = TWO_STAGE
    if not spec.two_stage:
        changes = ONE_STAGE | {"anchor_sizes": tuple(round(SIDES[family] * stride) for stride in ONE_STAGE["levels"])}
    if spec.traits.distributions:
        changes = changes | {"reg_max": 8}
    if spec.masks:
        changes = changes | {"mask_width": 32, "mask_roi_size": 14}
    body = Arch.parse("basic-16:16x1-32x1-64x1-64x1")
    return replace(spec, body=body, neck_width=32, score_threshold=0.05, **changes)


def perfect_mask_ap(data: Path, pixels: int) -> float:
    """The AP of what the mask branch is taught, pixels×pixels in each object's box, pasted into the image."""
    dataset = read_dataset(data)["train"]
    found = []
    for image in dataset.images:
        size = (image.height, image.width)
        boxes = torch.as_tensor(image.given_boxes, dtype=torch.float32)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        masks = resized_masks(image.segmentations, size, size)
        taught = project_masks_on_boxes(masks, boxes, torch.arange(len(boxes)), pixels)
        codes = encoded_masks(paste_masks_in_image(taught[:, None], boxes, size), size)
        found.append(Detection(image.id, boxes.numpy(), np.ones(len(boxes)), image.category_ids, codes))
    ap = evaluate_detections(dataset.coco_dict(), found, "segm").ap
    assert ap is not None
    return ap


@pytest.mark.slow
@families
def test_ten_images_are_learned_by_heart(family: str, tmp_path: Path) -> None:
    """Masks, too coarse for the thin tips of so small objects, come close to what perfectly learned ones reach."""
    torch.set_num_threads(1)
    data = write_shapes(tmp_path / "data", 10, 1, size=(96, 64), seed=1)
    shutil.copy(data / "train.json", data / "val.json")
    spec = learner(family)
    settings = TrainSettings(200, 5, lr=2e-3, weight_decay=0, warmup=10, flip=0)
    task = Task(str(data), str(tmp_path / "cache"), spec, settings, fixed_batches=False)
    found = Workbench(task).run(Formula(), inherit=False, replicate=0).metrics
    print(family, found)
    assert found.ap is not None and found.ap > 0.9
    if spec.masks:
        assert found.mask_ap is not None and found.mask_ap > 0.85 * perfect_mask_ap(data, 2 * spec.mask_roi_size)
