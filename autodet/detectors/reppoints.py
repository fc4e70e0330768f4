"""RepPoints (Yang et al. 2019, arXiv 1904.11490): a plain model in torchvision's idiom, and its explicit steps.

A one-stage detector that knows an object by a set of points. Each location guesses a first set; a deformable
convolution that looks at just these points classifies the object and moves them; a box is drawn around the second set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from autodet.detectors.deformable import deformable_convolution
from autodet.detectors.dims import Blocks, Dim, Named, tower_counts, tower_groups
from autodet.detectors.one_box import (
    OneBoxDetector,
    Outputs,
    conv_tower,
    convolution,
    describe_one_box,
    one_anchor,
    unsaid_one_box,
)
from autodet.detectors.one_stage import OneStageSteps, flatten, frame_options
from autodet.detectors.pyramid import build_backbone, check_rebuilt
from autodet.detectors.reppoints_loss import BETWEEN, NOTHING, assign_nearest, assign_overlapping, box_loss, moment_box
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.state import CLASSIFY, REGRESS, TOWER_NAMES, MMDet, Read, State, count, sizes
from autodet.detectors.steps import Dense, Family, Features, Inputs, Target

PRIOR: Final = 0.01  # score of every class before training (Lin et al. 2017)
INITIAL_WEIGHT: Final = 0.5  # of the first boxes' loss beside the two others (section 4.2: λ1 = 0.5, λ2 = 1)
POINT_RATE: Final = 0.1  # share of their gradient that the first points get from what looks at them (public code)
USUAL_SIDE: Final = 4 * math.sqrt(2)  # of a level's objects, in strides: of sizes from 4 strides to 8 the middle octave


class RepPointsClassificationHead(nn.Module):
    """Class scores of a level's locations: a tower of convolutions, with group norms if ``groups`` is not 0, one that
    looks at the location's points, and a last one.

    num_classes: with the background, whose channel 0 is there as in torchvision's heads. No location ever learns it,
    so that it falls silent, and no detection is made of it.
    """

    def __init__(self, in_channels: int, num_classes: int, num_convs: int, groups: int, points: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = conv_tower(in_channels, num_convs, groups)
        self.cls_conv = _PointConvolution(in_channels, points)
        self.cls_logits = convolution(in_channels, num_classes, 1, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, level: Tensor, offsets: Tensor) -> Tensor:
        """N×C×H×W and the points as offsets of a kernel N×2P×H×W → logits N×num_classes×H×W."""
        logits: Tensor = self.cls_logits(self.cls_conv(self.conv(level), offsets))
        return logits


class RepPointsRegressionHead(nn.Module):
    """Two sets of P points of each location, the second one moved from the first; both share one tower.

    side: of the first points' boxes before training, in strides [ours]: those of a level's objects, so that many
    locations have an object to classify from the start. The public code starts all points at the location, where boxes
    overlap nothing: on ten small images it is then at 0.54 AP when this is at 0.94. box_scale: see
    ``reppoints_loss.moment_box``.
    """

    def __init__(self, in_channels: int, num_convs: int, groups: int, points: int, side: float) -> None:
        super().__init__()
        self.num_points = points
        self.conv = conv_tower(in_channels, num_convs, groups)
        self.init_conv = convolution(in_channels, in_channels, 3)
        nn.init.kaiming_normal_(self.init_conv.weight, nonlinearity="relu")
        self.init_points = convolution(in_channels, 2 * points, 1)
        self.refine_conv = _PointConvolution(in_channels, points)
        self.refine_points = convolution(in_channels, 2 * points, 1)
        self.box_scale = nn.Parameter(torch.zeros(2))
        places = _kernel_places(points)
        self.init_points.bias = nn.Parameter((places / (2 * places[::2].std()) * side).flatten())

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N×C×H×W → first and second points, N×2P×H×W strides from the location, each down, then across; and the first
        ones as offsets of a kernel whose places are the next cells, with a tenth of their gradient. All in float32."""
        tower = self.conv(level)
        first = self.init_points(self.init_conv(tower).relu()).float()
        offsets = first.detach() * (1 - POINT_RATE) + first * POINT_RATE - _kernel_places(self.num_points).to(first)
        moves = self.refine_points(self.refine_conv(tower, offsets)).float()
        return first, first.detach() + moves, offsets

    def sides(self, points: Tensor, stride: int) -> Tensor:
        """Of points N×2P×H×W the box's distances from the location, left, up, right and down, N×4×H×W in pixels."""
        box = moment_box(points, self.box_scale) * stride
        return torch.cat([-box[:, :2], box[:, 2:]], dim=1)


class RepPointsHead(nn.Module):
    """Both heads on every level of the pyramid. strides: of the levels, in pixels; points: an odd number squared; side:
    of an object that a level usually learns, in strides."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int],
        num_convs: int = 3,
        groups: int = 32,
        points: int = 9,
        side: float = USUAL_SIDE,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.classification_head = RepPointsClassificationHead(in_channels, num_classes, num_convs, groups, points)
        self.regression_head = RepPointsRegressionHead(in_channels, num_convs, groups, points, side)

    def maps(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one level N×C×H×W: class logits, first points and second points."""
        first, second, offsets = self.regression_head(level)
        return self.classification_head(level, offsets), first, second

    def sides(self, points: dict[int, Tensor]) -> dict[int, Tensor]:
        """Distances to the boxes' sides of all levels, in pixels, under the keys of the levels."""
        return {
            key: self.regression_head.sides(level, stride)
            for (key, level), stride in zip(points.items(), self.strides, strict=True)
        }

    def forward(self, x: list[Tensor]) -> Outputs:
        """The pyramid → cls_logits N×all×num_classes, bbox_regression and bbox_initial N×all×4, the distances in pixels
        to the sides of the second and first box; the locations level by level and row by row."""
        logits, first, second = (dict(enumerate(maps)) for maps in zip(*map(self.maps, x), strict=True))
        return {
            "cls_logits": flatten(logits, self.classification_head.num_classes),
            "bbox_regression": flatten(self.sides(second), 4),
            "bbox_initial": flatten(self.sides(first), 4),
        }


class RepPoints(OneBoxDetector):
    """The plain detector. Its anchors, of 4 strides in the usual one, are the scale of the objects that a level's first
    points learn and start from, and the unit of the box losses; nothing else depends on them."""

    head: RepPointsHead

    def compute_loss(
        self, targets: list[Target], head_outputs: Outputs, anchors: list[Tensor], num_anchors_per_level: list[int]
    ) -> Outputs:
        """Focal loss of the classes and smooth L1 losses of second and first boxes, scalars; targets in the canvas's
        pixels.

        Each is divided by the number of locations that learn an object, one at least in every image (public code), over
        the batch as it is given: whoever splits one over processes combines their gradients.
        """
        sums: dict[str, list[Tensor]] = {"classification": [], "bbox_regression": [], "bbox_initial": []}
        first_count = second_count = 0
        for image, (target, centred) in enumerate(zip(targets, anchors, strict=True)):
            truth, logits = target["boxes"], head_outputs["cls_logits"][image].float()
            first, second = (
                self.box_coder.decode(head_outputs[name][image], centred)
                for name in ("bbox_initial", "bbox_regression")
            )
            near = assign_nearest(centred, truth, num_anchors_per_level)
            over = assign_overlapping(first.detach(), truth)
            for name, boxes, matched in (("bbox_initial", first, near), ("bbox_regression", second, over)):
                taught = matched >= 0
                sums[name].append(box_loss(boxes[taught], truth[matched[taught]], centred[taught]))
            wanted = torch.zeros_like(logits)
            wanted[over >= 0, target["labels"][over[over >= 0]]] = 1.0
            judged = over != BETWEEN
            sums["classification"].append(sigmoid_focal_loss(logits[judged], wanted[judged], reduction="sum"))
            first_count += max(1, int((near > NOTHING).sum()))
            second_count += max(1, int((over > NOTHING).sum()))
        totals = {name: torch.stack(parts).sum() for name, parts in sums.items()}
        return {
            "classification": totals["classification"] / second_count,
            "bbox_regression": totals["bbox_regression"] / second_count,
            "bbox_initial": INITIAL_WEIGHT * totals["bbox_initial"] / first_count,
        }


def _kernel_places(points: int) -> Tensor:
    """2P×1×1: of each place of a square kernel how many cells it is down and across from the middle, row by row."""
    side = math.isqrt(points)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (torch.stack([rows, columns], dim=-1).flatten() - side // 2).float().view(-1, 1, 1)


class _PointConvolution(nn.Module):
    """A convolution without bias whose kernel's places are a location's points, and a ReLU.

    No norm follows it: with the public code's weights of 0.01 little of the classes' gradient would pass [ours].
    """

    def __init__(self, width: int, points: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, math.isqrt(points), math.isqrt(points)))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """N×C×H×W and N×2P×H×W → N×C×H×W."""
        return deformable_convolution(x, offsets, self.weight).relu()


@dataclass
class RepPointsDense(Dense):
    """Dense responses with the point sets. deltas are distances in pixels from the location to the second box's sides.

    first, second: nominal stride → N×2P×H×W strides from the location, of each point how far down, then across.
    """

    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)


class RepPointsSteps(OneStageSteps):
    """The steps of ``detectors.steps.Detector`` on a RepPoints."""

    model: RepPoints

    def dense(self, inputs: Inputs, features: Features) -> RepPointsDense:
        """Class logits, distances to the box's sides in pixels, and both sets of points, of every location."""
        maps = [self.model.head.maps(level) for level in features.values()]
        logits, first, second = (dict(zip(features, levels, strict=True)) for levels in zip(*maps, strict=True))
        anchors = self.model.anchor_generator(inputs.images, list(features.values()))
        return RepPointsDense(logits, self.model.head.sides(second), anchors, first=first, second=second)

    def losses(self, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """The plain model's focal loss and its losses of second and first boxes."""
        assert isinstance(dense, RepPointsDense)
        outputs = self.outputs(dense) | {"bbox_initial": flatten(self.model.head.sides(dense.first), 4)}
        per_level = [level.shape[2] * level.shape[3] for level in features.values()]
        return self.model.compute_loss(inputs.ground_truth(), outputs, dense.anchors, per_level)


def build_reppoints(spec: DetectorSpec) -> RepPoints:
    """A RepPoints with fresh weights from torch's generator."""
    backbone = build_backbone(spec)
    classes = len(spec.labels) + 1
    side = math.sqrt(2) * spec.anchor_sizes[0] / spec.levels[0]
    head = RepPointsHead(spec.neck_width, classes, spec.levels, spec.head_depth, spec.head_groups, spec.points, side)
    return RepPoints(backbone, classes, one_anchor(spec), head, **frame_options(spec))


def describe_reppoints(model: RepPoints, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's RepPoints, read off its modules; SpecError where a spec cannot say a part."""
    if not isinstance(model.head, RepPointsHead):
        raise SpecError(f"Expected a RepPointsHead, found {type(model.head).__name__}: no adapter for it.")
    points = model.head.regression_head.num_points
    spec = DetectorSpec(family="reppoints", points=points, **describe_one_box(model, labels))
    with torch.device("meta"):
        check_rebuilt(model, build_reppoints(spec), unsaid_one_box)
    return spec


def read_reppoints(state: State) -> Read | None:
    """Classes and fields that the head's tensors tell."""
    if f"{REGRESS}box_scale" not in state:
        return None
    return sizes(state, f"{CLASSIFY}cls_logits.weight", 4)[0] - 1, {
        "points": sizes(state, f"{REGRESS}init_points.weight", 4)[0] // 2,
        **({} if f"{CLASSIFY}conv.0.1.weight" in state else {"head_groups": 0}),
        "head_depth": count(state, CLASSIFY + "conv.{}.0.weight"),
    }


# Of each tower: the layer that reads it → the one that reads that, and the group of channels between them.
READERS: Final = {
    "classification": {"cls_conv": ("cls_logits", "classification.pointed")},
    "regression": {
        "init_conv": ("init_points", "regression.first"),
        "refine_conv": ("refine_points", "regression.second"),
    },
}


def head_groups(spec: DetectorSpec) -> Named:
    """The channels of the towers, and between the layers that read them."""
    for tower, layers in READERS.items():
        yield from tower_groups(spec, tower, True, ())
        made = f"{tower}.{spec.head_depth - 1}"
        last: Dim = Blocks(made, spec.neck_width // spec.head_groups) if spec.head_groups else made
        for layer, (reader, between) in layers.items():
            yield f"head.{tower}_head.{layer}.weight", (between, last)
            yield f"head.{tower}_head.{reader}.weight", (None, between)
    yield f"{REGRESS}init_conv.bias", ("regression.first",)


def head_counts(spec: DetectorSpec) -> dict[str, int]:
    """Channels of each group of the head."""
    between = [group for layers in READERS.values() for _, group in layers.values()]
    return tower_counts(spec) | dict.fromkeys(between, spec.neck_width)


FAMILY = Family(
    model=RepPoints,
    steps=RepPointsSteps,
    build=build_reppoints,
    describe=describe_reppoints,
    read=read_reppoints,
    head_groups=head_groups,
    head_counts=head_counts,
    class_layers={f"{CLASSIFY}cls_logits": 1},
    mmdet=MMDet(
        mark="bbox_head.reppoints_cls_out.weight",
        names=(
            *TOWER_NAMES,
            (r"bbox_head\.reppoints_cls_conv\.", f"{CLASSIFY}cls_conv."),
            (r"bbox_head\.reppoints_cls_out\.", f"{CLASSIFY}cls_logits."),
            (r"bbox_head\.reppoints_pts_(init|refine)_conv\.", rf"{REGRESS}\1_conv."),
            (r"bbox_head\.reppoints_pts_(init|refine)_out\.", rf"{REGRESS}\1_points."),
            (r"bbox_head\.moment_transfer", f"{REGRESS}box_scale"),
        ),
        spec={"top_relu": False},
    ),
)
