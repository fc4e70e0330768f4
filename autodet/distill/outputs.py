"""What a detector answers for a batch: all that a student and a teacher are compared on. Values, no modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from autodet.data import Batch
from autodet.detectors import Dense, Detector, DetectorSpec, Features, Inputs, Masked, TwoStage

PARTS: Final = ("features", "dense", "regions", "masks")  # what an input may need of a detector, in the steps' order
Size = tuple[int, int]  # height, width


@dataclass
class RegionOutput:
    """The second stage on shared proposals, R in all images together; label 0 is background.

    proposals: per image R_i×4 xyxy in the batch's pixels; class_logits: R×(K+1); corners: the boxes R×(K+1)×4 xyxy in
    units of the proposal from its centre; masks: logits R×M×M over the proposals, of the class that the teacher finds
    likeliest, None where not asked for.
    """

    proposals: list[Tensor]
    class_logits: Tensor
    corners: Tensor
    masks: Tensor | None = None

    def likeliest(self) -> Tensor:
        """The class (1..K) that each region is likeliest of, R; no background."""
        return self.class_logits.detach()[:, 1:].argmax(1) + 1


@dataclass
class DetectorOutput:
    """One detector's answer for N images.

    features: nominal stride → N×C×H×W, empty where not asked for; canvas: its padded input; sizes: of each image on the
    canvas; boxes: the ground truth, per image R_i×4 xyxy in this detector's pixels. Of the dense step, by nominal
    stride: logits N×A×K×H×W (A anchors of K classes, K = 1 for a proposal network), corners N×A×4×H×W, the boxes xyxy
    in units of the stride from the location that the anchors are centred on, and, of a detector that has distributions,
    sides N×4×B×H×W, the logits that the box's left, upper, right and lower side lies 0, 1, …, B − 1 strides away.
    """

    spec: DetectorSpec
    features: Features
    canvas: Size
    sizes: list[Size]
    boxes: list[Tensor]
    logits: dict[int, Tensor] | None = None
    corners: dict[int, Tensor] | None = None
    sides: dict[int, Tensor] | None = None
    regions: RegionOutput | None = None


def output_of(
    detector: Detector,
    batch: Batch,
    inputs: Inputs,
    features: Features,
    dense: Dense | None,
    proposals: Sequence[Tensor] | None = None,
    masks_of: Tensor | Literal["likeliest"] | None = None,
) -> DetectorOutput:
    """The answer from the steps' values. dense: None where nothing beyond features is compared; proposals: the boxes,
    in the batch's pixels, that the second stage is asked about; None asks it nothing. masks_of: the classes (R, 1..K)
    whose masks on the proposals are asked for, or those that it finds likeliest itself; None asks for none."""
    device = inputs.images.tensors.device
    canvas = (int(inputs.images.tensors.shape[-2]), int(inputs.images.tensors.shape[-1]))
    truth = [target["boxes"].to(device) for target in batch.targets]
    boxes = resized_boxes(truth, inputs.sizes, inputs.images.image_sizes)
    output = DetectorOutput(detector.spec, features, canvas, list(inputs.images.image_sizes), boxes)
    if dense is not None:
        output.logits = {stride: _by_anchor(level, dense.deltas[stride]) for stride, level in dense.logits.items()}
        output.corners = cell_corners(dense, detector.boxes(dense))
        if dense.sides is not None:
            output.sides = {stride: _by_side(level) for stride, level in dense.sides.items()}
    if proposals is not None:
        assert isinstance(detector, TwoStage)
        own = resized_boxes(proposals, inputs.sizes, inputs.images.image_sizes)
        regions = detector.regions(inputs, features, own)
        output.regions = RegionOutput(list(proposals), regions.class_logits, detector.region_corners(regions))
        if masks_of is not None:
            assert isinstance(detector, Masked)
            labels = output.regions.likeliest() if isinstance(masks_of, str) else masks_of
            masks = detector.region_masks(inputs, features, own)
            output.regions.masks = masks[torch.arange(len(masks), device=masks.device), labels]
    return output


def answer_to(
    taught: DetectorOutput, student: Detector, batch: Batch, inputs: Inputs, features: Features, dense: Dense
) -> DetectorOutput:
    """A student's side of a comparison, as far as the teacher was asked, and about the teacher's regions."""
    regions = taught.regions
    proposals = None if regions is None else regions.proposals
    masks_of = None if regions is None or regions.masks is None else regions.likeliest()
    dense_step = None if taught.logits is None else dense
    return output_of(student, batch, inputs, features, dense_step, proposals, masks_of)


def cell_corners(dense: Dense, boxes: Tensor) -> dict[int, Tensor]:
    """Boxes N×all×4 (pixels, the anchors' order) as maps N×A×4×H×W in units of the stride from the location."""
    anchors = torch.stack(dense.anchors)
    centres = (anchors[..., :2] + anchors[..., 2:]).repeat(1, 1, 2) / 2
    offsets, maps, start = boxes - centres, {}, 0
    for stride, level in dense.deltas.items():
        images, channels, height, width = level.shape
        count = height * width * channels // 4
        rows = offsets[:, start : start + count] / stride
        maps[stride] = rows.reshape(images, height, width, channels // 4, 4).permute(0, 3, 4, 1, 2)
        start += count
    return maps


def resized_boxes(boxes: Sequence[Tensor], before: Sequence[Size], after: Sequence[Size]) -> list[Tensor]:
    """Boxes R×4 xyxy per image, moved from images of the sizes ``before`` (height, width) to the sizes ``after``."""
    moved = []
    for found, (height, width), (new_height, new_width) in zip(boxes, before, after, strict=True):
        moved.append(found * found.new_tensor([new_width / width, new_height / height] * 2))
    return moved


def _by_side(sides: Tensor) -> Tensor:
    """N×4B×H×W → N×4×B×H×W."""
    images, _, height, width = sides.shape
    return sides.view(images, 4, -1, height, width)


def _by_anchor(logits: Tensor, deltas: Tensor) -> Tensor:
    """N×(A·K)×H×W → N×A×K×H×W; the regressions tell A."""
    images, _, height, width = logits.shape
    return logits.view(images, deltas.shape[1] // 4, -1, height, width)
