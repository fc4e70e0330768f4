"""Every script, run as a user would at preset smoke; they share one search, its data and its teacher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import analyze
import check_proxy
import compare_distillers
import pytest
import search_distiller
import train_detector
from options import main_of

from autodet.data import write_shapes
from autodet.detectors import load_detector
from autodet.distill import Formula
from autodet.event_files import new_events
from autodet.ledger import Ledger
from autodet.records import Event
from autodet.results.frame import read_run

SCRIPTS = Path(__file__).parents[2] / "experiments"
SMOKE = ["--preset", "smoke", "--workers", "1"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--cache", str(tmp_path_factory.mktemp("cache"))]


def stopped_after(count: int, folder: Path, arguments: list[str]) -> int:
    """Run the search, and ask it to end once ``count`` candidates were told; its exit code."""

    def stop() -> None:
        while sum(event.kind == "told" for event in new_events(folder, 0)) < count:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    return main_of(lambda _: search_distiller.main(arguments))


@pytest.fixture(scope="session")
def search_run(ray_cluster: None, cache: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of search_distiller.py, stopped by SIGTERM on its way. (Drivers are killed in test_upgrade.py.)"""
    folder = tmp_path_factory.mktemp("runs") / "search"
    arguments = [*SMOKE, *cache, "--inputs", "global", "logits.roi", "--output", str(folder)]
    assert stopped_after(3, folder, arguments) == 130
    assert not (folder / "lease.json").exists()
    before = Ledger.open(folder).events()
    assert search_distiller.main(["--resume", str(folder)]) == 0
    events = Ledger.open(folder).events()
    assert events[: len(before)] == before
    assert told(events) == list(range(len(asks_of(folder))))
    return folder


def asks_of(folder: Path) -> list[dict[str, object]]:
    return [event.payload for event in Ledger.open(folder).events() if event.kind == "asked"]


def told(events: list[Event]) -> list[int]:
    return [event.id for event in events if event.kind == "told"]


def test_a_search_gives_formula_students_table_and_pictures(search_run: Path) -> None:
    frame = read_run(search_run)
    assert set(frame["phase"]) >= {"control", "formula", "weights"}
    assert (frame["status"] != "running").all() and (frame["seconds"] > 0).all()
    found = json.loads((search_run / "found.json").read_text())
    assert Formula.parse(found["formula"]).terms
    students = read_run(search_run / "students")
    assert list(students["group"]) == ["undistilled", "inherit-only", "found"]
    for name, weights in zip(students["group"], students["weights"], strict=True):
        _, notes = load_detector(search_run / "students" / "weights" / f"{weights}.safetensors")
        assert (notes["inherited"] is None) == (name == "undistilled")
    assert (search_run / "pictures" / "detections.png").stat().st_size > 10_000
    assert "undistilled" in (search_run / "report.html").read_text()


def test_a_comparison_reports_paired_differences(
    search_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--run",
        str(search_run),
        "--rivals",
        "pkd",
        "--tune",
        "7",
        "--seeds",
        "1",
        "--split",
        "test",
        "--transfer",
        str(search_run),
        "--workers",
        "1",
    ]
    assert compare_distillers.main([*arguments, "--output", str(tmp_path / "compare")]) == 0
    assert len(read_run(tmp_path / "compare" / "compare")) == 4
    assert compare_distillers.main(["--resume", str(tmp_path / "compare"), "--seeds", "2"]) == 0  # extended
    tuned = read_run(tmp_path / "compare" / "tune")
    assert len(tuned) == 7 and tuned["formula"].nunique() == 7
    frame = read_run(tmp_path / "compare" / "compare")
    assert set(frame["group"]) == {"undistilled", "inherit-only", "pkd", "found"}
    assert sorted(frame["seed"].unique()) == [1000, 1001] and len(frame) == 8
    best = tuned.sort_values("ap", ascending=False, kind="stable").iloc[0]["formula"]
    assert set(frame[frame["group"] == "pkd"]["formula"]) == {best}
    printed = capsys.readouterr().out
    assert "difference to inherit-only" in printed and "from search is the same formula as" in printed


def test_the_proxy_is_checked_against_longer_training(
    search_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--run",
        str(search_run),
        "--formulas",
        "3",
        "--seeds",
        "1",
        "--output",
        str(tmp_path / "proxy"),
        "--workers",
        "1",
    ]
    assert check_proxy.main(arguments) == 0
    assert len(read_run(tmp_path / "proxy" / "long")) == 3
    assert "rank correlation" in capsys.readouterr().out
    assert check_proxy.main(["--resume", str(tmp_path / "proxy")]) == 0
    assert len(read_run(tmp_path / "proxy" / "long")) == 3


def test_analyze_reads_the_run(search_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main([str(search_run), "--output", str(tmp_path)]) == 0
    assert "completed" in capsys.readouterr().out


def test_a_plain_training_and_its_file_as_a_teacher(
    cache: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "teacher"
    assert train_detector.main(["--preset", "smoke", *cache, "--output", str(output)]) == 0
    assert "ms an image" in capsys.readouterr().out
    detector, _ = load_detector(output / "teacher.safetensors")
    assert [name for _, name in detector.spec.labels] == ["disc", "square", "triangle", "star", "ring"]
    assert train_detector.main(["--resume", str(output)]) == 0


def test_a_finished_search_is_extended(search_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked stands, and the students follow what is found then."""
    taught: list[str] = []
    monkeypatch.setattr(search_distiller, "train_students", lambda found, *_: taught.append(str(found.formula)))
    folder = tmp_path / "extended"
    shutil.copytree(search_run, folder)
    events = Ledger.open(folder).events()
    assert search_distiller.main(["--resume", str(folder), "--weights-budget", "8"]) == 130  # before students
    assert taught == [json.loads((folder / "found.json").read_text())["formula"]]
    extended = read_run(folder)
    assert Ledger.open(folder).events()[: len(events)] == events
    inputs = extended.loc[extended["phase"] == "formula", "group"].nunique()
    taken_over = inputs * (4 - 2)  # the model starts after two of each input's four candidates
    assert (extended["phase"] == "weights").sum() == 8 + taken_over and (extended["status"] != "running").all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--teacher", "broken.safetensors"], "broken.safetensors"),
        (["--teacher", "other.safetensors", "--inputs", "logits.roi"], "different labels"),
        (["--family", "fcos", "--inputs", "global", "logits.roi"], "no second stage"),
        (["--inputs", "global", "logits.mask"], "has no mask branch"),
        (["--family", "mask_rcnn"], "train: expected a mask of every object"),
        (["--student", "faster_rcnn nonsense labels=[]"], "nonsense"),
        (["--resume", "nowhere"], "nowhere"),
        (["--output", "taken"], "holds a run already"),
        (["--address", "ray://head:10001"], "ray job submit"),
        (["--budget-per-input", "1", "--preset", "cpu"], "generations"),
        (["--full-fraction", "5"], "at most 1"),
        (["--workers", "0"], "at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_clear_line_and_code_2(
    arguments: list[str],
    message: str,
    cache: list[str],
    teacher_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(teacher_file.read_bytes()[:1000])
    data = write_shapes(tmp_path / "data", 2, 1, 1, size=(64, 48), seed=1)
    for split in ("train", "val", "test"):
        content = json.loads((data / f"{split}.json").read_text())
        content["categories"][0]["name"] = "cell"
        del content["annotations"][0]["segmentation"]
        (data / f"{split}.json").write_text(json.dumps(content))
    shutil.copyfile(teacher_file, tmp_path / "other.safetensors")
    Ledger.create(tmp_path / "taken", {}).close()
    given = ["--data", str(data)] if "--data" not in arguments else []
    command = [*SMOKE, *cache, *given, "--output", "new", *arguments]
    try:
        code = main_of(lambda _: search_distiller.main(command))
    except SystemExit as exit:  # argparse's own
        code = int(str(exit.code))
    error = capsys.readouterr().err
    assert code == 2 and "error: " in error and message in error
    assert "Traceback" not in error
    assert not (tmp_path / "new").exists()  # the name is free for the corrected command


def test_a_resumed_run_keeps_its_settings(search_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--seed 5 with --resume: the run was started with 0"):
        search_distiller.main(["--resume", str(search_run), "--seed", "5"])
    with pytest.raises(ValueError, match="is a run of search_distiller, expected one of check_proxy"):
        check_proxy.main(["--resume", str(search_run)])
    assert search_distiller.parse(["--resume", str(search_run)]).workers == 1


def test_every_script_says_what_it_is_for() -> None:
    for script in sorted(SCRIPTS.glob("*.py")):
        text = script.read_text()
        if "__main__" in text:
            head = text.split('"""')[1]
            assert all(f"\n{word}:" in head for word in ("command", "hardware", "time", "expected")), script
            assert head.strip().splitlines()[0].endswith("?"), script
