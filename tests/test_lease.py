import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autodet.lease import LAPSE_SECONDS, Lease, LeaseHeld, LeaseLost


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


def test_other_machine_holds_until_its_lease_lapses(tmp_path: Path) -> None:
    abandoned(tmp_path, host="elsewhere", machine="elsewhere", pid=finished_process(), heartbeat=time.time() - 20)
    with pytest.raises(LeaseHeld, match=r"on elsewhere, which renewed its lease 20 s ago; .*retry in (9|10) s"):
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
