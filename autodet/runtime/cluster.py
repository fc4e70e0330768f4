"""Joining or starting Ray."""

from __future__ import annotations

import logging
import os
import signal
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
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a user's command mean what they say
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "60",  # Tune's snapshots are not what a run resumes from
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
}


def check_address(address: str) -> None:
    """ValueError unless ``auto`` or ``local``; Ray Client (``ray://``) would move the ledger's writer off its disk."""
    if address.startswith("ray://"):
        raise ValueError(
            f"--address {address}: Ray Client is not supported. Submit the script to the cluster instead: "
            "ray job submit --address http://HEAD:8265 --working-dir . -- python experiments/… --address auto"
        )
    if address not in ("auto", "local"):
        raise ValueError(f"--address {address!r}: expected 'auto' (inside a cluster) or 'local'.")


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
    where: dict[str, Any] = {"address": "auto"} if address == "auto" else {"num_cpus": cpus}
    variables = {COPIED: os.environ[COPIED]} if COPIED in os.environ else {}
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    ray.init(**where, **quiet, runtime_env={"env_vars": variables})
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
