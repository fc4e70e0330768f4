import errno
import gc
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autodet.ledger import LeaseHeld, LeaseLost, Ledger, LedgerError, WriteError
from autodet.records import records_from

CONFIG = {"seed": 0, "budget": {"candidates": 10, "seconds": 5.0}, "inputs": ("global", "logits.roi")}
ASKED = {"candidate": {"formula": "none", "inherit": False, "replicate": 0}, "phase": "divide", "group": "global"}
TOLD = {"status": "completed", "ap": 0.5, "epochs": 1, "seconds": 1.0}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "run", CONFIG) as created:
        yield created


def fill(ledger: Ledger, candidates: int) -> None:
    """Three events a candidate."""
    start = len(records_from(ledger.events()))
    for id in range(start, start + candidates):
        ledger.append("asked", id, ASKED)
        ledger.append("reported", id, {"epoch": 1, "ap": 0.4, "verdict": "continue", "seconds": 0.5})
        ledger.append("told", id, TOLD)


def event_names(ledger: Ledger) -> list[str]:
    return sorted(path.name for path in (ledger.run_dir / "events").glob("*.json"))


def test_events_are_files_named_by_their_numbers(ledger: Ledger) -> None:
    """So that two drivers that write at once cannot both succeed, whatever they write."""
    fill(ledger, 1)
    assert event_names(ledger) == ["00000000.json", "00000001.json", "00000002.json"]


def test_runs_whose_files_are_named_by_kind_and_candidate_go_on(ledger: Ledger) -> None:
    fill(ledger, 2)
    ledger.close()
    before = ledger.events()
    for path, event in zip(sorted((ledger.run_dir / "events").glob("*.json")), before, strict=True):
        path.rename(path.with_name(f"{path.stem}-{event.kind}-{event.id:06d}.json"))
    with Ledger.resume(ledger.run_dir) as resumed:
        assert resumed.events() == before
        latest = resumed.append("asked", 2, ASKED)
        assert Ledger.open(ledger.run_dir).events() == [*before, latest]


def test_reader_sees_what_the_writer_was_given_back(ledger: Ledger) -> None:
    returned = ledger.append("asked", 0, {**ASKED, "generation": 3, "parents": (), "note": float("nan")})
    assert Ledger.open(ledger.run_dir).events() == [returned] == ledger.events()
    assert returned.payload["note"] is None and returned.payload["parents"] == []


def test_resume_continues_the_numbers(ledger: Ledger) -> None:
    fill(ledger, 2)
    ledger.close()
    with Ledger.resume(ledger.run_dir) as resumed:
        assert len(resumed.events()) == 6
        assert resumed.append("asked", 2, ASKED).number == 6


def test_a_report_is_recorded_once(ledger: Ledger) -> None:
    ledger.append("asked", 0, ASKED)
    first = ledger.append("reported", 0, {"epoch": 1, "ap": 0.4})
    assert ledger.append("reported", 0, {"epoch": 1, "ap": 0.9}) == first
    ledger.close()
    with Ledger.resume(ledger.run_dir) as resumed:
        assert resumed.append("reported", 0, {"epoch": 1, "ap": 0.9}) == first
        assert resumed.append("reported", 0, {"epoch": 2, "ap": 0.9}).number == 2


def test_order_of_events_is_enforced(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="never asked"):
        ledger.append("told", 0, TOLD)
    with pytest.raises(LedgerError, match="expected candidate 0"):
        ledger.append("asked", 1, ASKED)
    fill(ledger, 1)
    with pytest.raises(LedgerError, match="after it was told"):
        ledger.append("told", 0, TOLD)
    with pytest.raises(LedgerError, match="expected candidate 1"):
        ledger.append("asked", 0, ASKED)
    with pytest.raises(ValueError, match="status"):
        ledger.append("told", 0, {"status": "fine"})
    assert len(Ledger.open(ledger.run_dir).events()) == 3


def test_reader_cannot_write(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="opened for reading"):
        Ledger.open(ledger.run_dir).append("asked", 0, ASKED)


def test_second_writer_is_refused_and_readers_are_not(ledger: Ledger) -> None:
    fill(ledger, 1)
    with pytest.raises(LeaseHeld, match="stop that process"):
        Ledger.resume(ledger.run_dir)
    assert len(Ledger.open(ledger.run_dir).events()) == 3


def test_writer_whose_lease_was_taken_stops(ledger: Ledger) -> None:
    path = ledger.run_dir / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "other"}))
    with pytest.raises(LeaseLost):
        ledger.append("asked", 0, ASKED)
    assert event_names(ledger) == []


def test_number_that_another_writer_used_is_not_used_again(ledger: Ledger) -> None:
    fill(ledger, 1)
    foreign = ledger.run_dir / "events" / "00000003.json"
    foreign.write_text("{}")
    with pytest.raises(LedgerError, match="another writer"):
        ledger.append("asked", 1, ASKED)
    assert len(event_names(ledger)) == 4 and foreign.read_text() == "{}"


def test_existing_event_file_is_never_overwritten(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_modified", lambda self: 0)  # a disk whose times are too coarse to notice
    foreign = ledger.run_dir / "events" / "00000000.json"
    foreign.write_text("theirs")
    with pytest.raises(LedgerError, match="another writer"):
        ledger.append("asked", 0, ASKED)
    assert foreign.read_text() == "theirs"


def test_create_refuses_a_folder_with_a_run(ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(LedgerError, match="resume it or choose another"):
        Ledger.create(ledger.run_dir, CONFIG)


def test_create_accepts_what_a_driver_killed_early_leaves(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "weights").mkdir()
    with Ledger.create(tmp_path, CONFIG, about={"command": "x"}) as created:
        assert created.about["about"] == {"command": "x"}


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    for opening in (Ledger.open, Ledger.resume):
        with pytest.raises(LedgerError, match=r"found no config\.json"):
            opening(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"other": 1}')
    with pytest.raises(LedgerError, match="version 1"):
        Ledger.open(tmp_path)


def test_settings_must_be_those_of_the_run(ledger: Ledger) -> None:
    ledger.close()
    changed = {**CONFIG, "seed": 1, "extra": True}
    with pytest.raises(LedgerError, match=r"extra: recorded '\(absent\)', now True; seed: recorded 0, now 1.*nothing"):
        Ledger.resume(ledger.run_dir, changed)
    Ledger.resume(ledger.run_dir, CONFIG).close()  # a tuple is recorded as a list and still the same


def test_extension_is_allowed_and_recorded(ledger: Ledger) -> None:
    ledger.close()
    longer = {**CONFIG, "budget": {"candidates": 20, "seconds": 5.0}}
    with pytest.raises(LedgerError, match=r"budget\.candidates: recorded 10, now 20.*may change on resuming: workers"):
        Ledger.resume(ledger.run_dir, longer, extendable=("workers",))
    for extendable in (("budget",), ("budget.candidates",)):
        with Ledger.resume(ledger.run_dir, longer, extendable) as resumed:
            assert resumed.config["budget"]["candidates"] == 20
    (entry,) = Ledger.open(ledger.run_dir).about["history"]
    assert entry["changes"] == {"budget.candidates": [10, 20]}


def test_torn_last_event_is_set_aside_by_the_writer_only(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    fill(ledger, 2)
    ledger.close()
    last = ledger.run_dir / "events" / event_names(ledger)[-1]
    last.write_bytes(last.read_bytes()[:20])
    assert len(Ledger.open(ledger.run_dir).events()) == 5 and last.exists()
    with caplog.at_level(logging.WARNING), Ledger.resume(ledger.run_dir) as resumed:
        assert len(resumed.events()) == 5 and not last.exists()
        assert resumed.append("told", 1, TOLD).number == 5
    assert str(last) in caplog.text
    assert len(list((ledger.run_dir / "events" / "damaged").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b'{"version": 1', b"[]", b"\xff\xfe"])
def test_damage_before_the_end_names_file_and_remedy(ledger: Ledger, content: bytes) -> None:
    fill(ledger, 2)
    ledger.close()
    (ledger.run_dir / "events" / "00000002.json").write_bytes(content)
    for opening in (Ledger.open, Ledger.resume):
        with pytest.raises(LedgerError, match=r"00000002\.json.*Restore it.*3 later events"):
            opening(ledger.run_dir).events()
    with pytest.raises(LedgerError, match="Restore it"):
        Ledger.resume(ledger.run_dir)  # and not LeaseHeld: a failed resume keeps no lease


@pytest.mark.parametrize("place", [0, 63, 64])
def test_damage_is_found_among_many_events(ledger: Ledger, place: int) -> None:
    """Also where two neighbours would make sense together."""
    fill(ledger, 25)
    ledger.close()
    events = ledger.run_dir / "events"
    first, second = (events / name for name in event_names(ledger)[place : place + 2])
    whole = json.loads(first.read_bytes())
    first.write_text('{"version": 1, "payload": [1')
    second.write_text(f'2], "later": {json.dumps(whole)}}}')
    with pytest.raises(LedgerError, match=rf"{first.name}.*Restore it.*{74 - place} later events"):
        Ledger.open(ledger.run_dir).events()
    first.write_text(json.dumps(whole) + "," + json.dumps(whole))
    second.write_text("")
    with pytest.raises(LedgerError, match=rf"{first.name}.*Restore it"):
        Ledger.open(ledger.run_dir).events()


def test_many_events_are_read_in_order_and_the_garbage_collector_goes_on(ledger: Ledger) -> None:
    fill(ledger, 25)
    assert Ledger.open(ledger.run_dir).events() == ledger.events()
    assert gc.isenabled()


def test_gap_twice_the_same_number_and_broken_order(ledger: Ledger) -> None:
    fill(ledger, 2)
    ledger.close()
    events = ledger.run_dir / "events"
    copy = events / "00000001-reported-000001.json"
    copy.write_bytes((events / "00000001.json").read_bytes())
    with pytest.raises(LedgerError, match="one event with number 1"):
        Ledger.open(ledger.run_dir).events()
    copy.unlink()
    (events / "00000001.json").write_bytes((events / "00000002.json").read_bytes())
    with pytest.raises(LedgerError, match=r"its content says 00000002\.json"):
        Ledger.open(ledger.run_dir).events()
    (events / "00000001.json").unlink()
    with pytest.raises(LedgerError, match="expected event 1 next, found 2"):
        Ledger.open(ledger.run_dir).events()


def test_leftovers_of_a_killed_writer_are_no_events(ledger: Ledger) -> None:
    fill(ledger, 1)
    leftover = ledger.run_dir / "events" / ".00000003.json.123.abcd.tmp"
    leftover.write_text('{"ver')
    assert len(Ledger.open(ledger.run_dir).events()) == 3
    ledger.close()
    with Ledger.resume(ledger.run_dir):
        assert not leftover.exists()


@pytest.mark.parametrize("step", ["write", "fsync", "link"])
def test_full_disk_records_nothing_and_can_be_tried_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(ledger, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full_disk)
        with pytest.raises(WriteError, match=r"No space left.*free some space"):
            ledger.append("asked", 1, ASKED)
    assert len(os.listdir(ledger.run_dir / "events")) == 3  # no part and no temporary file either
    assert ledger.append("asked", 1, ASKED).number == 3
    assert len(Ledger.open(ledger.run_dir).events()) == 4


def test_views_can_be_rebuilt(ledger: Ledger, tmp_path: Path) -> None:
    fill(ledger, 2)
    ledger.append("asked", 2, ASKED)
    records = ledger.write_views()
    lines = (ledger.run_dir / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["completed", "completed", "running"]
    assert [record.id for record in records] == [0, 1, 2]
    before = (ledger.run_dir / "summary.csv").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    Ledger.open(ledger.run_dir).write_views(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "summary.csv").read_bytes() == before and before.count(b"\n") == 4


def test_append_does_not_look_at_the_past(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(ledger, 1)

    def no_listing(path: Path) -> Any:
        raise AssertionError(f"listed {path}")

    monkeypatch.setattr(os, "listdir", no_listing)
    fill(ledger, 3)
    monkeypatch.undo()
    assert len(event_names(ledger)) == 12


def test_ten_thousand_events_open_in_seconds(ledger: Ledger) -> None:
    events = ledger.run_dir / "events"
    for number in range(10_000):
        kind, payload = (("told", TOLD), ("asked", ASKED))[number % 2 == 0]
        content = {"version": 1, "number": number, "kind": kind, "id": number // 2, "time": 1.0, "payload": payload}
        (events / f"{number:08d}-{kind}-{number // 2:06d}.json").write_text(json.dumps(content))
    ledger.close()
    start = time.perf_counter()
    with Ledger.resume(ledger.run_dir) as resumed:
        opened = time.perf_counter() - start
        assert resumed.append("asked", 5000, ASKED).number == 10_000
    assert opened < 10  # about half a second on a laptop; a quadratic reader takes minutes


def write_until_killed(folder: Path) -> None:
    with Ledger.resume(folder) as ledger:
        while True:
            fill(ledger, 1)


def test_kill_at_any_moment_leaves_a_whole_ledger(ledger: Ledger) -> None:
    ledger.close()
    context, dice, known = multiprocessing.get_context("fork"), random.Random(0), 0
    for _ in range(6):
        process = context.Process(target=write_until_killed, args=(ledger.run_dir,))
        process.start()
        deadline = time.monotonic() + 20
        while len(os.listdir(ledger.run_dir / "events")) <= known + 3:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.03))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        events = Ledger.open(ledger.run_dir).events()
        assert [event.number for event in events] == list(range(len(events))) and len(events) > known
        # The last candidate may lack its report or result; finish it as a driver does, in place of the dead one.
        with Ledger.resume(ledger.run_dir) as resumed:
            last = records_from(resumed.events())[-1]
            if last.status == "running":
                resumed.append("told", last.id, TOLD)
            known = len(resumed.events())
    assert all(record.status == "completed" for record in records_from(Ledger.open(ledger.run_dir).events()))
