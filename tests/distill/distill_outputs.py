"""Outputs made up for the tests of a room: random answers of detectors of every family, and parts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autodet.data import Batch
from autodet.detectors import Arch, Detector, DetectorSpec, Masked
from autodet.detectors.traits import TRAITS
from autodet.distill.formula import Formula
from autodet.distill.inputs import INPUTS
from autodet.distill.outputs import DetectorOutput, RegionOutput, Size
from autodet.distill.terms import term_loss
from autodet.distill.values import Value

LABELS = ((3, "circle"), (5, "square"), (8, "triangle"))
CANVAS: Size = (64, 96)
COUNTS = (3, 0, 2, 1)  # objects of each image
PROPOSED = (4, 2, 0, 5)  # shared proposals of each image
MASK = 6  # pixels a side


def spec_of(family: str) -> DetectorSpec:
    """A small detector of a family; all share labels, input size and the levels 8 to 64."""
    common = DetectorSpec(
        "faster_rcnn",
        Arch.parse("basic-8:8x1-8x1-16x1-16x1"),
        LABELS,
        neck_width=16,
        levels=(8, 16, 32, 64),
        anchor_sizes=(8, 16, 32, 48),
        head_width=16,
        roi_size=3,
        min_size=64,
        max_size=96,
    )
    masks = {"mask_depth": 1, "mask_width": 8, "mask_roi_size": MASK // 2}
    if TRAITS[family].two_stage:
        standard = dict(TRAITS[family].standard)
        return replace(common, family=family, **(standard | masks if True in TRAITS[family].masks else standard))
    strides = (8, 16, 32, 64, 128)
    one_stage = replace(common, family="retinanet", levels=strides, anchor_sizes=strides, top="neck", head_depth=1)
    if family == "retinanet":
        return replace(one_stage, anchor_octaves=2)
    return replace(one_stage, family=family, anchor_ratios=(1.0,), head_groups=4, reg_max=5)


def random_boxes(count: int, size: Size, generator: torch.Generator) -> Tensor:
    """R×4 xyxy within an image, sides from a tenth of it to the whole."""
    height, width = size
    sides = 0.1 + 0.9 * torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (1 - sides)
    return torch.cat([corner, corner + sides], dim=1) * torch.tensor([width, height, width, height])


def answer(
    spec: DetectorSpec,
    seed: int,
    counts: Sequence[int] = COUNTS,
    proposed: Sequence[int] = PROPOSED,
    canvas: Size = CANVAS,
    dtype: torch.dtype = torch.float32,
) -> DetectorOutput:
    """Random outputs of a detector, all of them leaves that want a gradient; boxes and proposals are the same for
    every seed. A two-stage detector answers about ``proposed`` regions of each image."""
    generator, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    images, numbers = len(counts), 1 if spec.two_stage else len(spec.labels) + 1

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    grids = {stride: (-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in spec.levels}
    anchors = spec.anchors_per_location
    output = DetectorOutput(
        spec,
        {stride: leaf(images, spec.neck_width, *grid) for stride, grid in grids.items()},
        canvas,
        [canvas] * images,
        [random_boxes(count, canvas, shared) for count in counts],
        {stride: leaf(images, anchors, numbers, *grid) for stride, grid in grids.items()},
        {stride: leaf(images, anchors, 4, *grid) for stride, grid in grids.items()},
    )
    if spec.traits.distributions:
        output.sides = {stride: leaf(images, 4, spec.reg_max + 1, *grid) for stride, grid in grids.items()}
    if spec.two_stage:
        regions, classes = sum(proposed), len(spec.labels) + 1
        proposals = [random_boxes(count, canvas, shared) for count in proposed]
        output.regions = RegionOutput(proposals, leaf(regions, classes), leaf(regions, classes, 4))
        if spec.masks:
            side = 2 * spec.mask_roi_size
            output.regions.masks = leaf(regions, side, side)
    return output


def leaves(output: DetectorOutput) -> dict[str, Tensor]:
    """Every tensor that a loss may depend on, by the part it belongs to."""
    named = {f"features {stride}": level for stride, level in output.features.items()}
    named |= {f"logits {stride}": level for stride, level in (output.logits or {}).items()}
    named |= {f"corners {stride}": level for stride, level in (output.corners or {}).items()}
    named |= {f"sides {stride}": level for stride, level in (output.sides or {}).items()}
    if output.regions is not None:
        named |= {"class_logits": output.regions.class_logits, "region_corners": output.regions.corners}
        named |= {} if output.regions.masks is None else {"masks": output.regions.masks}
    return named


def part(output: DetectorOutput, images: slice) -> DetectorOutput:
    """Some images of a batch, as a worker would see them."""

    def cut(levels: dict[int, Tensor] | None) -> dict[int, Tensor]:
        return {stride: level[images] for stride, level in (levels or {}).items()}

    regions = output.regions
    if regions is not None:
        first = sum(map(len, regions.proposals[: images.start]))
        rows = slice(first, first + sum(map(len, regions.proposals[images])))
        masks = None if regions.masks is None else regions.masks[rows]
        regions = RegionOutput(regions.proposals[images], regions.class_logits[rows], regions.corners[rows], masks)
    return replace(
        output,
        features=cut(output.features),
        sizes=output.sizes[images],
        boxes=output.boxes[images],
        logits=cut(output.logits) or None,
        corners=cut(output.corners) or None,
        sides=cut(output.sides) or None,
        regions=regions,
    )


def sides(pairs: Sequence[tuple[Value, Value]]) -> tuple[list[Value], list[Value]]:
    """The student's values and the teacher's."""
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def loss_of(name: str, student: DetectorOutput, teacher: DetectorOutput, distance: str = "") -> Tensor:
    """An input's unweighted loss; ``giou`` on boxes and ``l1`` elsewhere unless a distance is named."""
    distance = distance or ("giou" if INPUTS[name].kind.boxes else "l1")
    return term_loss(Formula.parse(f"{name}: {distance}").terms[0], *sides(INPUTS[name].pairs(student, teacher)))


def tiny_batch(sizes: Sequence[Size] = ((64, 96), (64, 96), (64, 96))) -> Batch:
    """Noise of some sizes, with two objects each."""
    generator = torch.Generator().manual_seed(3)
    pictures = [torch.rand(3, *size, generator=generator) for size in sizes]
    labels = torch.ones(2, dtype=torch.long)
    targets = [{"boxes": random_boxes(2, size, generator), "labels": labels} for size in sizes]
    return Batch(None, pictures, targets)  # type: ignore[arg-type]  # no key: nothing is kept


def regions_of(output: DetectorOutput) -> RegionOutput:
    assert output.regions is not None
    return output.regions


def counted_steps(monkeypatch: pytest.MonkeyPatch, detector: Detector) -> Counter[str]:
    """Counts the calls of a detector's steps from now on."""
    calls: Counter[str] = Counter()

    def counting(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return step(*arguments)

        return call

    for name in ("preprocess", "features", "dense", "boxes", "proposals", "regions", "region_corners"):
        monkeypatch.setattr(detector, name, counting(name, getattr(detector, name)))
    if isinstance(detector, Masked):
        monkeypatch.setattr(detector, "region_masks", counting("region_masks", detector.region_masks))
    return calls


RCNN, RETINANET, FCOS, GFL, MASK_RCNN = (
    spec_of(family) for family in ("faster_rcnn", "retinanet", "fcos", "gfl", "mask_rcnn")
)
