"""A user's state dict of torchvision or mmdetection as a detector; settings that its tensors do not tell are these
libraries' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from autodet.detectors.arch import Arch, ArchError
from autodet.detectors.build import FAMILY_OF, build, is_detector_file, load_detector
from autodet.detectors.mmdet import COCO_80, from_mmdet, is_mmdet
from autodet.detectors.spec import COCO_LABELS, FAMILIES, DetectorSpec, SpecError, standard_spec
from autodet.detectors.state import ADAPT, Read, State, count, sizes
from autodet.detectors.steps import Detector
from autodet.detectors.weights import load_strict, modern_names, read_state_dict

Labels = Sequence[tuple[int, str]]  # (category id, name) of label 1, 2, …

MIN_SIZE, MAX_SIZE = 800, 1333  # torchvision's
BODY: Final = "backbone.body."
NECK_GROUPS: Final = 32  # of a pyramid with norms, mmdetection's usual number


def load_any_detector(path: Path | str, labels: Labels, min_size: int | None = None) -> Detector:
    """A detector in evaluation mode from a file of ``save_detector``, or of torchvision's or mmdetection's state dict.

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
    """The torchvision detector that a state dict belongs to, in evaluation mode; of mmdetection's, the same detector in
    torchvision's terms (see ``mmdet.py`` for what that means, and for what is refused).

    Family, body, widths, depths, levels and the number of classes are read off the tensors. Anchors, group norms, and
    what acts on images and detections are as torchvision's constructors have them: a model built otherwise needs
    ``adapt``. labels: of the data; where there are 90 classes and other labels, those are COCO's raw ids
    (``COCO_LABELS``), and of mmdetection's 80 those of them that name something (``COCO_80``). min_size, max_size:
    pixels, as it was trained. source: names the state dict in errors.

    Norms without a count of batches are frozen ones. norm_eps: theirs, which no tensor tells. None: 0 for Faster R-CNN,
    RetinaNet and Mask R-CNN on a ResNet-50, since torchvision's COCO weights of these have 0 and so has what is
    fine-tuned from them; give 1e-5 where a training with frozen norms started from ImageNet weights instead. 1e-5 for
    all others.

    SpecError where it belongs to no such detector or the labels are of another number, WeightsError where tensors of
    one are missing, superfluous, or of another shape.
    """
    state, coco = modern_names(state), COCO_LABELS
    fields: dict[str, Any] = {}
    try:
        if is_mmdet(state):
            (state, fields), coco = from_mmdet(state), COCO_80
        spec = replace(_spec(state, labels, coco, norm_eps), **fields, min_size=min_size, max_size=max_size)
    except ArchError as error:
        raise SpecError(f"{source}: expected a ResNet as the detector's body. {error}") from error
    except SpecError as error:
        raise SpecError(f"{source}: {error}") from error
    detector = build(spec)
    load_strict(detector.model, state, source)
    detector.model.eval()
    return detector


def _spec(state: State, labels: Labels, coco: Labels, norm_eps: float | None) -> DetectorSpec:
    if not any(name.startswith(BODY) for name in state):
        raise _unknown(state)
    body = Arch.of_state_dict(state, BODY)
    family, (classes, fields) = _read(state)
    width = sizes(state, "backbone.fpn.layer_blocks.0.0.weight", 4)[0]
    top = _top(state, width)
    spec = standard_spec(family, body, _labels(classes, labels, coco))
    levels, expected = count(state, "backbone.fpn.inner_blocks.{}.0.weight"), len(spec.body_levels)
    if levels != expected:
        raise SpecError(f"expected a pyramid on the body's last {expected} stages, found one on {levels}; {ADAPT}.")
    if "backbone.fpn.inner_blocks.0.1.weight" in state:
        fields |= {"neck_groups": NECK_GROUPS, "top_relu": top == "pool"}
    if f"{BODY}bn1.num_batches_tracked" not in state:
        fields |= {"norm": "frozen", "norm_eps": _frozen_eps(spec) if norm_eps is None else norm_eps}
    return replace(spec, neck_width=width, top=top, **fields)


def _read(state: State) -> tuple[str, Read]:
    """The family whose head these are, and what its own file reads off them."""
    for name, family in FAMILY_OF.items():
        if (found := family.read(state)) is not None:
            return name, found
    raise _unknown(state)


def _unknown(state: State) -> SpecError:
    return SpecError(
        f"expected the state dict of one of {', '.join(FAMILIES)} in torchvision's names (rpn.head.*, "
        f"head.classification_head.*) or mmdetection's (neck.lateral_convs.*), found one with "
        f"{', '.join(list(state)[:3])}, …"
    )


def _top(state: State, width: int) -> str:
    """What P6 is made from. Where the body's last map is as wide as the neck's, the neck's, as in torchvision."""
    names = [f"backbone.fpn.extra_blocks.p6.{own}weight" for own in ("", "0.")]
    p6 = next((state[name] for name in names if name in state), None)
    if p6 is None:
        return "pool"
    return "neck" if p6.shape[1] == width else "body"


def _frozen_eps(spec: DetectorSpec) -> float:
    """See ``detector_of_state_dict``; torchvision's constructors set 0 where they load these weights."""
    return 0.0 if spec.family in ("faster_rcnn", "retinanet", "mask_rcnn") and spec.body == Arch.resnet50() else 1e-5


def _labels(classes: int, labels: Labels, coco: Labels) -> Labels:
    """The data's labels, or COCO's, by their number."""
    if classes == len(labels):
        return labels
    if classes == len(coco):
        return coco
    raise SpecError(
        f"it has {classes} classes besides background, which is its class 0, but the data has {len(labels)} labels. "
        f"Give the labels that it was trained on, or fine-tune it on these (num_classes={len(labels) + 1})."
    )
