"""Knowledge inputs: what of a student's and a teacher's outputs is compared (DetKDS, knowledge inputs).

An input is a function ``(student, teacher) -> pairs of values``, a reason why a pair of detectors may have no such
pairs, and a line in ``INPUTS``, the list at the end. ``fg`` and ``bg`` are DetKDS's one foreground-background input
with a formula of its own for each; ``localization``, which its public code leaves out, is ours, as are the weights of
boxes and the reductions between heads of different families. ``localization.sides`` is what LD compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from autodet.detectors import DetectorSpec
from autodet.distill.outputs import DetectorOutput, RegionOutput, Size
from autodet.distill.values import BOXES, MAP, PLANE, VECTOR, Kind, Value, map_value, region_weights, vector_value

Pairs = list[tuple[Value, Value]]  # (student's, teacher's) of equal shapes, one a level, finest first
INSTANCE_SIZE = 4  # bins of an instance in each direction [ours]
CANONICAL_SIZE, CANONICAL_STRIDE = 224, 16  # a box of this size is pooled from this stride (Lin et al. 2017, eq. 1)


def global_maps(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """The whole map of each pyramid level, N×C×H×W."""
    aligned = _aligned(student, teacher, student.features, teacher.features)
    return [(map_value(ours), map_value(theirs)) for ours, theirs in aligned.values()]


def foreground_maps(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """The maps times √(H·W·m), m = 1/(cells of the box) inside each ground-truth box, the largest where boxes overlap.

    A mean of squares over the map is then a sum over boxes of the mean within each (the scale mask of FGD, Yang et al.
    2022).
    """
    return _masked(student, teacher, foreground_masks)


def background_maps(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """The maps times √(H·W·m), m = 1/(background cells) outside all ground-truth boxes, 0 inside."""
    return _masked(student, teacher, background_masks)


def instances(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """RoIAlign of every ground-truth box, R×C×4×4, on the level that suits the student's size of the box."""
    shared = sorted(set(student.features) & set(teacher.features))
    strides = [stride for stride in shared if stride <= 32]  # above, maps are rounded up and their stride is nominal
    level_of = _pooling_stride(torch.cat(student.boxes).float(), strides)
    rows = [(level_of == stride).nonzero()[:, 0] for stride in strides]
    order = torch.cat(rows)
    weights = region_weights([len(boxes) for boxes in student.boxes], order.float())[order]
    values = []
    for side in (student, teacher):
        rois = _rois(side.boxes)
        pooled = [_pooled(side.features[s], rois[chosen], s) for s, chosen in zip(strides, rows, strict=True)]
        values.append(Value(torch.cat(pooled), MAP, None, weights))
    return [(values[0], values[1])]


def dense_logits(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """Responses of every location: class logits of a one-stage head, objectness of a proposal network, N×(A·K)×H×W.

    Where the numbers of anchors differ, the strongest anchor's (N×K×H×W); where one head knows classes and the other
    only objects, the strongest class's as well (N×1×H×W).
    """
    over: tuple[int, ...] = ()
    if _classes(student) != _classes(teacher):
        over = (1, 2)
    elif not same_anchors(student.spec, teacher.spec):
        over = (1,)

    def reduced(level: Tensor) -> Tensor:
        return (level.amax(over, keepdim=True) if over else level).flatten(1, 2)

    ours, theirs = ({s: reduced(level) for s, level in _logits(side).items()} for side in (student, teacher))
    return [(map_value(s), map_value(t)) for s, t in _aligned(student, teacher, ours, theirs).values()]


def region_logits(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """Class logits of the second stages on the teacher's proposals, R×(K+1).

    What they have in common in a row means nothing: a cascade's are logarithms of probabilities, others' are not.
    """
    ours, theirs = _regions(student), _regions(teacher)
    counts = [len(boxes) for boxes in theirs.proposals]
    return [(vector_value(ours.class_logits, counts), vector_value(theirs.class_logits, counts))]


def dense_boxes(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """Decoded boxes of every anchor at every location, in units of the stride from the location; one value in all.

    Rows weigh as the teacher's probability that there is an object. Where the anchors differ, each side's strongest
    anchor stands for the location.
    """
    shared = sorted(set(_logits(student)) & set(_logits(teacher)))
    strongest = not same_anchors(student.spec, teacher.spec)
    ours, theirs = (
        torch.cat([_location_boxes(side, stride, strongest) for stride in shared], dim=1) for side in (student, teacher)
    )
    chances = [_location_scores(teacher, stride, strongest).flatten(1).sigmoid() for stride in shared]
    weights = _chance_weights(torch.cat(chances, dim=1)).flatten()
    values = [Value(boxes.flatten(0, 1), BOXES, None, weights) for boxes in (ours, theirs)]
    return [(values[0], values[1])]


def side_distributions(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """Logits of the distances from every location to each side of its box, R×B for the bins 0, …, B − 1 strides; one
    value in all (LD, Zheng et al. 2022).

    The rows of a location, its four sides, weigh together as the teacher's probability that there is an object.
    """
    shared = sorted(set(_sides(student)) & set(_sides(teacher)))
    rows = []
    for side in (student, teacher):
        levels = [_sides(side)[stride].float().permute(0, 3, 4, 1, 2).flatten(1, 2) for stride in shared]
        rows.append(torch.cat(levels, dim=1).flatten(0, 2))  # N×locations×4×B before
    chances = [_location_scores(teacher, stride, strongest=True).flatten(1).sigmoid() for stride in shared]
    weights = _chance_weights(torch.cat(chances, dim=1)).flatten().repeat_interleave(4) / 4
    values = [Value(logits, VECTOR, None, weights) for logits in rows]
    return [(values[0], values[1])]


def region_boxes(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """Boxes of the second stages on the teacher's proposals, of the class that the teacher finds likeliest, R×4 in
    units of the proposal from its centre. Rows weigh as the teacher's probability that there is an object."""
    ours, theirs = _regions(student), _regions(teacher)
    label, weights = theirs.likeliest(), _object_weights(theirs)
    rows = torch.arange(len(label), device=label.device)
    values = [Value(side.corners[rows, label].float(), BOXES, None, weights) for side in (ours, theirs)]
    return [(values[0], values[1])]


def region_masks(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
    """Mask logits on the teacher's proposals, of the class that the teacher finds likeliest, R×1×M×M with the student's
    M.

    Rows weigh as the teacher's probability that there is an object: a mask branch learns nothing about background. Each
    pixel is a yes or no of its own, which ``bernoulli`` says [ours].
    """
    ours, theirs = _masks(student), _masks(teacher)
    if theirs.shape != ours.shape:
        theirs = F.interpolate(theirs, ours.shape[2:], mode="bilinear", align_corners=False)
    weights = _object_weights(_regions(teacher))
    return [(Value(ours, PLANE, None, weights), Value(theirs, PLANE, None, weights))]


def foreground_masks(boxes: Sequence[Tensor], canvas: Size, size: Size) -> Tensor:
    """N×H×W: 1/(cells of the box) in every cell that a box touches, the largest where boxes overlap.

    boxes: per image R_i×4 xyxy in the canvas's pixels; size: H, W of the map that covers the canvas.
    """
    masks = []
    for rows, columns in _touched(boxes, canvas, size):
        share = rows / (rows.sum(1, keepdim=True) * columns.sum(1, keepdim=True))  # a box touches one cell at least
        boxed = share.unsqueeze(2) * columns.unsqueeze(1)
        masks.append(boxed.amax(0) if len(boxed) else boxed.new_zeros(size))
    return torch.stack(masks)


def background_masks(boxes: Sequence[Tensor], canvas: Size, size: Size) -> Tensor:
    """N×H×W: 1/(background cells) in every cell that no box touches; arguments as of ``foreground_masks``."""
    free = torch.stack([rows.T @ columns == 0 for rows, columns in _touched(boxes, canvas, size)]).float()
    return free / free.sum((1, 2), keepdim=True).clamp_min(1)


def same_anchors(one: DetectorSpec, other: DetectorSpec) -> bool:
    """Whether the anchors of a location correspond one to one."""
    return (one.anchor_ratios, one.anchor_octaves) == (other.anchor_ratios, other.anchor_octaves)


def _masked(
    student: DetectorOutput, teacher: DetectorOutput, masks: Callable[[Sequence[Tensor], Size, Size], Tensor]
) -> Pairs:
    pairs = []
    for ours, theirs in _aligned(student, teacher, student.features, teacher.features).values():
        height, width = int(ours.shape[2]), int(ours.shape[3])
        found = masks(student.boxes, student.canvas, (height, width))
        factor = (found * (height * width)).sqrt().unsqueeze(1)
        pairs.append((map_value(ours * factor), map_value(theirs * factor)))
    return pairs


def _touched(boxes: Sequence[Tensor], canvas: Size, size: Size) -> list[tuple[Tensor, Tensor]]:
    """Per image R_i×H and R_i×W, 1 in the rows and columns of cells that each box touches, one of each at least."""
    counts = [len(found) for found in boxes]
    x0, y0, x1, y1 = torch.cat(list(boxes)).float().unbind(1)
    down, across = size[0] / canvas[0], size[1] / canvas[1]
    rows = torch.split(_between(y0 * down, y1 * down, size[0]), counts)
    columns = torch.split(_between(x0 * across, x1 * across, size[1]), counts)
    return list(zip(rows, columns, strict=True))


def _between(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """R×cells, 1 from the cell that ``low`` lies in to that of ``high``."""
    first = low.floor().clamp(0, cells - 1)
    last = (high.ceil() - 1).clamp(max=cells - 1).maximum(first)
    index = torch.arange(cells, device=low.device).unsqueeze(0)
    return ((index >= first.unsqueeze(1)) & (index <= last.unsqueeze(1))).to(low.dtype)


def _aligned(
    student: DetectorOutput, teacher: DetectorOutput, ours: dict[int, Tensor], theirs: dict[int, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Maps of the nominal strides that both have, finest first, the teacher's on the student's grid, in float32."""
    pairs = {}
    for stride in sorted(set(ours) & set(theirs)):
        one, other = ours[stride].float(), theirs[stride].float()
        if (student.canvas, student.sizes) != (teacher.canvas, teacher.sizes) or one.shape[2:] != other.shape[2:]:
            other = _resampled(other, student, teacher, (int(one.shape[2]), int(one.shape[3])))
        pairs[stride] = (one, other)
    return pairs


def _resampled(level: Tensor, student: DetectorOutput, teacher: DetectorOutput, size: Size) -> Tensor:
    """The teacher's map at the student's cells. Image falls on image: the padding's share of the canvas may differ."""
    maps = []
    for own, other in zip(student.sizes, teacher.sizes, strict=True):
        down, across = (student.canvas[i] / own[i] * other[i] / teacher.canvas[i] for i in (0, 1))
        maps.append([[across, 0, across - 1], [0, down, down - 1]])  # in coordinates from -1 to 1, x before y
    grid = F.affine_grid(level.new_tensor(maps), [len(level), 1, *size], align_corners=False)
    return F.grid_sample(level, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _pooling_stride(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """The stride, of those given, that each box R×4 is pooled from."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp_min(1).sqrt()
    wanted = CANONICAL_STRIDE * 2 ** torch.floor(torch.log2(side / CANONICAL_SIZE + 1e-6))
    options = torch.tensor(strides, device=boxes.device, dtype=side.dtype)
    return options[(wanted.log2().unsqueeze(1) - options.log2()).abs().argmin(1)]


def _rois(boxes: Sequence[Tensor]) -> Tensor:
    """R×5: the image's number and the box. Always float32: half precision misplaces a box by pixels."""
    numbered = [F.pad(found.float(), (1, 0), value=float(image)) for image, found in enumerate(boxes)]
    return torch.cat(numbered)


def _pooled(level: Tensor, rois: Tensor, stride: int) -> Tensor:
    pooled: Tensor = roi_align(level.float(), rois, INSTANCE_SIZE, 1 / stride, 2, aligned=True)
    return pooled


def _location_scores(output: DetectorOutput, stride: int, strongest: bool) -> Tensor:
    """Logits N×A×H×W of a level that there is an object: the strongest class's; ``strongest``: and anchor's, A = 1."""
    scores = _logits(output)[stride].float().amax(2)
    return scores.amax(1, keepdim=True) if strongest else scores


def _location_boxes(output: DetectorOutput, stride: int, strongest: bool) -> Tensor:
    """Boxes N×(A·H·W)×4 of a level; ``strongest``: of the strongest anchor alone, A = 1."""
    assert output.corners is not None
    corners = output.corners[stride].float()  # N×A×4×H×W
    if strongest:
        best = _location_scores(output, stride, strongest=False).argmax(1, keepdim=True)
        corners = corners.gather(1, best.unsqueeze(2).expand(-1, -1, 4, -1, -1))
    return corners.permute(0, 1, 3, 4, 2).flatten(1, 3)


def _chance_weights(chances: Tensor) -> Tensor:
    """Probabilities N×locations as weights of which each image has 1/N; without gradient."""
    chances = chances.detach()
    return chances / chances.sum(1, keepdim=True).clamp_min(1e-6) / len(chances)


def _logits(output: DetectorOutput) -> dict[int, Tensor]:
    if output.logits is None:
        raise ValueError("This knowledge input needs the dense responses of both detectors: run their dense step.")
    return output.logits


def _sides(output: DetectorOutput) -> dict[int, Tensor]:
    if output.sides is None:
        raise ValueError("This knowledge input needs the distributions of both detectors: run their dense step.")
    return output.sides


def _classes(output: DetectorOutput) -> int:
    """Classes of the dense step: 1 for objectness."""
    return next(iter(_logits(output).values())).shape[2]


def _regions(output: DetectorOutput) -> RegionOutput:
    if output.regions is None:
        raise ValueError("This knowledge input needs the second stage of both detectors on the same proposals.")
    return output.regions


def _object_weights(teacher: RegionOutput) -> Tensor:
    """Per region the teacher's probability that there is an object, as the weights of an image's rows."""
    counts = [len(boxes) for boxes in teacher.proposals]
    objects = 1 - teacher.class_logits.detach().float().softmax(1)[:, 0]
    parts = [part / part.sum().clamp_min(1e-6) / len(counts) for part in torch.split(objects, counts)]
    return torch.cat(parts)


def _masks(output: DetectorOutput) -> Tensor:
    masks = _regions(output).masks
    if masks is None:
        raise ValueError("This knowledge input needs the mask branch of both detectors on the same proposals.")
    return masks.float().unsqueeze(1)


# Why a pair of detectors has nothing to compare. ---


def no_shared_level(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """Pyramids are compared level by level."""
    if set(student.levels) & set(teacher.levels):
        return None
    return f"the pyramids share no stride ({student.levels} and {teacher.levels})"


def other_classes(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """Objectness is the same for all labels, class responses are not."""
    if student.labels != teacher.labels and not (student.two_stage or teacher.two_stage):
        return "student and teacher have different labels"
    return no_shared_level(student, teacher)


def other_locations(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """Boxes of every location need the same locations."""
    sizes = [(spec.min_size, spec.max_size) for spec in (student, teacher)]
    if sizes[0] != sizes[1]:
        return f"student and teacher see images at other sizes ({sizes[0]} and {sizes[1]} pixels)"
    return no_shared_level(student, teacher)


def no_distributions(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """Distributions need a head that has them in both, over the same bins, and the same locations."""
    for role, spec in (("student", student), ("teacher", teacher)):
        if not spec.traits.distributions:
            return f"the {role}, a {spec.family}, has no distributions of the places of a box's sides"
    if student.reg_max != teacher.reg_max:
        return f"student and teacher have other bins (reg_max {student.reg_max} and {teacher.reg_max})"
    return other_locations(student, teacher)


def no_second_stage(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """Regions need a second stage in both, and the same classes."""
    for role, spec in (("student", student), ("teacher", teacher)):
        if not spec.two_stage:
            return f"the {role}, a {spec.family}, has no second stage"
    return "student and teacher have different labels" if student.labels != teacher.labels else None


def no_masks(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """Masks need a mask branch in both, and the same classes."""
    for role, spec in (("student", student), ("teacher", teacher)):
        if not spec.masks:
            return f"the {role}, a {spec.family}, has no mask branch"
    return "student and teacher have different labels" if student.labels != teacher.labels else None


@dataclass(frozen=True)
class InputSpec:
    """A knowledge input. pairs: its values; refusal: why a pair of specs has none, None where it has; family: which
    weights the weight phase offers it (DetKDS treats the two differently); part: what must be run (``outputs.PARTS``).
    """

    kind: Kind
    family: Literal["features", "responses"]
    part: Literal["features", "dense", "regions", "masks"]
    pairs: Callable[[DetectorOutput, DetectorOutput], Pairs]
    refusal: Callable[[DetectorSpec, DetectorSpec], str | None]


INPUTS: dict[str, InputSpec] = {
    "global": InputSpec(MAP, "features", "features", global_maps, no_shared_level),
    "fg": InputSpec(MAP, "features", "features", foreground_maps, no_shared_level),
    "bg": InputSpec(MAP, "features", "features", background_maps, no_shared_level),
    "instance": InputSpec(MAP, "features", "features", instances, no_shared_level),
    "logits.dense": InputSpec(MAP, "responses", "dense", dense_logits, other_classes),
    "logits.roi": InputSpec(VECTOR, "responses", "regions", region_logits, no_second_stage),
    "logits.mask": InputSpec(PLANE, "responses", "masks", region_masks, no_masks),
    "localization.dense": InputSpec(BOXES, "responses", "dense", dense_boxes, other_locations),
    "localization.sides": InputSpec(VECTOR, "responses", "dense", side_distributions, no_distributions),
    "localization.roi": InputSpec(BOXES, "responses", "regions", region_boxes, no_second_stage),
}


def why_incomparable(name: str, student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """The reason why a pair cannot be compared on an input, None where it can."""
    return INPUTS[name].refusal(student, teacher)


def comparable_inputs(student: DetectorSpec, teacher: DetectorSpec) -> tuple[str, ...]:
    """The knowledge inputs that this pair can be compared on."""
    return tuple(name for name in INPUTS if why_incomparable(name, student, teacher) is None)


def parts_of(names: Iterable[str]) -> frozenset[str]:
    """What a detector must run for these inputs: some of ``outputs.PARTS``."""
    return frozenset(INPUTS[name].part for name in names)
