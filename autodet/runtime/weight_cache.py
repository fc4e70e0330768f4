"""Weights that many trials read, once a node in Ray's shared memory.

One named actor a node keeps them by content hash, put as numpy arrays; a trial reads views of them without copying, and
copies out the slices that it needs. The views themselves are never handed on: an operation in place on a tensor that
aliases one would change it for every other reader. An actor that died, or a node that joined, fills from the file.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from autodet.detectors.weights import WeightsError, load_weights, weights_hash

NAMESPACE = "autodet"
LIMIT_BYTES = 2 << 30  # of weights that are kept on a node
IDLE_SECONDS = 120.0  # without a reader, after which a cache ends: a cloud ends no machine that still has one
ATTEMPTS = 4  # to reach a cache that is being rebuilt

Arrays = dict[str, npt.NDArray[Any]]


@dataclass
class Entry:
    """Weights that are kept."""

    ref: Any  # ray.ObjectRef of Arrays
    size: int


class WeightCache:
    """The actor's state and methods; one a node, made by ``cache_of_this_node``.

    limit: bytes. The entry used longest ago goes first, as soon as all together exceed it; the one that was asked for
    last stays even above it. A cache that died starts empty: it saves time, not weights, which are always in their
    files. idle: seconds without a reader after which the actor ends itself; None for never.
    """

    def __init__(self, limit: int = LIMIT_BYTES, idle: float | None = None) -> None:
        self.limit, self.idle = limit, idle
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.reads = {"hits": 0, "misses": 0}
        self._shown = Gauge("autodet_weight_cache", "hits, misses, and bytes of a node's cache", tag_keys=("what",))
        self._timer: threading.Timer | None = None
        self._restart_timer()

    def get(self, hash: str, path: str) -> list[Any]:
        """[reference] to the weights of a hash; read from a file of ``save_weights`` where they are not kept yet.

        WeightsError where the file's weights have another hash.
        """
        self._restart_timer()
        self.reads["hits" if hash in self.entries else "misses"] += 1
        if hash not in self.entries:
            self.entries[hash] = _read(hash, path)
        self.entries.move_to_end(hash)
        for what, number in {**self.reads, "bytes": self._bytes()}.items():
            self._shown.set(number, {"what": what})
        self._evict()
        return [self.entries[hash].ref]

    def facts(self) -> dict[str, Any]:
        """Hits, misses, bytes, and the hashes that are kept, the one used longest ago first."""
        return {**self.reads, "bytes": self._bytes(), "kept": list(self.entries)}

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.idle is not None:
            self._timer = threading.Timer(self.idle, _end_this_actor)
            self._timer.daemon = True
            self._timer.start()

    def _bytes(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def _evict(self) -> None:
        while len(self.entries) > 1 and self._bytes() > self.limit:
            self.entries.popitem(last=False)


class SharedWeights:
    """Weights in shared memory, of which copies can be taken. A ``Take`` of ``teachers.elastic``."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self.names = tuple(arrays)

    def __call__(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A copy of a slice of a tensor."""
        return torch.from_numpy(np.array(self._arrays[name][index], order="C"))

    def state(self) -> dict[str, Tensor]:
        """A copy of everything."""
        return {name: self(name) for name in self.names}


def _end_this_actor() -> None:
    ray.kill(ray.get_runtime_context().current_actor)  # for good: a process that merely ended would be started again


def cache_of_this_node(limit: int = LIMIT_BYTES, idle: float | None = IDLE_SECONDS) -> Any:
    """The handle of this run's cache on this node, made where there is none; ``drop_caches`` ends those of a run.

    It outlives the trial that makes it, and a driver that is killed by ``idle`` seconds.
    """
    context = ray.get_runtime_context()
    node, job = context.get_node_id(), context.get_job_id()  # of this run: another's limit is its own
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(WeightCache)
    return actor.options(
        name=f"autodet-weights-{job}-{node[:12]}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(limit, idle)


def drop_caches() -> None:
    """End this run's caches on all nodes."""
    job = ray.get_runtime_context().get_job_id()
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"autodet-weights-{job}-"):
            with suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(actor["name"], NAMESPACE))


def shared_weights(hash: str, path: Path) -> SharedWeights:
    """The weights of a hash from this node's cache, which reads them from a file where it has them not.

    Where the cache cannot be had, they are read from the file into this process alone. WeightsError where the file is
    not of that hash.
    """
    # While a task's own thread waits, Ray lends the task's CPUs to a further one, which then is one too many.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_shared_weights, hash, path).result()


def _shared_weights(hash: str, path: Path) -> SharedWeights:
    for _ in range(ATTEMPTS):
        try:
            (reference,) = ray.get(cache_of_this_node().get.remote(hash, str(path)), timeout=60)
            return SharedWeights(ray.get(reference, timeout=60))
        except (ObjectLostError, RayActorError, GetTimeoutError) as error:  # OwnerDiedError is an ObjectLostError
            logging.info("The weight cache of this node is asked again: %s", type(error).__name__)
        except RayTaskError as error:
            if isinstance(error.cause, (WeightsError, OSError)):
                raise error.cause from None  # what the file's reader said
            logging.info("The weight cache of this node failed: %s", error.cause)  # its memory may be full
            break
    logging.warning("The weight cache of this node cannot be reached; %s is read by this process alone.", path)
    return SharedWeights(_arrays(hash, str(path)))


def _read(hash: str, path: str) -> Entry:
    arrays = _arrays(hash, path)
    return Entry(ray.put(arrays), sum(array.nbytes for array in arrays.values()))


def _arrays(hash: str, path: str) -> Arrays:
    state, _ = load_weights(path)
    found = weights_hash(state)
    if found != hash:
        raise WeightsError(f"{path} has the hash {found[:12]}…, expected {hash[:12]}…: it was changed since.")
    return {name: tensor.numpy() for name, tensor in state.items()}
