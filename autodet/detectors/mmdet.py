"""mmdetection's state dicts (2.x and 3.x) under torchvision's names: ResNets and ResNeXts with a feature pyramid.

What names alone do not do:

- The background is mmdetection's last class and our first: rows of softmax heads are rotated. Sigmoid heads have no
  row for it there; here it is a row that never answers.
- Regressions of each class get zeros for the background; one for all classes is repeated.
- Its regions are pooled with half a cell's offset and one point a cell, its pyramids' P7 is made from P6 without a
  ReLU: the families' files say so of their specs (``roi_aligned``, ``roi_sampling``, ``top_relu``).

The same there and here: anchors' sizes, ratios and order (torchvision's are rounded to whole pixels), units of
regressions but for a cascade's third stage, the images' mean and deviation, norms' eps, P6 by pooling, the nearest
cell in the pyramid's sums, selection and NMS. Left as it is here: of a cascade, probabilities are averaged, not logits;
locations of levels whose strides do not divide the canvas (64 and 128) are spread evenly over it, as torchvision's.

Refused, since no spec of ours computes it: "caffe" bodies, whose stride is in the first convolution of a block and
whose images are BGR in 0–255, modulated deformable convolutions, FCOS heads. What no tensor tells is taken to be as in
the usual configurations, and could only be checked on real weights and images: anchors, the number of norms' groups,
the ReLU, the offset, that the version is 2 or later (1.x has the background first), that images are as torchvision's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from autodet.detectors.build import FAMILY_OF
from autodet.detectors.spec import SpecError
from autodet.detectors.state import UNUSED, State, count
from autodet.detectors.steps import Family
from autodet.detectors.traits import TRAITS

# The logit of a class that there is none of: as low as training makes it, and no lower, so that it can be imitated.
NEVER: Final = -10.0
LATERAL: Final = "neck.lateral_convs.{}.conv.weight"
NECK_NORM: Final = "neck.lateral_convs.0.gn.weight"
# Of COCO's raw category ids 1 to 90, those that name nothing: mmdetection numbers the others from 0 to 79.
UNNAMED: Final = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_80: Final = tuple((number, f"COCO category {number}") for number in range(1, 91) if number not in UNNAMED)


def is_mmdet(state: State) -> bool:
    """Whether a state dict has the names that mmdetection gives to a body and a pyramid."""
    return LATERAL.format(0) in state and "backbone.layer1.0.conv1.weight" in state


def from_mmdet(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same detector's tensors as torchvision names and orders them, and fields of its spec that they do not tell.

    SpecError where its head is none that we know, or a part of it has no counterpart here.
    """
    name, family = _family(state)
    assert family.mmdet is not None
    if family.mmdet.refused:
        raise SpecError(f"it is {family.mmdet.refused}.")
    _check_style(state)
    tables = (*_frame_names(state), *family.mmdet.names)
    renamed = {_renamed(key, tables): value for key, value in state.items()}
    unknown = [key for key, new in zip(state, renamed, strict=True) if key == new]
    if unknown:
        raise SpecError(
            f"it is a {name} of mmdetection's with parts that have no counterpart here: {', '.join(unknown[:4])}"
            f"{'' if len(unknown) <= 4 else f' and {len(unknown) - 4} more tensors'}."
        )
    adjusted = family.mmdet.adjust({name: value for name, value in renamed.items() if not name.startswith(UNUSED)})
    return _with_background(family, name, adjusted), dict(family.mmdet.spec)


def _family(state: State) -> tuple[str, Family]:
    known = {name: family for name, family in FAMILY_OF.items() if family.mmdet is not None}
    for name, family in known.items():
        assert family.mmdet is not None
        if family.mmdet.mark in state:
            return name, family
    heads = sorted({key for key in state if re.match(r"(bbox_head|roi_head)\..*weight$", key) and "_convs." not in key})
    raise SpecError(
        f"expected a head of {', '.join(known)} in mmdetection's names, found one with {', '.join(heads[:3])}."
        if heads
        else f"expected a head of {', '.join(known)} in mmdetection's names, found none."
    )


def _frame_names(state: State) -> Iterator[tuple[str, str]]:
    """Body and pyramid, with group norms or without. Convolutions above those of the body's levels make P6 and P7."""
    levels = count(state, LATERAL)
    yield r"backbone\.((?:conv1|bn1|layer\d\.\d+\.(?:conv\d|bn\d|downsample\.\d))\.)", r"backbone.body.\1"
    own = "0." if NECK_NORM in state else ""
    for above, name in ((levels, "p6"), (levels + 1, "p7")):
        yield rf"neck\.fpn_convs\.{above}\.conv\.", f"backbone.fpn.extra_blocks.{name}.{own}"
        yield rf"neck\.fpn_convs\.{above}\.gn\.", f"backbone.fpn.extra_blocks.{name}.1."
    for part, number in (("conv", 0), ("gn", 1)):
        yield rf"neck\.lateral_convs\.(\d+)\.{part}\.", rf"backbone.fpn.inner_blocks.\1.{number}."
        yield rf"neck\.fpn_convs\.(\d+)\.{part}\.", rf"backbone.fpn.layer_blocks.\1.{number}."


def _renamed(name: str, tables: tuple[tuple[str, str], ...]) -> str:
    """By the first pattern that a name begins with; as it is where there is none."""
    for pattern, replacement in tables:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return name


def _check_style(state: State) -> None:
    """Bodies that were converted from Caffe tell by their norms: all that these have is in scale and shift."""
    means = [value for name, value in state.items() if re.match(r"backbone\..*running_mean$", name)]
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    if bottleneck and means and not any(bool(value.any()) for value in means):
        raise SpecError(
            'its norms have no statistics, so its body is one of style "caffe", with strides and images that differ '
            'from torchvision\'s. Give one of style "pytorch".'
        )


def _with_background(family: Family, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers that answer for classes, with the background as class 0."""
    found, stages = dict(state), range(len(state))
    for pattern, each in {**family.class_layers, **family.mask_layers}.items():
        for layer in dict.fromkeys(pattern.format(stage) for stage in stages):
            if f"{layer}.weight" not in state:
                break
            for kind in ("weight", "bias"):
                if f"{layer}.{kind}" in state:
                    found[f"{layer}.{kind}"] = _background_first(name, layer, state, kind, each)
    return found


def _background_first(family: str, layer: str, state: State, kind: str, each: int) -> Tensor:
    """One tensor of a class layer. each: how many numbers in a row are of one class."""
    value = state[f"{layer}.{kind}"]
    if TRAITS[family].two_stage:
        if layer.endswith("cls_score"):
            return torch.cat([value[-1:], value[:-1]])
        classes = len(state[f"{layer.rpartition('.')[0]}.cls_score.bias"]) - 1 if each == 4 else len(value) // each
        if len(value) == each != classes * each:  # one regression for all classes
            return value.repeat(classes + 1, *(1,) * (value.dim() - 1))
        return torch.cat([torch.zeros_like(value[:each]), value])
    anchors = _anchors(family)
    if len(value) % anchors:
        raise SpecError(f"expected class responses of {anchors} anchors a location, found {len(value)} in all.")
    rows = value.view(anchors, -1, *value.shape[1:])
    unused = torch.full_like(rows[:, :each], NEVER if kind == "bias" else 0.0)
    return torch.cat([unused, rows], 1).flatten(0, 1)


def _anchors(family: str) -> int:
    """Anchors of a location of the family's usual detector, which is mmdetection's too."""
    usual = {"anchor_octaves": 1, "anchor_ratios": (0.5, 1.0, 2.0), **TRAITS[family].standard, **TRAITS[family].fixed}
    return int(usual["anchor_octaves"]) * len(usual["anchor_ratios"])
