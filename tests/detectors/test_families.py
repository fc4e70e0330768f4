"""The contract of every family in ``spec.FAMILIES``: its steps are torchvision's own forward, and its spec says it all.

A new family takes part by being in that list; ``HAND_DECODED`` asks for one independent computation of it.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_cases import (
    CONSTRUCTORS,
    LABELS,
    assert_same_detections,
    batch,
    constructed,
    small_spec,
    step_losses,
    steps,
    stir,
)
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, RetinaNet, fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image

from autodet.detectors import (
    Arch,
    Detector,
    DetectorSpec,
    SpecError,
    TwoStage,
    adapt,
    build,
    detect,
    is_detector_file,
    load_detector,
    save_detector,
    steps_of,
    torchvision_spec,
)
from autodet.detectors.spec import FAMILIES, TOPS
from autodet.detectors.weights import WeightsError, load_strict, save_weights

ONE = ((5, "cell"),)
SIZES = {
    "one": ((64, 96),),
    "different": ((48, 72), (60, 40), (50, 50)),
    "large and small": ((130, 200), (20, 30)),
    "empty": ((48, 72),),
}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def stirred(spec: DetectorSpec) -> Detector:
    detector = build(spec)
    stir(detector.model)
    return detector


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
    for stride, level in dense.logits.items():
        height, width = level.shape[2:]
        stride_y, stride_x = canvas[0] // height, canvas[1] // width
        anchors, classes = spec.anchors_per_location, level.shape[1] // spec.anchors_per_location
        for y, x, anchor in itertools.product(range(height), range(width), range(anchors)):
            own = level[:, anchor * classes : (anchor + 1) * classes, y, x]
            torch.testing.assert_close(own, plain["logits"][:, row])
            torch.testing.assert_close(
                dense.deltas[stride][:, anchor * 4 : anchor * 4 + 4, y, x], plain["deltas"][:, row]
            )
            if dense.centerness is not None:
                own = dense.centerness[stride][:, anchor : anchor + 1, y, x]
                torch.testing.assert_close(own, plain["centerness"][:, row])
            for boxes in dense.anchors:
                assert ((boxes[row, :2] + boxes[row, 2:]) / 2).tolist() == [x * stride_x, y * stride_y]
            row += 1
    assert row == plain["logits"].shape[1] == len(dense.anchors[0])


def plain_head(model: Any, maps: list[Tensor]) -> dict[str, Tensor]:
    """What torchvision's own head gives to its losses: N×all×numbers."""
    if hasattr(model, "rpn"):
        logits, deltas = concat_box_prediction_layers(*model.rpn.head(maps))
        return {"logits": logits.view(len(maps[0]), -1, 1), "deltas": deltas.view(len(maps[0]), -1, 4)}
    output = model.head(maps)
    names = {"cls_logits": "logits", "bbox_regression": "deltas", "bbox_ctrness": "centerness"}
    return {names[name]: value for name, value in output.items()}


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


HAND_DECODED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "faster_rcnn": shifted_and_scaled,
    "retinanet": shifted_and_scaled,
    "fcos": distances,
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


# The spec says it all. ---


def variants(family: str) -> dict[str, DetectorSpec]:
    """Detectors of a family that differ in what all families have."""
    spec = small_spec(family)
    grouped = Arch.parse("bottleneck[g2]-8:16x1(8)-16x1(4)-32x2(8,16)-32x1")
    found = {
        "torchvision's": torchvision_spec(family, Arch.resnet18(), LABELS),
        "small": spec,
        "one class": small_spec(family, ONE),
        "frozen": replace(spec, norm="frozen", norm_eps=0.0),
        "grouped": replace(spec, body=grouped, min_size=60, nms_threshold=0.4),
        "two stages read": with_body_levels(spec, (16, 32)),
        "four stages read": with_body_levels(spec, (4, 8, 16, 32)),
    }
    return found | {f"top {top}": replace(spec, top=top) for top in TOPS[family]}


def with_body_levels(spec: DetectorSpec, body_levels: tuple[int, ...]) -> DetectorSpec:
    levels = (*body_levels, *(stride for stride in spec.levels if stride > 32))
    return replace(spec, levels=levels, anchor_sizes=tuple(levels))


VARIANTS = [
    pytest.param(spec, id=f"{family}, {name}") for family in FAMILIES for name, spec in variants(family).items()
]
OWN: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"rpn_depth": 2, "anchor_ratios": (0.5, 1.5), "head_width": 24, "roi_size": 5, "roi_sampling": 1},
    "retinanet": {"anchor_octaves": 2, "anchor_ratios": (1.0,), "box_loss": "giou", "head_groups": 8, "head_depth": 3},
    "fcos": {"head_groups": 2, "head_depth": 1, "candidates": 7},
}
VARIANTS += [pytest.param(small_spec(family, **OWN[family]), id=f"{family}, its own fields") for family in OWN]


@pytest.mark.parametrize("spec", VARIANTS)
def test_a_built_detector_is_described_as_its_spec(spec: DetectorSpec) -> None:
    with torch.device("meta"):
        detector = build(spec)
        found = adapt(detector.model, spec.labels)
        rebuilt = build(found.spec)
    assert detector.spec == found.spec == spec
    assert found.model is detector.model
    assert type(found) is type(detector) is type(steps_of(detector.model, spec))
    shapes, other = ([(key, v.shape) for key, v in d.model.state_dict().items()] for d in (detector, rebuilt))
    assert shapes == other


@pytest.mark.parametrize("spec", VARIANTS)
def test_text_and_json_give_the_same_spec_back(spec: DetectorSpec) -> None:
    assert DetectorSpec.parse(str(spec)) == spec
    assert DetectorSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("spec", [spec for spec in VARIANTS if "torchvision's" not in str(spec.id)])
def test_every_variants_steps_equal_the_plain_forward(spec: DetectorSpec) -> None:
    detector = stirred(spec)
    images, targets = batch(classes=len(spec.labels))
    detector.model.train()
    torch.manual_seed(7)
    expected = detector.model(images, targets)
    torch.manual_seed(7)
    for name, loss in step_losses(detector, images, targets).items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    detector.model.eval()
    with torch.no_grad():
        assert_same_detections(detect(detector, images), detector.model(images))


@pytest.mark.parametrize("family", [family for family in FAMILIES if "body" in TOPS[family]])
def test_top_says_which_map_the_sixth_level_is_made_from(family: str) -> None:
    """Also where both maps are equally wide, from which torchvision would conclude the neck's."""
    equal = Arch.parse("basic-8:8x1-16x1-16x1-16x1")
    for top in TOPS[family]:
        detector = build(small_spec(family, body=equal, top=top))
        seen: dict[nn.Module, Any] = {}
        body, fpn, p6 = (detector.model.get_submodule(f"backbone.{n}") for n in ("body", "fpn", "fpn.extra_blocks.p6"))
        for module in (body, fpn, p6):
            module.register_forward_hook(lambda module, given, out, seen=seen: seen.update({module: (given[0], out)}))
        steps(detector, [torch.rand(3, 64, 64)])
        last_of_body, last_of_neck = list(seen[body][1].values())[-1], list(seen[fpn][1].values())[-3]
        assert torch.equal(seen[p6][0], last_of_neck if top == "neck" else last_of_body)
        assert adapt(detector.model, LABELS).spec.top == top


@families
def test_at_another_image_size_everything_keeps_its_proportion(family: str) -> None:
    spec = torchvision_spec(family, Arch.resnet18(), ONE)
    half = spec.at_size(400)
    assert (half.min_size, half.max_size) == (400, 666)
    assert half.anchor_sizes == tuple(size // 2 for size in spec.anchor_sizes)
    assert half.at_size(800) == replace(spec, max_size=1332)
    tiny = spec.at_size(24)
    detector = build(replace(tiny, body=small_spec(family).body, norm="frozen"))
    _, _, dense = steps(detector, [torch.rand(3, 24, 24)])
    sides = dense.anchors[0][:, 2:] - dense.anchors[0][:, :2]
    assert bool((sides > 0).all())


def test_an_fcos_for_small_images_still_gives_every_object_a_location() -> None:
    """torchvision takes locations within 1.5 anchor sizes of an object's centre; strides do not shrink with images."""
    spec = torchvision_spec("fcos", Arch.resnet18(), ONE).at_size(100)
    for stride, size in zip(spec.levels, spec.anchor_sizes, strict=True):
        assert 2 * 1.5 * size >= stride


# Files. ---


@families
def test_saved_detector_comes_back_the_same(family: str, tmp_path: Path) -> None:
    spec = small_spec(family)
    detector = stirred(spec)
    images, _ = batch()
    path = tmp_path / "detector.safetensors"
    save_detector(path, detector, {"formula": "none", "seed": 3})
    torch.manual_seed(99)  # the fresh weights of the rebuilt detector must not matter
    loaded, notes = load_detector(path)
    assert is_detector_file(path)
    assert notes == {"formula": "none", "seed": 3}
    assert loaded.spec == spec and type(loaded) is type(detector)
    assert not loaded.model.training
    expected = detect(detector, images)
    assert_same_detections(detect(loaded, images), expected)
    for one, other in zip(detect(loaded, images), expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@families
def test_a_file_that_is_no_detector_is_named(family: str, tmp_path: Path) -> None:
    path, spec = tmp_path / "weights.safetensors", small_spec(family)
    save_weights(path, {"weight": torch.zeros(2)}, {})
    assert not is_detector_file(path)
    with pytest.raises(SpecError, match=r"weights.safetensors holds weights but no detector.*save_detector"):
        load_detector(path)
    save_weights(path, {"weight": torch.zeros(2)}, {"spec": spec.to_json() | {"norm": "group"}})
    with pytest.raises(SpecError, match=r"weights.safetensors: its spec .* cannot be built: .*norm 'group'"):
        load_detector(path)
    save_weights(path, {"weight": torch.zeros(2)}, {"spec": spec.to_json()})
    with pytest.raises(WeightsError, match=r"weights.safetensors does not fit"):
        load_detector(path)
    for read in (load_detector, is_detector_file):
        with pytest.raises(WeightsError, match=r"absent.safetensors"):
            read(tmp_path / "absent.safetensors")


# torchvision's own models. ---


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_torchvisions_models_are_rebuilt_with_equal_outputs(name: str) -> None:
    spec = CONSTRUCTORS[name][1]
    model = constructed(name)
    stir(model)
    adapted = adapt(model, LABELS)
    assert adapted.model is model
    assert adapted.spec == replace(spec, min_size=64, max_size=96)
    rebuilt = build(adapted.spec)
    assert list(rebuilt.model.state_dict()) == list(model.state_dict())
    load_strict(rebuilt.model, model.state_dict())
    images = batch()[0][:2]
    model.eval()
    with torch.no_grad():
        expected = model(images)
    assert_same_detections(detect(rebuilt, images), expected)
    assert_same_detections(detect(adapted, images), expected)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_torchvisions_defaults_are_the_specs(name: str) -> None:
    constructor, spec = CONSTRUCTORS[name]
    with torch.device("meta"):
        model = constructor(weights=None, weights_backbone=None, num_classes=len(LABELS) + 1)
        assert adapt(model, LABELS).spec == spec


# What is refused. ---


@families
@pytest.mark.parametrize("labels", [LABELS[:1], (*LABELS, (9, "cat"))], ids=["too few", "too many"])
def test_a_wrong_number_of_labels_is_refused(family: str, labels: tuple[tuple[int, str], ...]) -> None:
    with torch.device("meta"):
        model = build(small_spec(family)).model
    with pytest.raises(SpecError, match=f"2 classes besides background, but {len(labels)} labels were given"):
        adapt(model, labels)


def test_another_kind_of_model_is_refused() -> None:
    with torch.device("meta"):
        model = resnet18()
    with pytest.raises(SpecError, match="Expected a torchvision FasterRCNN, RetinaNet or FCOS, found ResNet"):
        adapt(model, LABELS)


@families
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "yolo"}, "family 'yolo' is none of faster_rcnn, retinanet, fcos"),
        ({"top": "ceiling"}, "top 'ceiling' is none of"),
        ({"levels": (16, 8, 32, 64)}, "levels .* are not strides"),
        ({"levels": (4, 8, 16, 32)}, "levels .* are not strides"),
        ({"anchor_sizes": (8, 16)}, "2 anchor_sizes for 5 levels; give one a level"),
        ({"head_groups": 7}, "head_groups 7 do not divide neck_width 16"),
        ({"head_groups": -1}, "head_groups|group norms"),
        ({"head_depth": 0}, "head_depth is 0, expected at least 1"),
        ({"candidates": 0}, "candidates is 0, expected at least 1"),
        ({"anchor_octaves": 0}, "anchor_octaves"),
        ({"box_loss": "iou"}, "box_loss 'iou' is none of l1"),
        ({"norm": "group"}, "norm 'group' is none of batch, frozen"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_no_family_can_have(family: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        replace(small_spec(family), **change)


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("fcos", {"anchor_ratios": (0.5, 1.0)}, "an fcos has one anchor of ratio 1"),
        ("fcos", {"anchor_octaves": 3}, "anchor_octaves 3 belong to a retinanet"),
        ("fcos", {"head_groups": 0}, "group norms, found"),
        ("fcos", {"top": "pool"}, "top 'pool' is none of neck, body, which a fcos may have"),
        ("retinanet", {"top": "pool"}, "top 'pool' is none of neck, body"),
        ("retinanet", {"head_depth": 5}, "head_depth 5 is above a retinanet's 4"),
        ("retinanet", {"levels": (8, 16, 32, 64)}, "levels .* are not strides up to 32, then 64 and 128"),
        ("faster_rcnn", {"top": "neck"}, "top 'neck' is none of pool"),
        ("faster_rcnn", {"anchor_octaves": 3}, "anchor_octaves 3 belong to a retinanet"),
        ("faster_rcnn", {"levels": (8, 16, 32, 64, 128)}, "levels .* are not strides up to 32, then 64"),
    ],
)
def test_a_family_cannot_have(family: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        replace(small_spec(family), **change)


def test_an_unknown_family_has_no_torchvision_spec() -> None:
    with pytest.raises(SpecError, match="family among faster_rcnn, retinanet, fcos, found 'yolo'"):
        torchvision_spec("yolo", Arch.resnet18(), ONE)


def widen_the_stride(model: Any) -> None:
    model.backbone.body["layer4"][0].conv1.dilation = (2, 2)


def change_the_mean(model: Any) -> None:
    model.transform.image_mean = [0.0, 0.0, 0.0]


def change_one_eps(model: Any) -> None:
    model.backbone.body["layer2"][0].bn1.eps = 0.1


def train_at_several_sizes(model: Any) -> None:
    model.transform.min_size = (64, 80)


@families
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (widen_the_stride, r"backbone.body.layer4.0.conv1 is Conv2d.*dilation=\(2, 2\)"),
        (change_the_mean, r"image_mean is \(0.0, 0.0, 0.0\), expected \(0.485"),
        (change_one_eps, r"backbone.body.layer2.0.bn1 is BatchNorm2d\(.*eps=0.1"),
        (train_at_several_sizes, "number of min_size is 2, expected 1"),
    ],
)
def test_parts_that_no_spec_can_say_are_refused(family: str, change: Callable[[Any], None], reason: str) -> None:
    with torch.device("meta"):
        model = build(small_spec(family)).model
        change(model)
        with pytest.raises(SpecError, match=f"parts that a spec cannot say: .*{reason}"):
            adapt(model, LABELS)


@families
def test_a_body_or_pyramid_that_no_spec_can_say_is_refused(family: str) -> None:
    with torch.device("meta"):
        model: Any = build(small_spec(family)).model
        other = copy.deepcopy(model)
        other.backbone.body["bn1"] = nn.Identity()
        with pytest.raises(SpecError, match=r"Expected batch norms, frozen or not, in the detector's body, found Iden"):
            adapt(other, LABELS)
        other = copy.deepcopy(model)
        other.backbone.fpn.extra_blocks = None
        with pytest.raises(SpecError, match="Expected a pooled level or P6 and P7 on the pyramid, found NoneType"):
            adapt(other, LABELS)
        other = copy.deepcopy(model)
        other.backbone.body.return_layers = {"layer1": "0", "layer2": "1", "layer4": "2"}
        with pytest.raises(SpecError, match=r"Expected a pyramid on .*, found one on layer1, layer2, layer4"):
            adapt(other, LABELS)


class OtherHead(nn.Module):
    """A head of the user's own."""


class OtherFCOSHead(FCOSHead):  # type: ignore[misc]  # torchvision has no types
    """A head of the user's own that torchvision's type check lets pass: without norms."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, 1, classes, num_convs=0)


def retinanet(**settings: Any) -> RetinaNet:
    model: RetinaNet = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, **settings)
    return model


def fcos(**settings: Any) -> FCOS:
    model: FCOS = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, **settings)
    return model


def with_gelu(model: Any) -> Any:
    model.head.regression_head.conv[-1] = nn.GELU()
    return model


def with_other_coder(model: Any) -> Any:
    model.head.regression_head.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: retinanet(fg_iou_thresh=0.6), r"matcher is \(0.6, 0.4, True\), expected \(0.5, 0.4, True\)"),
        (lambda: retinanet(head=OtherHead()), "Expected a RetinaNetHead, found OtherHead"),
        (lambda: with_other_coder(retinanet()), "box_coders is"),
        (lambda: retinanet(head=RetinaNetHead(256, 9, 3, norm_layer=nn.BatchNorm2d)), "conv.0.1"),
        (lambda: fcos(center_sampling_radius=2.0), "center_sampling_radius is 2.0, expected 1.5"),
        (lambda: fcos(head=OtherHead()), "Expected an FCOSHead, found OtherHead"),
        (lambda: fcos(head=OtherFCOSHead(256, 3)), "Expected an FCOSHead with group norms, found none"),
        (lambda: with_gelu(fcos()), "head.regression_head.conv.11 is GELU"),
    ],
)
def test_other_one_stage_parts_are_refused(make: Callable[[], nn.Module], reason: str) -> None:
    with torch.device("meta"):
        model = make()
    with pytest.raises(SpecError, match=reason):
        adapt(model, LABELS)


@families
def test_only_detectors_with_a_second_stage_have_its_steps(family: str) -> None:
    with torch.device("meta"):
        detector = build(small_spec(family))
    assert isinstance(detector, TwoStage) == detector.spec.two_stage
