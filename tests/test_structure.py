"""The shape of the package: rooms import one way, only one room imports Ray, and the core works without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "autodet"
# Each room may import those before it; results reads ledgers, records, and detectors' texts alone.
ROOMS = (
    "object_store",
    "atomic",
    "working_copy",
    "pareto",
    "records",
    "lease",
    "event_files",
    "ledger",
    "data",
    "detectors",
    "evaluation",
    "export",
    "distill",
    "training",
    "morphism",
    "teachers",
    "search",
    "joint",
    "runtime",
)
RESULTS_READS = {"pareto", "object_store", "atomic", "records", "lease", "event_files", "ledger"}
RESULTS_READS |= {"detectors", "results"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_one_way(path: Path) -> None:
    room = room_of(path)
    used = {name.split(".")[1] for name in imported(path) if name.startswith("autodet.")}
    if room == "__init__":
        assert used <= {"data", "detectors", "distill", "teachers", "training"}  # the package's face
    elif room == "results":
        assert used <= RESULTS_READS
    else:
        assert used <= set(ROOMS[: ROOMS.index(room) + 1])


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in FILES} == {*ROOMS, "results", "__init__"}


def test_only_the_runtime_imports_ray() -> None:
    users = {room_of(path) for path in FILES if any(name.split(".")[0] == "ray" for name in imported(path))}
    assert users == {"runtime"}


def test_the_core_works_where_ray_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import autodet.data, autodet.detectors, autodet.evaluation, autodet.distill\n"
        "import autodet.training, autodet.morphism, autodet.teachers, autodet.search, autodet.results.report\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
