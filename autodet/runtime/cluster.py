"""Joining or starting Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from autodet.object_store import COPIED
from autodet.runtime.weight_cache import drop_caches
from autodet.search.session import MachineError

Name = TypeVar("Name")
CONNECT_SECONDS = 10.0
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a user's command mean what they say
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "60",  # Tune's snapshots are not what a run resumes from
}


def check_address(address: str) -> None:
    """ValueError unless ``local``, or ``auto`` where a cluster can be reached.

    Ray Client (``ray://``) would move the ledger's writer off its disk.
    """
    if address.startswith("ray://"):
        raise ValueError(
            f"--address {address}: Ray Client is not supported. Submit the script to the cluster instead: "
            "ray job submit --address http://HEAD:8265 --working-dir . -- python experiments/… --address auto"
        )
    if address not in ("auto", "local"):
        raise ValueError(f"--address {address!r}: expected 'auto' (inside a cluster) or 'local'.")
    if address == "auto" and not ray.is_initialized():
        check_reachable(os.environ.get("RAY_ADDRESS", ""))


def check_reachable(ray_address: str) -> None:
    """ValueError unless something listens at an address HOST:PORT; Ray itself would try for many minutes.

    ray_address: as in the variable RAY_ADDRESS; what is of another form is left to Ray.
    """
    if ray_address.startswith(("http://", "https://", "ray://")):
        raise ValueError(
            f"RAY_ADDRESS is {ray_address}, where jobs or clients knock. Inside the cluster it is HOST:PORT of the "
            "head, port 6379 unless chosen otherwise; or unset it."
        )
    host, _, port = ray_address.rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS is {ray_address}, and no Ray cluster answers there ({error}). Start one with 'ray start "
            "--head', correct the address, or unset it."
        ) from error


def warn_of_idle_machines(cpus: float, gpus: float) -> None:
    """Say so where no machine of the cluster is large enough for a trial: it would wait, for ever or for a new one."""
    nodes: Any = ray.nodes  # has no types
    sizes = [node["Resources"] for node in nodes() if node["Alive"]]
    if not any(size.get("CPU", 0) >= cpus and size.get("GPU", 0) >= gpus for size in sizes):
        largest = (max((size.get(name, 0) for size in sizes), default=0) for name in ("CPU", "GPU"))
        logging.warning(
            "No machine of this cluster has the %g CPUs and %g GPUs that a training takes (at most %g CPUs, %g GPUs). "
            "They wait until one joins; ask for less with --cpus-per-trial or --gpus-per-trial.",
            *(cpus, gpus, *largest),
        )


@contextmanager
def ray_running(address: str = "local", cpus: int | None = None) -> Iterator[None]:
    """Ray for the time of the block, unless this process has it already.

    ``auto`` joins the cluster this machine is part of, ``local`` starts one here.
    """
    check_address(address)
    if ray.is_initialized():  # the caller's own, which stays running
        yield
        return
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    on_terminate = signal.getsignal(signal.SIGTERM)
    where: dict[str, Any] = {"address": "auto"} if address == "auto" else {"address": "local", "num_cpus": cpus}
    variables = {COPIED: os.environ[COPIED]} if COPIED in os.environ else {}
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    try:
        ray.init(**where, **quiet, runtime_env={"env_vars": variables})
    except (ConnectionError, RuntimeError, RayError) as error:  # none is there; other versions; no token or another
        reason = " ".join(str(error).split())[:600]
        raise MachineError(f"--address {address}: Ray cannot be joined or started here: {reason}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler would end the process at once
    try:
        yield
    finally:
        if address == "auto":  # the cluster stays, and so would they
            with suppress(RayError):
                drop_caches()
        ray.shutdown()


def finished(doing: str, pending: Mapping[Any, Name]) -> Iterator[tuple[Name, Any]]:
    """Name and result of tasks as they end. pending: reference of a task → its name. MachineError where one fails.

    doing: what the tasks do, for messages, such as ``training``.
    """
    names = dict(pending)
    while names:
        (done,), _ = ray.wait(list(names), num_returns=1)
        name = names.pop(done)
        try:
            result = ray.get(done)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error  # without Ray's trace of where
            raise MachineError(f"{doing} {name} failed: {cause}") from error
        logging.info("[%d of %d] %s %s", len(pending) - len(names), len(pending), doing, name)
        yield name, result
