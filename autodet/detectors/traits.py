"""What the spec of each family may say: facts alone. What its detectors compute is in the family's own file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

LEAST_ANCHOR: Final = 2  # torchvision rounds the halves of a side, so that an anchor of 1 pixel has no area
# torchvision's FCOS gives an object the locations within 1.5 anchor sizes of its centre, so that an anchor below a
# third of the stride leaves some objects without any.
FCOS_REACH: Final = 3


@dataclass(frozen=True)
class Traits:
    """What tells the specs of a family from those of the others.

    two_stage: a second stage looks at regions. tops: what the pyramid's levels above the body's may be made from.
    standard: where its usual detector differs from a spec's defaults. fixed: fields that have no other value in it.
    grouped: its head cannot be built without group norms. masks: whether its detectors may have a mask branch, and
    whether they may be without. layers: the most that a tower of its head may have. reach: the share of a level's
    stride, as a divisor, that an anchor has at least. cascaded: its second stage is several box heads in a row.
    distributions: its head knows the place of a box's side as a distribution over distances from the location, 0 to
    ``reg_max`` strides.
    """

    two_stage: bool
    tops: tuple[str, ...]
    standard: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    grouped: bool = False
    masks: tuple[bool, ...] = (False,)
    layers: int | None = None
    reach: int | None = None
    cascaded: bool = False
    distributions: bool = False

    def least_anchor(self, stride: int) -> int:
        """The smallest anchor that a level of a stride may have, in pixels."""
        return math.ceil(stride / self.reach) if self.reach else LEAST_ANCHOR


_ONE_STAGE: Final[Mapping[str, Any]] = {"levels": (8, 16, 32, 64, 128), "top": "neck"}
_FCOS: Final[Mapping[str, Any]] = {
    "anchor_sizes": (8, 16, 32, 64, 128),
    "anchor_ratios": (1.0,),
    "head_groups": 32,
    "score_threshold": 0.2,
    "nms_threshold": 0.6,
}
_CASCADE: Final[Mapping[str, Any]] = {"stage_ious": (0.5, 0.6, 0.7)}
_GFL: Final[Mapping[str, Any]] = {
    "anchor_sizes": (64, 128, 256, 512, 1024),
    "anchor_ratios": (1.0,),
    "head_groups": 32,
    "nms_threshold": 0.6,
}
_REPPOINTS: Final[Mapping[str, Any]] = {
    "anchor_sizes": (32, 64, 128, 256, 512),
    "anchor_ratios": (1.0,),
    "head_depth": 3,
    "head_groups": 32,
}
_ONE_ANCHOR: Final[Mapping[str, Any]] = {"anchor_octaves": 1, "anchor_ratios": (1.0,)}

TRAITS: Final[Mapping[str, Traits]] = {
    "faster_rcnn": Traits(True, ("pool",), fixed={"anchor_octaves": 1}),
    "retinanet": Traits(False, ("neck", "body"), {**_ONE_STAGE, "anchor_octaves": 3, "detections": 300}, layers=4),
    "fcos": Traits(False, ("neck", "body"), {**_ONE_STAGE, **_FCOS}, _ONE_ANCHOR, grouped=True, reach=FCOS_REACH),
    "cascade_rcnn": Traits(True, ("pool",), _CASCADE, {"anchor_octaves": 1}, masks=(False, True), cascaded=True),
    "gfl": Traits(False, ("neck", "body"), {**_ONE_STAGE, **_GFL}, _ONE_ANCHOR, grouped=True, distributions=True),
    "mask_rcnn": Traits(True, ("pool",), {"mask_depth": 4}, {"anchor_octaves": 1}, masks=(True,)),
    "reppoints": Traits(False, ("neck", "body"), {**_ONE_STAGE, **_REPPOINTS}, _ONE_ANCHOR),
}
