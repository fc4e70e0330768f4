"""Prediction and export from the command line, on small random detectors."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import export_onnx
import numpy as np
import predict
import pytest
import torch
from detector_cases import small_spec, stirred
from matplotlib.figure import Figure
from options import main_of
from PIL import Image

from autodet.data import BatchPlan, ImageCache, Loader, read_dataset, write_shapes
from autodet.data.shapes import CATEGORY_IDS
from autodet.detectors import Target, detect, load_detector, save_detector
from autodet.evaluation import to_original
from autodet.results.detections import Panel, draw_detections

SIZE = (150, 110)  # width, height: the detector's are 96 and 64, so that images are resized
LABELS = tuple((id_, name) for name, id_ in CATEGORY_IDS.items())
THRESHOLD = 0.2
EXIF_ORIENTATION, TURNED_RIGHT = 0x0112, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", 1, 3, size=SIZE, seed=5)


@pytest.fixture(scope="module")
def images(data: Path) -> list[str]:
    return [str(image.path) for image in read_dataset(data)["val"].images]


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "detector.safetensors"
    save_detector(path, stirred(small_spec("faster_rcnn", LABELS)))
    return path


@pytest.fixture(scope="module")
def onnx_file(detector_file: Path, images: list[str]) -> Path:
    """The same detector, exported by the script."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = detector_file.with_suffix(".onnx")
    assert export_onnx.main([str(detector_file), str(path), "--image", *images[:2]]) == 0
    return path


def rows_of(printed: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(printed)))


def numbers(rows: list[dict[str, str]]) -> list[list[float]]:
    return [[float(row[name]) for name in ("category_id", "score", "x1", "y1", "x2", "y2")] for row in rows]


@pytest.mark.parametrize("kind", ["detector_file", "onnx_file"])
def test_detections_are_those_of_an_evaluation(
    kind: str,
    data: Path,
    images: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = request.getfixturevalue(kind)
    detector, _ = load_detector(request.getfixturevalue("detector_file"))
    spec, dataset = detector.spec, read_dataset(data)["val"]
    cache = ImageCache(dataset, spec.min_size, spec.max_size, tmp_path)
    expected = []
    for batch in Loader(cache, dataset, spec.label_map, BatchPlan(1, seed=0)).eval_batches(1):
        found = detect(detector, batch.images)[0]
        boxes = to_original(found["boxes"], (batch.images[0].shape[1], batch.images[0].shape[2]), (SIZE[1], SIZE[0]))
        for box, score, label in zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True):
            if score >= THRESHOLD:
                expected.append([spec.categories[label], score, *box])
    capsys.readouterr()
    assert predict.main([str(file), *images, "--threshold", str(THRESHOLD)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == len(expected) > 20
    np.testing.assert_allclose(numbers(rows), expected, atol=0.006)
    assert {row["image"] for row in rows} == set(images)
    assert all(row["name"] == dict(LABELS)[int(row["category_id"])] for row in rows)


def test_boxes_are_those_of_the_upright_image(
    detector_file: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright = Image.open(images[0]).convert("RGB")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED_RIGHT
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    found = []
    for name in ("upright.png", "turned.png"):
        assert predict.main([str(detector_file), str(tmp_path / name), "--threshold", "0.1"]) == 0
        found.append(numbers(rows_of(capsys.readouterr().out)))
    assert found[0] == found[1] != []


@pytest.mark.parametrize("threshold", ["0.2", "1"])
def test_pictures_show_what_is_printed(
    threshold: str,
    detector_file: Path,
    images: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[tuple[Panel, Mapping[int, str]]] = []

    def draw(rows: Sequence[Sequence[Panel]], names: Mapping[int, str]) -> Figure:
        drawn.append((rows[0][0], names))
        return draw_detections(rows, names)

    monkeypatch.setattr(predict, "draw_detections", draw)
    folder = tmp_path / "pictures"
    assert predict.main([str(detector_file), *images, "--output", str(folder), "--threshold", threshold]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert bool(rows) == (threshold != "1")  # with nothing to show there is a picture, too
    for path, (panel, names) in zip(images, drawn, strict=True):
        printed = np.array(numbers([row for row in rows if row["image"] == path])).reshape(-1, 6)
        np.testing.assert_allclose(panel.boxes, printed[:, 2:], atol=0.006)
        assert panel.image.shape == (SIZE[1], SIZE[0], 3)
        assert set(panel.labels.tolist()) <= set(names)
        with Image.open(folder / f"{Path(path).stem}.png") as picture:
            assert min(picture.size) > 100


def test_masks_are_drawn_at_the_size_of_the_image(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    path = tmp_path / "masks.safetensors"
    detector = stirred(small_spec("mask_rcnn", LABELS))
    save_detector(path, detector)
    panels: list[Panel] = []

    def draw(rows: Sequence[Sequence[Panel]], names: Mapping[int, str]) -> Figure:
        panels.append(rows[0][0])
        return draw_detections(rows, names)

    monkeypatch.setattr(predict, "draw_detections", draw)
    arguments = [str(path), images[0], "--output", str(tmp_path / "pictures"), "--threshold", str(THRESHOLD)]
    assert predict.main(arguments) == 0
    (panel,) = panels
    assert len(rows_of(capsys.readouterr().out)) == len(panel.boxes) > 5
    assert panel.masks is not None and panel.masks.shape == (len(panel.boxes), SIZE[1], SIZE[0]) and panel.masks.any()
    small = predict.prepared(Image.open(images[0]).convert("RGB"), detector.spec)
    found = detect(detector, [small])[0]
    sure = found["scores"] >= THRESHOLD
    ours, theirs = panel.masks.sum((1, 2)) / (SIZE[0] * SIZE[1]), (found["masks"][sure] > 0.5).float().mean((1, 2, 3))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=0.02)  # the same share of the picture


def test_labels_that_the_spec_does_not_know_are_left_out() -> None:
    spec = small_spec("retinanet", LABELS)

    def see(image: torch.Tensor) -> Target:
        boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3)
        return {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([0, 2, 1])}

    found = predict.predicted(see, spec, Image.new("RGB", SIZE), 0.75)
    assert found["labels"].tolist() == [2]
    assert found["boxes"][0].tolist() == pytest.approx([0, 0, 10 * 150 / 87, 10 * 110 / 64])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{detector}", "missing.jpg"], "missing.jpg: expected an image that can be read (No such file"),
        (["{detector}", "text.jpg"], "text.jpg: expected an image that can be read (cannot identify"),
        (["missing.safetensors", "text.jpg"], "missing.safetensors: cannot be read"),
        (["text.jpg", "text.jpg"], "text.jpg: truncated, or no safetensors file"),
        (["{detector}", "a/one.png", "b/one.jpg", "--output", "new"], "several images would become one.png"),
        (["{detector}", "a/one.png", "--output", "a"], "would replace the image"),
        (["{detector}", "text.jpg", "--threshold", "1.5"], "above 0 and at most 1"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: list[str],
    message: str,
    detector_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("no image")
    command = [argument.format(detector=detector_file) for argument in arguments]
    try:
        code = main_of(lambda _: predict.main(command))
    except SystemExit as exit:  # argparse's own
        code = int(str(exit.code))
    error = capsys.readouterr().err
    assert code == 2 and "error: " in error and message in error
    assert "Traceback" not in error and not Path("new").exists()


def test_an_onnx_file_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (tmp_path / "text.onnx").write_text("no model")
    assert main_of(lambda _: predict.main([str(tmp_path / "text.onnx"), "image.jpg"])) == 2
    assert "text.onnx: truncated, or no ONNX file" in capsys.readouterr().err


def test_an_export_that_compared_nothing_says_so(
    images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    save_detector(tmp_path / "blind.safetensors", stirred(small_spec("fcos", LABELS, score_threshold=0.9999)))
    assert export_onnx.main([str(tmp_path / "blind.safetensors"), str(tmp_path / "b.onnx"), "--image", images[0]]) == 0
    assert "nothing was compared" in capsys.readouterr().out
