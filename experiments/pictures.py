"""What the detectors of a search see, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autodet.atomic import atomic_write_bytes
from autodet.data import Batch, BatchKey, Loader
from autodet.detectors import Detector, detect, load_detector
from autodet.evaluation.masks import INSIDE
from autodet.results.detections import Panel, draw_detections
from autodet.results.plots import to_png
from autodet.training import Task, Workbench

IMAGES = 3
CONFIDENT = 0.5


def save_student_pictures(run: Path, task: Task, students: Mapping[str, Path]) -> None:
    """pictures/detections.png of a run: ground truth, teacher and students on the first images of the split."""
    save_detections(run, task, {"teacher": Path(str(task.teacher)), **students})


def save_detections(run: Path, task: Task, files: Mapping[str, Path]) -> None:
    """pictures/detections.png of a run: ground truth and detector files on the first images of the split."""
    bench = Workbench(replace(task, teacher=None))
    detectors = {name: load_detector(path)[0] for name, path in files.items()}
    shown = range(min(IMAGES, len(bench.eval_set)))
    loader = bench.eval_loader
    if bench.eval_set.mask_problem is None and any(detector.spec.masks for detector in detectors.values()):
        loader = Loader(loader.cache, loader.dataset, loader.labels, loader.plan, with_masks=True)
    batch = loader.load(BatchKey(tuple(shown), (False,) * len(shown)))
    rows = [_row(batch, index, detectors) for index in range(len(batch.images))]
    names = {label: name for label, (_, name) in enumerate(task.student.labels, start=1)}
    folder = run / "pictures"
    folder.mkdir(exist_ok=True)
    atomic_write_bytes(folder / "detections.png", to_png(draw_detections(rows, names)))


def _row(batch: Batch, index: int, detectors: Mapping[str, Detector]) -> list[Panel]:
    image, target = batch.images[index], batch.targets[index]
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    masks = target["masks"].numpy().astype(bool) if "masks" in target else None
    panels = [Panel("ground truth", pixels, target["boxes"].numpy(), target["labels"].numpy(), masks=masks)]
    for name, detector in detectors.items():
        found = detect(detector, [image])[0]
        sure = found["scores"] >= CONFIDENT
        boxes, labels, scores = (_array(found[key][sure]) for key in ("boxes", "labels", "scores"))
        masks = _array(found["masks"][sure][:, 0] > INSIDE) if "masks" in found else None
        panels.append(Panel(name, pixels, boxes, labels, scores, masks))
    return panels


def _array(values: Tensor) -> npt.NDArray[Any]:
    return np.asarray(values.cpu().numpy())
