"""RetinaNet (Lin et al. 2017): torchvision's model in explicit steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from autodet.detectors.dims import Named, tower_counts, tower_groups
from autodet.detectors.one_stage import OneStageSteps, describe_selection, flatten, frame_options
from autodet.detectors.pyramid import (
    build_backbone,
    check_rebuilt,
    describe_frame,
    matching,
    unsaid_frame,
)
from autodet.detectors.spec import DetectorSpec, SpecError, octaves
from autodet.detectors.state import CLASSIFY, REGRESS, TOWER_NAMES, MMDet, Read, State, count, one_stage
from autodet.detectors.steps import Dense, Family, Features, Inputs

V2_GROUPS = 32  # of the group norms of torchvision's second version


class RetinaNetSteps(OneStageSteps):
    """The steps of ``detectors.steps.Detector`` on a torchvision RetinaNet, which is used as it is, not copied."""

    model: RetinaNet

    def dense(self, inputs: Inputs, features: Features) -> Dense:
        """Class logits and box regressions of every anchor."""
        classify, regress = self.model.head.classification_head, self.model.head.regression_head
        logits = {stride: classify.cls_logits(classify.conv(level)) for stride, level in features.items()}
        deltas = {stride: regress.bbox_reg(regress.conv(level)) for stride, level in features.items()}
        return Dense(logits, deltas, self.model.anchor_generator(inputs.images, list(features.values())))

    def boxes(self, dense: Dense) -> Tensor:
        """N×all×4 xyxy in the canvas's pixels."""
        rows = flatten(dense.deltas, 4).float()
        decode = self.model.box_coder.decode_single
        return torch.stack([decode(codes, anchors) for codes, anchors in zip(rows, dense.anchors, strict=True)])

    def losses(self, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        """The plain model's focal loss and box loss."""
        return dict(self.model.compute_loss(inputs.ground_truth(), self.outputs(dense), dense.anchors))


def build_retinanet(spec: DetectorSpec) -> RetinaNet:
    """A torchvision RetinaNet with fresh weights from torch's generator; parameter names are torchvision's."""
    backbone = build_backbone(spec)
    anchors = AnchorGenerator(
        tuple(octaves(size, spec.anchor_octaves) for size in spec.anchor_sizes),
        (spec.anchor_ratios,) * len(spec.anchor_sizes),
    )
    groups = partial(nn.GroupNorm, spec.head_groups) if spec.head_groups else None
    head = RetinaNetHead(
        spec.neck_width, anchors.num_anchors_per_location()[0], len(spec.labels) + 1, norm_layer=groups
    )
    for part in (head.classification_head, head.regression_head):
        part.conv = part.conv[: spec.head_depth]  # torchvision builds four
    head.regression_head._loss_type = spec.box_loss
    return RetinaNet(
        backbone,
        len(spec.labels) + 1,
        anchor_generator=anchors,
        head=head,
        **frame_options(spec),
    )


def describe_retinanet(model: RetinaNet, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's torchvision RetinaNet, read off its modules; SpecError where a spec cannot say a part."""
    if not isinstance(model.head, RetinaNetHead):
        raise SpecError(f"Expected a RetinaNetHead, found {type(model.head).__name__}: no adapter for it.")
    classify, anchors = model.head.classification_head, model.anchor_generator
    norm = next((m for m in classify.conv.modules() if isinstance(m, nn.GroupNorm)), None)
    spec = DetectorSpec(
        family="retinanet",
        **describe_frame(model, classify.num_classes - 1, labels),
        anchor_sizes=tuple(sizes[0] for sizes in anchors.sizes),
        anchor_octaves=len(anchors.sizes[0]),
        anchor_ratios=tuple(anchors.aspect_ratios[0]),
        head_depth=len(classify.conv),
        head_groups=norm.num_groups if norm is not None else 0,
        box_loss=cast(str, model.head.regression_head._loss_type),
        **describe_selection(model),
    )
    with torch.device("meta"):
        check_rebuilt(model, build_retinanet(spec), _unsaid)
    return spec


def _unsaid(model: RetinaNet) -> dict[str, object]:
    """Settings that a spec has no field for."""
    return unsaid_frame(model, model.anchor_generator) | {
        "matcher": matching(model.proposal_matcher),
        "box_coders": (tuple(model.box_coder.weights), tuple(model.head.regression_head.box_coder.weights)),
    }


def read_retinanet(state: State) -> Read | None:
    """Classes and fields that the head's tensors tell."""
    if f"{CLASSIFY}cls_logits.weight" not in state or f"{REGRESS}bbox_ctrness.weight" in state:
        return None
    classes, head = one_stage(state, {9: 3, 3: 1})
    if f"{CLASSIFY}conv.0.1.weight" in state:  # retinanet_resnet50_fpn_v2
        head |= {"head_groups": V2_GROUPS, "box_loss": "giou"}
    return classes, head | {"head_depth": count(state, CLASSIFY + "conv.{}.0.weight")}


def head_groups(spec: DetectorSpec) -> Named:
    """The towers' channels."""
    yield from tower_groups(spec, "classification", True, ("cls_logits",))
    yield from tower_groups(spec, "regression", True, ("bbox_reg",))


FAMILY = Family(
    model=RetinaNet,
    steps=RetinaNetSteps,
    build=build_retinanet,
    describe=describe_retinanet,
    read=read_retinanet,
    head_groups=head_groups,
    head_counts=tower_counts,
    class_layers={f"{CLASSIFY}cls_logits": 1},
    mmdet=MMDet(
        mark="bbox_head.retina_cls.weight",
        names=(
            *TOWER_NAMES,
            (r"bbox_head\.retina_cls\.", f"{CLASSIFY}cls_logits."),
            (r"bbox_head\.retina_reg\.", f"{REGRESS}bbox_reg."),
        ),
        spec={"top_relu": False, "detections": 100},
    ),
)
