"""Reading: all layouts, every check, and what a sound data set turns into."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_builders import SHARED, Document, annotation, category, write_image, write_split
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from autodet.data import CocoDataset, DatasetError, label_of, read_dataset

Edit = Callable[[Document], object]


def read_train(root: Path) -> CocoDataset:
    return read_dataset(root, required=("train",))["train"]


def failure(root: Path, required: tuple[str, ...] = ("train",)) -> str:
    with pytest.raises(DatasetError) as caught:
        read_dataset(root, required=required)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["plain", "coco", "beside"])
def test_all_layouts_read_the_same(tmp_path: Path, layout: str) -> None:
    for split in ("train", "val"):
        write_split(tmp_path, split, layout=layout)
    splits = read_dataset(tmp_path)
    assert list(splits) == ["train", "val"]
    train = splits["train"]
    assert [c.id for c in train.categories] == [3, 7]
    assert label_of(train.categories) == {3: 1, 7: 2}
    assert [image.id for image in train.images] == [10, 20, 30]
    first, second, third = train.images
    assert first.path.is_file()
    np.testing.assert_array_equal(first.boxes, [[2, 3, 12, 23], [20.5, 4, 28.5, 10]])
    np.testing.assert_array_equal(first.areas, [150, 48])  # the second area is missing: width × height
    assert second.crowd.tolist() == [True, False]
    assert second.trainable.tolist() == [False, True]
    assert third.boxes.shape == (0, 4)
    assert "without a segmentation" in str(train.mask_problem)


def test_optional_split_is_read_only_where_present(tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    (tmp_path / "other.json").write_text("broken")
    assert list(read_dataset(tmp_path, required=("train",))) == ["train"]
    write_split(tmp_path, "test")
    assert list(read_dataset(tmp_path, required=("train",))) == ["train", "test"]


def set_box(box: list[float]) -> Edit:
    return lambda d: d["annotations"][0].update(bbox=box)


FAULTS: list[tuple[str, Edit, str]] = [
    ("no images key", lambda d: d.pop("images"), "missing key: 'images'"),
    ("images no list", lambda d: d.update(images={}), "images: expected a list"),
    ("no images", lambda d: d.update(images=[], annotations=[]), "no images"),
    ("no categories", lambda d: d.update(categories=[]), "no categories"),
    ("no annotations", lambda d: d.update(annotations=[]), "no annotations"),
    ("only crowds", lambda d: d.update(annotations=d["annotations"][2:3]), "no annotations: 1 annotations, all of"),
    ("entry no object", lambda d: d["annotations"].append(5), "annotation at position 4: 5"),
    ("no box", lambda d: d["annotations"][0].pop("bbox"), "missing key: annotation 1: 'bbox'"),
    ("no file name", lambda d: d["images"][2].pop("file_name"), "missing key: image 30: 'file_name'"),
    ("id as text", lambda d: d["annotations"][0].update(id="a"), "annotation a: id = 'a', expected an integer"),
    ("id as list", lambda d: d["images"][0].update(id=[1]), "id = [1], expected an integer"),
    ("width zero", lambda d: d["images"][0].update(width=0), "width = 0, expected an integer above 0"),
    ("bad crowd", lambda d: d["annotations"][0].update(iscrowd=3), "iscrowd = 3, expected 0 or 1"),
    ("bad area", lambda d: d["annotations"][0].update(area=-1), "area = -1, expected a number"),
    ("image id twice", lambda d: d["images"].append(d["images"][0]), "1 × duplicate image id: 10"),
    ("annotation id twice", lambda d: d["annotations"].append(d["annotations"][0]), "duplicate annotation id: 1"),
    ("category id twice", lambda d: d["categories"].append(category(7, "x")), "duplicate category id: 7"),
    ("unknown image", lambda d: d["annotations"][3].update(image_id=5), "unknown image: annotation 9 (image_id 5)"),
    ("unknown category", lambda d: d["annotations"][3].update(category_id=8), "annotation 9 (category_id 8)"),
    ("NaN box", set_box([float("nan"), 0, 1, 1]), "1 × bad box: annotation 1 (bbox [nan, 0, 1, 1])"),
    ("infinite box", set_box([0, 0, float("inf"), 1]), "bad box: annotation 1"),
    ("negative box", set_box([5, 5, -3, 4]), "bad box: annotation 1"),
    ("short box", set_box([5, 5, 3]), "bad box: annotation 1 (bbox [5, 5, 3])"),
    ("short polygon", lambda d: d["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "bad segmentation"),
    ("RLE of other size", lambda d: d["annotations"][2]["segmentation"].update(size=[3, 4]), "bad segmentation"),
    ("RLE too short", lambda d: d["annotations"][2]["segmentation"].update(counts=[7]), "bad segmentation"),
    ("RLE no run lengths", lambda d: d["annotations"][2]["segmentation"].update(counts={}), "bad segmentation"),
    ("RLE text too short", lambda d: d["annotations"][2]["segmentation"].update(counts="0"), "bad segmentation"),
    ("RLE text cut", lambda d: d["annotations"][2]["segmentation"].update(counts="0P"), "bad segmentation"),
    ("missing file", lambda d: d["images"][0].update(file_name="gone.jpg"), "missing image file: image 10 (gone.jpg)"),
    ("path leaves folder", lambda d: d["images"][0].update(file_name="../a.jpg"), "outside the image folder: image 10"),
    ("absolute path", lambda d: d["images"][0].update(file_name="/a.jpg"), "outside the image folder"),
    ("other size", lambda d: d["images"][0].update(width=41), "image 10 (train_1.jpg: 41×30, file 40×30)"),
]


@pytest.mark.parametrize(("edit", "expected"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_named_once_with_a_remedy(tmp_path: Path, edit: Edit, expected: str) -> None:
    write_split(tmp_path, "train", edit)
    message = failure(tmp_path)
    assert expected in message
    assert "train.json:" in message and "remedy: " in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty JSON file: 0 bytes"),
        (b'{"images": [', "truncated or invalid JSON: Expecting value at line 1, column 13, character 12 of 12"),
        (b"\xff\xfe\x00", "truncated or invalid JSON"),
        (b"[]", "expected an object at the top, found list"),
    ],
)
def test_broken_json(tmp_path: Path, content: bytes, expected: str) -> None:
    write_split(tmp_path, "train").write_bytes(content)
    assert expected in failure(tmp_path)


def test_missing_places(tmp_path: Path) -> None:
    assert "missing data folder" in failure(tmp_path / "nowhere")
    message = failure(tmp_path, ("train", "val"))
    assert "2 × missing split: train (looked for train.json, annotations/instances_train2017.json" in message
    (write_split(tmp_path, "train").parent / "images").rename(tmp_path / "pictures")
    assert "missing image folder: images" in failure(tmp_path)


def test_unreadable_images(tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    (tmp_path / "images" / "train_1.jpg").write_bytes(b"")
    (tmp_path / "images" / "train_2.jpg").write_bytes(b"no picture at all")
    message = failure(tmp_path)
    assert "2 × unreadable image: image 10 (train_1.jpg: UnidentifiedImageError), image 20" in message


def test_all_problems_of_all_splits_in_one_report(tmp_path: Path) -> None:
    def spoil(content: Document) -> None:
        faulty = [annotation(100 + i, 10, 99, [0, 0, 1]) for i in range(12)]
        content["annotations"] += faulty

    write_split(tmp_path, "train", spoil)
    write_split(tmp_path, "val", lambda d: d["images"][0].update(file_name="gone.jpg"))
    write_split(tmp_path, "test", lambda d: d["categories"][0].update(name="lion"))
    message = failure(tmp_path, ("train", "val"))
    assert "26 problems" in message
    assert "12 × unknown category: annotation 100 (category_id 99), " in message and "… and 7 more" in message
    assert "12 × bad box" in message
    assert "1 × missing image file: image 10 (gone.jpg)" in message
    assert "categories differ between splits: id 7 is 'lion' here and 'cat' in train.json" in message
    assert len(message.splitlines()) == 1 + 3 + 4 * 2


def test_compressed_run_lengths_are_accepted(tmp_path: Path) -> None:
    masks = np.random.default_rng(0).random((4, 30, 40)) < np.array([0, 0.01, 0.5, 1])[:, None, None]
    masks[0, :, 20:] = True  # long runs, which take several characters
    codes = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]

    def set_masks(content: Document) -> None:
        for entry, code in zip(content["annotations"], codes, strict=True):
            entry["segmentation"] = {"size": [30, 40], "counts": code["counts"].decode("ascii")}

    write_split(tmp_path, "train", set_masks)
    assert read_train(tmp_path).mask_problem is None


def test_exif_orientation_counts_for_the_size(tmp_path: Path) -> None:
    write_split(tmp_path, "train", lambda d: d["images"][2].update(width=30, height=40))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "train_3.jpg", exif=exif)
    assert read_train(tmp_path).images[2].width == 30


def test_clipped_and_dropped_boxes_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def add(content: Document) -> None:
        content["annotations"] += [
            annotation(20, 30, 3, [-5, 10, 10, 10]),  # clipped, kept
            annotation(21, 30, 3, [50, 10, 10, 10]),  # wholly outside: clipped and dropped
            annotation(22, 30, 3, [5, 5, 0, 4]),  # dropped
            annotation(23, 30, 3, [5, 5, 4, 0.5]),  # dropped
            annotation(24, 30, 3, [30, 20, 10.01, 10]),  # outside by rounding: silent
        ]

    write_split(tmp_path, "train", add)
    with caplog.at_level(logging.WARNING):
        train = read_train(tmp_path)
    assert len(caplog.records) == 1
    assert "2 boxes that leave the image were clipped; 3 boxes below 1 pixel" in caplog.text
    image = train.images[2]
    assert image.trainable.tolist() == [True, False, False, False, True]
    np.testing.assert_array_equal(image.boxes[0], [0, 10, 5, 20])
    given = [a["bbox"] for a in train.coco_dict()["annotations"] if a["image_id"] == 30]
    assert given == [[-5, 10, 10, 10], [50, 10, 10, 10], [5, 5, 0, 4], [5, 5, 4, 0.5], [30, 20, 10.01, 10]]


def test_same_image_name_in_two_splits_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_split(tmp_path, "train")
    write_split(tmp_path, "val", lambda d: d["images"][0].update(file_name="train_1.jpg"))
    with caplog.at_level(logging.WARNING):
        read_dataset(tmp_path)
    assert "1 image file names appear in both train and val (train_1.jpg" in caplog.text


def test_coco_dict_keeps_the_annotations_as_given(tmp_path: Path) -> None:
    path = write_split(tmp_path, "train")
    given = json.loads(path.read_text())
    found = read_train(tmp_path).coco_dict()
    assert [a["id"] for a in found["annotations"]] == [1, 2, 3, 4]
    for ours, theirs in zip(found["annotations"], given["annotations"], strict=True):
        assert ours["bbox"] == theirs["bbox"] and ours["category_id"] == theirs["category_id"]
        assert ours["iscrowd"] == theirs.get("iscrowd", 0)
        assert ours.get("segmentation") == theirs.get("segmentation")
    assert [a["area"] for a in found["annotations"]] == [150, 48, 600, 100]
    json.dumps(found)
    coco = COCO()
    coco.dataset = copy.deepcopy(found)
    coco.createIndex()
    assert coco.getCatIds() == [3, 7] and coco.getAnnIds(imgIds=[10]) == [1, 2]


def test_subset_is_deterministic_nested_and_never_empty(tmp_path: Path) -> None:
    def add_images(content: Document) -> None:
        for i in range(40):
            content["images"].append({"id": 100 + i, "file_name": f"more_{i}.png", "width": 4, "height": 4})
            write_image(tmp_path / "images" / f"more_{i}.png", (4, 4))

    write_split(tmp_path, "train", add_images)
    train = read_train(tmp_path)
    half, again, third = train.subset(0.5, 1), train.subset(0.5, 1), train.subset(0.3, 1)
    ids = [image.id for image in half.images]
    assert len(ids) == 22 and ids == sorted(ids) == [image.id for image in again.images]
    assert {image.id for image in third.images} < set(ids)
    assert ids != [image.id for image in train.subset(0.5, 2).images]
    assert len(train.subset(1e-9, 0)) == 1 and len(train.subset(1.0, 0)) == 43
    assert half.annotations_hash == again.annotations_hash != train.annotations_hash
    with pytest.raises(ValueError, match="fraction"):
        train.subset(0.0, 0)


def test_annotations_hash_sees_every_change(tmp_path: Path) -> None:
    edits: list[Edit] = [
        lambda d: None,
        set_box([2, 3, 10, 19]),
        lambda d: d["annotations"][1].update(iscrowd=1),
        lambda d: d["annotations"][0].update(area=151),
        lambda d: d["annotations"][0].update(segmentation=[[2, 3, 12, 3, 12, 22, 2, 23]]),
        lambda d: d["annotations"][0].update(category_id=7),
        lambda d: d["categories"][0].update(name="lion"),
        lambda d: d["images"].pop(),
    ]
    hashes = []
    for edit in edits:
        write_split(tmp_path, "train", edit)
        hashes.append(read_train(tmp_path).annotations_hash)
    assert len(set(hashes)) == len(edits)
    write_split(tmp_path, "train", lambda d: d.update(info="of no consequence"))
    assert read_train(tmp_path).annotations_hash == hashes[0]


@pytest.mark.skipif(not (SHARED / "coco_tiny").is_dir(), reason="needs shared data")
def test_real_coco() -> None:
    val = read_dataset(SHARED / "coco_tiny", required=("val",))["val"]
    assert len(val) == 80 and len(val.categories) == 80
    assert val.categories[-1].id == 90 and label_of(val.categories)[90] == 80
    crowds = [s for i in val.images for s, crowd in zip(i.segmentations, i.crowd, strict=True) if crowd]
    assert len(crowds) == 11 and all(isinstance(s["counts"], list) for s in crowds)
    assert val.mask_problem is None
    assert len(val.coco_dict()["annotations"]) == 815


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason="needs shared data")
def test_real_bccd_has_three_splits() -> None:
    splits = read_dataset(SHARED / "bccd")
    assert {name: len(split) for name, split in splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert [c.name for c in splits["train"].categories] == ["RBC", "WBC", "Platelets"]
