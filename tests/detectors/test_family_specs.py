"""The contract of every family in ``spec.FAMILIES``: its spec says it all.

That holds in text, in files, and for torchvision's own models.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_cases import (
    CONSTRUCTORS,
    LABELS,
    ONE,
    assert_same_detections,
    batch,
    constructed,
    families,
    small_spec,
    step_losses,
    steps,
    stir,
    stirred,
)
from torch import nn

from autodet.detectors import (
    Arch,
    DetectorSpec,
    SpecError,
    adapt,
    build,
    detect,
    is_detector_file,
    load_detector,
    save_detector,
    standard_spec,
    steps_of,
)
from autodet.detectors.spec import FAMILIES
from autodet.detectors.traits import TRAITS
from autodet.detectors.weights import WeightsError, load_strict, save_weights

# The spec says it all. ---


def variants(family: str) -> dict[str, DetectorSpec]:
    """Detectors of a family that differ in what all families have."""
    spec = small_spec(family)
    grouped = Arch.parse("bottleneck[g2]-8:16x1(8)-16x1(4)-32x2(8,16)-32x1")
    found = {
        "torchvision's": standard_spec(family, Arch.resnet18(), LABELS),
        "small": spec,
        "one class": small_spec(family, ONE),
        "frozen": replace(spec, norm="frozen", norm_eps=0.0),
        "norms in its pyramid": replace(spec, neck_groups=4, top_relu=spec.top == "pool"),
        "grouped": replace(spec, body=grouped, min_size=60, nms_threshold=0.4),
        "two stages read": with_body_levels(spec, (16, 32)),
        "four stages read": with_body_levels(spec, (4, 8, 16, 32)),
    }
    if spec.two_stage:
        found["other pooling"] = replace(spec, roi_aligned=True, roi_sampling=0)
    else:
        found["no ReLU"] = replace(spec, top_relu=False)
    if spec.head_groups and not TRAITS[family].grouped:
        found["no norms in its head"] = replace(spec, head_groups=0)
    if spec.masks and False in TRAITS[family].masks:
        found["no masks"] = replace(spec, **MASKLESS)
    return found | {f"top {top}": replace(spec, top=top) for top in TRAITS[family].tops}


MASKLESS: dict[str, Any] = {"mask_depth": 0, "mask_width": 256, "mask_roi_size": 14}  # a spec's own values


def with_body_levels(spec: DetectorSpec, body_levels: tuple[int, ...]) -> DetectorSpec:
    levels = (*body_levels, *(stride for stride in spec.levels if stride > 32))
    return replace(spec, levels=levels, anchor_sizes=tuple(levels))


VARIANTS = [
    pytest.param(spec, id=f"{family}, {name}") for family in FAMILIES for name, spec in variants(family).items()
]
OWN: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"rpn_depth": 2, "anchor_ratios": (0.5, 1.5), "head_width": 24, "roi_size": 5, "roi_sampling": 1},
    "retinanet": {"anchor_octaves": 2, "anchor_ratios": (1.0,), "box_loss": "giou", "head_groups": 8, "head_depth": 3},
    "gfl": {"head_groups": 2, "head_depth": 3, "reg_max": 5, "anchor_sizes": (8, 20, 30, 60, 90)},
    "fcos": {"head_groups": 2, "head_depth": 1, "candidates": 7},
    "cascade_rcnn": {"rpn_depth": 2, "head_width": 24, "stage_ious": (0.4, 0.55), "roi_size": 5, "roi_sampling": 1},
    "mask_rcnn": {"rpn_depth": 2, "mask_depth": 1, "mask_width": 20, "mask_roi_size": 5, "roi_sampling": 1},
    "reppoints": {"head_groups": 2, "head_depth": 1, "points": 25, "anchor_sizes": (8, 20, 30, 60, 90)},
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


@pytest.mark.parametrize("family", [family for family in FAMILIES if "body" in TRAITS[family].tops])
def test_top_says_which_map_the_sixth_level_is_made_from(family: str) -> None:
    """Also where both maps are equally wide, from which torchvision would conclude the neck's."""
    equal = Arch.parse("basic-8:8x1-16x1-16x1-16x1")
    for top in TRAITS[family].tops:
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
    spec = standard_spec(family, Arch.resnet18(), ONE)
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
    spec = standard_spec("fcos", Arch.resnet18(), ONE).at_size(100)
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
    few = 8 if spec.masks else spec.detections  # a mask head as wide as torchvision's takes long for each
    model = constructed(name, **({"box_detections_per_img": few} if spec.masks else {}))
    stir(model)
    adapted = adapt(model, LABELS)
    assert adapted.model is model
    assert adapted.spec == replace(spec, min_size=64, max_size=96, detections=few)
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
