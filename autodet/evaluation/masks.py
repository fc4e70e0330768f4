"""Masks between a detector's pixels and those of the original image, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn.functional import interpolate

AT_ONCE: Final = 8  # masks in full resolution
INSIDE: Final = 0.5  # a pixel of a mask belongs to the object above this


def binary_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """bool N×H×W at a size (height, width) of masks N×1×h×w in 0–1; interpolated before they are cut at 0.5."""
    return torch.cat([torch.empty((0, *size), dtype=torch.bool), *_resized(masks, size)])


def encoded_masks(masks: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Run-length codes of ``binary_masks``, as of ``pycocotools.mask.encode``."""
    codes: list[dict[str, Any]] = []
    for part in _resized(masks, size):
        codes += coco_mask.encode(np.asfortranarray(part.permute(1, 2, 0).numpy().astype(np.uint8)))
    return codes


def _resized(masks: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """The masks of ``binary_masks`` in parts, on the CPU."""
    for start in range(0, len(masks), AT_ONCE):
        part = masks[start : start + AT_ONCE].detach().float()
        full = part if tuple(part.shape[-2:]) == size else interpolate(part, size, mode="bilinear", align_corners=False)
        yield (full[:, 0] > INSIDE).cpu()
