"""The Slurm script, run with stand-ins for Slurm, Ray and the driver."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_files import CLUSTER

JOB = CLUSTER / "slurm" / "job.sh"
SCRIPT = "experiments/search_distiller.py"
# Each writes down how it was called, and what it saw of the token's file.
RECORD = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
if [[ -f ${RAY_AUTH_TOKEN_PATH:-} ]]; then
    stat -c '%a %s' "$RAY_AUTH_TOKEN_PATH" "$(dirname "$RAY_AUTH_TOKEN_PATH")" >>"$CALLS.modes"
    cat "$RAY_AUTH_TOKEN_PATH" >"$CALLS.token"
fi
"""
PYTHON = (
    RECORD
    + """
[[ $1 == -c ]] && exec "$REAL_PYTHON" "$@"
trap 'exit 130' TERM
touch "$CALLS.running"
for _ in $(seq "${DRIVER_TENTHS:-0}"); do sleep 0.1; done
exit "${DRIVER_CODE:-0}"
"""
)
SQUEUE = '#!/usr/bin/env bash\necho "${JOB_STATE:-RUNNING}"\n'


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calls are written down; a job of three nodes, of which this machine is the first."""
    programs = tmp_path / "clone" / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("ray", "srun", "scontrol", "squeue", "python"):
        (programs / name).write_text({"python": PYTHON, "squeue": SQUEUE}.get(name, RECORD))
        (programs / name).chmod(0o755)
    (tmp_path / "home").mkdir()
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RAY_"))]:
        monkeypatch.delenv(name)
    values = {"HOME": tmp_path / "home", "CALLS": tmp_path / "calls", "REAL_PYTHON": sys.executable}
    values |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "1"}
    for name, value in ({"HEAD_ADDRESS": "10.0.0.1"} | values).items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "calls"


def start(calls: Path, *arguments: str) -> subprocess.Popen[str]:
    folder = calls.parent / "clone"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(["bash", JOB, *arguments], cwd=folder, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def finished(calls: Path, *arguments: str) -> tuple[int, str]:
    job = start(calls, *arguments)
    output, _ = job.communicate(timeout=30)
    return job.returncode, output


def test_a_head_workers_and_the_driver_are_started(calls: Path) -> None:
    assert finished(calls, SCRIPT, "--data", "a b") == (0, "")
    lines = calls.read_text().splitlines()
    head, driver = (
        "ray start --head --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=127.0.0.1",
        f"python {SCRIPT}",
    )
    assert f"{head} --num-cpus=8 --num-gpus=1" in lines
    (workers,) = (line for line in lines if line.startswith("srun "))
    assert "--nodes=2 --ntasks=2" in workers
    assert workers.endswith("ray start --address=10.0.0.1:6379 --block --num-cpus=8 --num-gpus=1")
    assert f"{driver} --data a b --address auto --or-resume" in lines
    assert lines[-1] == "ray stop" and not any(line.startswith("scontrol") for line in lines)


def test_one_node_needs_no_workers(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert finished(calls, SCRIPT)[0] == 0
    assert "srun" not in calls.read_text()


def test_the_token_is_private_and_gone_at_the_end(calls: Path) -> None:
    _, output = finished(calls, SCRIPT)
    token = Path(f"{calls}.token").read_text()
    modes = Path(f"{calls}.modes").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert token not in calls.read_text() and token not in output
    assert set(re.findall(r"^(\d+) ", modes, re.MULTILINE)) == {"600", "700"}
    assert list((calls.parent / "home").iterdir()) == []


def test_the_drivers_failure_is_the_jobs(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVER_CODE", "2")
    assert finished(calls, SCRIPT)[0] == 2
    assert "scontrol" not in calls.read_text()


@pytest.mark.parametrize(
    ("state", "restarts", "requeued"),
    [("RUNNING", "0", True), ("RUNNING", "20", False), ("COMPLETING", "0", False)],
    ids=["out of time", "too often", "cancelled"],
)
def test_a_job_that_is_told_to_stop_may_go_back_to_the_queue(
    calls: Path, monkeypatch: pytest.MonkeyPatch, state: str, restarts: str, requeued: bool
) -> None:
    monkeypatch.setenv("DRIVER_TENTHS", "200")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setenv("JOB_STATE", state)
    job = start(calls, SCRIPT)
    deadline = time.monotonic() + 20
    while not Path(f"{calls}.running").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == 130
    assert ("scontrol requeue 7" in calls.read_text().splitlines()) == requeued
    assert list((calls.parent / "home").iterdir()) == []


def test_without_a_script_it_says_how(calls: Path) -> None:
    code, output = finished(calls)
    assert code == 2 and "usage: sbatch" in output
    assert not calls.exists()
