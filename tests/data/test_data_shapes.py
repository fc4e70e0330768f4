"""The generated data set: deterministic, consistent, redone after an interruption, and readable as COCO."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autodet.data import CocoDataset, read_dataset, write_shapes
from autodet.data import shapes as shapes_module
from autodet.data.drawing import FORMS, draw_form
from autodet.data.masks import object_mask
from autodet.data.shapes import CATEGORY_IDS, MIN_VISIBLE, draw_scene

SIZE = (96, 72)


def digest(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CocoDataset]:
    return read_dataset(write_shapes(tmp_path_factory.mktemp("shapes") / "set", 40, 10, 5, size=(256, 192)))


def test_content_depends_on_the_seed_alone(tmp_path: Path) -> None:
    one, two, three = (
        write_shapes(tmp_path / name, 3, 2, 1, SIZE, seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert digest(one) == digest(two)
    assert not set(digest(one).values()) & set(digest(three).values())
    assert len(set(digest(one).values())) == 3 + 6 + 1  # JSON files, images, and the manifest: all different


def test_masks_boxes_and_areas_agree(splits: dict[str, CocoDataset]) -> None:
    for split in splits.values():
        for image in split.images:
            total = np.zeros((image.height, image.width), dtype=int)
            for box, area, segmentation in zip(image.boxes, image.areas, image.segmentations, strict=True):
                mask = object_mask(segmentation, image.height, image.width)
                y, x = np.nonzero(mask)
                assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
                assert area == mask.sum()
                total += mask
            assert total.max() <= 1  # visible parts never overlap


def test_statistics(splits: dict[str, CocoDataset]) -> None:
    images = [image for split in splits.values() for image in split.images]
    assert {(image.width, image.height) for image in images} == {(256, 192)}
    counts = [len(image.boxes) for image in images]
    assert 1 <= sum(count == 0 for count in counts) <= 15 and 4 < np.mean(counts) < 8
    found = np.concatenate([image.category_ids for image in images])
    assert set(found.tolist()) == set(CATEGORY_IDS.values()) == {1, 2, 4, 7, 9}
    sides = np.concatenate([(image.boxes[:, 2:] - image.boxes[:, :2]).max(axis=1) for image in images])
    assert sides.min() < 30 and 80 < sides.max() <= 111


def test_split_sizes_and_optional_test_split(splits: dict[str, CocoDataset], tmp_path: Path) -> None:
    assert {name: len(split) for name, split in splits.items()} == {"train": 40, "val": 10, "test": 5}
    root = write_shapes(tmp_path / "two", 1, 1, 0, SIZE)
    assert sorted(path.name for path in root.iterdir()) == ["images", "shapes.json", "train.json", "val.json"]


def test_masks_lie_on_the_drawn_object() -> None:
    # Objects differ from what they cover by colour, so the pixels inside and just outside a large mask differ too.
    differences = []
    for seed in range(12):
        scene = draw_scene(np.random.default_rng(seed), (128, 96), empty=False)
        for _, visible in scene.objects:
            ring = np.zeros_like(visible)
            ring[2:-2, 2:-2] = visible[4:, 2:-2] | visible[:-4, 2:-2] | visible[2:-2, 4:] | visible[2:-2, :-4]
            ring &= ~visible
            if visible.sum() > 150 and ring.any():
                inside, outside = (scene.pixels[part].mean(axis=0) for part in (visible, ring))
                differences.append(np.linalg.norm(inside - outside))
    assert len(differences) > 10 and np.median(differences) > 40


def test_hidden_parts_stay_below_the_limit() -> None:
    for seed in range(15):
        objects: list[shapes_module._Object] = []
        rng = np.random.default_rng(seed)
        canvas = np.zeros((96, 128, 3), dtype=np.float32)
        for _ in range(20):
            shapes_module._add_object(rng, canvas, objects, 0.5)
        assert objects and all(o.visible.sum() >= MIN_VISIBLE * o.total for o in objects)
        assert any(o.visible.sum() < 0.8 * o.total for o in objects)  # and hiding does occur


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", np.pi),
        ("square", 2.0),
        ("triangle", 3 * np.sqrt(3) / 4),
        ("star", 5 * 2 * 0.5 * 0.45 * np.sin(np.pi / 5)),
        ("ring", np.pi * (1 - 0.55**2)),
    ],
)
def test_forms_have_their_area(shape: str, area: float) -> None:
    # The stretch along one axis, uniform in [0.8, 1], scales the area by its value.
    assert shape in FORMS
    for seed in range(5):
        covered = float(draw_form(np.random.default_rng(seed), shape, 200.0).sum())
        assert 0.79 * area < covered / 100**2 < 1.02 * area


def test_complete_set_is_reused_and_anything_else_is_redone(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", 2, 1, 0, SIZE)
    before, stamp = digest(root), (root / "train.json").stat().st_mtime_ns
    write_shapes(root, 2, 1, 0, SIZE)
    assert (root / "train.json").stat().st_mtime_ns == stamp
    (root / "images" / "val_00001.jpg").unlink()
    write_shapes(root, 2, 1, 0, SIZE)
    assert digest(root) == before
    write_shapes(root, 3, 1, 0, SIZE)
    assert json.loads((root / "shapes.json").read_text())["counts"]["train"] == 3
    assert len(list((root / "images").iterdir())) == 4


def test_interrupted_writing_leaves_nothing_and_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes_module, "atomic_write_json", interrupt)  # the manifest is the last to be written
        with pytest.raises(KeyboardInterrupt):
            write_shapes(tmp_path / "set", 2, 1, 0, SIZE)
    assert not (tmp_path / "set").exists()
    write_shapes(tmp_path / "set", 2, 1, 0, SIZE)
    assert digest(tmp_path / "set") == digest(write_shapes(tmp_path / "other", 2, 1, 0, SIZE))


def test_other_folders_are_not_touched(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "precious.png")
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_shapes(tmp_path, 1, 1)
    assert (tmp_path / "precious.png").exists()
    with pytest.raises(ValueError, match="n_train ≥ 1"):
        write_shapes(tmp_path / "set", 0, 1)
