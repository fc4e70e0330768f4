"""A whole upgrade in an object store, on machines that share nothing else: workers see another disk than the driver."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chaos import ENVIRONMENT, EXPERIMENTS, bucket, check
from ray.cluster_utils import Cluster

from autodet.object_store import COPIED, Place
from autodet.working_copy import ROOT, read_path


@contextmanager
def machine_with_its_own_disk(address: str, shared: Path, own: Path) -> Iterator[None]:
    """A node of two CPUs, to which the folder ``shared`` is another one."""
    own.mkdir()
    ray = Path(sys.executable).with_name("ray")
    start = f"mount --bind {own} {shared} && exec {ray} start --address={address} --num-cpus=2 --block"
    node = subprocess.Popen(["unshare", "--mount", "bash", "-c", start], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        node.terminate()
        node.wait()


@pytest.mark.slow
def test_every_stage_finds_what_another_machine_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("Disks of their own need the right to mount.")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "disk").mkdir()
    command = [sys.executable, str(EXPERIMENTS / "upgrade_detector.py"), "--address", "auto", "--or-resume"]
    command += ["--preset", "smoke", "--workers", "2", "--budget", "5", "--cache", str(tmp_path / "cache")]
    with bucket(tmp_path) as output:
        # No CPUs where the driver is: everything that is trained is trained elsewhere.
        cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        environment = os.environ | {"RAY_ADDRESS": cluster.address, COPIED: "{}"}
        try:
            with machine_with_its_own_disk(cluster.address, tmp_path / "disk", tmp_path / "other-disk"):
                first = environment | {ROOT: str(tmp_path / "disk" / "first")}
                driver = subprocess.Popen([*command, "--output", output], env=first)
                while not Place(output, "teachers/config.json").read():  # the pool is being trained
                    assert driver.poll() is None
                    time.sleep(0.2)
                time.sleep(10)
                driver.kill()
                driver.wait()
                second = environment | {ROOT: str(tmp_path / "disk" / "second")}  # a new machine
                done = subprocess.run([*command, "--output", output], env=second, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-4000:]
                again = subprocess.run([*command, "--output", output], env=second, capture_output=True, text=True)
                assert again.returncode == 0, again.stderr[-4000:]
        finally:
            cluster.shutdown()
        assert output in done.stdout + done.stderr or "Report" in done.stdout
        os.environ |= {ROOT: str(tmp_path / "reader"), COPIED: "{}"}
        run = read_path(output)
        assert len(check(run)) == 7 and len(check(run / "distiller")) > 4
        for name in ("base.safetensors", "derived.safetensors", "report.html", "teachers/pool/members.csv"):
            assert (run / name).exists(), name
        trained = list((tmp_path / "other-disk").rglob("run/weights/*.safetensors"))
        assert trained and not list((tmp_path / "other-disk").rglob("trials/*/*"))
