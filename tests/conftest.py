"""Fixtures that several rooms share: a few small generated images, and detectors that train in a second."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from autodet.data import Batch, BatchPlan, ImageCache, Loader, read_dataset, write_shapes
from autodet.data.shapes import CATEGORY_IDS
from autodet.detectors import Arch, DetectorSpec, build, save_detector

IMAGE_SIZE = (96, 64)  # width, height
TRAIN_IMAGES, VAL_IMAGES = 8, 4
pytest_plugins = ["store_fixtures"]
OF_RAY = ("tests/experiments/", "tests/runtime/")


class RayTogether(LoadScopeScheduling):  # type: ignore[misc]
    """All folders with tests of Ray in one process, which share a cluster; the other files in another one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if file.startswith(OF_RAY) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> RayTogether:
    """Marks would say the same, but pytest-xdist 3.8 does not see them with pytest 9.2."""
    return RayTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    items.sort(key=lambda item: not item.nodeid.startswith(OF_RAY))


def pytest_collection_finish() -> None:
    """Thousands of tests and the imported libraries stay to the end: the garbage collector need not go through them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries expect to be collected at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and results depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws and rounds the same whichever tests run before it: a script that one ran may have set threads."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes a millisecond where a GPU is not in use
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated data set "shapes": 8 training and 4 validation images of 96×64."""
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", TRAIN_IMAGES, VAL_IMAGES, size=IMAGE_SIZE, seed=3)


@pytest.fixture(scope="session")
def tiny_spec() -> DetectorSpec:
    """The smallest detector that still has every part."""
    return DetectorSpec(
        "faster_rcnn",
        Arch.parse("basic-8:8x1-8x1-16x1-16x1"),
        labels=tuple((id_, name) for name, id_ in CATEGORY_IDS.items()),
        neck_width=16,
        levels=(8, 16, 32, 64),
        anchor_sizes=(8, 16, 32, 48),
        head_width=16,
        roi_size=3,
        proposals_before_nms=(40, 40),
        proposals=(20, 20),
        regions_per_image=16,
        detections=20,
        min_size=IMAGE_SIZE[1],
        max_size=IMAGE_SIZE[0],
    )


@pytest.fixture(scope="session")
def teacher_spec(tiny_spec: DetectorSpec) -> DetectorSpec:
    """A detector with a wider body than ``tiny_spec`` and the same neck and head."""
    return replace(tiny_spec, body=Arch.parse("basic-8:8x1-16x1-16x1-24x1"))


@pytest.fixture(scope="session")
def teacher_file(teacher_spec: DetectorSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector file with the fresh weights of ``teacher_spec``."""
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_detector(path, build(teacher_spec))
    return path


@pytest.fixture(scope="session")
def tiny_loader(shapes_folder: Path, tiny_spec: DetectorSpec, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """The training images in recurring batches of 4."""
    dataset = read_dataset(shapes_folder)["train"]
    cache = ImageCache(dataset, tiny_spec.min_size, tiny_spec.max_size, tmp_path_factory.mktemp("images"))
    return Loader(cache, dataset, tiny_spec.label_map, BatchPlan(4, seed=0, fixed=True))


@pytest.fixture(scope="session")
def tiny_batch(tiny_loader: Loader) -> Batch:
    """The first batch of ``tiny_loader``."""
    return tiny_loader.load(tiny_loader.keys(0)[0])


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for all tests that need it, without its dashboard's authentication."""
    from autodet.runtime.cluster import ray_running  # here, so that the core's tests run where Ray is not installed

    # Ray's workers are as urgent as the tests that wait for them.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    # Ray Train looks at its workers more often, and no process watches for machines that a cloud will take back.
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    with ray_running("local", cpus=2):
        yield
