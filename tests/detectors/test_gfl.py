"""What only GFL has: its head, its targets and losses as a whole, its selection, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from detector_cases import LABELS, batch, small_spec, step_losses, steps, stirred
from torch import Tensor, nn
from torchvision.ops import box_iou, generalized_box_iou

from autodet.detectors import SpecError, adapt, detect
from autodet.detectors.atss import assign
from autodet.detectors.gfl import GFL, build_gfl

SPEC = small_spec("gfl")


def plain(**changes: Any) -> GFL:
    return build_gfl(replace(SPEC, **changes))


# The head. ---


def test_a_fresh_head_expects_little_and_knows_nothing_of_the_sides() -> None:
    """Scores of 0.01 (Lin et al. 2017) and flat distributions, whose means are half of the largest distance."""
    model = plain(reg_max=6)
    maps = [torch.randn(2, SPEC.neck_width, size, size) for size in (8, 4, 2, 1, 1)]
    found = model.head(maps)
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {
        "cls_logits": (2, 86, 3),
        "bbox_regression": (2, 86, 4),
        "bbox_distribution": (2, 86, 28),
    }
    assert float((found["cls_logits"].sigmoid() - 0.01).abs().max().detach()) < 0.005
    start = 0
    for stride, count in zip(SPEC.levels, (64, 16, 4, 1, 1), strict=True):
        level = found["bbox_regression"][:, start : start + count]
        torch.testing.assert_close(level, torch.full_like(level, 3.0 * stride), rtol=0.1, atol=0)
        start += count


def test_every_level_sharpens_its_distributions_by_a_scale_of_its_own() -> None:
    detector = stirred(SPEC)
    image = torch.rand(3, 64, 96)
    _, _, before = steps(detector, [image])
    with torch.no_grad():
        detector.model.get_parameter("head.regression_head.scales").copy_(torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0]))
    _, _, after = steps(detector, [image])
    assert before.sides is not None and after.sides is not None
    for stride, scale in zip(SPEC.levels, (1.0, 2.0, 0.5, 1.0, 0.0), strict=True):
        torch.testing.assert_close(after.sides[stride], before.sides[stride] * scale)
        torch.testing.assert_close(after.logits[stride], before.logits[stride])


# The losses. ---


def one_by_one(model: GFL, targets: list[dict[str, Tensor]], images: list[Tensor]) -> dict[str, Tensor]:
    """Sections 3.1 to 3.3 location by location, from the head's responses and the assignment."""
    image_list, moved = model.transform(images, targets)
    maps = list(model.backbone(image_list.tensors).values())
    found, anchors = model.head(maps), model.anchor_generator(image_list, maps)
    counts = [level.shape[2] * level.shape[3] for level in maps]
    strides = [stride for stride, count in zip(SPEC.levels, counts, strict=True) for _ in range(count)]
    bins = model.head.regression_head.reg_max + 1
    quality, giou, dfl, weights = torch.zeros(()), [], [], []
    for i, target in enumerate(moved):
        learns = assign(anchors[i], target["boxes"], counts).tolist()
        for row, own in enumerate(learns):
            scores = found["cls_logits"][i, row].sigmoid()
            wanted = torch.zeros(len(scores))
            if own >= 0:
                x, y = ((anchors[i][row, :2] + anchors[i][row, 2:]) / 2).tolist()
                chances = found["bbox_distribution"][i, row].view(4, bins).softmax(1)
                left, top, right, bottom = (chances * torch.arange(bins)).sum(1) * strides[row]
                box = torch.stack([x - left, y - top, x + right, y + bottom])
                truth = target["boxes"][own]
                wanted[target["labels"][own]] = box_iou(box[None], truth[None])[0, 0].detach()
                giou.append(1 - generalized_box_iou(box[None], truth[None])[0, 0])
                far = torch.stack([x - truth[0], y - truth[1], truth[2] - x, truth[3] - y]) / strides[row]
                sides = []
                for place, of in zip(far.clamp(0, bins - 1.1), chances, strict=True):
                    low = int(place)
                    sides.append(-(low + 1 - place) * of[low].log() - (place - low) * of[low + 1].log())
                dfl.append(torch.stack(sides).mean())
                weights.append(scores[1:].max().detach())
            entropy = -((1 - wanted) * (1 - scores).log() + wanted * scores.log())
            quality = quality + ((wanted - scores).abs() ** 2 * entropy).sum()
    assert len(giou) > 3
    w, total = torch.stack(weights), max(1.0, float(sum(weights)))
    return {
        "classification": quality / len(giou),
        "bbox_regression": 2 * (w * torch.stack(giou)).sum() / total,
        "bbox_distribution": 0.25 * (w * torch.stack(dfl)).sum() / total,
    }


def test_losses_are_the_papers_location_by_location() -> None:
    detector = stirred(SPEC)
    detector.model.train()
    images, targets = batch()
    assert isinstance(detector.model, GFL)
    expected = one_by_one(detector.model, targets, images)
    found = step_losses(detector, images, targets)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-3, atol=1e-4, msg=name)


def test_a_better_box_is_a_target_of_a_higher_score() -> None:
    """With the distributions at the truth, the score that costs least is 1; with the worst, close to 0."""
    model = plain(reg_max=6)
    anchors = model.anchor_generator(fake_images(), fake_maps())
    counts = [level.shape[2] * level.shape[3] for level in fake_maps()]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2])}]
    taught = assign(anchors[0], targets[0]["boxes"], counts) >= 0
    exact = model.box_coder.encode(anchors[0], targets[0]["boxes"].expand(len(anchors[0]), 4))
    losses = {}
    for shrink in (1.0, 0.3):
        for score in (0.1, 0.99):
            logits = torch.full((1, len(taught), 3), -12.0)
            logits[0, taught, 2] = torch.logit(torch.tensor(score))
            outputs = {
                "cls_logits": logits,
                "bbox_regression": (exact * shrink)[None],
                "bbox_distribution": torch.zeros(1, len(taught), 28),
            }
            losses[shrink, score] = float(model.compute_loss(targets, outputs, anchors, counts)["classification"])
    assert losses[1.0, 0.99] < 1e-4 < losses[1.0, 0.1]
    assert losses[0.3, 0.1] < 1e-4 < losses[0.3, 0.99]


def fake_maps() -> list[Tensor]:
    return [torch.zeros(1, 1, size, size) for size in (8, 4, 2, 1, 1)]


def fake_images() -> Any:
    return plain().transform([torch.zeros(3, 64, 64)])[0]


def test_training_without_targets_and_boxes_without_area_are_refused() -> None:
    model = plain().train()
    images, targets = batch()
    with pytest.raises(ValueError, match=r"Expected targets in training mode, found none: give them, or call eval"):
        model(images)
    targets[2]["boxes"][0, 2] = targets[2]["boxes"][0, 0]
    with pytest.raises(ValueError, match=r"boxes x1 y1 x2 y2 with an area, found \[10.0, .* in target 2"):
        model(images, targets)
    assert len(model.eval()(images)) == 3


# The selection. ---


def test_the_background_is_never_detected() -> None:
    detector = stirred(SPEC)
    with torch.no_grad():
        detector.model.get_parameter("head.classification_head.cls_logits.bias")[0] = 30.0
    found = detect(detector, batch()[0])
    assert {label for image in found for label in image["labels"].tolist()} == {1, 2}


def test_detections_are_chosen_level_by_level_by_threshold_number_and_overlap() -> None:
    """Four locations on two levels: the best ``candidates`` of each above the threshold, then NMS class by class."""
    model = plain(candidates=2, score_threshold=0.3, nms_threshold=0.5, detections=3)
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.6], [0.29, 0.4]])
    logits = torch.cat([torch.full((4, 1), 5.0), torch.logit(scores)], dim=1)[None]
    anchors = torch.tensor([[0.0, 0, 16, 16], [1, 0, 17, 16], [40, 40, 56, 56], [40, 40, 56, 56]])
    distances = torch.full((1, 4, 4), 8.0)
    split = {"cls_logits": [logits[:, :3], logits[:, 3:]], "bbox_regression": [distances[:, :3], distances[:, 3:]]}
    (found,) = model.postprocess_detections(split, [[anchors[:3], anchors[3:]]], [(50, 60)])
    # 0.7 and 0.6 are not among the two best of their level, 0.29 is below the threshold, 0.8 covered by 0.9.
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.4]))
    assert found["labels"].tolist() == [1, 2]
    assert found["boxes"].tolist() == [[0, 0, 16, 16], [40, 40, 56, 50]]  # within an image of 50 rows


# What a spec cannot say. ---


def other_candidates(model: GFL) -> None:
    model.atss_candidates = 5


def other_strides(model: GFL) -> None:
    model.head.strides = (4, 8, 16, 32, 64)


def other_coder(model: GFL) -> None:
    model.box_coder.normalize_by_size = True


def other_head(model: GFL) -> None:
    model.head = nn.Identity()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_candidates, "atss_candidates is 5, expected 9"),
        (other_strides, r"head.strides is \(4, 8"),
        (other_coder, "box_coder.normalize_by_size is True"),
        (other_head, "Expected a GFLHead, found Identity"),
    ],
)
def test_other_parts_are_refused(change: Callable[[GFL], None], reason: str) -> None:
    with torch.device("meta"):
        model = plain()
        change(model)
        with pytest.raises(SpecError, match=reason):
            adapt(model, LABELS)


def test_a_head_of_other_classes_is_refused() -> None:
    with torch.device("meta"):
        model = plain()
        with pytest.raises(ValueError, match="Expected a head of 7 classes with the background, found one of 3"):
            GFL(model.backbone, 7, model.anchor_generator, model.head)
