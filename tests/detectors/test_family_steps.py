"""The contract of every family in ``spec.FAMILIES``: its steps are torchvision's own forward.

A new family takes part by being in that list; ``HAND_DECODED`` asks for one independent computation of it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detector_cases import (
    LABELS,
    ONE,
    assert_same_detections,
    batch,
    families,
    small_spec,
    step_losses,
    steps,
    stirred,
)
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image

from autodet.detectors import (
    TwoStage,
    build,
    detect,
)

SIZES = {
    "one": ((64, 96),),
    "different": ((48, 72), (60, 40), (50, 50)),
    "large and small": ((130, 200), (20, 30)),
    "empty": ((48, 72),),
}


def without_objects(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value[:0] for key, value in target.items()} for target in targets]


# The steps are torchvision's forward. ---


@families
@pytest.mark.parametrize("labels", [ONE, LABELS], ids=["one class", "two classes"])
@pytest.mark.parametrize("sizes", SIZES)
def test_losses_equal_the_plain_forward(family: str, labels: tuple[tuple[int, str], ...], sizes: str) -> None:
    detector = stirred(small_spec(family, labels))
    detector.model.train()
    images, targets = batch(SIZES[sizes], len(labels))
    targets = without_objects(targets) if sizes == "empty" else targets
    untouched = copy.deepcopy(targets)
    torch.manual_seed(7)
    expected = detector.model(images, targets)
    torch.manual_seed(7)
    found = step_losses(detector, images, targets)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        assert loss.isfinite() and (loss > 0 or sizes == "empty"), name
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-5, msg=name)
    for target, before in zip(targets, untouched, strict=True):
        assert all(torch.equal(target[key], before[key]) for key in before)


@families
@pytest.mark.parametrize("labels", [ONE, LABELS], ids=["one class", "two classes"])
@pytest.mark.parametrize("sizes", SIZES)
def test_detections_equal_the_plain_forward(family: str, labels: tuple[tuple[int, str], ...], sizes: str) -> None:
    torch.manual_seed(3)  # with these weights each family finds both classes
    detector = stirred(small_spec(family, labels))
    images, _ = batch(SIZES[sizes])
    detector.model.eval()
    with torch.no_grad():
        expected = detector.model(images)
    detector.model.train()
    assert_same_detections(detect(detector, images), expected)
    assert len(set(torch.cat([image["labels"] for image in expected]).tolist())) >= len(labels)


@families
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_gradients_equal_the_plain_forwards(family: str, norm: str) -> None:
    """Of each loss on its own, parameter by parameter, and where there is none; together they reach everything."""
    detector = stirred(small_spec(family, norm=norm))
    detector.model.train()
    images, targets = batch()
    parameters = dict(detector.model.named_parameters())
    torch.manual_seed(7)
    expected = gradients(detector.model(images, targets), parameters)
    torch.manual_seed(7)
    found = gradients(step_losses(detector, images, targets), parameters)
    for loss, by_name in expected.items():
        for name, gradient in by_name.items():
            own = found[loss][name]
            assert (own is None) == (gradient is None), f"{loss} and {name}"
            if own is not None:
                torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6, msg=f"{loss} and {name}")
    reached = {n for by_name in found.values() for n, g in by_name.items() if g is not None and g.abs().sum() > 0}
    assert set(parameters) - reached == set()


def gradients(losses: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor | None]]:
    found: dict[str, dict[str, Tensor | None]] = {}
    for name, loss in losses.items():
        values = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        found[name] = dict(zip(parameters, values, strict=True))
    return found


@families
def test_losses_in_bfloat16_are_close(family: str) -> None:
    detector = stirred(small_spec(family, norm="frozen"))
    detector.model.train()
    images, targets = batch()
    torch.manual_seed(7)
    exact = step_losses(detector, images, targets)
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = step_losses(detector, images, targets)
    for name, loss in exact.items():
        assert rough[name].item() == pytest.approx(loss.item(), rel=0.1, abs=0.02), name
    torch.stack([loss.float() for loss in rough.values()]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.model.parameters())


@families
def test_losses_without_targets_say_what_to_do(family: str) -> None:
    detector = build(small_spec(family))
    with pytest.raises(ValueError, match=r"losses need targets: give them to preprocess"):
        detector.losses(*steps(detector, batch()[0]))


@families
@pytest.mark.parametrize("training", [True, False])
def test_detect_puts_every_mode_back(family: str, training: bool) -> None:
    detector = build(small_spec(family))
    detector.model.train(training)
    detector.model.get_submodule("backbone.body.layer1").eval()
    modes = [module.training for module in detector.model.modules()]
    seen = []
    detector.model.get_submodule("backbone.fpn").register_forward_hook(lambda module, *_: seen.append(module.training))
    detect(detector, [torch.rand(3, 64, 64)])
    assert seen == [False]
    assert [module.training for module in detector.model.modules()] == modes
    with pytest.raises((ValueError, IndexError)):
        detect(detector, [torch.rand(64)])
    assert [module.training for module in detector.model.modules()] == modes


# The values between the steps. ---


@families
@pytest.mark.parametrize(("size", "canvas"), [((48, 72), (64, 96)), ((64, 64), (64, 64)), ((40, 60), (64, 96))])
def test_maps_have_the_shapes_of_their_nominal_strides(
    family: str, size: tuple[int, int], canvas: tuple[int, int]
) -> None:
    spec = small_spec(family)
    inputs, features, dense = steps(build(spec), [torch.rand(3, *size)])
    assert tuple(inputs.images.tensors.shape[-2:]) == canvas
    assert inputs.sizes == [size]
    assert tuple(features) == tuple(dense.logits) == tuple(dense.deltas) == spec.levels
    # The canvas is a multiple of 32, not of 64: sizes above are rounded up (96 px are 2 cells of 64).
    cells = {stride: (math.ceil(canvas[0] / stride), math.ceil(canvas[1] / stride)) for stride in spec.levels}
    anchors, classes = spec.anchors_per_location, 1 if spec.two_stage else len(spec.labels) + 1
    for stride, (height, width) in cells.items():
        assert tuple(features[stride].shape) == (1, spec.neck_width, height, width)
        assert tuple(dense.logits[stride].shape) == (1, anchors * classes, height, width)
        assert tuple(dense.deltas[stride].shape) == (1, 4 * anchors, height, width)
        if dense.centerness is not None:
            assert tuple(dense.centerness[stride].shape) == (1, anchors, height, width)
        if dense.sides is not None:
            assert tuple(dense.sides[stride].shape) == (1, 4 * (spec.reg_max + 1), height, width)
    locations = sum(height * width for height, width in cells.values())
    assert [tuple(boxes.shape) for boxes in dense.anchors] == [(anchors * locations, 4)]


@families
def test_channels_are_the_plain_heads_anchors_then_classes(family: str) -> None:
    """Location by location: anchors are the outer and classes the inner channels, rows follow the anchors."""
    spec = small_spec(family)
    detector = stirred(spec)
    inputs, features, dense = steps(detector, batch()[0])
    plain = plain_head(detector.model, list(features.values()))
    row, canvas = 0, inputs.images.tensors.shape[-2:]
    ours: dict[str, list[Tensor]] = {name: [] for name in ("logits", "deltas", "centerness")}
    for stride, level in dense.logits.items():
        height, width = level.shape[2:]
        stride_y, stride_x = canvas[0] // height, canvas[1] // width
        anchors, classes = spec.anchors_per_location, level.shape[1] // spec.anchors_per_location
        for y, x, anchor in itertools.product(range(height), range(width), range(anchors)):
            ours["logits"].append(level[:, anchor * classes : (anchor + 1) * classes, y, x])
            ours["deltas"].append(dense.deltas[stride][:, anchor * 4 : anchor * 4 + 4, y, x])
            if dense.centerness is not None:
                ours["centerness"].append(dense.centerness[stride][:, anchor : anchor + 1, y, x])
            for boxes in dense.anchors:
                assert ((boxes[row, :2] + boxes[row, 2:]) / 2).tolist() == [x * stride_x, y * stride_y]
            row += 1
    assert row == plain["logits"].shape[1] == len(dense.anchors[0])
    for name, rows in ours.items():
        if rows:
            torch.testing.assert_close(torch.stack(rows, dim=1), plain[name])


def plain_head(model: Any, maps: list[Tensor]) -> dict[str, Tensor]:
    """What torchvision's own head gives to its losses: N×all×numbers."""
    if hasattr(model, "rpn"):
        logits, deltas = concat_box_prediction_layers(*model.rpn.head(maps))
        return {"logits": logits.view(len(maps[0]), -1, 1), "deltas": deltas.view(len(maps[0]), -1, 4)}
    output = model.head(maps)
    names = {"cls_logits": "logits", "bbox_regression": "deltas", "bbox_ctrness": "centerness"}
    return {names.get(name, name): value for name, value in output.items()}


def shifted_and_scaled(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Ren et al. 2015, eq. 2 solved for the box; the logarithms are limited as in torchvision."""
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def distances(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Tian et al. 2019, eq. 1 solved for the box, in units of the anchor's sides."""
    size = (anchors[..., 2:] - anchors[..., :2]).repeat(1, 1, 2)
    centre = ((anchors[..., :2] + anchors[..., 2:]) / 2).repeat(1, 1, 2)
    return centre + deltas * size * deltas.new_tensor([-1, -1, 1, 1])


def pixels(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Distances in pixels from the anchor's centre to the left, upper, right and lower side."""
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    return torch.cat([centre - deltas[..., :2], centre + deltas[..., 2:]], dim=-1)


HAND_DECODED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "faster_rcnn": shifted_and_scaled,
    "retinanet": shifted_and_scaled,
    "fcos": distances,
    "cascade_rcnn": shifted_and_scaled,
    "gfl": pixels,
    "mask_rcnn": shifted_and_scaled,
    "reppoints": pixels,
}


def maps_to_rows(level: Tensor) -> Tensor:
    """N×4A×H×W → N×(H·W·A)×4."""
    images, channels, height, width = level.shape
    return level.view(images, channels // 4, 4, height, width).permute(0, 3, 4, 1, 2).flatten(1, 3)


@families
def test_boxes_are_the_decoded_regressions_with_gradient(family: str) -> None:
    detector = stirred(small_spec(family))
    _, _, dense = steps(detector, batch()[0])
    boxes = detector.boxes(dense)
    rows = [maps_to_rows(level) for level in dense.deltas.values()]
    expected = HAND_DECODED[family](torch.cat(rows, dim=1), torch.stack(dense.anchors))
    torch.testing.assert_close(boxes, expected, rtol=1e-5, atol=1e-4)
    slopes = torch.autograd.grad(boxes.sum(), list(dense.deltas.values()), retain_graph=True)
    others = torch.autograd.grad(expected.sum(), list(dense.deltas.values()))
    for slope, other in zip(slopes, others, strict=True):
        assert slope.abs().sum() > 0
        torch.testing.assert_close(slope, other, rtol=1e-4, atol=1e-4)


@families
def test_the_plain_models_choice_is_among_the_boxes(family: str) -> None:
    """Detections of one stage, proposals of two: on an image that is neither resized nor padded, clipped boxes."""
    detector = stirred(small_spec(family))
    detector.model.eval()
    image = torch.rand(3, 64, 96)
    with torch.no_grad():
        inputs, _, dense = steps(detector, [image])
        boxes = clip_boxes_to_image(detector.boxes(dense)[0], (64, 96))
        if isinstance(detector, TwoStage):
            chosen = detector.proposals(inputs, dense)[0]
        else:
            chosen = detector.model([image])[0]["boxes"]
    assert len(chosen) > 20
    assert float(torch.cdist(chosen, boxes, p=1).min(1).values.max()) < 1e-3


@families
def test_only_detectors_with_a_second_stage_have_its_steps(family: str) -> None:
    with torch.device("meta"):
        detector = build(small_spec(family))
    assert isinstance(detector, TwoStage) == detector.spec.two_stage
