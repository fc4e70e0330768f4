"""A pool's folder: what is written is had again, members work, and what is broken is refused with its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detector_cases import families, small_spec, stirred
from pool_cases import space_of
from torch import nn

from autodet.data import BatchPlan, ImageCache, Loader, read_dataset
from autodet.data.shapes import CATEGORY_IDS
from autodet.detectors import Detector, build, detect
from autodet.detectors.weights import load_weights, save_weights
from autodet.records import Cost
from autodet.teachers import pool as pool_module
from autodet.teachers.elastic import ElasticDetector
from autodet.teachers.pool import (
    MANIFEST,
    WEIGHTS,
    MemberRow,
    PoolError,
    TeacherPool,
    best_member,
    read_members,
    save_members,
    save_pool,
)
from autodet.teachers.space import Member, SpaceError
from autodet.teachers.statistics import measure_statistics, recalibrate, statistics_of

LABELS = tuple((id_, name) for name, id_ in CATEGORY_IDS.items())
SPACE = space_of("tied")


def largest(family: str = "fcos") -> Detector:
    return stirred(replace(small_spec(family, LABELS), body=SPACE.largest.body))


@pytest.fixture(scope="module")
def loader(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    dataset = read_dataset(shapes_folder)["train"]
    cache = ImageCache(dataset, 64, 96, tmp_path_factory.mktemp("pool-images"))
    labels = {category: label for label, (category, _) in enumerate(LABELS, 1)}
    return Loader(cache, dataset, labels, BatchPlan(4, seed=0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pool(tmp_path / "pool", largest(), SPACE, {"seed": 3})
    return tmp_path / "pool"


@families
def test_every_member_comes_out_as_it_went_in(family: str, tmp_path: Path, loader: Loader) -> None:
    detector = largest(family)
    save_pool(tmp_path, detector, SPACE, {"seed": 3})
    pool = TeacherPool.open(tmp_path)
    assert (pool.space, pool.spec, pool.notes) == (SPACE, detector.spec, {"seed": 3})
    elastic = ElasticDetector(detector, SPACE)
    for member in (SPACE.largest, SPACE.smallest, replace(SPACE.smallest, size=48)):
        ours, theirs = pool.extract(member), elastic.extract(member)
        assert ours.spec == theirs.spec
        found, expected = ours.model.state_dict(), theirs.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_taken_member_has_the_statistics_of_the_images_and_works(folder: Path, loader: Loader) -> None:
    """Against norms whose inputs are measured by hooks, layer after layer, by sums over all pixels of all images."""
    pool = TeacherPool.open(folder)
    member = Member(SPACE.smallest.body, 64)
    taken = pool.take(member, loader)
    assert not taken.model.training
    reference = pool.extract(member)
    reference.model.train()
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in reference.model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in loader.sample(16, 16):  # eight images are one batch: its moments are those of all pixels
            reference.features(reference.preprocess(batch.images))
    for name, (values,) in inputs.items():
        norm = taken.model.get_submodule(name)
        torch.testing.assert_close(norm.get_buffer("running_mean"), values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.get_buffer("running_var"), values.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    images = loader.load(loader.keys(0)[0]).images
    assert all(torch.isfinite(found["boxes"]).all() for found in detect(taken, images))


def test_statistics_are_averages_over_batches(loader: Loader) -> None:
    detector = build(replace(small_spec("fcos", LABELS), body=SPACE.smallest.body))
    means = []
    detector.model.train()
    with torch.no_grad():
        for batch in loader.sample(2, 5):
            tensors = detector.preprocess(batch.images).images.tensors
            means.append(detector.model.get_submodule("backbone.body.conv1")(tensors).mean((0, 2, 3)))
    first = detector.model.get_submodule("backbone.body.bn1")
    recalibrate(detector, loader.sample(2, 5))
    torch.testing.assert_close(first.get_buffer("running_mean"), torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)


def test_recalibrating_leaves_weights_modes_and_momentum(loader: Loader) -> None:
    detector = largest()
    norm = detector.model.get_submodule("backbone.body.bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = 0.3
    before = {name: value.clone() for name, value in detector.model.named_parameters()}
    detector.model.eval()
    measure_statistics(detector, loader)
    assert norm.momentum == 0.3 and not any(module.training for module in detector.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in detector.model.named_parameters())
    again = {name: value.clone() for name, value in statistics_of(detector).items()}
    measure_statistics(detector, loader)
    assert all(torch.equal(value, again[name]) for name, value in statistics_of(detector).items())


def test_statistics_are_measured_once_and_kept_by_member_and_images(
    folder: Path, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(detector: Detector, *arguments: object) -> None:
        calls.append(detector.spec.body)
        measure_statistics(detector, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pool_module, "measure_statistics", counted)
    pool = TeacherPool.open(folder)
    members = [SPACE.smallest, SPACE.largest]
    first = [pool.take(member, loader, tmp_path / "cache") for member in members]
    again = [TeacherPool.open(folder).take(member, loader, tmp_path / "cache") for member in members]
    assert calls == [member.body for member in members]
    for ours, theirs in zip(first, again, strict=True):
        state = theirs.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in ours.model.state_dict().items())
    fewer = Loader(loader.cache, loader.dataset.subset(0.5, 0), loader.labels, loader.plan)
    pool.take(members[0], fewer, tmp_path / "cache")
    assert len(calls) == 3


def test_statistics_that_cannot_be_read_are_measured_anew(folder: Path, loader: Loader, tmp_path: Path) -> None:
    pool = TeacherPool.open(folder)
    first = statistics_of(pool.take(SPACE.smallest, loader, tmp_path))
    (path,) = (tmp_path / "statistics").iterdir()
    for damage in (path.read_bytes()[:-50], b""):
        path.write_bytes(damage)
        again = statistics_of(pool.take(SPACE.smallest, loader, tmp_path))
        assert all(torch.equal(again[name], value) for name, value in first.items())
        assert load_weights(path)[0].keys() == first.keys()
    save_weights(path, {"backbone.body.bn1.running_mean": torch.zeros(8)}, {})
    again = statistics_of(pool.take(SPACE.smallest, loader, tmp_path))
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_taking_a_member_again_is_quick(folder: Path, loader: Loader, tmp_path: Path) -> None:
    pool = TeacherPool.open(folder)
    pool.take(SPACE.largest, loader, tmp_path)
    started = time.perf_counter()
    pool.take(SPACE.largest, loader, tmp_path)
    assert time.perf_counter() - started < 1


def test_a_pool_is_not_changed_by_use(folder: Path, loader: Loader, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pool = TeacherPool.open(folder)
    taken = pool.take(SPACE.smallest, loader, tmp_path)
    with torch.no_grad():
        for parameter in taken.model.parameters():
            parameter.zero_()
    again, fresh = pool.extract(SPACE.largest).model.state_dict(), load_weights(folder / WEIGHTS)[0]
    assert all(torch.equal(value, fresh[name]) for name, value in again.items())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


Break = Callable[[Path], None]


def cut_off(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def change_one_weight(folder: Path) -> None:
    state, metadata = load_weights(folder / WEIGHTS)
    state["backbone.body.conv1.weight"][0, 0, 0, 0] += 1e-6
    save_weights(folder / WEIGHTS, state, metadata)


def edit(**changes: object) -> Break:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | changes))

    return apply


def relabel(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["spec"]["labels"][0][1] = "cell"
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "weights.safetensors"),
        (cut_off, "weights.safetensors"),
        (change_one_weight, "one of them is of another training"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "is no manifest of a pool"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "is no manifest of a pool"),
        (edit(format="other"), "expected autodet-pool of version 1, found other of 1"),
        (edit(version=2), "found autodet-pool of 2: written by another program or release"),
        (edit(space="basic-=:8x1"), "is no manifest of a pool"),
        (edit(space="basic-=:8x1-8x1-16x1-16x1@64"), "is not the space's largest member"),
        (edit(weights=None), "weights is None, expected a hash"),
        (edit(notes=None), "beside notes"),
        (edit(space=None), "is no manifest of a pool"),
        (relabel, "is of another detector than"),
    ],
)
def test_a_broken_pool_is_refused_by_name(damage: Break, reason: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(PoolError) as error:
        TeacherPool.open(folder)
    assert reason in str(error.value) and str(folder) in str(error.value)


def test_a_member_outside_is_refused(folder: Path) -> None:
    with pytest.raises(SpaceError, match="its input size 50 is none of 48, 64"):
        TeacherPool.open(folder).extract(replace(SPACE.smallest, size=50))


def test_the_table_finds_the_best_member_within_limits(folder: Path) -> None:
    def row(member: Member, ap: float, latency: float, macs: float) -> MemberRow:
        return MemberRow(member, ap, ap / 2, "val", Cost(latency, latency, "cpu", 1, 1, macs, macs))

    small, middle = SPACE.smallest, replace(SPACE.smallest, size=64)
    with pytest.raises(PoolError, match=r"has no members\.csv"):
        read_members(folder)
    save_members(folder, [row(small, 0.2, 10, 0.1), row(middle, 0.4, 20, 0.2), row(SPACE.largest, 0.5, 40, 0.9)])
    assert list(read_members(folder)["member"]) == [str(small), str(middle), str(SPACE.largest)]
    assert best_member(folder, {}) == SPACE.largest
    assert best_member(folder, {"latency_ms": 30}) == middle
    assert best_member(folder, {"latency_ms": 30, "macs_g": 0.15}) == small
    with pytest.raises(PoolError, match=r"has latency_ms ≤ 5; the least are latency_ms 10"):
        best_member(folder, {"latency_ms": 5})
    with pytest.raises(PoolError, match=r"found speed"):
        best_member(folder, {"speed": 5})
    assert "mask_ap" not in read_members(folder)
    save_members(folder, [replace(row(small, 0.2, 10, 0.1), mask_ap=0.1)])
    assert read_members(folder)["mask_ap"].tolist() == [0.1]
