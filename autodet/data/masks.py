"""Masks of objects: from COCO's segmentations to pixels, and what training on them needs of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn.functional import interpolate

SHOWN: Final = 5  # objects named in a message
MOSTLY: Final = 0.5  # of a resized pixel: then it belongs to the object


def object_mask(segmentation: Any, height: int, width: int) -> npt.NDArray[np.uint8]:
    """uint8 height×width of COCO polygons (list), or of a run-length code with counts as a list or as text."""
    if isinstance(segmentation, list):
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = coco_mask.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    mask: npt.NDArray[np.uint8] = coco_mask.decode(code)
    return mask


def resized_masks(segmentations: Sequence[Any], before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """uint8 N×H×W at the size ``after`` (height, width) of masks in an image of the size ``before``.

    A pixel belongs to the object that covers half of it. What covers no half keeps the pixel that it covers most.
    """
    if not segmentations:
        return torch.zeros((0, *after), dtype=torch.uint8)
    full = torch.from_numpy(np.stack([object_mask(found, *before) for found in segmentations]))
    if before == after:
        return full
    share = interpolate(full[None].float(), size=after, mode="area")[0]
    least = share.amax((1, 2), keepdim=True).clamp(min=torch.finfo(share.dtype).tiny, max=MOSTLY)
    return (share >= least).to(torch.uint8)


def mask_problem(name: str, objects: Iterable[tuple[str, Any, tuple[int, int]]]) -> str | None:
    """Why a detector cannot learn masks from a data set: objects without a mask, or with an empty one. None where it
    can.

    objects: those used in training: where each is, for the message, its segmentation or None, and its image's height
    and width.
    """
    lacking: dict[str, list[str]] = {"without a segmentation": [], "whose mask covers no pixel of the image": []}
    missing, empty = lacking.values()
    count = 0
    for where, segmentation, size in objects:
        count += 1
        if segmentation is None or _is_empty(segmentation, *size):
            (missing if segmentation is None else empty).append(where)
    parts = [f"{len(found)} {what} ({_some(found)})" for what, found in lacking.items() if found]
    if not parts:
        return None
    return (
        f"{name}: expected a mask of every object, since this detector learns masks; of {count} objects there are "
        f"{' and '.join(parts)}. Give each a segmentation (polygons or RLE), or train a detector without masks."
    )


def _some(found: list[str]) -> str:
    return "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _is_empty(segmentation: Any, height: int, width: int) -> bool:
    """Whether a mask covers nothing of its image; of polygons by their extent, since drawing all would take long."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return not (sum(counts[1::2]) if isinstance(counts, list) else coco_mask.area(segmentation))
    points = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation])
    low, high = points.min(0).clip(0), points.max(0).clip(max=(width, height))
    return bool((high <= low).any())
