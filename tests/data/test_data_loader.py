"""Batches: order as a pure function of seed and epoch, mirroring against brute force, targets, prefetching."""

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from data_builders import HEIGHT, SHARED, WIDTH, Document, annotation, write_split
from pycocotools.coco import COCO

from autodet.data import (
    Batch,
    BatchKey,
    BatchPlan,
    CocoDataset,
    DatasetError,
    ImageCache,
    Loader,
    label_of,
    read_dataset,
)
from autodet.data.masks import object_mask, resized_masks

PLAN = BatchPlan(batch_size=2, seed=3)


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    def add_polygon(content: Document) -> None:
        content["annotations"][1]["segmentation"] = [[20, 4, 28, 4, 28, 10, 20, 10]]
        content["annotations"][3]["segmentation"] = [[15, 15, 25, 15, 20, 25]]
        content["annotations"].append(annotation(30, 30, 3, [39.5, 1, 5, 5], segmentation=[[39, 1, 44, 1, 44, 6]]))

    write_split(tmp_path, "train", add_polygon)
    return read_dataset(tmp_path, required=("train",))["train"]


def loader_of(dataset: CocoDataset, tmp_path: Path, size: int = HEIGHT, masks: bool = False) -> Loader:
    cache = ImageCache(dataset, size, 2 * size, tmp_path / "cache")
    return Loader(cache, dataset, label_of(dataset.categories), PLAN, with_masks=masks)


def assert_same(one: Batch, other: Batch) -> None:
    assert one.key == other.key
    assert all(torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True))
    for a, b in zip(one.targets, other.targets, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("n", "size"), [(1, 4), (8, 4), (11, 4), (30, 1)])
def test_every_image_once_an_epoch(n: int, size: int, fixed: bool) -> None:
    plan = BatchPlan(size, seed=7, fixed=fixed)
    groups = [i % 3 for i in range(n)]
    for epoch in range(3):
        keys = plan.epoch(n, epoch, groups)
        assert sorted(i for key in keys for i in key.indices) == list(range(n))
        assert sorted(len(key.indices) for key in keys)[1:] == [size] * (-(-n // size) - 1)
        assert keys == plan.epoch(n, epoch, groups)
        mixed = [key for key in keys if len({groups[i] for i in key.indices}) > 1]
        assert len(mixed) <= 2  # one batch at each border between groups


def test_fixed_plan_has_few_different_batches() -> None:
    plan = BatchPlan(4, seed=1, fixed=True)
    epochs = [plan.epoch(22, epoch) for epoch in range(30)]
    keys = {key for epoch in epochs for key in epoch}
    assert len(keys) == 2 * 6
    assert len({key.indices for key in keys}) == 6
    assert all(len(set(key.flipped)) == 1 for key in keys)
    assert epochs[0] != epochs[1]
    assert {k.indices for k in epochs[0]} != {k.indices for k in BatchPlan(4, seed=2, fixed=True).epoch(22, 0)}


def test_unfixed_plan_deals_anew_and_mirrors_half_the_images() -> None:
    plan = BatchPlan(4, seed=1)
    epochs = [plan.epoch(22, epoch) for epoch in range(60)]
    assert {key.indices for key in epochs[0]} != {key.indices for key in epochs[1]}
    flips = [flip for epoch in epochs for key in epoch for flip in key.flipped]
    assert abs(np.mean(flips) - 0.5) < 4 * 0.5 / np.sqrt(len(flips))  # four standard errors
    assert any(len(set(key.flipped)) == 2 for epoch in epochs for key in epoch)
    assert not any(f for key in BatchPlan(4, 1, flip=0.0).epoch(22, 0) for f in key.flipped)
    assert all(f for key in BatchPlan(4, 1, flip=1.0).epoch(22, 0) for f in key.flipped)


def test_bad_plan_is_refused() -> None:
    for batch_size, seed in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="expected batch_size"):
            BatchPlan(batch_size, seed)
    with pytest.raises(ValueError, match="flip"):
        BatchPlan(1, 0, flip=1.5)


def test_targets_of_unresized_images(dataset: CocoDataset, tmp_path: Path) -> None:
    batch = loader_of(dataset, tmp_path).load(BatchKey((0, 1, 2), (False,) * 3))
    first, second, third = batch.targets
    assert first["boxes"].tolist() == [[2, 3, 12, 23], [20.5, 4, 28.5, 10]] and first["labels"].tolist() == [1, 2]
    assert second["boxes"].tolist() == [[15, 15, 25, 25]] and second["labels"].tolist() == [1]  # without the crowd
    assert third["boxes"].shape == (0, 4) and third["labels"].shape == (0,)  # its box is too narrow once clipped
    assert [int(t["image_id"]) for t in batch.targets] == [10, 20, 30]
    assert first["orig_size"].tolist() == [HEIGHT, WIDTH]
    assert {t.dtype for t in batch.images} == {torch.float32} and first["boxes"].dtype == torch.float32
    assert first["labels"].dtype == first["image_id"].dtype == first["orig_size"].dtype == torch.int64
    assert batch.images[0].min() >= 0 and 0.9 < batch.images[0].max() <= 1


def painted(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """N×H×W: the pixels that integer boxes cover."""
    masks = np.zeros((len(boxes), HEIGHT, WIDTH), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def test_mirrored_boxes_against_mirrored_pixels(tmp_path: Path) -> None:
    write_split(tmp_path, "train", lambda d: d["annotations"][1].update(bbox=[20, 4, 20, 26]))
    dataset = read_dataset(tmp_path, required=("train",))["train"]
    loader = loader_of(dataset, tmp_path)
    plain, mirrored = (loader.load(BatchKey((0, 1), (flip, flip))) for flip in (False, True))
    for a, b, target_a, target_b in zip(plain.images, mirrored.images, plain.targets, mirrored.targets, strict=True):
        assert torch.equal(b, torch.from_numpy(a.numpy()[:, :, ::-1].copy()))
        expected = painted(target_a["boxes"].numpy())[:, :, ::-1]
        np.testing.assert_array_equal(painted(target_b["boxes"].numpy()), expected)
        assert torch.equal(target_a["labels"], target_b["labels"])


def test_resized_boxes_follow_the_image(tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    dataset = read_dataset(tmp_path, required=("train",))["train"]
    batch = loader_of(dataset, tmp_path, size=50).load(BatchKey((0, 0), (False, True)))
    assert batch.images[0].shape == (3, 50, 66)  # 66.67 rounded down: the two directions scale differently
    x, y = 66 / WIDTH, 50 / HEIGHT
    torch.testing.assert_close(batch.targets[0]["boxes"][0], torch.tensor([2 * x, 3 * y, 12 * x, 23 * y]))
    torch.testing.assert_close(batch.targets[1]["boxes"][0], torch.tensor([66 - 12 * x, 3 * y, 66 - 2 * x, 23 * y]))
    assert batch.targets[0]["orig_size"].tolist() == [HEIGHT, WIDTH]


def test_masks_against_brute_force(dataset: CocoDataset, tmp_path: Path) -> None:
    loader = loader_of(dataset, tmp_path, masks=True)
    plain, mirrored = (loader.load(BatchKey((0, 1, 2), (flip,) * 3)).targets for flip in (False, True))
    np.testing.assert_array_equal(plain[0]["masks"][0].numpy(), painted(np.array([[2, 3, 12, 23]]))[0])
    assert plain[0]["masks"].dtype == torch.uint8
    assert plain[1]["masks"].shape == (1, HEIGHT, WIDTH) and plain[2]["masks"].shape == (0, HEIGHT, WIDTH)
    for one, other in zip(plain, mirrored, strict=True):
        assert torch.equal(one["masks"], other["masks"].flip(-1))
    half = loader_of(dataset, tmp_path, size=HEIGHT // 2, masks=True).load(BatchKey((1,), (False,))).targets[0]
    blocks = plain[1]["masks"].reshape(1, HEIGHT // 2, 2, WIDTH // 2, 2).float().mean((2, 4))
    assert torch.equal(half["masks"], (blocks >= 0.5).byte())
    assert 0 < half["masks"].sum() < half["masks"].numel()


def test_resized_masks_follow_the_resized_boxes(dataset: CocoDataset, tmp_path: Path) -> None:
    """A rectangle's mask at 50 of 30 pixels: its extent is that of the box, to a pixel; mirrored too."""
    for flip in (False, True):
        target = loader_of(dataset, tmp_path, size=50, masks=True).load(BatchKey((0,), (flip,))).targets[0]
        rows, columns = np.nonzero(target["masks"][0].numpy())
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(extent, target["boxes"][0].numpy(), atol=1)
        assert target["masks"].shape[1:] == target["boxes"].new_zeros(50, 66).shape


def test_a_mask_smaller_than_a_pixel_keeps_the_one_that_it_covers_most() -> None:
    found = resized_masks([[[9, 9, 11, 9, 11, 12, 9, 12]]], (40, 40), (4, 4))  # 2 × 3 of 100 pixels, in 4 blocks
    assert torch.argwhere(found[0]).tolist() == [[1, 0], [1, 1]]


def test_masks_that_no_detector_can_learn_are_named(tmp_path: Path) -> None:
    def spoil(content: Document) -> None:
        content["annotations"][0]["segmentation"] = [[50, 3, 60, 3, 60, 23]]  # beside the image
        content["annotations"][3]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}

    write_split(tmp_path, "train", spoil)
    train = read_dataset(tmp_path, required=("train",))["train"]
    reason = (
        r"train: expected a mask of every object.*of 3 objects there are 1 without a segmentation "
        r"\(image 10, bbox \[20.5, 4, 8, 6\]\) and 2 whose mask covers no pixel of the image "
        r"\(image 10, bbox .*; image 20, bbox .*\)\. Give each a segmentation"
    )
    with pytest.raises(DatasetError, match=reason):
        loader_of(train, tmp_path, masks=True)
    loader_of(train, tmp_path)  # boxes are as good as ever


@pytest.mark.skipif(not (SHARED / "coco_tiny").is_dir(), reason="needs shared data")
def test_object_masks_of_real_annotations_equal_pycocotools() -> None:
    val = read_dataset(SHARED / "coco_tiny", required=("val",))["val"]
    coco = COCO()
    coco.dataset = val.coco_dict()
    coco.createIndex()
    chosen = [a for a in coco.dataset["annotations"] if a["iscrowd"]][:5] + coco.dataset["annotations"][:20]
    sizes = {image.id: (image.height, image.width) for image in val.images}
    for entry in chosen:
        mask = object_mask(entry["segmentation"], *sizes[entry["image_id"]])
        np.testing.assert_array_equal(mask, coco.annToMask(entry))
        assert 0.8 < mask.sum() / entry["area"] < 1.25


def test_resuming_gives_the_tail(dataset: CocoDataset, tmp_path: Path) -> None:
    cache = ImageCache(dataset, 30, 40, tmp_path / "cache")
    loader = Loader(cache, dataset, label_of(dataset.categories), BatchPlan(1, seed=0))
    full = list(loader.batches(4))
    assert [batch.key for batch in full] == loader.keys(4)
    for start in range(4):
        tail = list(loader.batches(4, start))
        assert len(tail) == 3 - start
        for one, other in zip(tail, full[start:], strict=True):
            assert_same(one, other)


def test_eval_batches_are_in_order_and_unmirrored(dataset: CocoDataset, tmp_path: Path) -> None:
    batches = list(loader_of(dataset, tmp_path).eval_batches(2))
    assert [batch.key for batch in batches] == [BatchKey((0, 1), (False, False)), BatchKey((2,), (False,))]
    assert [int(t["image_id"]) for batch in batches for t in batch.targets] == [10, 20, 30]


def test_a_sample_is_the_same_every_time_and_of_full_batches(dataset: CocoDataset, tmp_path: Path) -> None:
    loader = loader_of(dataset, tmp_path)
    first, again = ([batch.key for batch in loader.sample(2, 2)] for _ in range(2))
    assert first == again and len(first) == 1 and len(first[0].indices) == 2 and not any(first[0].flipped)
    assert [len(batch.images) for batch in loader.sample(2, 100)] == [2]  # the third image fills no batch
    assert sorted(i for batch in loader.sample(1, 100) for i in batch.key.indices) == [0, 1, 2]
    assert [len(batch.images) for batch in loader.sample(8, 1)] == [3]  # fewer than one batch


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_sample_puts_like_shapes_together(dataset: CocoDataset, tmp_path: Path, odd: int) -> None:
    loader = loader_of(dataset, tmp_path)
    loader._groups = [0 if i != odd else 1 for i in range(3)]
    assert [set(batch.key.indices) for batch in loader.sample(2, 2)] == [{0, 1, 2} - {odd}]


def test_a_subset_uses_the_cache_of_the_whole(dataset: CocoDataset, tmp_path: Path) -> None:
    whole = loader_of(dataset, tmp_path)
    part = dataset.subset(0.67, seed=2)
    loader = Loader(whole.cache, part, whole.labels, PLAN)
    chosen = [dataset.images.index(image) for image in part.images]
    assert len(chosen) == 2 and chosen != [0, 1]
    for i, original in enumerate(chosen):
        ours, expected = loader.load(BatchKey((i,), (True,))), whole.load(BatchKey((original,), (True,)))
        assert torch.equal(ours.images[0], expected.images[0])
        assert torch.equal(ours.targets[0]["image_id"], expected.targets[0]["image_id"])


def test_order_does_not_depend_on_the_labels(dataset: CocoDataset, tmp_path: Path) -> None:
    loader = loader_of(dataset, tmp_path)
    raw = Loader(loader.cache, dataset, {3: 3, 7: 7}, PLAN)
    assert raw.keys(5) == loader.keys(5)
    assert raw.load(BatchKey((0,), (False,))).targets[0]["labels"].tolist() == [3, 7]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("autodet-loader")]


def test_closing_early_ends_the_thread(dataset: CocoDataset, tmp_path: Path) -> None:
    loader = loader_of(dataset, tmp_path)
    batches = loader.eval_batches(1)
    next(batches)
    assert loader_threads()
    batches.close()  # type: ignore[attr-defined]
    assert not loader_threads()


def test_an_error_in_the_thread_reaches_the_consumer(
    dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(dataset, tmp_path)
    load = loader.load

    def failing(key: BatchKey) -> Batch:
        if 2 in key.indices:
            raise RuntimeError("the disk is gone")
        return load(key)

    monkeypatch.setattr(loader, "load", failing)
    batches = loader.eval_batches(1)
    assert next(batches).key.indices == (0,) and next(batches).key.indices == (1,)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(batches)
    assert not loader_threads()


def test_missing_labels_and_masks_are_refused(dataset: CocoDataset, tmp_path: Path) -> None:
    cache = ImageCache(dataset, 30, 40, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"found none for ids \[7\]"):
        Loader(cache, dataset, {3: 1}, PLAN)
    write_split(tmp_path, "train")
    without = read_dataset(tmp_path, required=("train",))["train"]
    with pytest.raises(ValueError, match="expected a mask of every object"):
        Loader(cache, without, {3: 1, 7: 2}, PLAN, with_masks=True)
