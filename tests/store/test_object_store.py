"""Folders in an object store, on an S3-compatible server: what is written, what copies hold, what a mistake says."""

from __future__ import annotations

import http.client
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from s3_server import free_port
from store_machines import other_machine, read_by_another_process

from autodet import object_store
from autodet.atomic import atomic_write_bytes
from autodet.detectors.weights import load_weights, save_weights
from autodet.ledger import Ledger, LedgerError, is_run
from autodet.object_store import COPIED, Changed, Place, StoreError, Version, copies, named, place_of
from autodet.working_copy import discard, fetch, fetch_changed, local_path, move, read_path, spare, update


def test_paths_are_paths_and_urls_are_copies(url: str, tmp_path: Path) -> None:
    assert local_path("runs/a") == Path("runs/a")
    folder = local_path(url)
    assert folder == tmp_path / "copies" / url.replace("://", "/")
    assert copies() == {str(folder): url}
    assert place_of(folder / "events" / "x.json") == Place(url, "events/x.json")
    assert place_of(folder) == Place(url, "") and str(place_of(folder)) == url
    assert place_of(tmp_path) is None and place_of(Path("runs/a")) is None


def test_an_object_is_created_once_and_replaced_only_as_it_was_seen(url: str) -> None:
    place = Place(url, "a/b.json")
    assert place.read() is None and place.version() is None
    first = place.write(b"1", new=True)
    with pytest.raises(Changed, match="another process"):
        place.write(b"2", new=True)
    second = place.write(b"2", instead_of=first)
    with pytest.raises(Changed, match="another process"):
        place.write(b"3", instead_of=first)
    assert place.read() == (b"2", second) and place.version() == second


def test_a_write_whose_answer_was_lost_and_that_is_repeated_has_succeeded(url: str) -> None:
    place = Place(url, "event.json")
    version = place.write(b"mine", new=True)
    assert place.write(b"mine", new=True) == version
    replaced = place.write(b"next", instead_of=version)
    assert place.write(b"next", instead_of=version) == replaced


def test_what_is_written_into_a_copy_is_in_the_store(url: str) -> None:
    folder = local_path(url)
    folder.mkdir(parents=True)
    atomic_write_bytes(folder / "a.json", b"content")
    found = Place(url, "a.json").read()
    assert found is not None and found[0] == b"content" == (folder / "a.json").read_bytes()
    with pytest.raises(FileExistsError):
        atomic_write_bytes(folder / "a.json", b"other", overwrite=False)
    assert (folder / "a.json").read_bytes() == b"content"


def test_another_machine_sees_the_same_files(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    for name in ("config.json", "events/00000000.json", "weights/abc.safetensors", "trials/000001/c.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / name, name.encode())
    other = other_machine(url, monkeypatch)
    names = {path.relative_to(other).as_posix() for path in other.rglob("[!.]*") if path.is_file()}
    assert names == {"config.json", "events/00000000.json", "weights/abc.safetensors"}
    assert all((other / name).read_bytes() == name.encode() for name in names)
    fetch(other / "trials/000001/c.pt")  # by the trial that goes on from it
    assert (other / "trials/000001/c.pt").read_bytes() == b"trials/000001/c.pt"


def test_a_copy_that_was_left_behind_is_brought_up_to_date(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    folder.mkdir(parents=True)
    atomic_write_bytes(folder / "config.json", b"old")
    atomic_write_bytes(folder / "gone.json", b"old")
    place = Place(url, "config.json")
    place.write(b"new")
    Place(url, "gone.json").remove()
    (folder / "never-recorded.json").write_bytes(b"of a write that failed")
    update(folder)
    assert {path.name: path.read_bytes() for path in folder.glob("[!.]*")} == {"config.json": b"new"}


def test_what_never_changes_is_fetched_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    (folder / "events").mkdir(parents=True)
    for number in range(3):
        atomic_write_bytes(folder / "events" / f"{number}.json", b"event")
    read: list[str] = []
    whole = Place.read

    def counted(place: Place) -> tuple[bytes, Version] | None:
        read.append(place.key)
        return whole(place)

    monkeypatch.setattr(Place, "read", counted)
    (folder / "events" / "1.json").unlink()
    update(folder)
    assert read == ["events/1.json"]


def test_weights_are_fetched_by_whoever_reads_them(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    (folder / "weights").mkdir(parents=True)
    other = other_machine(url, monkeypatch)  # which made its copy before the weights were there
    monkeypatch.setenv(COPIED, os.environ[COPIED])
    assert not (other / "weights" / "a.safetensors").exists()
    Place(url, "weights/a.safetensors").write(_saved(folder))
    state, notes = load_weights(other / "weights" / "a.safetensors")
    assert torch.equal(state["x"], torch.arange(3.0)) and notes == {"n": 1}


def _saved(folder: Path) -> bytes:
    path = folder.parent / "elsewhere.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, {"x": torch.arange(3.0)}, {"n": 1})
    return path.read_bytes()


def test_a_file_of_weights_can_be_named_by_its_url(url: str, tmp_path: Path) -> None:
    Place(url, "base.safetensors").write(_saved(local_path(url)))
    state, _ = load_weights(read_path(f"{url}/base.safetensors"))
    assert list(state) == ["x"]


def test_removing_goes_to_the_store_as_well(url: str) -> None:
    folder = local_path(url)
    (folder / "trials" / "000001").mkdir(parents=True)
    for name in ("trials/000001/a", "trials/000001/b", "kept"):
        atomic_write_bytes(folder / name, b"")
    discard(folder / "trials" / "000001")
    discard(folder / "absent")
    assert [found.name for found in Place(url, "").files()] == ["kept"]
    assert not (folder / "trials" / "000001").exists()
    discard(folder / "kept")
    assert not list(Place(url, "").files()) and not (folder / "kept").exists()
    fetch_changed(folder / "kept")
    assert not (folder / "kept").exists()


def test_empty_objects_that_mark_folders_are_no_files(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.create(local_path(url) / "teachers", {}).close()
    connection = http.client.HTTPConnection(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"))
    for marker in ("/", "/teachers/", "/empty/"):
        connection.request("PUT", f"/{url.removeprefix('s3://')}{marker}")
        assert connection.getresponse().read() == b""
    Place(url, "nothing.txt").write(b"")
    other = other_machine(url, monkeypatch)
    assert {found.name for found in Place(url, "").files()} == {"teachers/config.json", "nothing.txt", "empty"}
    assert is_run(other / "teachers") and (other / "nothing.txt").read_bytes() == b""


def test_a_reader_does_not_disturb_the_driver_on_its_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    (folder / "ray").mkdir(parents=True)
    for name in ("ray/state", ".event.json.tmp", "found.json"):
        (folder / name).write_bytes(b"about to be written")
    other = read_by_another_process(url, monkeypatch)
    assert other != folder and len([path for path in folder.rglob("*") if path.is_file()]) == 3
    update(folder)
    assert not (folder / "found.json").exists() and (folder / ".event.json.tmp").exists()


def test_a_driver_reads_what_it_wrote_in_its_own_copy(url: str) -> None:
    folder = local_path(url)
    for name in (url, str(folder)):
        assert read_path(f"{name}/base.safetensors") == folder / "base.safetensors"
        assert local_path(f"{name}/distiller") == folder / "distiller"
    assert copies() == {str(folder): url}
    assert read_path(f"{url}-2/pool") != folder.with_name("a-2") / "pool"


def test_the_path_of_a_copy_means_its_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_path(url)
    monkeypatch.setenv(COPIED, "{}")
    assert named(folder) == str(folder)
    assert local_path(str(folder)) == folder and named(folder) == url
    assert named(local_path(str(read_path(url)))) == url


def test_a_file_is_moved_in_the_store_as_well(url: str) -> None:
    folder = local_path(url)
    (folder / "base").mkdir(parents=True)
    atomic_write_bytes(folder / "base" / "abc.safetensors", b"weights")
    move(folder / "base" / "abc.safetensors", folder / "base.safetensors")
    assert [found.name for found in Place(url, "").files()] == ["base.safetensors"]
    assert (folder / "base.safetensors").read_bytes() == b"weights" and not list((folder / "base").glob("[!.]*"))


def test_a_name_that_says_nothing_of_its_content_is_looked_up(url: str) -> None:
    folder = local_path(url)
    folder.mkdir(parents=True)
    atomic_write_bytes(folder / "base.safetensors", b"of the run that was here before")
    Place(url, "base.safetensors").write(b"of this run")  # by a driver elsewhere
    fetch_changed(folder / "base.safetensors")
    assert (folder / "base.safetensors").read_bytes() == b"of this run"


def test_a_machine_that_is_short_of_space_keeps_what_it_uses(url: str) -> None:
    run = local_path(url)
    for name in ("trials/000001", "weights"):
        (run / name).mkdir(parents=True)
    for name in ("trials/000001/checkpoint.pt", "weights/a.safetensors", "weights/b.safetensors"):
        atomic_write_bytes(run / name, name.encode())
    long_ago = time.time() - 1e5
    for name in ("a", "b"):
        os.utime(run / "weights" / f"{name}.safetensors", (long_ago, long_ago))
    fetch_changed(run / "weights" / "b.safetensors")
    spare(run, run / "trials" / "000001")
    assert [path.name for path in (run / "weights").iterdir()] == ["b.safetensors"]
    assert not (run / "trials" / "000001").exists() and len(list(Place(url, "").files())) == 3
    fetch_changed(run / "weights" / "a.safetensors")
    assert (run / "weights" / "a.safetensors").read_bytes() == b"weights/a.safetensors"


class Forbidden(BaseHTTPRequestHandler):
    """A store that permits nothing."""

    def _refuse(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"<Error><Code>AccessDenied</Code></Error>")

    do_GET = do_PUT = do_HEAD = do_POST = _refuse  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_mistakes_say_what_to_do(url: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="there is no such bucket"):
        local_path("s3://no-such-bucket/x")
    for wrong in ("ftp://host/x", "s3://", "s3:///"):
        with pytest.raises(ValueError, match="expected a folder in an object store"):
            local_path(wrong)
    with pytest.raises(LedgerError, match="found no config"):
        Ledger.open(local_path(url))


def test_a_store_that_forbids_or_cannot_be_reached(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 1)
    refusing = HTTPServer(("127.0.0.1", 0), Forbidden)
    threading.Thread(target=refusing.serve_forever, daemon=True).start()
    for port, expected in ((refusing.server_port, "not permitted"), (free_port(), "cannot be used")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        object_store._store.cache_clear()
        with pytest.raises(StoreError, match=expected) as caught:
            local_path(url)
        assert "AWS_SECRET_ACCESS_KEY" in str(caught.value) or "network" in str(caught.value)
        assert "test" not in str(caught.value).split("AWS_")[0], "no secret in a message"
    refusing.shutdown()
    refusing.server_close()
    object_store._store.cache_clear()
