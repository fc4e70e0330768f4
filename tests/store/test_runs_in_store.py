"""Runs in an object store: who may write, what is recorded, and how they go on on other machines."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import pytest
from gcs_server import gcs_server
from store_machines import ASKED, other_machine, read_by_another_process

from autodet import lease as lease_module
from autodet import object_store
from autodet.atomic import atomic_write_bytes
from autodet.lease import Lease, LeaseHeld, LeaseLost
from autodet.ledger import Ledger, LedgerError, is_run
from autodet.object_store import COPIED, Changed, Place, StoreError, Version, declare_copy
from autodet.working_copy import ROOT, local_path, update


def test_a_run_goes_on_on_another_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    with Ledger.create(folder, {"seed": 1}) as ledger:
        for number in range(3):
            ledger.append("asked", number, ASKED)
        before = ledger.events()
    other = other_machine(url, monkeypatch)
    with Ledger.resume(other, {"seed": 1}) as resumed:
        assert resumed.events() == before
        resumed.append("told", 0, {"status": "completed", "ap": 0.5, "epochs": 1, "seconds": 1.0})
    declare_copy(folder, url)
    update(folder)
    assert Ledger.open(folder).events()[:3] == before and len(Ledger.open(folder).events()) == 4


def test_a_second_driver_is_refused_and_takes_over_what_has_lapsed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    folder.mkdir(parents=True)
    first = Lease(folder, renew_seconds=0.1)
    machines = count()
    monkeypatch.setattr(lease_module, "_machine", lambda: f"machine {next(machines)}")  # always another one
    with pytest.raises(LeaseHeld, match="process"):
        Lease(other_machine(url, monkeypatch), lapse_seconds=1.5)
    first._closing.set()  # its machine hangs
    first._thread.join()
    other = other_machine(url, monkeypatch)
    with Lease(other, renew_seconds=0.1, lapse_seconds=0.5) as second:
        second.check()
        with pytest.raises(LeaseLost, match="taken over"):
            first.check()
        first.release()
        second.check()
    assert Place(url, "lease.json").read() is None


def test_of_two_drivers_that_begin_at_once_one_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    folder.mkdir(parents=True)
    monkeypatch.setattr(Lease, "_unless_held", lambda lease: None)  # both have looked, and found it free
    with Lease(folder), pytest.raises(LeaseHeld, match="has just begun"):
        Lease(folder)


def test_a_renewal_does_not_overwrite_another_drivers_lease(url: str) -> None:
    folder = local_path(url)
    folder.mkdir(parents=True)
    lease = Lease(folder, renew_seconds=1000)
    Place(url, "lease.json").write(b'{"host": "b"}')
    with pytest.raises(Changed):
        lease._file.write(lease._holder)
    lease.release()


def test_an_event_that_the_store_did_not_take_is_not_recorded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    with Ledger.create(folder, {}) as ledger:
        ledger.append("asked", 0, ASKED)
        whole = Place.write

        def failing(place: Place, *args: object, **options: object) -> Version:
            if place.key.startswith("events/"):
                raise StoreError("the network is down")
            return whole(place, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(Place, "write", failing)
        with pytest.raises(OSError, match="network is down"):
            ledger.append("asked", 1, ASKED)
        assert len(ledger.events()) == 1 and len(list((folder / "events").iterdir())) == 1
        monkeypatch.setattr(Place, "write", whole)
        ledger.append("asked", 1, ASKED)
    update(folder)
    assert [event.id for event in Ledger.open(folder).events()] == [0, 1]


def test_two_drivers_that_write_at_once_cannot_both_succeed(url: str) -> None:
    """As where one was frozen between looking at its lease and writing."""
    with Ledger.create(local_path(url), {}) as ledger:
        ledger.append("asked", 0, ASKED)
        Place(url, "events/00000001.json").write(b"what the other one told")
        with pytest.raises(LedgerError, match="another writer"):
            ledger.append("asked", 1, ASKED)
    assert Place(url, "events/00000001.json").read() is not None


def test_on_googles_store_a_lease_is_renewed_and_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    object_store._store.cache_clear()
    monkeypatch.setenv(COPIED, "{}")
    monkeypatch.setenv(ROOT, str(tmp_path / "copies"))
    with gcs_server() as settings:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        url = "gs://bucket/runs/a"
        folder = local_path(url)
        folder.mkdir(parents=True)
        first = Lease(folder, renew_seconds=0.05)
        place = Place(url, "lease.json")
        before = place.version()
        while place.version() == before:
            assert first._thread.is_alive()
            time.sleep(0.02)
        first._closing.set()
        first._thread.join()
        monkeypatch.setattr(lease_module, "_is_dead", lambda holder: True)
        with Lease(folder), pytest.raises(LeaseLost, match="taken over"):
            first.check()
        with pytest.raises(Changed):
            place.write(b"{}", instead_of=before)
    object_store._store.cache_clear()


def test_a_lease_that_could_not_be_renewed_for_long_is_renewed_before_it_is_relied_on(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local_path(url)
    folder.mkdir(parents=True)
    with Lease(folder, renew_seconds=1000) as lease:
        place = Place(url, "lease.json")
        before = place.version()
        lease.check()
        assert place.version() == before
        monkeypatch.setattr(lease_module, "FRESH_SECONDS", -1.0)
        lease.check()
        assert place.version() != before
        monkeypatch.setattr(lease._file, "read", lambda: lease._holder)  # the moment before another one takes it over
        place.write(b'{"host": "b"}')
        with pytest.raises(LeaseLost, match="another process"):
            lease.check()
        place.remove()


def test_a_driver_that_resumes_sees_what_the_last_one_wrote_meanwhile(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = local_path(url)
    with Ledger.create(first, {}) as ledger:
        ledger.append("asked", 0, ASKED)
        other = other_machine(url, monkeypatch)  # whose driver now checks its data, and waits for the lease
        declare_copy(first, url)
        ledger.append("told", 0, {"status": "completed", "ap": 0.5, "epochs": 1, "seconds": 1.0})
    with Ledger.resume(other) as resumed:
        assert [event.kind for event in resumed.events()] == ["asked", "told"]
        resumed.append("asked", 1, ASKED)


def test_a_run_without_events_is_a_run_everywhere(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.create(local_path(url), {"script": "train_teacher_pool"}).close()
    other = other_machine(url, monkeypatch)
    assert is_run(other) and not is_run(other / "events")
    with Ledger.resume(other) as ledger:
        ledger.append("asked", 0, ASKED)


def test_settings_name_what_is_inside_the_run_wherever_it_lies(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    inner = folder / "distiller"
    Ledger.create(folder, {"data": "/data", "task": {"weights": f"{folder}/weights"}}).close()
    Ledger.create(inner, {"start": f"{folder}/base.safetensors", "arms": [f"{inner}/a:member"]}).close()
    other = other_machine(url, monkeypatch)
    assert Ledger.open(other).config == {"data": "/data", "task": {"weights": f"{other}/weights"}}
    expected = {"start": f"{other}/base.safetensors", "arms": [f"{other}/distiller/a:member"]}
    assert Ledger.open(other / "distiller").config == expected
    Ledger.resume(other / "distiller", expected).close()


def test_nested_runs_bring_what_a_reader_needs_and_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    names = ("distiller/events/0.json", "distiller/trials/1/c.pt", "teachers/train/checkpoint_1/c.pt", "lease.json")
    for name in (*names, "distiller/lease.json", "pool/weights.safetensors", "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / name, name.encode())
    other = read_by_another_process(url, monkeypatch)
    found = {path.relative_to(other).as_posix() for path in other.rglob("[!.]*") if path.is_file()}
    assert found == {"distiller/events/0.json", "pool/weights.safetensors", "config.json"}
    read: list[str] = []
    whole = Place.read

    def noted(place: Place) -> tuple[bytes, Version] | None:
        read.append(place.key)
        return whole(place)

    monkeypatch.setattr(Place, "read", noted)
    update(other)
    assert read == []
    atomic_write_bytes(folder / "config.json", b"x" * len("config.json"))
    update(other)
    assert read == ["config.json"]
    update(other / "distiller", ("events/",))
    assert (other / "distiller/events/0.json").exists() and read == ["config.json"]
