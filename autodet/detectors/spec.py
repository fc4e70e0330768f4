"""The genome of a detector: everything that is needed to rebuild the module that a state dict fits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from autodet.detectors.arch import Arch, ArchError

FAMILIES: Final = ("faster_rcnn",)
NORMS: Final = ("batch", "frozen")
BODY_STRIDES: Final = (4, 8, 16, 32)
COCO_LABELS: Final = tuple((number, f"COCO category {number}") for number in range(1, 91))  # raw ids, gaps included


class SpecError(ValueError):
    """A detector's description that cannot be built, or a text that describes none."""


@dataclass(frozen=True)
class DetectorSpec:
    """A detector in full. Defaults are torchvision's ``fasterrcnn_resnet50_fpn``; sizes in pixels, widths in channels.

    labels: (category id, name) of label 1, 2, …; label 0 is background. torchvision's COCO weights number their labels
    by the raw category ids, ten of which name nothing: give all from 1 to 90 there (``COCO_LABELS``).
    levels: nominal strides of the pyramid; those up to 32 come from the body's stages, 64 is a pooled level.
    """

    family: str
    body: Arch
    labels: tuple[tuple[int, str], ...]
    norm: str = "batch"
    norm_eps: float = 1e-5
    neck_width: int = 256
    levels: tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_depth: int = 1
    head_width: int = 1024
    roi_size: int = 7
    roi_sampling: int = 2  # points a bin and direction; on a CPU their gradient is the largest cost of a small detector
    proposals_before_nms: tuple[int, int] = (2000, 1000)  # training, evaluation; per level
    proposals: tuple[int, int] = (2000, 1000)  # training, evaluation; per image
    regions_per_image: int = 512
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
                values[name] = json.loads(value)
            except json.JSONDecodeError as error:
                raise SpecError(f"Expected name=<JSON value> in {text!r}, found {word!r}.") from error
        return cls.from_json(values)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; the body as its text."""
        values: dict[str, Any] = json.loads(
            json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, default=str)
        )
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DetectorSpec:
        """The inverse of ``to_json``; unknown, missing or malformed fields raise SpecError."""
        known = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted({"family", "body", "labels"} - set(values))
        if unknown or missing:
            raise SpecError(f"A detector's description has unknown fields {unknown} and lacks {missing}.")
        converted = {name: _tuples(value) for name, value in values.items() if name != "body"}
        try:
            return cls(body=Arch.parse(str(values["body"])), **converted)
        except (ArchError, TypeError) as error:  # TypeError: text or null where a number belongs
            raise SpecError(f"A detector's description has a malformed value: {error}") from error

    def at_size(self, pixels: int) -> DetectorSpec:
        """The same detector for images of another shorter side; longer side and anchors in proportion."""
        scale = pixels / self.min_size
        anchors = tuple(max(1, round(size * scale)) for size in self.anchor_sizes)
        return replace(self, min_size=pixels, max_size=round(self.max_size * scale), anchor_sizes=anchors)

    def with_labels(self, labels: Sequence[tuple[int, str]]) -> DetectorSpec:
        """The same detector for other classes."""
        return replace(self, labels=tuple(labels))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _problems(spec: DetectorSpec) -> list[str]:
    """Why a spec cannot be built, first reason first."""
    ids = [category for category, _ in spec.labels]
    expected_levels = (*BODY_STRIDES[len(BODY_STRIDES) - len(spec.body_levels) :], 64)
    positive = (
        "neck_width",
        "rpn_depth",
        "head_width",
        "roi_size",
        "roi_sampling",
        "detections",
        "min_size",
        "regions_per_image",
    )
    checks = [
        (spec.family not in FAMILIES, f"family {spec.family!r} is none of {', '.join(FAMILIES)}"),
        (spec.norm not in NORMS, f"norm {spec.norm!r} is none of {', '.join(NORMS)}"),
        (not spec.labels, "it has no labels"),
        (len(set(ids)) != len(ids), f"category ids repeat in labels: {ids}"),
        (
            spec.levels != expected_levels or not spec.body_levels,
            f"levels {spec.levels} are not strides up to 32, then 64",
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
        (spec.max_size < spec.min_size, f"max_size {spec.max_size} is below min_size {spec.min_size}"),
    ]
    checks += [(getattr(spec, name) < 1, f"{name} is {getattr(spec, name)}, expected at least 1") for name in positive]
    return [reason for wrong, reason in checks if wrong]
