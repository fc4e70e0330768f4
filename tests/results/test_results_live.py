"""The live view of a run: what it says, and that it reads each event once."""

from __future__ import annotations

from pathlib import Path

import analyze
import pytest
from made_joint_runs import Step, joint_run

from autodet import event_files
from autodet.ledger import Ledger
from autodet.records import records_from
from autodet.results.live import WIDTH, Follower, live_text

STEPS = (
    Step(1.0, 0.50, parent=None, teacher=None, phase="base"),
    Step(0.62, 0.48, actions="prune_neck(width=48)"),
    Step(0.58, 0.53, actions="resize(pixels=224)"),
    Step(0.58, None, status="failed", cause="its AP is nan"),
    Step(0.5, None, status=None, actions="remove_block(stage=2)"),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return joint_run(tmp_path / "run", STEPS)


def test_it_says_what_runs_what_failed_and_what_is_best(run: Path) -> None:
    records = records_from(Ledger.open(run).events())
    text = live_text(run, records, now=records[-1].asked_at + 90)
    assert "no driver at work" in text
    assert "base         1 completed" in text and "joint        2 completed, 1 failed, 1 running" in text
    lines = text.splitlines()
    best = lines[lines.index("best so far:") + 1 :]
    assert "AP 0.5300 at 58%" in best[0] and "resize(pixels=224)" in best[0] and "AP 0.5000 at 100%" in best[1]
    running = lines[lines.index("running now:") + 1]
    assert running.split()[:2] == ["4", "joint"] and "1.5 min" in running and "remove_block" in running
    assert "failed: its AP is nan" in text
    assert max(map(len, lines)) <= WIDTH


def test_an_empty_run_and_a_driver(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "run", {}) as ledger:
        text = live_text(ledger.run_dir, [], now=0.0)
        assert "driver: process" in text and "nothing was asked yet" in text and "nothing has completed yet" in text
        assert "not heard of" in live_text(ledger.run_dir, [], now=1e12)


def test_events_are_read_once_and_torn_ones_later(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = event_files._bytes

    def counted(path: str) -> bytes:
        read.append(path)
        return whole(path)

    monkeypatch.setattr(event_files, "_bytes", counted)
    follower, files = Follower(run), sorted((run / "events").iterdir())
    content = files[-1].read_bytes()
    files[-1].write_bytes(content[:20])
    before = follower.records()
    files[-1].write_bytes(content)
    after = follower.records()
    assert after == records_from(Ledger.open(run).events()) and len(after) - len(before) == 1
    read.clear()
    assert follower.records() == after and not read


def test_following_ends_with_the_driver(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main([str(run), "--follow"]) == 0
    assert capsys.readouterr().out.count("best so far") == 1
    ledger = Ledger.resume(run)
    shown: list[float] = []

    def wait(seconds: float) -> None:
        shown.append(seconds)
        ledger.close()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("analyze.time.sleep", wait)
        assert analyze.main([str(run), "--follow"]) == 0
    assert shown == [analyze.FOLLOW_SECONDS] and capsys.readouterr().out.count("best so far") == 2


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main([str(tmp_path), "--follow"]) == 2
    assert "config.json" in capsys.readouterr().err
