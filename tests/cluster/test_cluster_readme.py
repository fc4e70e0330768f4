"""The README names files, options and blocks that there are."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from cluster_files import CLUSTER, ROOT, flags_of

README = (CLUSTER / "README.md").read_text()
# Language and marks of a block, and its commands. Marks say what a block needs: `local` runs on one machine's two Ray
# nodes, `local start` and `local stop` are their start and end, and `local dashboard` needs Ray's dashboard as well.
BLOCKS = [
    (info.split(), text) for info, text in re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
FILLED = {
    "MY-ACCOUNT",
    "MY-REGION",
    "MY-AMI",
    "MY-REGISTRY",
    "MY-BUCKET",
    "MY-HEAD",
    "MY-WORKER-1",
    "MY-WORKER-2",
    "MY-USER",
}


def commands() -> list[list[str]]:
    """Words of every command line of bash blocks; continued lines are one."""
    text = "\n".join(block for (language, *_), block in BLOCKS if language == "bash")
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def calls_of_scripts() -> list[tuple[Path, set[str]]]:
    """Script of experiments/ or cluster/, and the options it is given, in all the ways that one may be called."""
    found = []
    for words in commands():
        for place, word in enumerate(words):
            if match := re.search(r"(?:^|/)((?:experiments|cluster)/[a-z_]+\.py)$", word):
                found.append((ROOT / match[1], {option for option in words[place:] if option.startswith("--")}))
    return found


def test_blocks_are_bash_that_parses() -> None:
    assert {language for (language, *_), _ in BLOCKS} == {"bash"} and len(BLOCKS) > 15
    for _, block in BLOCKS:
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert checked.stderr == "", block


def test_blocks_that_run_on_one_machine_are_marked() -> None:
    assert [" ".join(marks) for (_, *marks), _ in BLOCKS if marks] == [
        "local start",
        "local",
        "local",
        "local dashboard",
        "local stop",
    ]


def test_scripts_and_options_exist() -> None:
    calls = calls_of_scripts()
    assert {script.name for script, _ in calls} >= {"upgrade_detector.py", "search_distiller.py", "fetch_data.py"}
    for script, options in calls:
        assert script.exists()
        assert options <= flags_of(script), script.name


def test_options_that_the_text_names_exist() -> None:
    known = set().union(*(flags_of(script) for script in (ROOT / "experiments").glob("*.py")))
    foreign = {"--submission-id"}
    named = set(re.findall(r"`(--[a-z][a-z-]*)", README))
    assert named - foreign <= known


def test_files_and_links_exist() -> None:
    for path in set(re.findall(r"(?<![\w/])cluster/[\w./-]+\w", README)):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(((?!https?://)[^)#]+)\)", README):
        assert (CLUSTER / target).exists(), target
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_every_name_in_the_files_is_filled_in() -> None:
    files = list(CLUSTER.rglob("*.yaml"))
    names = set().union(*(re.findall(r"MY-[A-Z]+(?:-\d)?", path.read_text()) for path in files))
    assert names == FILLED
    for name in FILLED:
        assert re.search(rf"s[/#](s3://)?{name}[/#]", README), name


def test_filling_in_leaves_a_whole_file() -> None:
    text = (CLUSTER / "aws" / "cluster.yaml").read_text()
    for name, value in (("MY-ACCOUNT", "1234"), ("MY-REGION", "eu-west-1"), ("MY-AMI", "ami-1")):
        text = text.replace(name, value)
    assert "--env AWS_REGION=eu-west-1\n" in text and "availability_zone: eu-west-1a,eu-west-1b" in text
    assert "s3://autodet-1234-eu-west-1/data" in text and "ImageId: ami-1\n" in text


def test_ray_has_the_options_that_are_used() -> None:
    found = find_spec("ray")
    assert found is not None and found.origin is not None
    ray = Path(found.origin).parent
    sources = [ray / "scripts" / "scripts.py", ray / "dashboard" / "modules" / "job" / "cli.py"]
    known = set(re.findall(r"\"(--[a-z][a-z-]*)\"", "".join(path.read_text() for path in sources)))
    for words in commands():
        for place, word in enumerate(words):
            if Path(word).name == "ray" and place + 1 < len(words):
                rest = words[place:]
                own = rest[: rest.index("--")] if "--" in rest else rest
                assert {option.partition("=")[0] for option in own if option.startswith("--")} <= known, words


@pytest.mark.parametrize("secret", ["AKIA", "aws_secret_access_key", "Bearer ", "RAY_AUTH_TOKEN="])
def test_no_secret_is_written_down(secret: str) -> None:
    files = [path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix not in (".json", ".pyc")]
    assert not [path for path in files if secret.lower() in path.read_text().lower()]
