"""Reading a detector's structure off the names and shapes of its tensors: what the families' files need for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from autodet.detectors.spec import SpecError

State = Mapping[str, Tensor]
Read = tuple[int, dict[str, Any]]  # classes besides background, and a spec's fields

CLASSIFY: Final = "head.classification_head."
REGRESS: Final = "head.regression_head."
# mmdetection's towers → torchvision's where it numbers their layers in pairs of convolution and norm.
TOWER_NAMES: Final = (
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.", rf"{CLASSIFY}conv.\1.0."),
    (r"bbox_head\.cls_convs\.(\d+)\.gn\.", rf"{CLASSIFY}conv.\1.1."),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.", rf"{REGRESS}conv.\1.0."),
    (r"bbox_head\.reg_convs\.(\d+)\.gn\.", rf"{REGRESS}conv.\1.1."),
)
UNUSED: Final = "unused."  # what tensors without a counterpart are called, by a replacement, until they are left out
ADAPT: Final = "build that model yourself and give it to adapt()"


@dataclass(frozen=True)
class MMDet:
    """What mmdetection calls a family's head, and where its usual detector differs from a spec's (see ``mmdet.py``).

    mark: a tensor's name that tells the family. names: (pattern, replacement) of its head's names, as ``re.sub`` takes
    them; body and neck are ``mmdet.py``'s. spec: fields of a spec whose values no tensor tells. adjust: what else has
    to become of the tensors, by their new names, before the classes move. refused: why no detector of ours can be such
    a one, and what to do; empty where it can.
    """

    mark: str
    names: tuple[tuple[str, str], ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    adjust: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    refused: str = ""


def sizes(state: State, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor; SpecError where it is missing or has other dimensions."""
    if name not in state or state[name].dim() != dimensions:
        raise SpecError(f"expected {name!r} with {dimensions} dimensions; save all of model.state_dict().")
    return tuple(state[name].shape)


def count(state: State, name: str, step: int = 1) -> int:
    """How many layers there are that are numbered 0, step, 2·step, …"""
    number = 0
    while name.format(number * step) in state:
        number += 1
    return number


def octaves_of(known: Mapping[int, int], anchors: int) -> int:
    """A location's octaves by the number of its anchors, as torchvision's constructors have them."""
    if anchors not in known:
        raise SpecError(
            f"expected torchvision's {' or '.join(map(str, known))} anchors at a location, found {anchors}, whose "
            f"sizes and ratios a state dict does not hold; {ADAPT}."
        )
    return known[anchors]


def one_stage(state: State, known: Mapping[int, int]) -> Read:
    """Classes and octaves of a one-stage head, by torchvision's names. known: octaves by the anchors of a location."""
    anchors = sizes(state, f"{REGRESS}bbox_reg.weight", 4)[0] // 4
    classes = sizes(state, f"{CLASSIFY}cls_logits.weight", 4)[0] // anchors - 1
    return classes, {"anchor_octaves": octaves_of(known, anchors)}
