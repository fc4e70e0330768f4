"""Masks of detections: at another size, as run lengths, and their AP beside that of the boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from autodet.data import Batch, BatchPlan, CocoDataset, ImageCache, Loader, read_dataset
from autodet.detectors import DetectorSpec
from autodet.evaluation import binary_masks, encoded_masks, evaluate
from autodet.evaluation.masks import AT_ONCE
from autodet.records import Metrics


def test_masks_at_their_own_size_are_cut_at_one_half() -> None:
    masks = torch.tensor([[[[0.2, 0.5], [0.51, 1.0]]]])
    assert binary_masks(masks, (2, 2)).tolist() == [[[False, False], [True, True]]]


def test_larger_masks_are_cut_where_the_interpolated_ramp_crosses_one_half() -> None:
    ramp = ((torch.arange(10) + 0.5) / 10).expand(1, 1, 4, 10)  # the value is the place, 0–1 from left to right
    large = binary_masks(ramp, (12, 40))
    assert large.shape == (1, 12, 40)
    assert torch.equal(large[0], ((torch.arange(40) + 0.5) / 40 > 0.5).expand(12, 40))


@pytest.mark.parametrize("count", [0, 1, AT_ONCE, 2 * AT_ONCE + 3])
@pytest.mark.parametrize("size", [(9, 7), (20, 30)])
def test_run_lengths_are_those_masks(count: int, size: tuple[int, int]) -> None:
    masks = torch.rand(count, 1, 9, 7)
    codes, expected = encoded_masks(masks, size), binary_masks(masks, size)
    assert len(codes) == count and expected.shape == (count, *size) and expected.dtype == torch.bool
    for code, mask in zip(codes, expected, strict=True):
        assert np.array_equal(coco_mask.decode(code), mask.numpy())


@pytest.fixture(scope="module")
def dataset(shapes_folder: Path) -> CocoDataset:
    return read_dataset(shapes_folder)["val"]


def measured(
    dataset: CocoDataset, spec: DetectorSpec, folder: Path, spoiled: Callable[[Tensor], Tensor], pixels: int = 64
) -> Metrics:
    """Of a detector that answers with the true boxes, and with what is made of the true masks."""
    cache = ImageCache(dataset, pixels, 2 * pixels, folder)
    loader = Loader(cache, dataset, spec.label_map, BatchPlan(4, seed=0), with_masks=True)

    def detect(batch: Batch) -> list[dict[str, Tensor]]:
        return [
            target | {"masks": spoiled(target["masks"])[:, None].float(), "scores": torch.ones(len(target["labels"]))}
            for target in batch.targets
        ]

    return evaluate(detect, loader, dataset, spec.categories)


def left_half(masks: Tensor) -> Tensor:
    """What each mask covers left of its middle column."""
    kept = masks.clone()
    for mask in kept:
        columns = torch.where(mask.any(0))[0]
        mask[:, (columns[0] + columns[-1] + 1) // 2 :] = 0
    return kept


def test_ap_of_masks_stands_beside_that_of_boxes(dataset: CocoDataset, tiny_spec: DetectorSpec, tmp_path: Path) -> None:
    exact = measured(dataset, tiny_spec, tmp_path, lambda masks: masks)
    assert exact.ap == pytest.approx(1) and exact.mask_ap == exact.mask_ap75 == pytest.approx(1)
    halved = measured(dataset, tiny_spec, tmp_path, left_half)
    assert halved.ap == exact.ap
    assert halved.mask_ap is not None and halved.mask_ap < 0.2 and halved.mask_ap75 == 0
    doubled = measured(dataset, tiny_spec, tmp_path, lambda masks: masks, pixels=128)
    assert doubled.mask_ap is not None and doubled.mask_ap > 0.9  # resized there and back


def test_data_without_masks_has_no_ap_of_masks(dataset: CocoDataset, tiny_spec: DetectorSpec, tmp_path: Path) -> None:
    bare = replace(
        dataset, images=tuple(replace(i, segmentations=(None,) * len(i.segmentations)) for i in dataset.images)
    )
    cache = ImageCache(bare, 64, 96, tmp_path)
    loader = Loader(cache, bare, tiny_spec.label_map, BatchPlan(4, seed=0))

    def detect(batch: Batch) -> list[dict[str, Tensor]]:
        return [
            {
                **target,
                "scores": torch.ones(len(target["labels"])),
                "masks": torch.ones(len(target["labels"]), 1, 64, 96),
            }
            for target in batch.targets
        ]

    metrics = evaluate(detect, loader, bare, tiny_spec.categories)
    assert metrics.ap == pytest.approx(1) and metrics.mask_ap is None
