"""The genome of a detector: everything that is needed to rebuild the module that a state dict fits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Final

from autodet.detectors.arch import READ, Arch, ArchError
from autodet.detectors.traits import TRAITS, Traits

FAMILIES: Final = tuple(TRAITS)
ABOVE: Final = {"pool": (64,), "neck": (64, 128), "body": (64, 128)}  # strides of the levels above the body's
NORMS: Final = ("batch", "frozen")
BOX_LOSSES: Final = ("l1", "smooth_l1", "ciou", "diou", "giou")  # those of torchvision's RetinaNet
POINTS: Final = tuple(side**2 for side in (3, 5, 7))  # of one point alone there is no deviation
BODY_STRIDES: Final = (4, 8, 16, 32)
COCO_LABELS: Final = tuple((number, f"COCO category {number}") for number in range(1, 91))  # raw ids, gaps included


class SpecError(ValueError):
    """A detector's description that cannot be built, or a text that describes none."""


@dataclass(frozen=True)
class DetectorSpec:
    """A detector in full. Defaults are torchvision's ``fasterrcnn_resnet50_fpn``; sizes in pixels, widths in channels.

    labels: (category id, name) of label 1, 2, …; label 0 is background. torchvision's COCO weights number their labels
    by the raw category ids, ten of which name nothing: give all from 1 to 90 there (``COCO_LABELS``).
    levels: nominal strides of the pyramid; those up to 32 come from the body's stages. top: what the levels above are
    made from: "pool" (64, pooled), or convolutions (64 and 128) on the "neck"'s or the "body"'s last map.
    Fields that a family does not know keep their defaults: rpn_depth to regions_per_image are Faster R-CNN's and what
    extends it, stage_ious Cascade R-CNN's, those of the mask branch of detectors that also give masks (mask_depth 0: it
    has none), anchor_octaves and box_loss RetinaNet's, reg_max GFL's, points RepPoints's, head_depth to candidates
    those of the one-stage families. An FCOS's anchor_sizes are the unit of its distances, a GFL's decide which
    locations learn an object, a RepPoints's are the scale of a level's objects. ``standard_spec`` gives each family
    torchvision's own values, or its paper's (a RepPoints's levels above the body's are torchvision's; the public code
    makes them from the body, ``top="body"``).
    """

    family: str
    body: Arch
    labels: tuple[tuple[int, str], ...]
    norm: str = "batch"
    norm_eps: float = 1e-5
    neck_width: int = 256
    levels: tuple[int, ...] = (4, 8, 16, 32, 64)
    top: str = "pool"
    top_relu: bool = True  # between the levels 64 and 128; mmdetection's usual detectors have none there
    neck_groups: int = 0  # of the group norms on the pyramid's convolutions; 0: these have none
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_depth: int = 1
    head_width: int = 1024
    stage_ious: tuple[float, ...] = ()  # of a cascade of box heads, each one's least overlap with its object
    roi_size: int = 7
    roi_sampling: int = 2  # points a bin and direction; on a CPU their gradient is the largest cost of a small detector
    # 0: one for each cell of the map. aligned: the cells' centres are half a cell from their corners, as mmdetection's
    roi_aligned: bool = False
    proposals_before_nms: tuple[int, int] = (2000, 1000)  # training, evaluation; per level
    proposals: tuple[int, int] = (2000, 1000)  # training, evaluation; per image
    regions_per_image: int = 512
    mask_depth: int = 0  # convolutions of the mask head; 0: there is none
    mask_width: int = 256
    mask_roi_size: int = 14  # bins a side; a mask has twice as many pixels a side
    anchor_octaves: int = 1  # sizes of an anchor at a location: size · 2^(i / octaves), rounded down
    box_loss: str = "l1"
    head_depth: int = 4
    head_groups: int = 0  # of the head's group norms; 0: the head has none
    reg_max: int = 16  # strides from a location to a box's side, at most
    points: int = 9  # of a location's set; those of a kernel, so the square of an odd number
    candidates: int = 1000  # best responses of a level that enter NMS
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100
    min_size: int = 800
    max_size: int = 1333

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise SpecError(f"This is no detector that can be built: {problem}.")

    @property
    def label_map(self) -> dict[int, int]:
        """Category id → label (1..K)."""
        return {category: label for label, (category, _) in enumerate(self.labels, start=1)}

    @property
    def categories(self) -> dict[int, int]:
        """Label (1..K) → category id."""
        return {label: category for category, label in self.label_map.items()}

    @property
    def two_stage(self) -> bool:
        """Whether a second stage looks at regions."""
        return self.traits.two_stage

    @property
    def masks(self) -> bool:
        """Whether it gives a mask of every object, and learns them."""
        return self.mask_depth > 0

    @property
    def traits(self) -> Traits:
        """What is particular to its family."""
        return TRAITS[self.family]

    @property
    def anchors_per_location(self) -> int:
        """Anchors that every location of a level has."""
        return len(self.anchor_ratios) * self.anchor_octaves

    @property
    def neck_step(self) -> int:
        """Channels of the neck that only go together, because of norms over groups of them."""
        return math.lcm(*(self.neck_width // groups for groups in (self.neck_groups, self.head_groups) if groups))

    @property
    def body_levels(self) -> tuple[int, ...]:
        """The levels that come from the body's stages."""
        return tuple(stride for stride in self.levels if stride in BODY_STRIDES)

    def __str__(self) -> str:
        """``faster_rcnn basic-16:16x1-… labels=[[1,"RBC"],[2,"WBC"]] neck_width=64``: what differs from the defaults.

        The words are separated by spaces, or by tabs where a name contains a space.
        """
        words = [self.family, str(self.body)]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("family", "body") and value != field.default:
                words.append(f"{field.name}={json.dumps(value, separators=(',', ':'), ensure_ascii=False)}")
        return "\t".join(words) if any(" " in word for word in words) else " ".join(words)

    @classmethod
    def parse(cls, text: str) -> DetectorSpec:
        """The inverse of ``str``; raises SpecError naming the word that is wrong."""
        words = text.split("\t") if "\t" in text else text.split(" ")
        if len(words) < 3:
            raise SpecError(f"Expected '<family> <body> labels=… [name=value …]', found {text!r}.")
        values: dict[str, Any] = {"family": words[0], "body": words[1]}
        for word in words[2:]:
            name, _, value = word.partition("=")
            if name in values:
                raise SpecError(f"Expected every field once in {text!r}, found {name!r} again.")
            try:
                values[name] = _value(value)
            except json.JSONDecodeError as error:
                raise SpecError(f"Expected name=<JSON value> in {text!r}, found {word!r}.") from error
        return cls._made(values)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; the body as its text."""
        values: dict[str, Any] = json.loads(
            json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, default=str)
        )
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DetectorSpec:
        """The inverse of ``to_json``; unknown, missing or malformed fields raise SpecError."""
        return cls._made({name: _tuples(value) for name, value in values.items()})

    @classmethod
    def _made(cls, values: Mapping[str, Any]) -> DetectorSpec:
        """values: with tuples for lists."""
        known = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted({"family", "body", "labels"} - set(values))
        if unknown or missing:
            raise SpecError(f"A detector's description has unknown fields {unknown} and lacks {missing}.")
        try:
            return cls(**{**values, "body": Arch.parse(str(values["body"]))})
        except (ArchError, TypeError) as error:  # TypeError: text or null where a number belongs
            raise SpecError(f"A detector's description has a malformed value: {error}") from error

    def at_size(self, pixels: int) -> DetectorSpec:
        """The same detector for images of another shorter side; longer side and anchors in proportion.

        An FCOS's anchors stay large enough for every object to have a location.
        """
        scale = pixels / self.min_size
        least = [self.traits.least_anchor(stride) for stride in self.levels]
        anchors = tuple(max(low, round(size * scale)) for low, size in zip(least, self.anchor_sizes, strict=True))
        return replace(self, min_size=pixels, max_size=round(self.max_size * scale), anchor_sizes=anchors)

    def with_labels(self, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
        """The same detector for other classes."""
        return replace(self, labels=tuple(labels))


@lru_cache(maxsize=READ)
def _value(text: str) -> Any:
    """A field's value, with tuples for lists. Specs of equal texts share it: labels may be many."""
    return _tuples(json.loads(text))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def octaves(size: int, count: int) -> tuple[int, ...]:
    """The sizes of a location's anchors: size · 2^(i / count), rounded down as torchvision does."""
    return tuple(int(size * 2 ** (i / count)) for i in range(count))


def standard_spec(family: str, body: Arch, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
    """The family's usual detector (torchvision's ``<family>_resnet50_fpn`` where it has one) with another body, other
    classes, and norms that learn."""
    if family not in FAMILIES:
        raise SpecError(f"Expected a family among {', '.join(FAMILIES)}, found {family!r}.")
    return DetectorSpec(family=family, body=body, labels=tuple(labels), **TRAITS[family].standard)


def _problems(spec: DetectorSpec) -> list[str]:
    """Why a spec cannot be built, first reason first."""
    if spec.family not in FAMILIES:
        return [f"family {spec.family!r} is none of {', '.join(FAMILIES)}"]
    tops = spec.traits.tops
    if spec.top not in tops:
        return [f"top {spec.top!r} is none of {', '.join(tops)}, which a {spec.family} may have"]
    ids = [category for category, _ in spec.labels]
    below = BODY_STRIDES[len(BODY_STRIDES) - len(spec.body_levels) :]
    above = ABOVE[spec.top]
    positive = (
        *("neck_width", "rpn_depth", "head_width", "roi_size", "detections", "min_size", "mask_width", "mask_roi_size"),
        *("regions_per_image", "anchor_octaves", "head_depth", "candidates", "reg_max"),
    )
    checks = [
        (spec.norm not in NORMS, f"norm {spec.norm!r} is none of {', '.join(NORMS)}"),
        (not spec.labels, "it has no labels"),
        (len(set(ids)) != len(ids), f"category ids repeat in labels: {ids}"),
        (
            spec.levels != (*below, *above) or not spec.body_levels,
            f"levels {spec.levels} are not strides up to 32, then {' and '.join(map(str, above))}",
        ),
        (
            len(spec.anchor_sizes) != len(spec.levels),
            f"{len(spec.anchor_sizes)} anchor_sizes for {len(spec.levels)} levels; give one a level",
        ),
        (
            not spec.anchor_ratios or min(*spec.anchor_sizes, *spec.anchor_ratios) <= 0,
            f"anchor_sizes {spec.anchor_sizes} and anchor_ratios {spec.anchor_ratios} must be positive",
        ),
        (
            min(*spec.proposals, *spec.proposals_before_nms) < 1,
            f"proposals {spec.proposals} and proposals_before_nms {spec.proposals_before_nms} must be at least 1",
        ),
        (
            spec.neck_groups < 0 or (spec.neck_groups > 0 and spec.neck_width % spec.neck_groups != 0),
            f"neck_groups {spec.neck_groups} do not divide neck_width {spec.neck_width}",
        ),
        (
            spec.neck_groups > 0 and spec.top != "pool" and spec.top_relu,
            "a pyramid with norms has no ReLU between its upper levels: top_relu is true, expected false",
        ),
        (spec.roi_sampling < 0, f"roi_sampling is {spec.roi_sampling}, expected at least 0"),
        (spec.max_size < spec.min_size, f"max_size {spec.max_size} is below min_size {spec.min_size}"),
        (spec.box_loss not in BOX_LOSSES, f"box_loss {spec.box_loss!r} is none of {', '.join(BOX_LOSSES)}"),
        *_head_problems(spec),
    ]
    checks += [(getattr(spec, name) < 1, f"{name} is {getattr(spec, name)}, expected at least 1") for name in positive]
    return [reason for wrong, reason in checks if wrong]


def _head_problems(spec: DetectorSpec) -> list[tuple[bool, str]]:
    """What only the heads of some families can be."""
    traits, layers = spec.traits, spec.traits.layers or spec.head_depth
    return [
        *(
            (getattr(spec, name) != value, f"{name} is {getattr(spec, name)}, but always {value} in a {spec.family}")
            for name, value in traits.fixed.items()
        ),
        (traits.grouped and spec.head_groups < 1, f"the head of a {spec.family} has group norms: head_groups is 0"),
        (
            spec.head_groups < 0 or (spec.head_groups > 0 and spec.neck_width % spec.head_groups != 0),
            f"head_groups {spec.head_groups} do not divide neck_width {spec.neck_width}",
        ),
        (
            (len(spec.stage_ious) > 1) != traits.cascaded or len(spec.stage_ious) == 1,
            f"stage_ious are {spec.stage_ious}, but a {spec.family} has "
            + ("two at least" if traits.cascaded else "one stage: expected ()"),
        ),
        (
            not all(0 < iou < 1 for iou in spec.stage_ious),
            f"stage_ious {spec.stage_ious} are not all between 0 and 1",
        ),
        (
            spec.mask_depth < 0 or spec.masks not in traits.masks,
            f"mask_depth is {spec.mask_depth}, but a {spec.family} has {_mask_words(traits)}",
        ),
        (
            spec.points not in POINTS,
            f"points is {spec.points}, expected the square of an odd number, one of {', '.join(map(str, POINTS))}",
        ),
        (spec.head_depth > layers, f"head_depth {spec.head_depth} is above a {spec.family}'s {layers}"),
    ]


def _mask_words(traits: Traits) -> str:
    """What mask_depth may be in a family."""
    if len(traits.masks) > 1:
        return "a mask branch or none: at least 0"
    return "a mask branch: at least 1" if traits.masks[0] else "no mask branch: 0"
