"""The README's commands for one machine, run as they stand: two nodes, three searches, a job, the end. Minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from cluster_files import ROOT
from test_cluster_readme import BLOCKS

COPIED = ("autodet", "experiments", "cluster", "pyproject.toml", "README.md")


def blocks(*marks: str) -> str:
    """The commands of the README's blocks with these marks."""
    return "".join(text for (_, *found), text in BLOCKS if found == list(marks))


def rays_of_this_machine() -> list[str]:
    """What ``ray stop`` would end."""
    found = subprocess.run(["pgrep", "-x", "-l", "raylet|gcs_server"], capture_output=True, text=True)
    return found.stdout.split()


@pytest.mark.slow
def test_the_commands_for_one_machine(tmp_path: Path) -> None:
    if find_spec("aiohttp_cors") is None:
        pytest.skip("Jobs need Ray's dashboard: pip install 'ray[default]'.")
    if running := rays_of_this_machine():
        pytest.skip(f"The last command, ray stop, would end another Ray on this machine: {running}.")
    for name in COPIED:
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    environment = os.environ | {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
    }
    (tmp_path / "home").mkdir()

    def run(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    mode = "export RAY_AUTH_MODE=token\n"
    try:
        run(blocks("local", "start"))
        told = run(mode + blocks("local"))
        assert "2.0 CPU" in told and "completed" in told
        run(mode + blocks("local", "dashboard"))
    finally:
        run(blocks("local", "stop"))
    assert not rays_of_this_machine()

    runs = tmp_path / "runs" / "cluster"
    for name in ("formula", "upgrade", "job"):
        assert (runs / name / "report.html").exists(), name
    assert (runs / "pool" / "pool" / "manifest.json").exists()
    assert sorted(path.name for path in (runs / "copy" / "events").iterdir()) == sorted(
        path.name for path in (runs / "formula" / "events").iterdir()
    )
    run("python experiments/search_distiller.py --preset smoke --workers 2 --output runs/alone")
    tables = [
        pd.read_csv(folder / "summary.csv") for folder in (runs / "formula", runs / "job", tmp_path / "runs/alone")
    ]
    for table in tables[1:]:
        assert list(table.columns) == list(tables[0].columns) and len(table) == len(tables[0])
