import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from autodet.lease import LAPSE_SECONDS, LONG_AGO, Lease, LeaseHeld, LeaseLost


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def abandoned(folder: Path, **changes: Any) -> None:
    """A lease file as a driver that was killed leaves it."""
    with Lease(folder):
        content = (folder / "lease.json").read_text()
    (folder / "lease.json").write_text(content)
    edited(folder, **changes)


def finished_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_second_driver_is_refused_with_who_and_when(tmp_path: Path) -> None:
    with Lease(tmp_path), pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on .*retry in \d+ s"):
        Lease(tmp_path)


def test_released_lease_is_free(tmp_path: Path) -> None:
    with Lease(tmp_path):
        pass
    assert not (tmp_path / "lease.json").exists()
    with Lease(tmp_path) as lease:
        lease.check()


def test_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    abandoned(tmp_path, pid=finished_process())
    with Lease(tmp_path) as lease:
        lease.check()


def test_zombie_counts_as_dead(tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    stat = Path(f"/proc/{process.pid}/stat")
    deadline = time.monotonic() + 10
    while (fields := stat.read_text().rpartition(")")[2].split())[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    abandoned(tmp_path, pid=process.pid, start=int(fields[19]))
    with Lease(tmp_path):
        process.wait()


def test_number_given_to_another_process_is_taken_over(tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    abandoned(tmp_path, start=1)
    with Lease(tmp_path) as lease:
        lease.check()


@pytest.mark.parametrize(("age", "least"), [(20.0, 0.5), (-20.0, 0.5), (LONG_AGO + 1, 0.0)])
def test_another_machine_holds_a_lease_as_long_as_it_renews_it(tmp_path: Path, age: float, least: float) -> None:
    """Only the watching machine's own clock counts, unless the lease is very old."""
    abandoned(tmp_path, host="elsewhere", machine="elsewhere", pid=finished_process(), heartbeat=time.time() - age)
    started = time.monotonic()
    with Lease(tmp_path, lapse_seconds=0.5) as lease:
        assert least <= time.monotonic() - started < least + 5
        lease.check()


def test_a_process_of_this_machine_that_hangs_loses_its_lease_by_the_clock(tmp_path: Path) -> None:
    abandoned(tmp_path, pid=os.getpid(), heartbeat=time.time() - 20)
    with pytest.raises(LeaseHeld, match=r"which renewed its lease 20 s ago; .*retry in (9|10) s"):
        Lease(tmp_path)
    edited(tmp_path, heartbeat=time.time() - LAPSE_SECONDS - 1)
    with Lease(tmp_path) as lease:
        lease.check()


def test_holder_notices_that_it_was_replaced(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        edited(tmp_path, token="other", host="elsewhere")
        with pytest.raises(LeaseLost, match="elsewhere"):
            lease.check()
    assert (tmp_path / "lease.json").exists(), "another driver's lease must not be given back"


def test_missing_lease_is_a_lost_lease(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        (tmp_path / "lease.json").unlink()
        with pytest.raises(LeaseLost, match="is gone"):
            lease.check()


def test_is_renewed_in_the_background(tmp_path: Path) -> None:
    with Lease(tmp_path, renew_seconds=0.02):
        first = json.loads((tmp_path / "lease.json").read_text())["heartbeat"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / "lease.json").read_text())["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_damaged_lease_file_does_not_lock_the_run_for_ever(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text('{"host":')
    with Lease(tmp_path) as lease:
        lease.check()


def test_a_driver_that_lost_its_lease_is_told_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long stage may write into the run without asking, and two would then do so."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        lease = Lease(tmp_path, renew_seconds=0.05)
        edited(tmp_path, token="another's")
        deadline = time.monotonic() + 10
        while not told.is_set():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lease.release()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "lease.json").exists()  # the other's


@pytest.mark.parametrize("behind", [-300.0, 31.0, 300.0])
def test_a_machine_whose_clock_is_wrong_keeps_its_lease_while_it_renews_it(tmp_path: Path, behind: float) -> None:
    abandoned(tmp_path, machine="another", heartbeat=time.time() - behind)
    stopped = threading.Event()

    def renew() -> None:
        while not stopped.wait(0.05):
            edited(tmp_path, heartbeat=time.time() - behind)

    other = threading.Thread(target=renew)
    other.start()
    try:
        with pytest.raises(LeaseHeld, match="found process"):
            Lease(tmp_path, lapse_seconds=2.0)
    finally:
        stopped.set()
        other.join()
    with Lease(tmp_path, lapse_seconds=0.3) as lease:
        lease.check()
