"""The image: its versions, its user, and what goes into it."""

from __future__ import annotations

import re

from cluster_files import CLUSTER, PYPROJECT, ROOT, ray_version
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Name and arguments, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for line in joined.splitlines() if line for name, _, rest in [line.partition(" ")]]


def of(wanted: str) -> list[str]:
    return [rest for name, rest in instructions() if name == wanted]


def test_ray_is_the_one_that_the_package_requires() -> None:
    (ray,) = (Requirement(text) for text in PYPROJECT["project"]["dependencies"] if text.startswith("ray["))
    assert ray.specifier.contains(ray_version())
    assert of("FROM") == ["rayproject/ray:${RAY_VERSION}-py311-cpu"]
    (install,) = (rest for rest in of("RUN") if "pip install" in rest)
    assert '"ray[default,tune,train]==${RAY_VERSION}"' in install


def test_python_is_one_that_the_package_requires() -> None:
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains("3.11")


def test_readme_names_the_same_versions() -> None:
    readme = (CLUSTER / "README.md").read_text()
    assert set(re.findall(r"ray\[default\]==([\d.]+)", readme)) == {ray_version()}
    assert f"Ray {ray_version()}, Python 3.11" in readme
    assert set(re.findall(r"autodet:([\d.]+\d)", readme)) == {PYPROJECT["project"]["version"]}


def test_what_is_installed_is_what_the_package_names() -> None:
    (install,) = (rest for rest in of("RUN") if "pip install" in rest)
    (extras,) = re.findall(r'--editable "\.\[([a-z,]+)\]"', install)
    assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    assert "http" not in install and "--index-url" not in install


def test_the_user_is_not_root() -> None:
    assert of("USER")[-1] == "ray"
    assert all("--chown=ray:users" in rest for rest in of("COPY"))


def test_nothing_comes_from_elsewhere_and_nothing_is_secret() -> None:
    assert not of("ADD")
    for rest in of("COPY"):
        for source in rest.split()[1:-1]:
            assert (ROOT / source).exists()
    assert not re.search(r"(?i)(password|secret|token|access_key)\s*=", DOCKERFILE)


def test_only_what_is_copied_is_sent_to_docker() -> None:
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    sent = {line[1:] for line in rules if line.startswith("!")}
    assert rules[0] == "*" and sent == {source for rest in of("COPY") for source in rest.split()[1:-1]}


def test_the_empty_package_stands_where_the_real_one_comes() -> None:
    copied = {rest.split()[-1] for rest in of("COPY")}
    assert any("mkdir autodet && touch autodet/__init__.py" in rest for rest in of("RUN")) and "autodet" in copied
