"""Detectors from torchvision's state dicts: as its constructors make them, as its published files hold them, wrapped,
damaged, and of other models."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from detector_cases import BODY, CONSTRUCTORS, LABELS, assert_same_detections, batch, families, small_spec, stir
from torch import Tensor
from torchvision.models import resnet18
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn_v2,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
    ssdlite320_mobilenet_v3_large,
)

from autodet.detectors import (
    Arch,
    DetectorSpec,
    SpecError,
    adapt,
    build,
    detect,
    detector_of_state_dict,
    load_any_detector,
    save_detector,
    standard_spec,
)
from autodet.detectors.spec import COCO_LABELS, FAMILIES
from autodet.detectors.weights import WeightsError, modern_names

State = dict[str, Tensor]
# Published before torchvision renamed its layers.
OLD_HEADS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn")


def plain_spec(family: str, **changes: Any) -> DetectorSpec:
    """torchvision's settings, of which a state dict does not tell, around a narrow body and neck."""
    spec = standard_spec(family, BODY, LABELS)
    narrow = {"neck_width": 32, "min_size": 64, "max_size": 96}
    narrow |= ({"head_width": 64} if spec.two_stage else {}) | ({"mask_width": 16} if spec.masks else {})
    return replace(spec, **narrow | changes)


def state_of(spec: DetectorSpec) -> State:
    return dict(build(spec).model.state_dict())


def read_back(state: State, spec: DetectorSpec, **settings: Any) -> Any:
    return detector_of_state_dict(state, spec.labels, spec.min_size, spec.max_size, **settings)


def published(name: str) -> State:
    """Tensors with the names and shapes of torchvision's COCO file; the values are arbitrary."""
    with torch.device("meta"):
        shapes = CONSTRUCTORS[name][0](weights=None, weights_backbone=None, num_classes=91).state_dict()
    state = {key: torch.full(value.shape, 0.01 * (i % 7 + 1)) for i, (key, value) in enumerate(shapes.items())}
    if name == "retinanet_resnet50_fpn_v2":  # the only one that was trained with norms that learn
        return {k: v.long() if "num_batches" in k else v for k, v in state.items()}
    state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    return old_names(state, name in OLD_HEADS)


def old_names(state: State, heads: bool) -> State:
    renamed = {re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key): value for key, value in state.items()}
    if heads:
        renamed = {key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for key, value in renamed.items()}
        renamed = {re.sub(r"_head\.conv\.(\d)\.0\.", _doubled, key): value for key, value in renamed.items()}
        renamed = {re.sub(r"mask_head\.(\d)\.0\.", _counted, key): value for key, value in renamed.items()}
    return renamed


def _doubled(found: re.Match[str]) -> str:
    return f"_head.conv.{2 * int(found[1])}."


def _counted(found: re.Match[str]) -> str:
    return f"mask_head.mask_fcn{int(found[1]) + 1}."


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_published_files_are_what_torchvision_makes_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision itself reads the same tensors, with its own renaming, frozen norms and eps."""
    state = published(name)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(state))
    reference = CONSTRUCTORS[name][0](weights="COCO_V1")
    found = detector_of_state_dict(state, LABELS)
    assert found.spec == adapt(reference, COCO_LABELS).spec
    assert found.spec.norm_eps == (0.0 if name in OLD_HEADS else 1e-5)
    assert found.spec.norm == ("batch" if name == "retinanet_resnet50_fpn_v2" else "frozen")
    assert not found.model.training
    expected = reference.state_dict()
    own = found.model.state_dict()
    assert own.keys() == expected.keys()
    assert [key for key, value in own.items() if not torch.equal(value, expected[key])] == []


def variants(family: str) -> dict[str, DetectorSpec]:
    grouped = Arch.parse("bottleneck[g2]-8:16x1(8)-16x1(4)-32x2(8,16)-32x1")
    found = {
        "plain": plain_spec(family),
        "one class": plain_spec(family, labels=((4, "cell"),)),
        "another body and neck": plain_spec(family, body=grouped, neck_width=64),
        "frozen": plain_spec(family, norm="frozen"),
    }
    if found["plain"].masks:
        found["another mask head"] = plain_spec(family, mask_depth=2, mask_width=24)
    if found["plain"].two_stage:
        return found | {"another head": plain_spec(family, rpn_depth=2, head_width=24, roi_size=5)}
    found |= {"another depth": plain_spec(family, head_depth=2), "top body": plain_spec(family, top="body")}
    if family == "gfl":
        found["other bins"] = plain_spec(family, reg_max=7)
    if family == "retinanet":
        found["norms"] = plain_spec(family, head_groups=32, box_loss="giou")
        found["three anchors"] = plain_spec(family, anchor_octaves=1)
    return found


VARIANTS = [
    pytest.param(spec, id=f"{family}, {name}") for family in FAMILIES for name, spec in variants(family).items()
]


@pytest.mark.parametrize("spec", VARIANTS)
def test_everything_else_is_read_off_the_tensors(spec: DetectorSpec) -> None:
    state = state_of(spec)
    found = read_back(state, spec)
    assert found.spec == spec
    assert all(torch.equal(value, state[key]) for key, value in found.model.state_dict().items())


@families
def test_a_body_as_wide_as_the_neck_is_read_as_torchvision_builds_it(family: str) -> None:
    spec = plain_spec(family, body=Arch.parse("basic-8:8x1-16x1-16x1-32x1"))
    assert read_back(state_of(spec), spec).spec == spec


def test_only_norms_of_torchvisions_first_files_have_no_eps() -> None:
    """What is fine-tuned from these has other classes; another body cannot come from them."""
    spec = standard_spec("faster_rcnn", Arch.resnet50(), LABELS)
    tuned = replace(spec, norm="frozen", norm_eps=0.0)
    state = state_of(tuned)
    assert detector_of_state_dict(state, LABELS).spec == tuned
    assert detector_of_state_dict(state, LABELS, norm_eps=1e-5).spec == replace(tuned, norm_eps=1e-5)
    other = plain_spec("faster_rcnn", norm="frozen")
    assert read_back(state_of(other), other).spec.norm_eps == 1e-5


# Files. ---


def as_saved_by_torchvisions_scripts(state: State, path: Path) -> Path:
    torch.save({"model": state, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    return path


def as_saved_in_parallel(state: State, path: Path) -> Path:
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def as_safetensors(state: State, path: Path) -> Path:
    safetensors.torch.save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_saved_in_2019(state: State, path: Path) -> Path:
    torch.save(old_names(state, heads="head.regression_head.bbox_ctrness.weight" not in state), path)
    return path


@families
@pytest.mark.parametrize(
    "save", [as_saved_by_torchvisions_scripts, as_saved_in_parallel, as_safetensors, as_saved_in_2019]
)
def test_files_give_the_same_detections(family: str, save: Callable[[State, Path], Path], tmp_path: Path) -> None:
    spec = plain_spec(family, score_threshold=0.05 if family != "fcos" else 0.2)
    original = build(spec)
    stir(original.model)
    path = save(dict(original.model.state_dict()), tmp_path / "theirs.pth")
    found = load_any_detector(path, LABELS, 64)
    assert found.spec == replace(spec, max_size=1333)
    images, _ = batch()
    assert_same_detections(detect(found, images), detect(original, images))


@families
def test_our_own_files_know_themselves(family: str, tmp_path: Path) -> None:
    spec = small_spec(family)
    save_detector(tmp_path / "ours.safetensors", build(spec))
    found = load_any_detector(tmp_path / "ours.safetensors", ((1, "other"),), 500)
    assert found.spec == spec and not found.model.training


def test_the_image_size_is_torchvisions_unless_given(tmp_path: Path) -> None:
    torch.save(state_of(plain_spec("fcos")), tmp_path / "a.pth")
    for given, sizes in ((None, (800, 1333)), (400, (400, 1333)), (2000, (2000, 2000))):
        spec = load_any_detector(tmp_path / "a.pth", LABELS, given).spec
        assert (spec.min_size, spec.max_size) == sizes
        assert spec.anchor_sizes == (8, 16, 32, 64, 128)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    state = state_of(plain_spec("fcos"))
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-5000])
    safetensors.torch.save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-5000])
    (tmp_path / "notes.txt").write_text("no weights")
    for name in ("short.pth", "short.safetensors", "absent.pth", "absent.safetensors", "notes.txt"):
        with pytest.raises(WeightsError, match=re.escape(str(tmp_path / name))):
            load_any_detector(tmp_path / name, LABELS)
    torch.save(resnet18(num_classes=3).state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(SpecError, match=r"classifier.pth: expected the state dict of one of faster_rcnn"):
        load_any_detector(tmp_path / "classifier.pth", LABELS)


# What is refused. ---


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (
            ssdlite320_mobilenet_v3_large,
            SpecError,
            r"expected the state dict of one of faster_rcnn.*found one",
        ),
        (fasterrcnn_mobilenet_v3_large_fpn, SpecError, "expected a ResNet as the detector's body"),
        (fasterrcnn_resnet50_fpn_v2, SpecError, "expected a box head of two layers .*adapt"),
        (maskrcnn_resnet50_fpn_v2, SpecError, "expected a box head of two layers .*adapt"),
        (keypointrcnn_resnet50_fpn, WeightsError, "does not fit FasterRCNN: .* unexpected: roi_heads.keypoint_head"),
    ],
)
def test_other_detectors_are_refused(make: Any, error: type[Exception], reason: str) -> None:
    with torch.device("meta"):
        state = make(weights=None, weights_backbone=None, num_classes=3).state_dict()
    with pytest.raises(error, match=f"^theirs.pth.*{reason}"):
        detector_of_state_dict(state, LABELS, source="theirs.pth")


@families
@pytest.mark.parametrize("labels", [((1, "a"),), tuple((i, str(i)) for i in range(1, 81))], ids=["one", "eighty"])
def test_a_wrong_number_of_labels_names_both_and_the_remedy(family: str, labels: tuple[tuple[int, str], ...]) -> None:
    state = state_of(plain_spec(family))
    number = rf"num_classes={len(labels) + 1}"
    with pytest.raises(SpecError, match=rf"2 classes besides background.*but the data has {len(labels)} .*{number}"):
        detector_of_state_dict(state, labels)


@families
def test_ninety_classes_are_the_datas_where_it_has_ninety(family: str) -> None:
    own = tuple((100 + number, f"kind {number}") for number in range(90))
    spec = plain_spec(family, labels=own)
    state = state_of(spec)
    assert detector_of_state_dict(state, own).spec.labels == own
    assert detector_of_state_dict(state, LABELS).spec.labels == COCO_LABELS


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (plain_spec("faster_rcnn", anchor_ratios=(0.5, 1.0)), "expected torchvision's 3 anchors .*, found 2.*adapt"),
        (plain_spec("retinanet", anchor_octaves=2), "expected torchvision's 9 or 3 anchors .*, found 6.*adapt"),
        (
            small_spec("faster_rcnn", levels=(8, 16, 32, 64), anchor_sizes=(8, 16, 32, 64)),
            "last 4 stages, found one on 3",
        ),
        (small_spec("fcos", levels=(16, 32, 64, 128), anchor_sizes=(8, 16, 32, 64)), "last 3 stages, found one on 2"),
        (small_spec("fcos"), "head_groups 32 do not divide neck_width 16"),
    ],
    ids=["two anchors", "six anchors", "three levels", "two levels", "neck"],
)
def test_what_torchvisions_constructors_do_not_build_is_refused(spec: DetectorSpec, reason: str) -> None:
    with pytest.raises(SpecError, match=f"^theirs.pth: .*{reason}"):
        detector_of_state_dict(state_of(spec), LABELS, source="theirs.pth")


@pytest.mark.parametrize(
    ("family", "missing", "error", "reason"),
    [
        (
            "retinanet",
            "head.regression_head.bbox_reg.weight",
            SpecError,
            "expected 'head.regression_head.bbox_reg.weight'",
        ),
        ("retinanet", "backbone.fpn.extra_blocks.p6.weight", SpecError, "top 'pool' is none of neck, body"),
        ("fcos", "backbone.fpn.extra_blocks.p7.weight", WeightsError, "1 missing: backbone.fpn.extra_blocks.p7.weight"),
        ("fcos", "backbone.fpn.layer_blocks.0.0.weight", SpecError, "expected 'backbone.fpn.layer_blocks.0.0.weight'"),
        ("faster_rcnn", "backbone.body.conv1.weight", SpecError, "expected a ResNet as the detector's body"),
        ("faster_rcnn", "rpn.head.bbox_pred.weight", SpecError, "expected 'rpn.head.bbox_pred.weight'"),
    ],
)
def test_an_incomplete_state_dict_says_what_is_missing(
    family: str, missing: str, error: type[Exception], reason: str
) -> None:
    state = state_of(plain_spec(family))
    del state[missing]
    with pytest.raises(error, match=f"^theirs.pth.*{reason}"):
        detector_of_state_dict(state, LABELS, source="theirs.pth")


def test_a_tensor_of_another_rank_is_refused() -> None:
    state = state_of(plain_spec("fcos"))
    state["head.regression_head.bbox_reg.weight"] = torch.zeros(4)
    with pytest.raises(SpecError, match=r"expected 'head.regression_head.bbox_reg.weight' with 4 dimensions"):
        detector_of_state_dict(state, LABELS)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_present_names_stay(name: str) -> None:
    with torch.device("meta"):
        state = CONSTRUCTORS[name][0](weights=None, weights_backbone=None).state_dict()
    assert list(modern_names(state)) == list(state)
    assert list(modern_names(old_names(state, name in OLD_HEADS))) == list(state)
