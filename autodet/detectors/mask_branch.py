"""The branch that gives each region a mask (He et al. 2017): torchvision's, for any detector with its RoIHeads."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from autodet.detectors.dims import Named, Transposed, biased, pyramid_dim
from autodet.detectors.faster_rcnn import ROI, Sampled, region_pool
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.state import State, count, sizes
from autodet.detectors.steps import Target

HEAD, PREDICTOR = f"{ROI}mask_head.", f"{ROI}mask_predictor."
MASK_LAYERS: Final = {f"{PREDICTOR}mask_fcn_logits": 1}

Maps = dict[str, Tensor]  # the pyramid under the names that the pooling knows
Sizes = list[tuple[int, int]]  # height and width of each image on the canvas


def build_mask_branch(spec: DetectorSpec) -> dict[str, nn.Module]:
    """The branch's parts under the names of torchvision's RoIHeads; fresh weights from torch's generator."""
    return {
        "mask_roi_pool": region_pool(spec, spec.mask_roi_size),
        "mask_head": MaskRCNNHeads(spec.neck_width, [spec.mask_width] * spec.mask_depth, 1),
        "mask_predictor": MaskRCNNPredictor(spec.mask_width, spec.mask_width, len(spec.labels) + 1),
    }


def mask_logits(heads: Any, maps: Maps, boxes: list[Tensor], image_sizes: Sizes) -> Tensor:
    """Logits R×(K+1)×M×M of the masks on the boxes, per image R_i×4 in the canvas's pixels; M = 2 · mask_roi_size."""
    pooled = heads.mask_roi_pool(maps, boxes, image_sizes)
    logits: Tensor = heads.mask_predictor(heads.mask_head(pooled))
    return logits


def mask_losses(
    heads: Any, maps: Maps, sampled: Sampled, image_sizes: Sizes, targets: list[Target]
) -> dict[str, Tensor]:
    """The mean binary cross-entropy of the masks of the sampled regions that are objects, each of its own class (He et
    al. 2017, section 3)."""
    objects = [torch.where(labels > 0)[0] for labels in sampled.labels]
    boxes = [found[rows] for found, rows in zip(sampled.boxes, objects, strict=True)]
    matched = [numbers[rows] for numbers, rows in zip(sampled.matched, objects, strict=True)]
    masks, labels = ([target[name] for target in targets] for name in ("masks", "labels"))
    logits = mask_logits(heads, maps, boxes, image_sizes)
    return {"loss_mask": maskrcnn_loss(logits, boxes, masks, labels, matched)}


def with_masks(heads: Any, maps: Maps, found: list[Target], image_sizes: Sizes) -> list[Target]:
    """Detections (boxes in the canvas's pixels) with the masks of their classes: R×1×M×M, each in its box, in 0–1."""
    logits = mask_logits(heads, maps, [image["boxes"] for image in found], image_sizes)
    masks = maskrcnn_inference(logits, [image["labels"] for image in found])
    return [image | {"masks": own} for image, own in zip(found, masks, strict=True)]


def describe_mask_branch(heads: Any) -> dict[str, Any]:
    """The spec's fields that the branch decides; SpecError where it is another one."""
    for part, kind in ((heads.mask_head, MaskRCNNHeads), (heads.mask_predictor, MaskRCNNPredictor)):
        if not isinstance(part, kind):
            raise SpecError(f"Expected a {kind.__name__}, found {type(part).__name__}: no adapter for it.")
    return {
        "mask_depth": len(heads.mask_head),
        "mask_width": heads.mask_predictor.conv5_mask.in_channels,
        "mask_roi_size": heads.mask_roi_pool.output_size[0],
    }


def unsaid_mask_branch(heads: Any) -> dict[str, object]:
    """Settings that a spec has no field for."""
    pool: MultiScaleRoIAlign = heads.mask_roi_pool
    return {"mask_roi_pool.canonical": (pool.canonical_scale, pool.canonical_level)}


def read_mask_branch(state: State) -> dict[str, Any]:
    """The spec's fields that the branch's tensors tell; none where there is no branch."""
    if f"{PREDICTOR}mask_fcn_logits.weight" not in state:
        return {}
    return {
        "mask_depth": count(state, HEAD + "{}.0.weight"),
        "mask_width": sizes(state, f"{PREDICTOR}conv5_mask.weight", 4)[0],
    }


def mask_groups(spec: DetectorSpec) -> Named:
    """Channels of the branch's layers; none where there is no branch."""
    before = pyramid_dim(spec)
    for index in range(spec.mask_depth):
        yield from biased(f"{HEAD}{index}.0", f"mask.{index}", before)
        before = f"mask.{index}"
    if spec.masks:
        yield f"{PREDICTOR}conv5_mask.weight", Transposed((before, "mask.up"))
        yield f"{PREDICTOR}conv5_mask.bias", ("mask.up",)
        yield f"{PREDICTOR}mask_fcn_logits.weight", (None, "mask.up")


def mask_counts(spec: DetectorSpec) -> dict[str, int]:
    """Channels of those groups."""
    names = [f"mask.{index}" for index in range(spec.mask_depth)]
    return dict.fromkeys([*names, "mask.up"], spec.mask_width) if spec.masks else {}


def mmdet_names(stage: str = "") -> tuple[tuple[str, str], ...]:
    """mmdetection's names of a branch → ours; stage: what follows its name where there are several, as ``\\.2``."""
    branch = rf"roi_head\.mask_head{stage}\."
    return (
        (rf"{branch}convs\.(\d+)\.conv\.", rf"{HEAD}\1.0."),
        (rf"{branch}upsample\.", f"{PREDICTOR}conv5_mask."),
        (rf"{branch}conv_logits\.", f"{PREDICTOR}mask_fcn_logits."),
    )
