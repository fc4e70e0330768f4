"""The files of cluster/, and facts that several of its tests hold them to."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = sorted(CLUSTER.rglob("*.sh"))


@cache
def loaded(name: str) -> Any:
    """A YAML file of cluster/."""
    return yaml.safe_load((CLUSTER / name).read_text())


def documents(name: str) -> list[Any]:
    """All documents of a YAML file of cluster/."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def ray_version() -> str:
    """The version of Ray that the image brings, and with it every machine."""
    found = re.search(r"^ARG RAY_VERSION=(\S+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def flags_of(script: Path) -> set[str]:
    """The options of a script of experiments/: those in its source, and the common ones that it takes."""
    own = set(_flags(script))
    source = script.read_text()
    for module in ("options", "runs"):
        if re.search(rf"^from {module} import", source, re.MULTILINE):
            own |= _flags(script.with_name(f"{module}.py"))
    return own


@cache
def _flags(file: Path) -> frozenset[str]:
    return frozenset(re.findall(r"[\"'](--[a-z][a-z-]*)[\"']", file.read_text()))
