"""DetectorSpec: text and JSON forms, label maps, and what cannot be built."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from autodet.detectors import Arch, DetectorSpec, SpecError, standard_spec
from autodet.detectors.spec import ABOVE, BOX_LOSSES, COCO_LABELS, FAMILIES, POINTS
from autodet.detectors.traits import TRAITS

BODY = Arch.parse("basic-16:16x1-32x1(8)-64x2(24,40)-128x1")
LABELS = ((1, "RBC"), (2, "WBC"), (3, "Platelets"))
SPEC = DetectorSpec("faster_rcnn", BODY, LABELS)
NAMES = (
    "RBC",
    "traffic light",
    "tab\there",
    'quote " inside',
    "équipe",
    "a=b",
    "[1,2]",
    "",
    "line\nbreak",
    "back\\slash",
)
BODY_LEVELS = ((4, 8, 16, 32), (8, 16, 32), (16, 32), (32,))
GROUPS = (1, 2, 8)


def random_spec(rng: random.Random) -> DetectorSpec:
    """Of any family, with any fields, about half of them at its family's defaults."""
    family = rng.choice(FAMILIES)
    base = standard_spec(family, rng.choice((BODY, Arch.resnet50(), Arch.resnext101_32x8d())), random_labels(rng))
    top = rng.choice(TRAITS[family].tops)
    levels = (*rng.choice(BODY_LEVELS), *ABOVE[top])
    optional: dict[str, Any] = {
        "norm": rng.choice(("batch", "frozen")),
        "norm_eps": rng.choice((0.0, 1e-5, 1e-3, rng.random())),
        "neck_width": 32 * rng.randint(1, 10),
        "score_threshold": rng.random(),
        "nms_threshold": rng.random(),
        "detections": rng.randint(1, 300),
        "min_size": rng.randint(32, 800),
        "max_size": rng.randint(800, 1400),
        **random_head(rng, family),
    }
    chosen = {name: value for name, value in optional.items() if rng.random() < 0.5}
    return replace(base, top=top, levels=levels, anchor_sizes=tuple(rng.randint(4, 512) for _ in levels), **chosen)


def random_labels(rng: random.Random) -> tuple[tuple[int, str], ...]:
    return tuple((id_, rng.choice(NAMES)) for id_ in rng.sample(range(1, 1000), rng.randint(1, 5)))


def random_head(rng: random.Random, family: str) -> dict[str, Any]:
    """Fields that only some families know."""
    if TRAITS[family].two_stage:
        ious = {"stage_ious": tuple(rng.uniform(0.1, 0.9) for _ in range(rng.randint(2, 4)))}
        masks = {
            "mask_depth": rng.randint(1, 5),
            "mask_width": rng.randint(1, 300),
            "mask_roi_size": rng.randint(1, 28),
        }
        return (
            (ious if TRAITS[family].cascaded else {})
            | (masks if True in TRAITS[family].masks else {})
            | {
                "anchor_ratios": tuple(rng.uniform(0.1, 4) for _ in range(rng.randint(1, 4))),
                "rpn_depth": rng.randint(1, 3),
                "head_width": rng.randint(1, 2000),
                "roi_size": rng.randint(1, 14),
                "roi_sampling": rng.randint(0, 4),
                "roi_aligned": rng.random() < 0.5,
                "proposals_before_nms": (rng.randint(1, 3000), rng.randint(1, 3000)),
                "proposals": (rng.randint(1, 3000), rng.randint(1, 3000)),
                "regions_per_image": rng.randint(1, 600),
            }
        )
    head = {
        "top_relu": rng.random() < 0.5,
        "head_depth": rng.randint(1, 4),
        "head_groups": rng.choice(GROUPS),
        "candidates": rng.randint(1, 2000),
    }
    if family == "fcos":
        return head
    if family == "gfl":
        return head | {"reg_max": rng.randint(1, 30)}
    if family == "reppoints":
        return head | {"points": rng.choice(POINTS)}
    ratios = tuple(rng.uniform(0.1, 4) for _ in range(rng.randint(1, 4)))
    return head | {"anchor_octaves": rng.randint(1, 4), "anchor_ratios": ratios, "box_loss": rng.choice(BOX_LOSSES)}


@pytest.mark.parametrize("seed", range(100))
def test_text_and_json_give_the_same_spec_back(seed: int) -> None:
    spec = random_spec(random.Random(seed))
    text = str(spec)
    assert DetectorSpec.parse(text) == spec
    assert str(DetectorSpec.parse(text)) == text
    assert "\n" not in text
    values = json.loads(json.dumps(spec.to_json()))
    assert DetectorSpec.from_json(values) == spec
    assert hash(DetectorSpec.from_json(values)) == hash(spec)


def test_text_holds_only_what_differs_from_the_defaults() -> None:
    assert str(SPEC) == f'faster_rcnn {BODY} labels=[[1,"RBC"],[2,"WBC"],[3,"Platelets"]]'
    assert str(replace(SPEC, neck_width=64)) == f"{SPEC} neck_width=64"
    # Tabs part the words once a name has a space in it.
    assert str(SPEC.with_labels([(9, "traffic light")])) == f'faster_rcnn\t{BODY}\tlabels=[[9,"traffic light"]]'


def test_spec_is_a_key() -> None:
    assert {SPEC: "first", replace(SPEC): "again", replace(SPEC, neck_width=32): "other"} == {
        SPEC: "again",
        replace(SPEC, neck_width=32): "other",
    }


def test_labels_count_from_one_whatever_the_gaps_in_the_ids() -> None:
    spec = SPEC.with_labels([(7, "cat"), (3, "dog"), (90, "bird")])
    assert spec.label_map == {7: 1, 3: 2, 90: 3}
    assert spec.categories == {1: 7, 2: 3, 3: 90}


def test_raw_coco_labels_are_the_category_ids_themselves() -> None:
    spec = SPEC.with_labels(COCO_LABELS)
    assert spec.label_map == spec.categories == {number: number for number in range(1, 91)}
    assert DetectorSpec.parse(str(spec)) == spec


def test_body_levels_leave_the_pooled_level_out() -> None:
    assert SPEC.body_levels == (4, 8, 16, 32)
    assert replace(SPEC, levels=(8, 16, 32, 64), anchor_sizes=(8, 16, 32, 64)).body_levels == (8, 16, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "yolo"}, "family 'yolo' is none of faster_rcnn"),
        ({"norm": "group"}, "norm 'group' is none of batch, frozen"),
        ({"labels": ()}, "it has no labels"),
        ({"labels": ((1, "a"), (2, "b"), (1, "c"))}, r"category ids repeat in labels: \[1, 2, 1\]"),
        ({"levels": (4, 8, 16, 32)}, r"levels \(4, 8, 16, 32\) are not strides up to 32, then 64"),
        ({"levels": (4, 16, 32, 64)}, r"levels \(4, 16, 32, 64\) are not strides"),
        ({"levels": (4, 8, 16, 64)}, r"levels \(4, 8, 16, 64\) are not strides"),
        ({"levels": (8, 4, 16, 32, 64)}, r"levels \(8, 4, 16, 32, 64\) are not strides"),
        ({"levels": (64,), "anchor_sizes": (32,)}, r"levels \(64,\) are not strides"),
        ({"anchor_sizes": (32, 64)}, "2 anchor_sizes for 5 levels; give one a level"),
        ({"anchor_sizes": (0, 64, 128, 256, 512)}, r"anchor_sizes \(0, 64, .*must be positive"),
        ({"anchor_ratios": ()}, r"anchor_ratios \(\) must be positive"),
        ({"anchor_ratios": (1.0, -1.0)}, r"anchor_ratios \(1.0, -1.0\) must be positive"),
        ({"proposals": (0, 100)}, r"proposals \(0, 100\) .*must be at least 1"),
        ({"proposals_before_nms": (100, 0)}, r"proposals_before_nms \(100, 0\) must be at least 1"),
        ({"max_size": 700}, "max_size 700 is below min_size 800"),
        ({"neck_width": 0}, "neck_width is 0, expected at least 1"),
        ({"rpn_depth": 0}, "rpn_depth is 0, expected at least 1"),
        ({"head_width": -1}, "head_width is -1, expected at least 1"),
        ({"roi_size": 0}, "roi_size is 0, expected at least 1"),
        ({"detections": 0}, "detections is 0, expected at least 1"),
        ({"min_size": 0}, "min_size is 0, expected at least 1"),
        ({"regions_per_image": 0}, "regions_per_image is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_built_says_why(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        replace(SPEC, **change)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expected '<family> <body> labels=…"),
        (f"faster_rcnn {BODY}", "Expected '<family> <body> labels=…"),
        (f"{SPEC} neck_width", "Expected name=<JSON value> in .*, found 'neck_width'"),
        (f"{SPEC} neck_width=wide", "found 'neck_width=wide'"),
        (f"{SPEC} neck_width=8 neck_width=16", "Expected every field once in .*, found 'neck_width' again"),
        (f"{SPEC} family=2", "found 'family' again"),
        (f"{SPEC} colour=1", r"unknown fields \['colour'\] and lacks \[\]"),
        (f"faster_rcnn {BODY} neck_width=8", r"lacks \['labels'\]"),
        (f'{SPEC} neck_width="8"', "malformed value"),
        (f"faster_rcnn {BODY} labels=5", "malformed value"),
        ("faster_rcnn basic-16:oops labels=[[1,2]]", "malformed value.*oops"),
    ],
)
def test_text_that_is_no_spec_says_why(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        DetectorSpec.parse(text)


def test_json_with_other_fields_is_refused() -> None:
    values = SPEC.to_json()
    values["depth"] = values.pop("body")
    with pytest.raises(SpecError, match=r"unknown fields \['depth'\] and lacks \['body'\]"):
        DetectorSpec.from_json(values)
