"""What only Cascade R-CNN has: several box heads, each on the boxes of the one before."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from detector_cases import LABELS, assert_same_detections, batch, small_spec, step_losses, steps, stirred
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads

from autodet.detectors import DetectorSpec, SpecError, adapt, build, detect
from autodet.detectors.cascade_rcnn import (
    CascadeRCNN,
    CascadeRCNNSteps,
    CascadeRoIHeads,
    build_cascade_rcnn,
)
from autodet.detectors.faster_rcnn import poolable, region_pool
from autodet.detectors.weights import load_strict
from autodet.morphism.labels import keep_labels
from autodet.morphism.pruning import prune_head

SPEC = small_spec("cascade_rcnn", mask_depth=0)
SHAPES = [(64, 96), (60, 80)]


def detector_of(spec: DetectorSpec = SPEC) -> CascadeRCNNSteps:
    detector = stirred(spec)
    assert isinstance(detector, CascadeRCNNSteps)
    return detector


def given(count: int = 12) -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, Tensor]]]:
    """Maps, proposals around the objects of two images, and the objects."""
    maps = {str(i): torch.randn(2, SPEC.neck_width, 64 // s, 96 // s) for i, s in enumerate(SPEC.body_levels)}
    targets = [
        {"boxes": torch.tensor([[4.0, 5, 40, 44], [30, 10, 70, 50]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.tensor([[10.0, 10, 60, 45]]), "labels": torch.tensor([2])},
    ]
    proposals = []
    for target, (height, width) in zip(targets, SHAPES, strict=True):
        boxes = target["boxes"].repeat(count // len(target["boxes"]), 1) + torch.randn(count, 4) * 6
        proposals.append(boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2).float()))
    return maps, proposals, targets


# One stage is torchvision's. ---


def one_stage(positive: bool) -> tuple[CascadeRoIHeads, RoIHeads]:
    """A cascade of one stage, and torchvision's head with the same regressions for every class."""
    head, predictor = TwoMLPHead(SPEC.neck_width * 9, 32), FastRCNNPredictor(32, 3)
    pool = region_pool(SPEC, 3)
    plain = RoIHeads(pool, head, predictor, 0.5, 0.5, 16, 0.25, None, 0.05, 0.5, 40)
    ours = FastRCNNPredictor(32, 3)
    ours.cls_score, ours.bbox_pred = predictor.cls_score, nn.Linear(32, 4)
    with torch.no_grad():
        ours.bbox_pred.weight.mul_(3)
        for name in ("weight", "bias"):
            value = getattr(ours.bbox_pred, name)
            getattr(predictor.bbox_pred, name).copy_(torch.cat([value] * 3))
    cascade = CascadeRoIHeads(pool, [head], [ours], [0.5], 16, 0.05, 0.5, 40)
    return cascade.train(positive), plain.train(positive)


def test_of_one_stage_the_detections_are_torchvisions() -> None:
    cascade, plain = one_stage(False)
    maps, proposals, _ = given()
    with torch.no_grad():
        found, losses = cascade(maps, proposals, SHAPES)
        expected, _ = plain(maps, proposals, SHAPES)
    assert losses == {}
    assert_same_detections(found, expected)


def test_of_one_stage_the_losses_are_torchvisions_but_for_where_the_box_loss_bends() -> None:
    cascade, plain = one_stage(True)
    maps, proposals, targets = given()
    torch.manual_seed(5)
    found = cascade(maps, proposals, SHAPES, targets)[1]
    torch.manual_seed(5)
    expected = plain(maps, list(proposals), SHAPES, targets)[1]
    assert found.keys() == {"loss_classifier_0", "loss_box_reg_0"}
    torch.testing.assert_close(found["loss_classifier_0"], expected["loss_classifier"])
    torch.manual_seed(5)
    boxes, _, labels, wanted = plain.select_training_samples(list(proposals), targets)
    deltas = cascade.responses(0, maps, boxes, SHAPES)[1]
    gaps = (deltas - torch.cat(wanted))[torch.cat(labels) > 0].abs()
    assert bool((gaps < 1).any() and (gaps > 1).any())
    count = len(torch.cat(labels))
    bent_at_one = torch.where(gaps < 1, gaps**2 / 2, gaps - 0.5).sum() / count
    bent_at_a_ninth = torch.where(gaps < 1 / 9, gaps**2 * 9 / 2, gaps - 1 / 18).sum() / count
    torch.testing.assert_close(found["loss_box_reg_0"], bent_at_one)
    torch.testing.assert_close(expected["loss_box_reg"], bent_at_a_ninth)


# Several stages, against a loop. ---


def iou(one: Tensor, two: Tensor) -> float:
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return float(width * height / (areas[0] + areas[1] - width * height))


def moved(box: Tensor, delta: Tensor, stage: int, size: tuple[int, int]) -> Tensor:
    """Ren et al. 2015, eq. 2 solved for the box, the deltas in the stage's units, clipped to the image."""
    delta = delta / torch.tensor([10.0, 10, 5, 5]) / (stage + 1)
    side = box[2:] - box[:2]
    centre = (box[:2] + box[2:]) / 2 + delta[:2] * side
    half = side * delta[2:].clamp(max=math.log(1000 / 16)).exp() / 2
    limit = torch.tensor([size[1], size[0]] * 2).float()
    return torch.cat([centre - half, centre + half]).clamp(min=0).minimum(limit)


def aim(box: Tensor, truth: Tensor, stage: int) -> Tensor:
    """Ren et al. 2015, eq. 2, in the stage's units."""
    side, wanted = box[2:] - box[:2], truth[2:] - truth[:2]
    shift = ((truth[:2] + truth[2:]) / 2 - (box[:2] + box[2:]) / 2) / side
    return torch.cat([shift, (wanted / side).log()]) * torch.tensor([10.0, 10, 5, 5]) * (stage + 1)


def test_stages_learn_from_the_boxes_of_the_ones_before_at_their_own_overlap() -> None:
    """All regions are taken, so that nothing is drawn."""
    ious = (0.4, 0.5, 0.7)
    detector = detector_of(replace(SPEC, stage_ious=ious, regions_per_image=1000))
    heads, (maps, proposals, targets) = detector.model.roi_heads.train(), given(24)
    found = heads(maps, proposals, SHAPES, targets)[1]
    boxes, positives = proposals, []
    for stage, threshold in enumerate(ious):
        rows: list[tuple[Tensor, int, Tensor]] = []  # box, label, what its box should become
        counts, own = [], []
        for some, target in zip(boxes, targets, strict=True):
            for box in (*some, *target["boxes"]):
                overlaps = [iou(box, truth) for truth in target["boxes"]]
                best = max(range(len(overlaps)), key=overlaps.__getitem__)
                label = int(target["labels"][best]) if overlaps[best] >= threshold else 0
                rows.append((box, label, aim(box, target["boxes"][best], stage) if label else torch.zeros(4)))
            counts.append(len(some) + len(target["boxes"]))
            own.append(len(some))
        all_boxes = list(torch.split(torch.stack([box for box, _, _ in rows]), counts))
        logits, deltas = heads.responses(stage, maps, all_boxes, SHAPES)
        labels = torch.tensor([label for _, label, _ in rows])
        positives.append(int((labels > 0).sum()))
        loss_class = -logits.log_softmax(1)[torch.arange(len(rows)), labels].mean()
        gaps = [(deltas[i] - wanted).abs() for i, (_, label, wanted) in enumerate(rows) if label]
        bent = torch.stack([torch.where(gap < 1, gap**2 / 2, gap - 0.5).sum() for gap in gaps])
        weight = (1, 0.5, 0.25)[stage]
        torch.testing.assert_close(found[f"loss_classifier_{stage}"], weight * loss_class)
        torch.testing.assert_close(
            found[f"loss_box_reg_{stage}"], weight * bent.sum() / len(rows), rtol=1e-4, atol=1e-5
        )
        pieces = zip(all_boxes, deltas.detach().split(counts), own, SHAPES, strict=True)
        boxes = [
            torch.stack([moved(box, delta, stage, size) for box, delta in zip(some[:count], part, strict=False)])
            for some, part, count, size in pieces  # the ground truth's own boxes are left out
        ]
    assert positives[0] > positives[2] > 3  # fewer overlap so much, and more than the ground truth does


def test_an_image_without_objects_keeps_its_boxes_through_all_stages() -> None:
    detector = detector_of(replace(SPEC, regions_per_image=1000))
    heads, (maps, proposals, targets) = detector.model.roi_heads.train(), given()
    nothing = [{key: value[:0] for key, value in target.items()} for target in targets]
    seen: list[int] = []
    heads.box_roi_pool.register_forward_pre_hook(lambda _, values: seen.append(sum(map(len, values[1]))))
    losses = heads(maps, proposals, SHAPES, nothing)[1]
    assert seen == [24, 24, 24]
    assert all(losses[f"loss_box_reg_{stage}"].item() == 0 for stage in range(3))


def test_every_stage_samples_as_many_regions_and_gets_the_ground_truth_again() -> None:
    detector = detector_of(replace(SPEC, regions_per_image=8))
    heads, (maps, proposals, targets) = detector.model.roi_heads.train(), given()
    seen: list[list[Tensor]] = []
    heads.box_roi_pool.register_forward_pre_hook(lambda _, values: seen.append(values[1]))
    for _ in range(20):
        heads(maps, proposals, SHAPES, targets)
    assert all(len(boxes) <= 8 for images in seen for boxes in images)
    truths = [[bool((boxes == truth).all(1).any()) for images in seen[s::3] for boxes, target in
               zip(images, targets, strict=True) for truth in target["boxes"]] for s in range(3)]  # fmt: skip
    assert all(any(drawn) for drawn in truths)  # a third of them in the last stage, after none was carried on
    assert all((boxes == truth).all(1).sum() <= 1 for images in seen for boxes, target in
               zip(images, targets, strict=True) for truth in target["boxes"])  # fmt: skip


# What the stages answer together. ---


def test_scores_are_the_mean_of_the_stages_probabilities() -> None:
    detector = detector_of()
    heads, biases = detector.model.roi_heads.eval(), torch.tensor([[2.0, 0, -1], [0.0, 3, 0], [-30.0, 60, 40]])
    for predictor, bias in zip(heads.box_predictor, biases, strict=True):
        nn.init.zeros_(predictor.cls_score.weight)
        predictor.cls_score.bias.data.copy_(bias)
    maps, proposals, _ = given()
    with torch.no_grad():
        regions = heads.regions(maps, proposals, SHAPES)
        found = heads(maps, proposals, SHAPES)[0]
    expected = torch.stack([torch.exp(bias) / torch.exp(bias).sum() for bias in biases.double()]).mean(0).float()
    assert regions.class_logits.isfinite().all()
    torch.testing.assert_close(regions.class_logits.softmax(1), expected.expand(24, 3))
    for image in found:
        torch.testing.assert_close(image["scores"], expected[image["labels"]])


def test_regions_are_the_last_stages_boxes_in_units_of_the_given_proposals() -> None:
    detector = detector_of()
    detector.model.eval()
    inputs, features, dense = steps(detector, batch()[0])
    proposals = detector.proposals(inputs, dense)
    regions = detector.regions(inputs, features, proposals)
    corners = detector.region_corners(regions)
    count = sum(map(len, proposals))
    assert regions.proposals is proposals and tuple(corners.shape) == (count, 3, 4)
    assert tuple(regions.box_deltas.shape) == (count, 12) and tuple(regions.class_logits.shape) == (count, 3)
    heads, boxes, limits = detector.model.roi_heads, list(proposals), inputs.images.image_sizes
    with torch.no_grad():
        for stage in range(3):
            _, deltas = heads.responses(stage, poolable(features), boxes, limits)
            sizes = limits if stage < 2 else [(10**6, 10**6)] * len(limits)
            parts = zip(boxes, deltas.split([len(own) for own in boxes]), sizes, strict=True)
            before = boxes
            boxes = [torch.stack([moved(box, d, stage, size) for box, d in zip(own, ds, strict=True)])
                     for own, ds, size in parts]  # fmt: skip
    found, last = torch.cat(proposals), torch.cat(boxes)
    size = (found[:, 2:] - found[:, :2]).repeat(1, 2)
    centre = (found[:, :2] + found[:, 2:]).repeat(1, 2) / 2
    for label in range(3):
        decoded = corners[:, label] * size + centre
        torch.testing.assert_close(decoded.clamp(min=0), last, rtol=1e-4, atol=2e-3)
    assert float((torch.cat(before) - found).abs().mean()) > 0.5
    (slope,) = torch.autograd.grad(corners.sum(), regions.box_deltas)
    assert slope.isfinite().all()
    nothing = detector.regions(inputs, features, [torch.zeros(0, 4)] * len(proposals))
    assert tuple(detector.region_corners(nothing).shape) == (0, 3, 4)


def test_what_is_taught_of_regions_reaches_every_classifier_and_the_last_boxes() -> None:
    detector = detector_of()
    inputs, features, dense = steps(detector, batch()[0])
    regions = detector.regions(inputs, features, detector.proposals(inputs, dense))
    layers = {f"{stage}.{name}": getattr(detector.model.roi_heads.box_predictor[stage], name).weight
              for stage in range(3) for name in ("cls_score", "bbox_pred")}  # fmt: skip
    for taught, reached in (
        (regions.class_logits.square().sum(), {"0.cls_score", "1.cls_score", "2.cls_score"}),
        (detector.region_corners(regions).square().sum(), {"2.bbox_pred"}),
    ):
        slopes = torch.autograd.grad(taught, list(layers.values()), retain_graph=True, allow_unused=True)
        found = {name for name, slope in zip(layers, slopes, strict=True) if slope is not None and slope.any()}
        assert found == reached


# What it takes part in. ---


def test_losing_classes_leaves_the_boxes_and_lets_the_others_compete_alone() -> None:
    detector = detector_of(small_spec("cascade_rcnn", (*LABELS, (9, "cat")), stage_ious=(0.5, 0.6)))
    state = detector.model.state_dict()
    morph = keep_labels(detector.spec, state, ((9, "cat"), (3, "dog")))
    child = morph.weights(state)
    for stage in range(2):
        predictor = f"roi_heads.box_predictor.{stage}."
        for kind in ("weight", "bias"):
            assert torch.equal(child[f"{predictor}cls_score.{kind}"], state[f"{predictor}cls_score.{kind}"][[0, 3, 1]])
            assert torch.equal(child[f"{predictor}bbox_pred.{kind}"], state[f"{predictor}bbox_pred.{kind}"])
    build(morph.spec).model.load_state_dict(child)


def test_pruning_the_heads_equals_masking_in_every_stage() -> None:
    parent = detector_of()
    state = {name: value.clone() for name, value in parent.model.state_dict().items()}
    morph = prune_head(parent.spec, state, random.Random(0), 20)
    groups = {f"fc{layer}.{stage}" for layer in (6, 7) for stage in range(3)}
    assert set(morph.picks) == groups and len({tuple(kept.tolist()) for kept in morph.picks.values()}) > 1
    child = build(morph.spec)
    child.model.load_state_dict(morph.weights(state))
    for group, kept in morph.picks.items():
        layer, stage = group.split(".")
        gone = [i for i in range(32) if i not in kept.tolist()]
        for kind in ("weight", "bias"):
            parent.model.get_parameter(f"roi_heads.box_head.{stage}.{layer}.{kind}").data[gone] = 0
    images, _ = batch()
    assert_same_detections(detect(child, images), detect(parent, images))


def looser(model: Any) -> None:
    model.roi_heads.stages[1].proposal_matcher.low_threshold = 0.1


def other_units(model: Any) -> None:
    model.roi_heads.stages[2].box_coder.weights = (10.0, 10.0, 5.0, 5.0)


def more_objects(model: Any) -> None:
    model.roi_heads.stages[1].fg_bg_sampler.positive_fraction = 0.5


def boxes_of_every_class(model: Any) -> None:
    model.roi_heads.box_predictor[1].bbox_pred = nn.Linear(SPEC.head_width, 12)


# Masks. ---


def test_masks_are_learned_from_the_first_stages_regions_and_given_to_the_last_ones_boxes() -> None:
    """By the branch of a Mask R-CNN, on these regions and on what is found."""
    spec = small_spec("cascade_rcnn")
    masked, plain = stirred(spec), detector_of(replace(spec, mask_depth=0))
    load_strict(plain.model, {name: v for name, v in masked.model.state_dict().items() if ".mask_" not in name}, "test")
    assert isinstance(masked, CascadeRCNNSteps)
    images, targets = batch()
    torch.manual_seed(3)
    expected = step_losses(plain, images, targets)
    torch.manual_seed(3)
    found = step_losses(masked, images, targets)
    assert found.pop("loss_mask") > 0 and found == expected
    inputs, features, dense = steps(masked, images)
    with torch.no_grad():
        chosen = masked.selected(inputs, features, dense)
        logits = masked.region_masks(inputs, features, [image["boxes"] for image in chosen])
    kinds = torch.cat([image["labels"] for image in chosen])
    own = logits[torch.arange(len(kinds)), kinds].sigmoid()
    torch.testing.assert_close(torch.cat([image["masks"] for image in chosen])[:, 0], own)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(looser, "stages is"), (other_units, "stages is"), (more_objects, "stages is"),
     (boxes_of_every_class, "parameter roi_heads.box_predictor.1.bbox_pred")],
)  # fmt: skip
def test_parts_that_a_spec_cannot_say_are_refused(change: Any, reason: str) -> None:
    with torch.device("meta"):
        model = build_cascade_rcnn(SPEC)
    change(model)
    with pytest.raises(SpecError, match=f"parts that a spec cannot say: .*{reason}"):
        adapt(model, LABELS)


def test_other_heads_are_refused() -> None:
    with torch.device("meta"):
        model, plain = build_cascade_rcnn(SPEC), build(small_spec("faster_rcnn")).model
    model.roi_heads = plain.get_submodule("roi_heads")  # type: ignore[assignment]
    with pytest.raises(SpecError, match="Expected CascadeRoIHeads, found RoIHeads"):
        adapt(model, LABELS)
    with pytest.raises(ValueError, match="found 1, 2 and 3"):
        CascadeRCNN(model.backbone, [nn.Identity()], [nn.Identity()] * 2, (0.5, 0.6, 0.7))


def test_a_users_cascade_has_the_usual_overlaps() -> None:
    with torch.device("meta"):
        parts = build_cascade_rcnn(SPEC)
        heads = parts.roi_heads
        model = CascadeRCNN(
            parts.backbone, list(heads.box_head), list(heads.box_predictor), box_roi_pool=heads.box_roi_pool
        )
    assert [stage.proposal_matcher.high_threshold for stage in model.roi_heads.stages] == [0.5, 0.6, 0.7]
    assert [stage.box_coder.weights for stage in model.roi_heads.stages] == [
        (10, 10, 5, 5),
        (20, 20, 10, 10),
        (30, 30, 15, 15),
    ]
