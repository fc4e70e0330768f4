"""The image cache: right pixels and sizes, never stale, safe under concurrency and after a kill."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_builders import Document, write_image, write_split
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from autodet.data import CocoDataset, DatasetError, ImageCache, read_dataset
from autodet.data import cache as cache_module
from autodet.data.cache import decode, file_hashes, resized_size
from autodet.data.lock import file_lock

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    write_split(tmp_path, "train")
    return read_dataset(tmp_path, required=("train",))["train"]


def torchvision_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    transform = GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3)
    images, _ = transform([torch.zeros(3, height, width)])
    return tuple(images.image_sizes[0])


@pytest.mark.parametrize(("min_size", "max_size"), [(64, 96), (20, 80)])
def test_torchvision_leaves_a_cached_size_alone(min_size: int, max_size: int) -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(10, 300, (60, 2)).tolist():
        size = resized_size(height, width, min_size, max_size)
        assert torchvision_size(*size, min_size, max_size) == size
        direct = torchvision_size(height, width, min_size, max_size)  # may fall a pixel short in floating point
        assert all(0 <= ours - theirs <= 1 for ours, theirs in zip(size, direct, strict=True))


def test_resized_size_where_floating_point_falls_short() -> None:
    assert int(147 * (192 / 147)) == 191
    assert resized_size(147, 200, 192, 320) == (192, 261)
    assert resized_size(100, 1000, 192, 320) == (32, 320)
    assert resized_size(1, 1000, 192, 320) == (1, 320)


def test_pixels_equal_a_direct_decoding(dataset: CocoDataset, tmp_path: Path) -> None:
    same = ImageCache(dataset, 30, 40, tmp_path / "cache")
    half = ImageCache(dataset, 15, 40, tmp_path / "cache")
    assert len(same) == 3 and same.size(1) == (30, 40) and half.size(1) == (15, 20)
    assert [same.position(id_) for id_ in (10, 20, 30)] == [0, 1, 2]
    for i, image in enumerate(dataset.images):
        pixels = np.asarray(Image.open(image.path))
        np.testing.assert_array_equal(same[i].permute(1, 2, 0).numpy(), pixels)
        means = pixels.reshape(15, 2, 20, 2, 3).mean(axis=(1, 3))
        assert np.abs(half[i].permute(1, 2, 0).numpy() - means).mean() < 20  # antialiased: near the mean of four


def test_writing_to_a_tensor_does_not_reach_the_file(dataset: CocoDataset, tmp_path: Path) -> None:
    cache = ImageCache(dataset, 30, 40, tmp_path / "cache")
    content = cache.path.read_bytes()
    cache[0].zero_()
    assert cache.path.read_bytes() == content


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    colour = Image.new("RGB", (8, 6), (204, 204, 204) if mode != "1" else (255, 255, 255))  # 204: in PIL's palette
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    colour.convert(mode).save(path)
    pixels = np.asarray(decode(path)).astype(int)
    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels - np.asarray(colour)).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 256, 25700], [40000, 65535, 511]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "deep.png"))[..., 0], values // 256)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:, :15] = 255  # left half
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(decode(tmp_path / "turned.png"))
    assert turned.shape == (30, 20, 3)
    assert turned[:15].min() == 255 and turned[15:].max() == 0  # the left half is now on top


def test_every_undecodable_image_is_named(dataset: CocoDataset, tmp_path: Path) -> None:
    for image in dataset.images[:2]:
        content = image.path.read_bytes()
        image.path.write_bytes(content[: len(content) // 2])
    write_image(dataset.images[2].path, (41, 30))
    with pytest.raises(DatasetError) as caught:
        ImageCache(dataset, 30, 40, tmp_path / "cache")
    message = str(caught.value)
    assert "3 problems" in message and "train_1.jpg:" in message and "train_2.jpg:" in message
    assert "image 30: 40×30, file 41×30" in message
    assert not list((tmp_path / "cache").glob("*.bin*"))


def test_changed_bytes_of_the_same_size_give_another_key(tmp_path: Path) -> None:
    def use_bitmaps(content: Document) -> None:
        for image in content["images"]:
            image["file_name"] = f"{image['id']}.bmp"
            write_image(tmp_path / "images" / image["file_name"])

    write_split(tmp_path, "train", use_bitmaps)
    dataset = read_dataset(tmp_path, required=("train",))["train"]
    before = ImageCache(dataset, 30, 40, tmp_path / "cache")
    path, size = dataset.images[1].path, dataset.images[1].path.stat().st_size
    write_image(path, seed=5)
    assert path.stat().st_size == size
    after = ImageCache(dataset, 30, 40, tmp_path / "cache")
    assert after.path != before.path and after.content_hash != before.content_hash
    np.testing.assert_array_equal(after[1].permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_key_depends_on_sizes_and_content_hash_on_annotations(dataset: CocoDataset, tmp_path: Path) -> None:
    caches = [ImageCache(dataset, *sizes, tmp_path / "cache") for sizes in ((30, 40), (30, 41), (20, 40))]
    assert len({cache.path for cache in caches}) == 3
    assert len({cache.content_hash for cache in caches}) == 1
    write_split(tmp_path, "train", lambda d: d["annotations"][0].update(area=3))
    other = ImageCache(read_dataset(tmp_path, required=("train",))["train"], 30, 40, tmp_path / "cache")
    assert other.path == caches[0].path and other.content_hash != caches[0].content_hash


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SETTLED_NS", -1)  # as if the files were old
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    first = file_hashes([path], tmp_path)
    monkeypatch.setattr(hashlib, "sha256", None)  # a second computation would fail
    assert file_hashes([path], tmp_path) == first
    monkeypatch.undo()
    path.write_bytes(b"two")
    assert file_hashes([path], tmp_path) != first


def test_young_files_are_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    first = file_hashes([path], tmp_path)
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # within the clock's grain times may agree
    assert file_hashes([path], tmp_path) != first
    assert not (tmp_path / "image-hashes.json").exists()


@pytest.mark.parametrize("damage", ["truncated", "no index", "index cut", "no pixels"])
def test_damaged_cache_is_built_again(dataset: CocoDataset, tmp_path: Path, damage: str) -> None:
    path = ImageCache(dataset, 30, 40, tmp_path / "cache").path
    content, index = path.read_bytes(), path.with_suffix(".json")
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "no index":
        index.unlink()
        path.write_bytes(bytes(len(content)))
    elif damage == "index cut":
        index.write_text(index.read_text()[:20])
    else:
        path.unlink()
    assert ImageCache(dataset, 30, 40, tmp_path / "cache").path == path
    assert path.read_bytes() == content
    assert json.loads(index.read_text())["sizes"] == [[30, 40]] * 3


def build_and_report(dataset: CocoDataset, directory: Path, barrier: Any, results: Any) -> None:
    builds: list[int] = []
    build = ImageCache._build

    def slow_build(self: ImageCache) -> None:
        builds.append(1)
        time.sleep(0.2)  # the other process arrives meanwhile
        build(self)

    ImageCache._build = slow_build  # type: ignore[method-assign]
    barrier.wait(20)
    cache = ImageCache(dataset, 30, 40, directory)
    results.put((len(builds), bytes(cache[2].numpy().tobytes())))


def test_two_processes_build_once(dataset: CocoDataset, tmp_path: Path) -> None:
    barrier, results = FORK.Barrier(2), FORK.Queue()
    arguments = (dataset, tmp_path / "cache", barrier, results)
    workers = [FORK.Process(target=build_and_report, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join(20)
    assert sorted(builds for builds, _ in found) == [0, 1]
    expected = np.asarray(Image.open(dataset.images[2].path)).transpose(2, 0, 1).tobytes()
    assert [pixels for _, pixels in found] == [expected] * 2


def hold_and_die(lock: Path, partial: Path) -> None:
    with file_lock(lock):
        partial.write_bytes(b"half a cache")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_builder_killed_while_holding_the_lock(dataset: CocoDataset, tmp_path: Path) -> None:
    path = ImageCache(dataset, 30, 40, tmp_path / "cache").path
    content = path.read_bytes()
    path.unlink()
    worker = FORK.Process(target=hold_and_die, args=(path.with_suffix(".lock"), path.with_suffix(".bin.partial")))
    worker.start()
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL and path.with_suffix(".bin.partial").exists()
    ImageCache(dataset, 30, 40, tmp_path / "cache")
    assert path.read_bytes() == content and not path.with_suffix(".bin.partial").exists()


def test_bad_sizes_are_refused(dataset: CocoDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 0 < min_size ≤ max_size, found 50 and 40"):
        ImageCache(dataset, 50, 40, tmp_path)
