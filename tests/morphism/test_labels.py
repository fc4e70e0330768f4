"""A detector whose classes are dropped or reordered answers for the others as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detector_cases import families, small_spec, stirred
from torch import Tensor, nn

from autodet.detectors import Detector, build, detect
from autodet.morphism.labels import keep_labels
from autodet.morphism.morph import MorphError

LABELS = ((3, "dog"), (7, "traffic light"), (9, "cat"))
IMAGE = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(1))


def relabelled(detector: Detector, labels: tuple[tuple[int, str], ...]) -> Detector:
    morph = keep_labels(detector.spec, detector.model.state_dict(), labels)
    found = build(morph.spec)
    found.model.load_state_dict(morph.weights(detector.model.state_dict()))
    return found


def found_by(detector: Detector) -> dict[int, Tensor]:
    """Category id → its boxes and scores, N×5, best first."""
    detector.model.eval()
    (found,) = detect(detector, [IMAGE])
    rows = torch.cat([found["boxes"], found["scores"][:, None]], 1)
    order = found["scores"].argsort(descending=True, stable=True)
    labels = found["labels"][order]
    return {category: rows[order][labels == label] for label, category in detector.spec.categories.items()}


def everything(family: str) -> Detector:
    """A detector that cuts nothing off, so that no class can crowd out another one."""
    torch.manual_seed(0)
    return stirred(small_spec(family, LABELS, detections=5000, candidates=100_000))


def predictor(detector: Detector) -> nn.Module:
    return detector.model.get_submodule("roi_heads.box_predictor")


@families
def test_in_another_order_the_detections_are_the_same(family: str) -> None:
    detector = everything(family)
    other = relabelled(detector, (LABELS[2], LABELS[0], (7, "Traffic light")))
    assert other.spec == replace(detector.spec, labels=((9, "cat"), (3, "dog"), (7, "Traffic light")))
    before, after = found_by(detector), found_by(other)
    assert sum(map(len, before.values())) > 20
    for category, rows in before.items():
        torch.testing.assert_close(after[category], rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["retinanet", "fcos", "gfl", "reppoints"])
def test_of_a_one_stage_detector_the_other_classes_stay_as_they_are(family: str) -> None:
    detector = everything(family)
    before, after = found_by(detector), found_by(relabelled(detector, (LABELS[2], LABELS[0])))
    assert set(after) == {3, 9} and min(map(len, after.values())) > 5
    for category, rows in after.items():
        torch.testing.assert_close(rows, before[category], rtol=1e-4, atol=1e-4)


def test_of_a_second_stage_the_other_classes_compete_alone() -> None:
    detector = everything("faster_rcnn")
    other = relabelled(detector, (LABELS[2], LABELS[0]))
    regions = torch.rand(5, detector.spec.head_width)
    scores, boxes = predictor(detector)(regions)
    ours, own_boxes = predictor(other)(regions)
    torch.testing.assert_close(ours, scores[:, [0, 3, 1]])
    torch.testing.assert_close(own_boxes.view(5, 3, 4), boxes.view(5, 4, 4)[:, [0, 3, 1]])


def test_a_category_that_is_not_known_is_refused() -> None:
    detector = everything("fcos")
    with pytest.raises(MorphError, match=r"found \[5\]"):
        keep_labels(detector.spec, detector.model.state_dict(), ((3, "dog"), (5, "cell")))
