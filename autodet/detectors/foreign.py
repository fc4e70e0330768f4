"""A user's torchvision state dict as a detector; the settings that its tensors do not tell are torchvision's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from autodet.detectors.arch import Arch, ArchError
from autodet.detectors.build import build, is_detector_file, load_detector
from autodet.detectors.spec import COCO_LABELS, DetectorSpec, SpecError, torchvision_spec
from autodet.detectors.steps import Detector
from autodet.detectors.weights import load_strict, modern_names, read_state_dict

Labels = Sequence[tuple[int, str]]  # (category id, name) of label 1, 2, …
State = Mapping[str, Tensor]

MIN_SIZE, MAX_SIZE = 800, 1333  # torchvision's
GROUPS: Final = 32  # of the group norms in torchvision's heads
BODY: Final = "backbone.body."
CLASSIFY: Final = "head.classification_head."
REGRESS: Final = "head.regression_head."
# Octaves by the anchors of a location, for torchvision's three ratios (one in FCOS).
OCTAVES: Final = {"faster_rcnn": {3: 1}, "retinanet": {9: 3, 3: 1}, "fcos": {1: 1}}
ADAPT: Final = "build that model yourself and give it to adapt()"


def load_any_detector(path: Path | str, labels: Labels, min_size: int | None = None) -> Detector:
    """A detector in evaluation mode from a file of ``save_detector`` or of a torchvision state dict.

    labels, min_size: of a state dict, as ``detector_of_state_dict`` takes them (None: 800); a file of ours knows its
    own. WeightsError or SpecError, which name the file, where it cannot be read or is no detector that we know.
    """
    if is_detector_file(path):
        return load_detector(Path(path))[0]
    size = MIN_SIZE if min_size is None else min_size
    return detector_of_state_dict(read_state_dict(path), labels, size, max(size, MAX_SIZE), str(path))


def detector_of_state_dict(
    state: State,
    labels: Labels,
    min_size: int = MIN_SIZE,
    max_size: int = MAX_SIZE,
    source: str = "the state dict",
    norm_eps: float | None = None,
) -> Detector:
    """The torchvision detector that a state dict belongs to, in evaluation mode.

    Family, body, widths, depths, levels and the number of classes are read off the tensors. Anchors, group norms, and
    what acts on images and detections are as torchvision's constructors have them: a model built otherwise needs
    ``adapt``. labels: of the data; where there are 90 classes and other labels, those are COCO's raw ids
    (``COCO_LABELS``). min_size, max_size: pixels, as it was trained. source: names the state dict in errors.

    Norms without a count of batches are frozen ones. norm_eps: theirs, which no tensor tells. None: 0 for Faster R-CNN
    and RetinaNet on a ResNet-50, since torchvision's COCO weights of these have 0 and so has what is fine-tuned from
    them; give 1e-5 where a training with frozen norms started from ImageNet weights instead. 1e-5 for all others.

    SpecError where it belongs to no such detector or the labels are of another number, WeightsError where tensors of
    one are missing, superfluous, or of another shape.
    """
    state = modern_names(state)
    try:
        spec = replace(_spec(state, labels, norm_eps), min_size=min_size, max_size=max_size)
    except ArchError as error:
        raise SpecError(f"{source}: expected a ResNet as the detector's body. {error}") from error
    except SpecError as error:
        raise SpecError(f"{source}: {error}") from error
    detector = build(spec)
    load_strict(detector.model, state, source)
    detector.model.eval()
    return detector


def _spec(state: State, labels: Labels, norm_eps: float | None) -> DetectorSpec:
    family = _family(state)
    body = Arch.of_state_dict(state, BODY)
    width = _sizes(state, "backbone.fpn.layer_blocks.0.0.weight", 4)[0]
    classes, fields = _two_stage(state, width) if family == "faster_rcnn" else _one_stage(state, family)
    spec = torchvision_spec(family, body, _labels(classes, labels))
    levels, expected = _count(state, "backbone.fpn.inner_blocks.{}.0.weight"), len(spec.body_levels)
    if levels != expected:
        raise SpecError(f"expected a pyramid on the body's last {expected} stages, found one on {levels}; {ADAPT}.")
    if f"{BODY}bn1.num_batches_tracked" not in state:
        fields |= {"norm": "frozen", "norm_eps": _frozen_eps(spec) if norm_eps is None else norm_eps}
    return replace(spec, neck_width=width, top=_top(state, width), **fields)


def _family(state: State) -> str:
    if "rpn.head.cls_logits.weight" in state:
        return "faster_rcnn"
    if f"{REGRESS}bbox_ctrness.weight" in state:
        return "fcos"
    if f"{CLASSIFY}cls_logits.weight" in state:
        return "retinanet"
    known = f"a torchvision Faster R-CNN (rpn.head.*), RetinaNet or FCOS ({CLASSIFY}cls_logits.*)"
    raise SpecError(f"expected the state dict of {known}, found one with {', '.join(list(state)[:3])}, …")


def _top(state: State, width: int) -> str:
    """What P6 is made from. Where the body's last map is as wide as the neck's, the neck's, as in torchvision."""
    p6 = state.get("backbone.fpn.extra_blocks.p6.weight")
    if p6 is None:
        return "pool"
    return "neck" if p6.shape[1] == width else "body"


def _frozen_eps(spec: DetectorSpec) -> float:
    """See ``detector_of_state_dict``; torchvision's constructors set 0 where they load these weights."""
    return 0.0 if spec.family in ("faster_rcnn", "retinanet") and spec.body == Arch.resnet50() else 1e-5


def _two_stage(state: State, width: int) -> tuple[int, dict[str, Any]]:
    """Classes besides background, and the fields of a Faster R-CNN's heads."""
    if "roi_heads.box_head.fc6.weight" not in state:
        raise SpecError(
            "expected a box head of two layers (roi_heads.box_head.fc6), found another one, as that of "
            "fasterrcnn_resnet50_fpn_v2: there is no adapter for it."
        )
    anchors = _sizes(state, "rpn.head.bbox_pred.weight", 4)[0] // 4
    head_width, inputs = _sizes(state, "roi_heads.box_head.fc6.weight", 2)
    return _sizes(state, "roi_heads.box_predictor.cls_score.weight", 2)[0] - 1, {
        "anchor_octaves": _octaves("faster_rcnn", anchors),
        "rpn_depth": _count(state, "rpn.head.conv.{}.0.weight"),
        "head_width": head_width,
        "roi_size": math.isqrt(inputs // width),
    }


def _one_stage(state: State, family: str) -> tuple[int, dict[str, Any]]:
    """Classes besides background, and the fields of a RetinaNet's or an FCOS's head."""
    anchors = _sizes(state, f"{REGRESS}bbox_reg.weight", 4)[0] // 4
    head: dict[str, Any] = {"anchor_octaves": _octaves(family, anchors)}
    classes = _sizes(state, f"{CLASSIFY}cls_logits.weight", 4)[0] // anchors - 1
    if family == "fcos":  # convolution, norm, activation
        return classes, head | {"head_depth": _count(state, CLASSIFY + "conv.{}.weight", step=3)}
    if f"{CLASSIFY}conv.0.1.weight" in state:  # retinanet_resnet50_fpn_v2
        head |= {"head_groups": GROUPS, "box_loss": "giou"}
    return classes, head | {"head_depth": _count(state, CLASSIFY + "conv.{}.0.weight")}


def _octaves(family: str, anchors: int) -> int:
    known = OCTAVES[family]
    if anchors not in known:
        raise SpecError(
            f"expected torchvision's {' or '.join(map(str, known))} anchors at a location, found {anchors}, whose "
            f"sizes and ratios a state dict does not hold; {ADAPT}."
        )
    return known[anchors]


def _labels(classes: int, labels: Labels) -> Labels:
    """The data's labels, or COCO's raw ids, by their number."""
    if classes == len(labels):
        return labels
    if classes == len(COCO_LABELS):
        return COCO_LABELS
    raise SpecError(
        f"it has {classes} classes besides background, which is its class 0, but the data has {len(labels)} labels. "
        f"Give the labels that it was trained on, or fine-tune it on these (num_classes={len(labels) + 1})."
    )


def _sizes(state: State, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state or state[name].dim() != dimensions:
        raise SpecError(f"expected {name!r} with {dimensions} dimensions; save all of model.state_dict().")
    return tuple(state[name].shape)


def _count(state: State, name: str, step: int = 1) -> int:
    """How many layers there are that are numbered 0, step, 2·step, …"""
    number = 0
    while name.format(number * step) in state:
        number += 1
    return number
