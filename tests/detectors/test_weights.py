"""Weights: files, hashes, loading into modules, and downloads (torch.hub's network call replaced)."""

from __future__ import annotations

import argparse
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from autodet.detectors import download
from autodet.detectors.arch import Arch
from autodet.detectors.resnet import ResNetBody, norm_layer
from autodet.detectors.weights import (
    WeightsError,
    load_matching,
    load_strict,
    load_weights,
    metadata_of,
    modern_names,
    read_state_dict,
    save_weights,
    weights_hash,
)

ARCH = Arch.parse("basic-8:8x1-8x1-16x1-16x1")


def some_state() -> dict[str, Tensor]:
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "shared": base,
        "transposed": base.t(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_save_and_load(tmp_path: Path) -> None:
    metadata = {"spec": "faster_rcnn größer", "notes": {"seed": 3, "ap": 0.5}}
    save_weights(tmp_path / "a.safetensors", some_state(), metadata)
    state, found = load_weights(tmp_path / "a.safetensors")
    assert equal(state, some_state())
    assert found == metadata
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_save_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, {"w": torch.ones(2)}, {})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="space"):
        save_weights(path, {"w": torch.zeros(2)}, {})
    assert torch.equal(load_weights(path)[0]["w"], torch.ones(2))
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]


def test_saving_something_else_than_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="found epoch"):
        save_weights(tmp_path / "a.safetensors", {"epoch": 3}, {})  # type: ignore[dict-item]


def test_unreadable_files(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_weights(good, {"w": torch.ones(100)}, {})
    content = good.read_bytes()
    cases = {"empty": b"", "short": content[:4], "header": content[:40], "data": content[:-8], "text": b"{}" * 100}
    for name, data in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(WeightsError, match="truncated") as error:
            load_weights(path)
        assert str(path) in str(error.value)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(tmp_path / "none.safetensors")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="written by autodet"):
        load_weights(tmp_path / "foreign.safetensors")
    assert metadata_of(tmp_path / "foreign.safetensors") is None
    assert metadata_of(good) == {}
    later = {"format": "autodet-weights", "format_version": "99", "metadata": "{}"}
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "later.safetensors", metadata=later)
    for read in (load_weights, metadata_of):
        with pytest.raises(WeightsError, match="found 99"):
            read(tmp_path / "later.safetensors")


def test_read_a_users_state_dict(tmp_path: Path) -> None:
    state = {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(2)}
    parallel = {f"module.{key}": value for key, value in state.items()}
    options = argparse.Namespace(lr=0.1)  # torchvision's reference scripts store these
    compiled = {f"_orig_mod.{key}": value for key, value in parallel.items()}
    contents = [state, {"model": state, "args": options, "epoch": 3}, {"state_dict": parallel}, parallel, compiled]
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        assert equal(read_state_dict(path), state)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert equal(read_state_dict(tmp_path / "old.pt"), state)
    save_weights(tmp_path / "ours.safetensors", state, {})
    assert equal(read_state_dict(tmp_path / "ours.safetensors"), state)


def test_users_files_that_hold_something_else(tmp_path: Path) -> None:
    state = {"w": torch.ones(50)}
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-200])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    torch.save({}, tmp_path / "nothing.pth")
    (tmp_path / "weights.onnx").touch()
    for name in (
        "short.pth",
        "empty.pth",
        "text.pth",
        "list.pth",
        "numbers.pth",
        "nothing.pth",
        "weights.onnx",
        "none.pth",
    ):
        with pytest.raises(WeightsError) as error:
            read_state_dict(tmp_path / name)
        assert str(tmp_path / name) in str(error.value), name


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"model": Intruder(mark)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Intruder(mark), protocol=2))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("zip.pth", "plain.pth", "module.pth"):
        with pytest.raises(WeightsError, match="not loaded for safety"):
            read_state_dict(tmp_path / name)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Intruder(mark)))  # the intruder does work where pickles are run
    assert mark.exists()


def test_hash_depends_on_content_alone() -> None:
    state = some_state()
    backwards = {key: state[key].clone() for key in reversed(state)}
    assert weights_hash(backwards) == weights_hash(state)
    different = [
        state | {"count": torch.tensor(8)},
        state | {"count": torch.tensor(7, dtype=torch.int32)},
        state | {"shared": state["shared"].reshape(4, 3)},
        {**{key: state[key] for key in state if key != "empty"}, "empty2": state["empty"]},
    ]
    hashes = {weights_hash(state), *map(weights_hash, different)}
    assert len(hashes) == 1 + len(different)


def test_load_matching_takes_what_fits() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 4), "c": nn.Linear(1, 1)})
    before = {key: value.clone() for key, value in module.state_dict().items()}
    given = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(5), "b.weight": torch.ones(4, 3), "x": torch.ones(1)}
    report = load_matching(module, given)
    assert report.loaded == ("a.weight", "b.weight")
    assert report.missing == ("b.bias", "c.weight", "c.bias")
    assert report.unexpected == ("x",)
    assert report.mismatched == (("a.bias", (3,), (5,)),)
    after = module.state_dict()
    assert all(bool((after[key] == 1).all()) for key in report.loaded)
    assert all(torch.equal(after[key], before[key]) for key in ("a.bias", "b.bias", "c.weight", "c.bias"))


def test_load_strict_changes_nothing_on_a_misfit() -> None:
    module = nn.Linear(2, 3)
    before = module.weight.detach().clone()
    with pytest.raises(WeightsError) as error:
        load_strict(module, {"weight": torch.ones(3, 2), "bias": torch.ones(4)}, "weights.pth")
    assert "weights.pth does not fit Linear: 1 of another shape: bias (expected (3,), found (4,))" in str(error.value)
    assert torch.equal(module.weight, before)
    with pytest.raises(WeightsError, match=r"k0, k1, k2, k3, and 5 more"):
        load_strict(module, {f"k{i}": torch.ones(1) for i in range(9)})
    report = load_strict(module, {"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    assert report.complete and bool((module.weight == 1).all())


def test_batch_and_frozen_norms_take_each_others_weights() -> None:
    batch, frozen = ResNetBody(ARCH, norm_layer("batch")), ResNetBody(ARCH, norm_layer("frozen"))
    assert load_strict(frozen, batch.state_dict()).complete
    assert load_strict(batch, frozen.state_dict()).complete


class Hub:
    """Replaces the download of torch.hub by files prepared under their published names."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "server"
        self.folder.mkdir()
        self.hashes: list[str | None] = []
        monkeypatch.setenv("TORCH_HOME", str(folder / "home"))
        monkeypatch.setattr("torch.hub.download_url_to_file", self._fetch)

    def publish(self, url: str, state: dict[str, Tensor]) -> None:
        torch.save(state, self.folder / url.rpartition("/")[2])

    def _fetch(self, url: str, target: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        self.hashes.append(hash_prefix)
        shutil.copyfile(self.folder / url.rpartition("/")[2], target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path, monkeypatch)


def test_download_imagenet_body(hub: Hub) -> None:
    published = torchvision.models.resnet18(num_classes=10).state_dict()
    hub.publish(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url, published)
    body = ResNetBody(Arch.resnet18(), norm_layer("batch"))
    load_strict(body, download.download_imagenet_body("resnet18"))
    assert torch.equal(body.state_dict()["layer4.1.bn2.weight"], published["layer4.1.bn2.weight"])
    assert torch.equal(body.state_dict()["conv1.weight"], published["conv1.weight"])
    assert hub.hashes == ["f37072fd"]  # checked by torch.hub against the file's sha256


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision's published file of 2019 has them."""
    short = {key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for key, value in state.items()}
    return {
        (k.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if ".fpn." in k else k): v
        for k, v in short.items()
    }


def test_download_coco_detector_of_2019(hub: Hub) -> None:
    weights = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    with torch.device("meta"):
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=91
        )
    model.to_empty(device="cpu")
    state = {key: value.zero_() for key, value in model.state_dict().items() if "num_batches" not in key}
    published = old_names(state)
    assert {"backbone.fpn.inner_blocks.0.weight", "rpn.head.conv.bias"} <= set(published)
    assert not {"backbone.fpn.inner_blocks.0.0.weight", "rpn.head.conv.0.0.bias"} & set(published)
    hub.publish(weights.url, published)
    found = download.download_coco_detector()
    assert found.keys() == state.keys() and hub.hashes == ["258fb6c6"]
    assert load_strict(model, found).complete
    body = ResNetBody(Arch.of_state_dict(found, "backbone.body."), norm_layer("frozen", 0.0))
    inner = {k.removeprefix("backbone.body."): v for k, v in found.items() if k.startswith("backbone.body.")}
    assert load_strict(body, inner).complete
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in body.modules()) == 53


def test_present_names_stay() -> None:
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    assert modern_names(model.state_dict()).keys() == model.state_dict().keys()


def test_download_errors(hub: Hub) -> None:
    with pytest.raises(WeightsError, match=r"expected one of resnet18.*found 'vgg16'"):
        download.download_imagenet_body("vgg16")
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V1.*found 'V9'"):
        download.download_imagenet_body("resnet18", "V9")
    with pytest.raises(WeightsError, match=r"resnet18: https.*could not be downloaded.*TORCH_HOME"):
        download.download_imagenet_body("resnet18")  # nothing was published
