"""Exported detectors in ONNX Runtime against the detectors themselves, on small random ones of every family."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_cases import LABELS, small_spec, stirred

from autodet import export
from autodet.detectors import Detector, Target, build, detect
from autodet.detectors.spec import FAMILIES
from autodet.export import ExportError, OnnxCheck, export_onnx, load_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# Sizes that torchvision's own traced arithmetic resizes to a pixel less or more, and others.
OTHER_SIZES = ((62, 61), (148, 129), (200, 333), (57, 193), (40, 33))


def tamed(family: str, **changes: Any) -> Detector:
    """A detector whose scores differ: saturated ones would be alike, and their order a matter of chance. Nor are its
    boxes as thin as random ones, of which a cascade's stages magnify what is rounded."""
    torch.manual_seed(0)
    detector = stirred(small_spec(family, **changes))
    for name, parameter in detector.model.named_parameters():
        if name.endswith("cls_logits.weight"):
            parameter.data *= 0.3
        elif name.endswith("bbox_pred.weight"):
            parameter.data *= 0.5
    detect(detector, [torch.rand(3, 64, 96)])  # torchvision's RoI pooling keeps the scales of its first image
    return detector


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path, OnnxCheck]:
    """A detector in training mode, its file, and what the export said."""
    detector = tamed(request.param)
    detector.model.train()
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    return detector, path, export_onnx(detector, path, [torch.rand(3, 64, 96), torch.rand(3, 60, 40)])


def assert_alike(found: Target, expected: Target) -> None:
    """The same detections in any order: every one has its own partner."""
    assert found.keys() == expected.keys()
    one, other = (
        torch.cat([side["boxes"] / 100, side["scores"][:, None], side["labels"][:, None].float()], dim=1)
        for side in (found, expected)
    )
    assert one.shape == other.shape
    near = (one[:, None] - other).abs().amax(2) < 1e-4
    assert near.sum(0).tolist() == near.sum(1).tolist() == [1] * len(one)
    if "masks" in expected:
        assert found["masks"].shape == expected["masks"].shape and bool((expected["masks"] > 0.5).any())
        partners = near.int().argmax(1)
        torch.testing.assert_close(found["masks"], expected["masks"][partners], rtol=0, atol=1e-4)


def test_the_file_finds_what_the_detector_finds(made: tuple[Detector, Path, OnnxCheck]) -> None:
    detector, path, check = made
    assert check.images == 2 and check.detections > 100
    assert 0 < check.box_difference < 1e-3 and 0 < check.score_difference < 1e-5
    exported = load_onnx(path)
    assert exported.spec == detector.spec
    labels = json.loads(exported.session.get_modelmeta().custom_metadata_map["labels"])
    assert {int(label): (entry["category_id"], entry["name"]) for label, entry in labels.items()} == {
        1: LABELS[0],
        2: LABELS[1],
    }


def test_other_sizes_than_the_traced_one(made: tuple[Detector, Path, OnnxCheck]) -> None:
    detector, path, _ = made
    exported = load_onnx(path)
    for size in OTHER_SIZES:
        image = torch.rand(3, *size)
        expected = detect(detector, [image])[0]
        assert len(expected["boxes"]) > 50
        assert_alike(exported(image), expected)


@pytest.mark.parametrize("family", ["retinanet", "cascade_rcnn"])  # of one stage; of two, with masks
def test_an_image_without_detections(family: str, tmp_path: Path) -> None:
    detector = tamed(family)
    images = [torch.rand(3, 64, 96) for _ in range(4)]
    images.sort(key=lambda image: float(detect(detector, [image])[0]["scores"].max()))
    low, high = (float(detect(detector, [image])[0]["scores"].max()) for image in (images[0], images[-1]))
    strict = build(replace(detector.spec, score_threshold=(low + high) / 2))
    strict.model.load_state_dict(detector.model.state_dict())
    check = export_onnx(strict, tmp_path / "strict.onnx", [images[0], images[-1]])  # traced on the one without
    assert check.detections == len(detect(strict, images[-1:])[0]["boxes"]) > 0
    nothing = load_onnx(tmp_path / "strict.onnx")(images[0])
    assert nothing["boxes"].shape == (0, 4) and nothing["scores"].shape == nothing["labels"].shape == (0,)
    assert "masks" not in nothing or nothing["masks"].shape == (0, 1, 64, 96)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mask_rcnn", {"roi_aligned": True, "roi_sampling": 0}),
        ("retinanet", {"top_relu": False}),
    ],
)
def test_what_mmdetections_detectors_do_otherwise(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    detector = tamed(family, **change)
    export_onnx(detector, tmp_path / "theirs.onnx", [torch.rand(3, 64, 96), torch.rand(3, 60, 40)])
    image = torch.rand(3, 57, 193)
    assert_alike(load_onnx(tmp_path / "theirs.onnx")(image), detect(detector, [image])[0])


def weaken(model: Any) -> None:
    model.head.classification_head.cls_logits.weight.data *= 1.01


def tighten(model: Any) -> None:
    model.score_thresh = 0.7


@pytest.mark.parametrize(
    ("tamper", "message"),
    [(weaken, r"image 1 of 2: \d+ of 80 detections differ"), (tighten, r"image 1 of 2: expected 80 detections, found")],
)
def test_a_file_that_disagrees_is_not_written(
    tamper: Callable[[Any], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = export._traced

    def tampered(model: Any, *arguments: Any) -> bytes:
        tamper(model)
        return traced(model, *arguments)

    monkeypatch.setattr(export, "_traced", tampered)
    detector = tamed("fcos")
    path = tmp_path / "detector.onnx"
    path.write_text("an older file")
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(detector, path, [torch.rand(3, 64, 96), torch.rand(3, 60, 40)])
    assert str(path) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["detector.onnx"] and path.read_text() == "an older file"


def test_some_images_may_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, trace = export._differences, export._traced
    calls: list[str] = []
    files: list[bytes] = []

    def traced_once(*arguments: Any) -> bytes:
        files.append(files[0] if files else trace(*arguments))
        return files[0]

    def sometimes(found: Any, expected: Any, where: str, longer: int) -> tuple[float, float, float]:
        calls.append(where)
        if where.endswith(("image 2 of 3", "image 1 of 1")):
            raise ExportError(where)
        return compare(found, expected, where, longer)

    monkeypatch.setattr(export, "_differences", sometimes)
    monkeypatch.setattr(export, "_traced", traced_once)  # the detector and its first image stay the same
    detector, images = tamed("fcos"), [torch.rand(3, 64, 96), torch.rand(3, 60, 40), torch.rand(3, 64, 96)]
    check = export_onnx(detector, tmp_path / "detector.onnx", images, odd=1)
    assert (check.images, check.odd) == (2, 1) and len(calls) == 3
    assert check.detections == sum(len(detect(detector, [images[number]])[0]["boxes"]) for number in (0, 2))
    with pytest.raises(ExportError, match="image 2 of 3"):
        export_onnx(detector, tmp_path / "other.onnx", images)
    with pytest.raises(ExportError, match="image 1 of 1"):
        export_onnx(detector, tmp_path / "other.onnx", images[:1], odd=3)  # one at least must agree
    assert not (tmp_path / "other.onnx").exists()


def test_the_detector_stays_as_it_is(made: tuple[Detector, Path, OnnxCheck]) -> None:
    detector = made[0]
    before = tamed(detector.spec.family).model.state_dict()
    assert all(module.training for module in detector.model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.model.state_dict().items())
    assert "resize" not in vars(detector.model.transform)


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Target:
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


ONE, OTHER = [0.0, 0.0, 10.0, 20.0], [5.0, 5.0, 50.0, 60.0]


@pytest.mark.parametrize(
    ("found", "agrees"),
    [
        (detections([OTHER, ONE], [0.5, 0.5], [2, 1]), True),
        (detections([ONE, [5.0, 5.0, 50.0, 60.005]], [0.5, 0.50005], [1, 2]), True),
        (detections([ONE, [5.0, 5.0, 50.0, 60.02]], [0.5, 0.5], [1, 2]), False),
        (detections([ONE, OTHER], [0.5, 0.5002], [1, 2]), False),
        (detections([ONE, OTHER], [0.5, 0.5], [1, 1]), False),
        (detections([ONE, [5.0, 5.0, 50.0, float("nan")]], [0.5, 0.5], [1, 2]), False),
        (detections([ONE], [0.5], [1]), False),
    ],
)
def test_what_agrees(found: Target, agrees: bool) -> None:
    expected = detections([ONE, OTHER], [0.5, 0.5], [1, 2])
    if agrees:
        export._differences(found, expected, "here", 100)
    else:
        with pytest.raises(ExportError, match=r"here: .*; nothing was written"):
            export._differences(found, expected, "here", 100)


def with_masks(moved: Sequence[int], count: int = 40) -> Target:
    """Detections one below the other with masks of 10×10 pixels, of which some are one pixel further to the right."""
    found = detections([[0.0, 10.0 * i, 10.0, 10.0 * i + 10] for i in range(count)], [0.5] * count, [1] * count)
    masks = torch.zeros(count, 1, 10 * count, 12)
    for i in range(count):
        masks[i, 0, 10 * i : 10 * i + 10, (i in moved) : 10 + (i in moved)] = 0.9
    return found | {"masks": masks}


def test_few_masks_may_move_by_a_pixel() -> None:
    expected = with_masks(())
    assert export._differences(expected, expected, "here", 400)[2] == 0
    # Of eleven columns that either covers, two are covered by one alone.
    assert export._differences(with_masks((3, 17)), expected, "here", 400)[2] == pytest.approx(2 / 11)
    with pytest.raises(ExportError, match=r"here: 3 of 40 masks differ in ONNX Runtime, by up to 18.2% of an object"):
        export._differences(with_masks((3, 17, 20)), expected, "here", 400)
    order = torch.arange(40).flip(0)
    shuffled = {name: values[order] for name, values in expected.items()}
    assert export._differences(shuffled, expected, "here", 400)[2] == 0
    with pytest.raises(ExportError, match=r"expected masks \(40, 1, 400, 12\), found \(40, 1, 400, 11\)"):
        export._differences(expected | {"masks": expected["masks"][..., 1:]}, expected, "here", 400)


def test_every_detection_has_its_own_partner() -> None:
    twice = detections([ONE, ONE], [0.5, 0.5], [1, 1])
    assert export._differences(twice, twice, "here", 100) == (0, 0, 0)  # boxes without an area pass NMS side by side
    different = detections([ONE, OTHER], [0.5, 0.5], [1, 1])
    for found, expected in ((twice, different), (different, twice)):
        with pytest.raises(ExportError, match="1 of 2 detections differ"):
            export._differences(found, expected, "here", 100)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf'needs {package}, .*pip install "autodet\[onnx\]"'):
        export_onnx(tamed("fcos"), tmp_path / "detector.onnx", [torch.rand(3, 64, 96)])


def test_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="at least one image"):
        export_onnx(tamed("fcos"), tmp_path / "detector.onnx", [])


def other_model() -> bytes:
    """An ONNX file of another program."""
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [value], [out])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "no ONNX file"),
        (b"rubbish", "no ONNX file"),
        (other_model, "none of export_onnx"),
    ],
)
def test_a_file_that_is_no_export(content: bytes | Callable[[], bytes] | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.onnx"
    if content is not None:
        path.write_bytes(content() if callable(content) else content)
    with pytest.raises(ExportError, match=f"{path}: .*{message}"):
        load_onnx(path)
