"""Mistakes of a cluster's kind: each ends with a clear message and code 2, and damages nothing."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import ray
import search_distiller
import torch
import train_detector
import train_teacher_pool
import upgrade_detector
from options import main_of, recorded, source
from s3_server import free_port, make_bucket, s3_server
from store_machines import reach
from upgrading import pool_placement

from autodet import object_store
from autodet.ledger import Ledger
from autodet.runtime import cluster
from autodet.runtime.trial import answers, check_code, code_here
from autodet.search.session import MachineError


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        make_bucket(address, "bucket")
        yield address


@pytest.fixture
def place(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, from which an object store can be reached."""
    reach(server, tmp_path / "copies", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], script: object, *arguments: str) -> str:
    """What a script answers to a mistake."""
    monkey = pytest.MonkeyPatch()
    monkey.setattr("sys.argv", ["script.py", *arguments])
    try:
        code = main_of(script.main)  # type: ignore[attr-defined]
    except SystemExit as ended:  # of the options' own parser
        code = int(str(ended.code))
    finally:
        monkey.undo()
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (search_distiller, ["--address", "ray://head:10001"], "ray job submit"),
        (upgrade_detector, ["--address", "10.0.0.1:6379"], "expected 'auto'"),
        (train_teacher_pool, ["--address", "http://head:8265"], "expected 'auto'"),
        (upgrade_detector, ["--output", "s3://no-bucket/run"], "there is no such bucket"),
        (upgrade_detector, ["--output", "ftp://host/run"], "expected a folder in an object store"),
        (upgrade_detector, ["--output", "s3://"], "expected a folder in an object store"),
        (search_distiller, ["--output", "s3://key:secret@bucket/run"], "keys do not belong into a URL"),
        (upgrade_detector, ["--data", "s3://bucket/data"], "every machine reads from its own disk"),
        (search_distiller, ["--cache", "gs://bucket/cache"], "every machine reads from its own disk"),
        (upgrade_detector, ["--resume", "s3://bucket/nothing"], "found no config.json"),
        (upgrade_detector, ["--resume", "nowhere"], "found no config.json"),
        (upgrade_detector, ["--pool", "s3://bucket/nothing"], "no complete pool"),
        (upgrade_detector, ["--base", "s3://bucket/nothing.safetensors"], "nothing.safetensors"),
        (search_distiller, ["--preset", "smoke", "--gpus-per-trial", "1"], "computes on the CPU"),
        (train_teacher_pool, ["--preset", "smoke", "--gpus-per-trial", "0.5"], "computes on the CPU"),
        (upgrade_detector, ["--gpus-per-trial", "2"], "above 0 and at most 1"),
        (upgrade_detector, ["--gpus-per-trial", "-1"], "above 0 and at most 1"),
        (search_distiller, ["--cpus-per-trial", "0"], "at least 1"),
        (search_distiller, ["--workers", "0"], "at least 1"),
        (upgrade_detector, ["--or-resume", "--preset", "smoke"], "--or-resume needs --output RUN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_at_once_with_a_remedy(
    place: Path, capsys: pytest.CaptureFixture[str], script: object, arguments: list[str], message: str
) -> None:
    answer = said(capsys, script, *arguments)
    assert message in answer and "Traceback" not in answer and "secret" not in answer
    assert not list(place.rglob("events"))


@pytest.mark.parametrize("output", ["runs/a", "s3://bucket/runs/a"])
def test_what_is_there_is_neither_overwritten_nor_mixed(
    place: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    folder = place / "copies" / "s3/bucket/runs/a" if "://" in output else place / output
    if "://" in output:
        object_store.declare_copy(folder, output)
    with Ledger.create(folder, {"script": "train_teacher_pool", "options": {}}):
        pass
    before = sorted(path.name for path in folder.iterdir())
    assert "holds a run already" in said(capsys, search_distiller, "--output", output)
    for option in ("--resume", "--or-resume"):
        arguments = ["--resume", output] if option == "--resume" else ["--or-resume", "--output", output]
        assert "is a run of train_teacher_pool" in said(capsys, search_distiller, *arguments)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("output", ["runs/a", "s3://bucket/runs/second"])
def test_a_second_driver_is_refused_and_changes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    folder = place / "copies" / "s3/bucket/runs/second" if "://" in output else place / output
    if "://" in output:
        object_store.declare_copy(folder, output)
    with Ledger.create(folder, {"script": "search_distiller", "options": {"preset": "smoke"}}) as ledger:
        before = sorted(path.name for path in folder.rglob("*"))
        for arguments in (["--resume", output], ["--or-resume", "--output", output, "--preset", "smoke"]):
            answer = said(capsys, search_distiller, *arguments)
            assert f"found process {os.getpid()}" in answer and "stop that process" in answer
        assert sorted(path.name for path in folder.rglob("*")) == before
        ledger.append("asked", 0, {"candidate": {"formula": "none"}})  # the first one goes on


def test_going_on_with_other_settings_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"preset": "smoke", "seed": 1}
    with Ledger.create(place / "run", {"script": "search_distiller", "options": options}):
        pass
    answer = said(capsys, search_distiller, "--or-resume", "--output", "run", "--preset", "cpu", "--seed", "1")
    assert "--preset cpu" in answer and "started with smoke" in answer


def test_what_is_only_read_has_a_copy_of_its_own_also_with_a_member(place: Path) -> None:
    url = "s3://bucket/runs/a/pool"
    copy = place / "copies" / "read" / "s3/bucket/runs/a/pool"
    assert source(url) == copy and str(source(f"{url}:basic-8:8x1@64")) == f"{copy}:basic-8:8x1@64"
    options = argparse.Namespace(pool=source(url), teacher=source(f"{url}:basic-8:8x1@64"), run=Path("runs/a"))
    expected = {"pool": url, "teacher": f"{url}:basic-8:8x1@64", "run": str(place / "runs" / "a")}
    assert recorded(options, ("pool", "teacher", "run")) == expected


def test_a_pools_workers_take_whole_gpus_and_as_many_as_there_are_on_a_cluster() -> None:
    options = argparse.Namespace(workers=8, cpus_per_trial=4, gpus_per_trial=0.5, address="auto")
    assert pool_placement(options) == ["--workers", "1-8", "--cpus-per-trial", "4"]
    assert pool_placement(argparse.Namespace(**(vars(options) | {"address": "local"})))[:2] == ["--workers", "8"]


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:{port}", "no Ray cluster answers there"), ("http://head:8265", "where jobs or clients knock")],
)
def test_a_cluster_that_is_not_there_is_said_at_once(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster.check_reachable(address.format(port=free_port()))
    for fine in ("", "auto", "local"):
        cluster.check_reachable(fine)


def test_code_that_differs_stops_the_run_and_leaves_the_candidate_open() -> None:
    here = code_here()
    check_code(here)
    assert re.fullmatch(r"autodet 0\.1\.0 \([0-9a-f]{8}\) and torch [0-9.]+", here)
    with pytest.raises(OSError, match=r"but autodet 99\.0 where the driver runs"):
        check_code("autodet 99.0")


def test_a_device_that_is_not_there_does_not_answer() -> None:
    assert answers("cpu")
    assert answers("cuda") == torch.cuda.is_available()


def test_a_cluster_that_wants_a_token_is_told_in_one_line(tmp_path: Path) -> None:
    """In a process of its own, since Ray reads its settings once."""
    program = """
import sys
from options import main_of
from autodet.runtime import cluster
cluster.check_reachable = lambda address: None
def script(argv):
    with cluster.ray_running("auto"):
        return 0
sys.exit(main_of(script))
"""
    variables = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": f"127.0.0.1:{free_port()}", "HOME": str(tmp_path)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | variables
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: --address auto" in done.stderr and "token" in done.stderr.lower()


@pytest.mark.parametrize("script", [search_distiller, train_teacher_pool, upgrade_detector])
def test_a_cluster_that_cannot_be_reached_is_told_before_a_run_begins(
    script: ModuleType, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert "no Ray cluster answers there" in said(capsys, script, "--address", "auto", "--output", "new")
    assert not (place / "new").exists()


@pytest.mark.parametrize("script", [search_distiller, train_detector, train_teacher_pool, upgrade_detector])
def test_a_missing_gpu_is_told_before_a_run_begins(
    script: ModuleType, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU on this machine" in said(capsys, script, "--preset", "gpu", "--output", "new")
    assert not (place / "new").exists()


def test_a_cluster_of_other_versions_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.0\n    Python: 3.9")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    told = r"Version mismatch: The cluster was started with: Ray: 2\.0"
    with pytest.raises(MachineError, match=told), cluster.ray_running("local"):
        pass


def test_trials_larger_than_any_machine_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machines = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    cluster.warn_of_idle_machines(4, 0.5)
    assert not caplog.text
    cluster.warn_of_idle_machines(8, 1)
    assert "the 8 CPUs and 1 GPUs" in caplog.text and "at most 4 CPUs, 1 GPUs" in caplog.text
