"""FCOS (Tian et al. 2019): torchvision's model in explicit steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

from autodet.detectors.dims import Named, tower_counts, tower_groups
from autodet.detectors.one_stage import OneStageSteps, describe_selection, frame_options
from autodet.detectors.pyramid import build_backbone, check_rebuilt, describe_frame, unsaid_frame
from autodet.detectors.spec import DetectorSpec, SpecError
from autodet.detectors.state import CLASSIFY, REGRESS, MMDet, Read, State, count, one_stage
from autodet.detectors.steps import Dense, Family, Features, Inputs


class FCOSSteps(OneStageSteps):
    """The steps of ``detectors.steps.Detector`` on a torchvision FCOS, which is used as it is, not copied."""

    model: FCOS

    def dense(self, inputs: Inputs, features: Features) -> Dense:
        """Class logits, distances to the box's sides (in the level's anchor size) and centerness of every location."""
        classify, regress = self.model.head.classification_head, self.model.head.regression_head
        logits = {stride: classify.cls_logits(classify.conv(level)) for stride, level in features.items()}
        towers = {stride: regress.conv(level) for stride, level in features.items()}
        sides = {stride: nn.functional.relu(regress.bbox_reg(tower)) for stride, tower in towers.items()}
        centerness = {stride: regress.bbox_ctrness(tower) for stride, tower in towers.items()}
        anchors = self.model.anchor_generator(inputs.images, list(features.values()))
        return Dense(logits, sides, anchors, centerness)


def build_fcos(spec: DetectorSpec) -> FCOS:
    """A torchvision FCOS with fresh weights from torch's generator; parameter names are torchvision's."""
    backbone = build_backbone(spec)
    classes = len(spec.labels) + 1
    anchors = AnchorGenerator(tuple((size,) for size in spec.anchor_sizes), ((1.0,),) * len(spec.anchor_sizes))
    head = FCOSHead(spec.neck_width, 1, classes, num_convs=0)  # its own norms have 32 groups
    groups = partial(nn.GroupNorm, spec.head_groups)
    head.classification_head = FCOSClassificationHead(spec.neck_width, 1, classes, spec.head_depth, norm_layer=groups)
    head.regression_head = FCOSRegressionHead(spec.neck_width, 1, spec.head_depth, norm_layer=groups)
    return FCOS(
        backbone,
        classes,
        anchor_generator=anchors,
        head=head,
        **frame_options(spec),
    )


def describe_fcos(model: FCOS, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The spec of a user's torchvision FCOS, read off its modules; SpecError where a spec cannot say a part."""
    if not isinstance(model.head, FCOSHead):
        raise SpecError(f"Expected an FCOSHead, found {type(model.head).__name__}: no adapter for it.")
    classify = model.head.classification_head
    norms = [layer for layer in classify.conv if isinstance(layer, nn.GroupNorm)]
    if not norms:
        raise SpecError("Expected an FCOSHead with group norms, found none: no adapter for it.")
    spec = DetectorSpec(
        family="fcos",
        **describe_frame(model, classify.num_classes - 1, labels),
        anchor_sizes=tuple(sizes[0] for sizes in model.anchor_generator.sizes),
        anchor_ratios=(1.0,),
        head_depth=len(norms),
        head_groups=norms[0].num_groups,
        **describe_selection(model),
    )
    with torch.device("meta"):
        check_rebuilt(model, build_fcos(spec), _unsaid)
    return spec


def _unsaid(model: FCOS) -> dict[str, object]:
    """Settings that a spec has no field for."""
    return unsaid_frame(model, model.anchor_generator) | {
        "center_sampling_radius": model.center_sampling_radius,
        "box_coders": (model.box_coder.normalize_by_size, model.head.box_coder.normalize_by_size),
    }


def read_fcos(state: State) -> Read | None:
    """Classes and fields that the head's tensors tell."""
    if f"{REGRESS}bbox_ctrness.weight" not in state:
        return None
    classes, head = one_stage(state, {1: 1})
    return classes, head | {"head_depth": count(state, CLASSIFY + "conv.{}.weight", step=3)}  # convolution, norm, ReLU


def head_groups(spec: DetectorSpec) -> Named:
    """The towers' channels."""
    yield from tower_groups(spec, "classification", False, ("cls_logits",))
    yield from tower_groups(spec, "regression", False, ("bbox_reg", "bbox_ctrness"))


FAMILY = Family(
    model=FCOS,
    steps=FCOSSteps,
    build=build_fcos,
    describe=describe_fcos,
    read=read_fcos,
    head_groups=head_groups,
    head_counts=tower_counts,
    class_layers={f"{CLASSIFY}cls_logits": 1},
    mmdet=MMDet(
        mark="bbox_head.conv_centerness.weight",
        refused="an FCOS of mmdetection's, which answers for points half a stride from torchvision's and scales each "
        "level's distances by a number of its own: torchvision's FCOS cannot compute it; train one here instead",
    ),
)
