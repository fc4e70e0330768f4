"""Weights in a node's shared memory: held once, never changed by a reader, rebuilt where their actor dies."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from autodet.detectors.weights import WeightsError, save_weights, weights_hash
from autodet.runtime.weight_cache import (
    NAMESPACE,
    SharedWeights,
    WeightCache,
    cache_of_this_node,
    drop_caches,
    shared_weights,
)

MEGABYTES = 40


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, str, dict[str, Tensor]]:
    """A file of 40 MB, its hash, and what is in it."""
    state = {f"layer{i}": torch.rand(256, 1024, 10) for i in range(MEGABYTES // 10)}
    path = tmp_path / "weights.safetensors"
    save_weights(path, state, {})
    return path, weights_hash(state), state


def small_file(folder: Path, seed: int) -> tuple[str, str]:
    """The hash and the path of a file of 4 kB."""
    state = {"w": torch.full((1024,), float(seed))}
    path = folder / f"{seed}.safetensors"
    save_weights(path, state, {})
    return weights_hash(state), str(path)


def start_readers(count: int) -> list[Any]:
    """Trials' processes. Their class is made here, so that Ray sends it along: no worker finds this file."""

    class Reader:
        def __init__(self) -> None:
            self.before = self.proportional_bytes()

        def read(self, hash: str, path: str) -> float:
            self.weights = shared_weights(hash, Path(path))
            return float(sum(self.weights(f"layer{i}", (slice(0, 1),)).sum() for i in range(MEGABYTES // 10)))

        def spoil(self) -> None:
            self.weights("layer0").zero_()
            self.weights.state()["layer1"].add_(1)

        def memory(self) -> int:
            return self.proportional_bytes() - self.before

        def proportional_bytes(self) -> int:
            """Memory of this process; pages that several processes map count in parts."""
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

    return [ray.remote(num_cpus=0.1)(Reader).remote() for _ in range(count)]


@pytest.mark.usefixtures("ray_cluster")
def test_a_cache_that_nobody_reads_ends_and_is_made_again(weights: tuple[Path, str, dict[str, Tensor]]) -> None:
    path, hash, state = weights

    def read() -> tuple[float, float]:
        """When a process began to read, and when it had the weights. (Here, so that Ray sends it along.)"""
        began = time.time()
        shared_weights(hash, path)
        return began, time.time()

    drop_caches()
    wait_for(names_of_caches, until=lambda names: not names)
    ended = cache_of_this_node(idle=0.5)
    ray.get(ended.get.remote(hash, str(path)))
    wait_for(names_of_caches, until=lambda names: not names)
    # Made again by a task, which keeps its CPUs while it waits for it: no other one begins meanwhile.
    times = sorted(ray.get([ray.remote(num_cpus=2)(read).remote() for _ in range(3)]))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(times))
    assert torch.equal(shared_weights(hash, path)("layer0"), state["layer0"])


@pytest.mark.usefixtures("ray_cluster")
def test_trials_hold_the_weights_once_and_none_can_change_them(weights: tuple[Path, str, dict[str, Tensor]]) -> None:
    """Each reader's own memory hardly grows: what it maps is the one copy in Ray's shared memory."""
    path, hash, state = weights
    readers = start_readers(2)
    expected = float(sum(value[0].sum() for value in state.values()))
    for found in ray.get([reader.read.remote(hash, str(path)) for reader in readers]):
        assert found == pytest.approx(expected, rel=1e-5)
    own = [ray.get(reader.memory.remote()) / 2**20 for reader in readers]
    assert sum(own) < 1.4 * MEGABYTES  # private copies would be twice, and more while they are made
    facts = ray.get(cache_of_this_node().facts.remote())
    assert hash in facts["kept"] and facts["hits"] >= 1
    ray.get(readers[0].spoil.remote())
    assert ray.get(readers[1].read.remote(hash, str(path))) == pytest.approx(expected, rel=1e-5)
    shared_weights(hash, path)("layer2").zero_()
    assert all(torch.equal(value, state[name]) for name, value in shared_weights(hash, path).state().items())


@pytest.mark.usefixtures("ray_cluster")
def test_a_file_of_other_weights_is_refused(weights: tuple[Path, str, dict[str, Tensor]]) -> None:
    path, _, _ = weights
    with pytest.raises(WeightsError, match=r"expected 000000000000…: it was changed since"):
        shared_weights("0" * 64, path)
    with pytest.raises(WeightsError, match="missing"):
        shared_weights("1" * 64, path.with_name("missing.safetensors"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_cache_that_dies_is_rebuilt_from_the_file(weights: tuple[Path, str, dict[str, Tensor]]) -> None:
    path, hash, state = weights
    before = shared_weights(hash, path)
    cache = cache_of_this_node()
    victim = ray.get(cache.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(victim, signal.SIGKILL)
    after = shared_weights(hash, path)
    assert all(torch.equal(after(name), value) for name, value in state.items())
    assert torch.equal(before("layer0"), state["layer0"])  # what was mapped stays readable
    assert ray.get(cache_of_this_node().__ray_call__.remote(lambda _: os.getpid())) != victim
    drop_caches()
    wait_for(names_of_caches, until=lambda names: not names)


def names_of_caches() -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]


def wait_for(read: Callable[[], Any], until: Callable[[Any], bool], seconds: float = 20) -> Any:
    """What is read, once it is as wanted."""
    deadline = time.monotonic() + seconds
    while not until(found := read()):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


Make = Callable[[int], WeightCache]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Caches whose shared memory is a list of this process: what they keep and drop needs no Ray."""
    monkeypatch.setattr("autodet.runtime.weight_cache.ray.put", lambda arrays: arrays)
    return WeightCache


def test_what_was_used_longest_ago_goes_first(stored: Make, tmp_path: Path) -> None:
    files = [small_file(tmp_path, seed) for seed in range(4)]
    cache = stored(2 * 4096)
    for file in (files[0], files[1], files[0], files[2]):
        cache.get(*file)
    assert list(cache.entries) == [files[0][0], files[2][0]]
    assert cache.reads == {"hits": 1, "misses": 3}
    assert cache.facts()["bytes"] == 2 * 4096


def test_one_that_is_larger_than_the_limit_is_kept_alone(stored: Make, tmp_path: Path) -> None:
    files = [small_file(tmp_path, seed) for seed in range(2)]
    cache = stored(1000)
    for file in files:
        cache.get(*file)
    assert list(cache.entries) == [files[1][0]]


def test_bytes_never_exceed_the_limit_where_there_is_more_than_one(stored: Make, tmp_path: Path) -> None:
    rng = random.Random(0)
    files = [small_file(tmp_path, seed) for seed in range(8)]
    cache = stored(3 * 4096)
    for _ in range(300):
        file = rng.choice(files)
        cache.get(*file)
        facts = cache.facts()
        assert facts["bytes"] <= 3 * 4096 and facts["kept"][-1] == file[0]


def test_copies_are_taken_of_slices() -> None:
    arrays = {"w": torch.arange(12.0).reshape(3, 4).numpy(), "n": torch.tensor(7).numpy()}
    arrays["w"].setflags(write=False)
    shared = SharedWeights(arrays)
    part = shared("w", (slice(0, 2), slice(0, 3)))
    part.zero_()
    assert torch.equal(shared("w"), torch.arange(12.0).reshape(3, 4))
    assert part.shape == (2, 3) and part.is_contiguous() and int(shared("n")) == 7
