"""Which pairs of detectors an input can compare, and what holds for every input on them.

All runs over ``INPUTS`` and every pair of families, so a new input is tested by being listed there.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from distill_outputs import (
    CANVAS,
    COUNTS,
    FCOS,
    GFL,
    MASK_RCNN,
    PROPOSED,
    RCNN,
    RETINANET,
    answer,
    leaves,
    loss_of,
    part,
    regions_of,
    spec_of,
    tiny_batch,
)

from autodet.detectors import DetectorSpec, build
from autodet.detectors.spec import FAMILIES
from autodet.detectors.traits import TRAITS
from autodet.distill.inputs import (
    INPUTS,
    comparable_inputs,
    parts_of,
    why_incomparable,
)
from autodet.distill.outputs import PARTS, answer_to
from autodet.distill.teacher import Teacher
from autodet.distill.values import Value

# Which pairs can be compared. ---

FEATURES = ("global", "fg", "bg", "instance")
TWO_STAGE = {family for family in FAMILIES if TRAITS[family].two_stage}
MASKED = {family for family in FAMILIES if True in TRAITS[family].masks}
REGIONS = ("logits.roi", "localization.roi", "logits.mask")
PAIRS = list(itertools.product(FAMILIES, FAMILIES))
# What builds detectors takes a part of them: each family with itself and with two others, each in both roles.
SOME_PAIRS = [(family, FAMILIES[(i + step) % len(FAMILIES)]) for i, family in enumerate(FAMILIES) for step in (0, 1, 3)]


def own(pair: tuple[str, str], *other: str) -> tuple[str, ...]:
    """What only two second stages have, two mask branches, or two heads with distributions, without some."""
    regions = REGIONS[:2] if set(pair) <= TWO_STAGE else ()
    masks = ("logits.mask",) if set(pair) <= MASKED else ()
    sides = ("localization.sides",) if all(TRAITS[family].distributions for family in pair) else ()
    return tuple(name for name in (*regions, *masks, *sides) if name not in other)


COMPARABLE = {
    "same": {pair: (*FEATURES, "logits.dense", "localization.dense", *own(pair)) for pair in PAIRS},
    "labels": {  # objectness means the same whatever the labels
        pair: (
            *FEATURES,
            *(["logits.dense"] if TWO_STAGE & set(pair) else []),
            "localization.dense",
            *own(pair, *REGIONS),
        )
        for pair in PAIRS
    },
    "size": {pair: (*FEATURES, "logits.dense", *own(pair, "localization.sides")) for pair in PAIRS},
}


@pytest.mark.parametrize("other", list(COMPARABLE))
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_what_every_pair_of_families_can_be_compared_on(student: str, teacher: str, other: str) -> None:
    ours, theirs = spec_of(student), spec_of(teacher)
    theirs = {"same": theirs, "labels": theirs.with_labels([(1, "cell")]), "size": theirs.at_size(96)}[other]
    expected = COMPARABLE[other][student, teacher]
    assert set(comparable_inputs(ours, theirs)) == set(expected)
    for name in INPUTS:
        assert (why_incomparable(name, ours, theirs) is None) == (name in expected)


@pytest.mark.parametrize(
    ("name", "student", "teacher", "reason"),
    [
        ("logits.roi", RETINANET, RCNN, "the student, a retinanet, has no second stage"),
        ("localization.roi", RCNN, FCOS, "the teacher, a fcos, has no second stage"),
        ("logits.roi", RCNN, RCNN.with_labels([(1, "cell")]), "different labels"),
        ("localization.roi", RCNN, RCNN.with_labels(RCNN.labels[::-1]), "different labels"),
        ("logits.mask", RCNN, MASK_RCNN, "the student, a faster_rcnn, has no mask branch"),
        ("logits.mask", MASK_RCNN, RETINANET, "the teacher, a retinanet, has no mask branch"),
        ("logits.mask", MASK_RCNN, MASK_RCNN.with_labels([(1, "cell")]), "different labels"),
        ("logits.dense", FCOS, RETINANET.with_labels([(1, "cell")]), "different labels"),
        ("localization.sides", FCOS, GFL, "the student, a fcos, has no distributions of the places of a box's sides"),
        ("localization.sides", GFL, RCNN, "the teacher, a faster_rcnn, has no distributions"),
        ("localization.sides", GFL, replace(GFL, reg_max=7), r"other bins \(reg_max 5 and 7\)"),
        ("localization.sides", GFL, GFL.at_size(96), r"other sizes \(\(64, 96\) and \(96, 144\) pixels\)"),
        ("localization.dense", FCOS, RETINANET.at_size(128), r"other sizes \(\(64, 96\) and \(128, 192\) pixels\)"),
    ],
)  # fmt: skip
def test_reasons_say_what_is_missing(name: str, student: DetectorSpec, teacher: DetectorSpec, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why_incomparable(name, student, teacher))


@pytest.mark.parametrize("name", list(INPUTS))
def test_pyramids_without_a_common_stride_are_refused(name: str) -> None:
    """No spec of today's families has such levels: all end at 32 and 64."""
    own = GFL if name == "localization.sides" else RCNN
    coarse = copy.copy(GFL)
    object.__setattr__(coarse, "levels", (256, 512))
    reason = why_incomparable(name, own, coarse)
    assert "share no stride" in str(reason) or INPUTS[name].part in ("regions", "masks")
    assert reason is not None


@pytest.mark.parametrize("name", [name for name, spec in INPUTS.items() if spec.part != "features"])
def test_responses_that_were_not_computed_are_asked_for(name: str) -> None:
    output = replace(answer(RCNN, 1), logits=None, corners=None, sides=None, regions=None)
    reasons = {"dense": "dense step", "regions": "second stage", "masks": "second stage"}
    with pytest.raises(ValueError, match=reasons[INPUTS[name].part]):
        INPUTS[name].pairs(output, output)
    if INPUTS[name].part == "masks":
        with pytest.raises(ValueError, match="mask branch"):
            INPUTS[name].pairs(answer(RCNN, 1), answer(RCNN, 2))


def test_every_input_names_the_part_that_must_be_run() -> None:
    for name, spec in INPUTS.items():
        assert parts_of([name]) == {spec.part} <= set(PARTS)
    assert parts_of(tuple(INPUTS)) == set(PARTS) and parts_of(()) == set()


# What holds for every input, on pairs of families that have it. ---

TRIPLES = [
    (name, student, teacher)
    for student, teacher in SOME_PAIRS
    for name in comparable_inputs(spec_of(student), spec_of(teacher))
]
EVERYWHERE = pytest.mark.parametrize(("name", "student", "teacher"), TRIPLES)
TAKEN_FROM = {
    "features": ("features",),
    "dense": ("logits", "corners", "sides"),
    "regions": ("class_logits", "region_corners"),
    "masks": ("masks",),
}


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_finite_equal_in_shape_and_weighted_alike(
    name: str, student: str, teacher: str, dtype: torch.dtype
) -> None:
    ours, theirs = answer(spec_of(student), 1, dtype=dtype), answer(spec_of(teacher), 2, dtype=dtype)
    for one, two in INPUTS[name].pairs(ours, theirs):
        assert one.data.shape == two.data.shape and one.kind == two.kind == INPUTS[name].kind
        assert one.axis is None and two.axis is None
        assert one.data.isfinite().all() and two.data.isfinite().all() and one.weights.isfinite().all()
        assert torch.equal(one.weights, two.weights) and len(one.weights) == len(one.data)
        assert 0 < one.weights.sum() < 1 + 1e-5 and one.weights.min() >= 0
    full = loss_of(name, answer(spec_of(student), 1), answer(spec_of(teacher), 2)).item()
    loss = loss_of(name, ours, theirs)
    assert loss.item() == pytest.approx(full, rel=0.02)
    loss.backward()  # type: ignore[no-untyped-call]
    reached = [key for key, tensor in leaves(ours).items() if tensor.grad is not None and tensor.grad.any()]
    assert reached and all(key.startswith(TAKEN_FROM[INPUTS[name].part]) for key in reached)
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in leaves(ours).values())
    assert all(tensor.grad is None for tensor in leaves(theirs).values())


@EVERYWHERE
def test_a_student_equal_to_its_teacher_has_no_loss(name: str, student: str, teacher: str) -> None:
    own = answer(spec_of(teacher), 2)
    if name in comparable_inputs(own.spec, own.spec):
        assert loss_of(name, own, answer(spec_of(teacher), 2)) == 0
    different = loss_of(name, answer(spec_of(student), 1), own)
    assert different > 0


@EVERYWHERE
def test_how_a_batch_is_split_over_workers_changes_nothing(name: str, student: str, teacher: str) -> None:
    """Trap 4 at the source: weights are of images, so the loss of a batch is the mean of its images' losses, also where
    one has no object and one no proposal."""
    ours, theirs = answer(spec_of(student), 1), answer(spec_of(teacher), 2)
    single = [loss_of(name, part(ours, slice(i, i + 1)), part(theirs, slice(i, i + 1))) for i in range(len(COUNTS))]
    torch.testing.assert_close(loss_of(name, ours, theirs), torch.stack(single).mean())
    halves = [loss_of(name, part(ours, rows), part(theirs, rows)) for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(loss_of(name, ours, theirs), torch.stack(halves).mean())


@EVERYWHERE
def test_without_objects_and_proposals_there_is_nothing_or_a_finite_loss(name: str, student: str, teacher: str) -> None:
    nothing = (0, 0)
    ours, theirs = (answer(spec_of(family), i, nothing, nothing) for i, family in enumerate((student, teacher)))
    loss = loss_of(name, ours, theirs)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in leaves(ours).values())
    if name in ("fg", "instance", "logits.roi", "logits.mask", "localization.roi"):
        assert loss == 0


@EVERYWHERE
def test_levels_come_finest_first_and_equal_outputs_give_equal_values(name: str, student: str, teacher: str) -> None:
    first, again = (INPUTS[name].pairs(answer(spec_of(student), 1), answer(spec_of(teacher), 2)) for _ in "ab")
    sizes = [one.data[0].numel() for one, _ in first]
    assert sizes == sorted(sizes, reverse=True)
    for (one, two), (other, another) in zip(first, again, strict=True):
        assert torch.equal(one.data, other.data) and torch.equal(two.data, another.data)


@pytest.mark.parametrize("pixels", [64, 80])
@pytest.mark.parametrize(("student", "teacher"), SOME_PAIRS)
def test_real_detectors_are_compared_on_all_that_their_specs_allow(student: str, teacher: str, pixels: int) -> None:
    """Answers of untrained detectors on images of several sizes, whose canvases no stride above 32 divides."""
    torch.manual_seed(0)
    ours, theirs = build(spec_of(student)), build(spec_of(teacher).at_size(pixels))
    batch = tiny_batch([(64, 96), (70, 64), (50, 90)])
    taught = Teacher(theirs, comparable_inputs(ours.spec, theirs.spec))(batch)
    inputs = ours.preprocess(batch.images)
    features = ours.features(inputs)
    output = answer_to(taught, ours, batch, inputs, features, ours.dense(inputs, features))
    for name in comparable_inputs(ours.spec, theirs.spec):
        loss = loss_of(name, output, taught)
        ours.model.zero_grad()
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in ours.model.parameters() if p.grad is not None]
        assert loss > 0 and gradients and all(gradient.isfinite().all() for gradient in gradients), name


def test_parts_of_made_up_outputs_are_consistent() -> None:
    whole = answer(RCNN, 1)
    pieces = [part(whole, slice(i, i + 1)) for i in range(4)]
    assert torch.equal(torch.cat([regions_of(p).class_logits for p in pieces]), regions_of(whole).class_logits)
    assert [len(regions_of(p).proposals[0]) for p in pieces] == list(PROPOSED)
    assert whole.canvas == CANVAS and isinstance(INPUTS["global"].pairs(whole, whole)[0][0], Value)
