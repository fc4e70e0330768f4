"""train_teacher_pool.py as a user would run it, and its pool as a teacher of another script."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import compare_pool
import measure_pool_costs
import numpy as np
import pandas as pd
import pool_presets
import pytest
import ray
import search_distiller
import teachers
import torch
import train_teacher_pool
from detector_cases import small_spec

from autodet.data.shapes import CATEGORY_IDS
from autodet.detectors import Detector, DetectorSpec, build, load_detector, save_detector
from autodet.detectors.spec import FAMILIES
from autodet.distill import why_incomparable
from autodet.ledger import Ledger
from autodet.records import Metrics
from autodet.runtime.pool_measuring import MEASURED, measure_side_by_side
from autodet.runtime.pool_training import CHECKPOINT, PROGRESS, TRAIN_FOLDER, Workers
from autodet.runtime.weight_cache import cache_of_this_node
from autodet.search.session import MachineError
from autodet.teachers import Member, ScheduleError, SpaceError
from autodet.teachers.elastic import member_spec
from autodet.teachers.pool import PoolError, TeacherPool
from autodet.teachers.statistics import measure_statistics, statistics_of
from autodet.teachers.task import PoolBench, PoolTask
from autodet.training import Task, TrainSettings, Workbench

SCHEDULE = "1*largest > 1*sandwich(0.5, 1) > 6*sandwich(1, 1)"
LABELS = tuple((id_, name) for name, id_ in CATEGORY_IDS.items())


def kill_a_worker(folder: Path, after: int, killed: list[int]) -> None:
    """Kill one of Ray Train's workers once some epochs are done."""
    wait_for_epochs(folder, after)
    workers: list[int] = []
    while not workers:  # one that was lost may just be replaced
        pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
        workers = [pid for pid in pids if "RayTrainWorker" in read(pid, "cmdline") and os.getpid() in ancestors(pid)]
    os.kill(workers[-1], signal.SIGKILL)
    killed.append(workers[-1])


def wait_for_epochs(folder: Path, count: int, driver: subprocess.Popen[bytes] | None = None) -> None:
    """Until a training has done some epochs, while its driver runs."""
    while not (folder / PROGRESS).exists() or len((folder / PROGRESS).read_text().splitlines()) < count:
        assert driver is None or driver.poll() is None
        time.sleep(0.05)


def ancestors(pid: int) -> Iterator[int]:
    """The processes that a process comes from: another run's on this machine must not be killed."""
    while pid > 1:
        status = dict(line.split(":", 1) for line in read(pid, "status").splitlines() if ":" in line)
        pid = int(status.get("PPid", 0))
        yield pid


def read(pid: int, name: str) -> str:
    """A file about a process, which may have ended meanwhile."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text()
    return ""


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pool at preset smoke, stopped and damaged on its way.

    Its driver was killed after two epochs, in the middle of writing Ray's list of checkpoints; then its worker, where
    it had had two before.
    """
    folder = tmp_path_factory.mktemp("runs") / "pool"
    cache = str(tmp_path_factory.mktemp("cache"))
    options = ["--preset", "smoke", "--family", "fcos", "--output", str(folder), "--cache", cache]
    # A formula that does not divide by small deviations, so that rounding stays as small as it is.
    options += ["--schedule", SCHEDULE, "--check-every", "3", "--formula", "global: l2 * 0.1", "--workers", "2"]
    script = str(Path(train_teacher_pool.__file__))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([sys.executable, script, *options, "--address", "auto"], env=environment)
    wait_for_epochs(folder, 3, driver)
    driver.kill()
    driver.wait()
    before = (folder / PROGRESS).read_text().splitlines()
    snapshot = folder / TRAIN_FOLDER / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:40])
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(folder, len(before) + 2, killed), daemon=True)
    killer.start()
    assert train_teacher_pool.main(["--resume", str(folder), "--workers", "1"]) == 0
    assert len(killed) == 1
    after = (folder / PROGRESS).read_text().splitlines()
    assert after[: len(before) - 1] == before[:-1]  # seconds included: only what no checkpoint held was trained again
    return folder


def test_a_lost_worker_changes_nothing_and_no_epoch_counts_twice(run: Path) -> None:
    """Two workers, then one, which was lost, against one process that does everything."""
    task = PoolTask.from_json(json.dumps(Ledger.open(run).config["task"]))
    bench = PoolBench(task)
    alone = bench.trainer()
    bench.train(alone, lambda trainer, entry: None)
    history = [json.loads(line) for line in (run / PROGRESS).read_text().splitlines()]
    assert [entry["epoch"] for entry in history] == list(range(1, task.task.settings.epochs + 1))
    assert history[-1]["ap"].keys() == {"largest", "smallest", "random 1", "random 2"}
    for ours, theirs in zip(history, alone.history, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)
    found = TeacherPool.open(run / "pool").extract(task.space.largest).model
    for name, parameter in alone.member(task.space.largest).model.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=0, atol=1e-5)


def test_a_finished_run_keeps_no_checkpoints(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "pool", "pictures", PROGRESS, MEASURED}
    assert not [name for name in names if name == CHECKPOINT or name.startswith(TRAIN_FOLDER)]


def test_a_pool_is_trained_measured_and_drawn(run: Path) -> None:
    pool = TeacherPool.open(run / "pool")
    assert pool.notes["schedule"] == SCHEDULE
    members = pd.read_csv(run / "pool" / "members.csv")
    assert members["member"].iloc[0] == str(pool.space.smallest)
    assert members["member"].iloc[-1] == str(pool.space.largest)
    assert len(members) == 4 and members["params_m"].is_monotonic_increasing
    assert (members[["latency_ms", "macs_g"]] > 0).all().all() and members["ap"].between(0, 1).all()
    drawn = {path.stem for path in (run / "pictures").iterdir()}
    assert drawn == {"members", "schedule", "statistics", "training"}


def test_a_finished_pool_is_only_shown_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "pool").iterdir()}
    assert train_teacher_pool.main(["--resume", str(run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "pool").iterdir()} == before
    assert "192 members" in capsys.readouterr().out


def test_members_are_measured_through_the_cache_and_none_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same AP as from the pool's folder without Ray; after a stop only those that are missing."""
    task = PoolTask.from_json(json.dumps(Ledger.open(run).config["task"]))
    pool, bench = TeacherPool.open(run / "pool"), PoolBench(task)
    members = [task.space.smallest, task.space.largest]
    found = measure_side_by_side(task, tmp_path, run / "pool", members)
    for member, (ap, before, masks) in found.items():
        assert masks is None and ap == bench.bench.measure(pool.take(member, bench.bench.train_loader)).ap
        assert before == bench.bench.measure(pool.extract(member)).ap
    assert pool.hash in ray.get(cache_of_this_node().facts.remote())["kept"]
    # Detectors as small as these find nothing: that they were the right ones is seen by the statistics they left.
    monkeypatch.setattr("autodet.teachers.pool.measure_statistics", None)
    for member in members:
        kept = pool.take(member, bench.bench.train_loader, Path(task.task.cache))
        anew = pool.extract(member)
        measure_statistics(anew, bench.bench.train_loader)
        for name, value in statistics_of(anew).items():
            torch.testing.assert_close(kept.model.get_buffer(name), value, rtol=1e-4, atol=1e-6)
    line = json.dumps({"member": str(members[0]), "ap": 0.75, "ap_before": 0.5})
    (tmp_path / MEASURED).write_text(line + "\n")
    assert measure_side_by_side(task, tmp_path, run / "pool", members) == found | {members[0]: (0.75, 0.5, None)}


def test_a_member_that_cannot_be_measured_stops_with_its_cause(run: Path, tmp_path: Path) -> None:
    task = PoolTask.from_json(json.dumps(Ledger.open(run).config["task"]))
    with pytest.raises(MachineError, match=r"measuring basic-8.* failed: .* is no complete pool"):
        measure_side_by_side(task, tmp_path, tmp_path, [task.space.smallest])


def test_members_are_compared_with_detectors_trained_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the table is of these weights, on test; a resumed comparison trains nothing again.

    Detectors as small as these find nothing, so in place of AP stands a number that tells weights apart.
    """

    def fingerprint(bench: Workbench, detector: Detector) -> Metrics:
        assert bench.task.split == "test"
        return Metrics(ap=sum(float(value.double().abs().mean()) for value in detector.model.state_dict().values()))

    monkeypatch.setattr(Workbench, "measure", fingerprint)
    folder = tmp_path / "compared"
    assert compare_pool.main(["--run", str(run), "--members", "2", "--output", str(folder)]) == 0
    table = pd.read_csv(folder / "members.csv")
    pool, task = TeacherPool.open(run / "pool"), task_of(run)
    assert table["member"].tolist() == [str(pool.space.smallest), str(pool.space.largest)]
    files = sorted((folder / "alone").glob("??/*.safetensors"))
    for row, file in zip(table.to_dict("records"), files, strict=True):
        alone, _ = load_detector(file)
        bench = Workbench(replace(task, student=alone.spec, split="test"))
        taken = pool.take(Member.parse(str(row["member"])), bench.train_loader)
        assert (row["alone"], row["pool"]) == (bench.measure(alone).ap, bench.measure(taken).ap)
        assert row["alone"] != row["pool"]
        assert row["gap"] == pytest.approx(row["alone"] - row["pool"])
    assert "mean gap" in capsys.readouterr().out
    written = {file: file.stat().st_mtime_ns for file in files}
    shutil.copytree(run / "pool", tmp_path / "twin" / "pool")
    for _ in range(2):  # the second time, twin is on record
        extended = ["--resume", str(folder), "--also", str(tmp_path / "twin"), "--seeds", "2"]
        assert compare_pool.main(extended) == 0
        assert {file: file.stat().st_mtime_ns for file in files} == written
    found = pd.read_csv(folder / "members.csv")
    assert found["pool"].tolist() == found["twin"].tolist() == table["pool"].tolist()
    first, second = found["alone, training 1"], found["alone, training 2"]
    assert first.tolist() == table["alone"].tolist() and not first.equals(second)
    assert found["alone"].tolist() == pytest.approx(((first + second) / 2).tolist())
    printed = capsys.readouterr().out
    assert "pool minus twin: +0.00 [+0.00, +0.00] points" in printed and "two trainings alone" in printed


def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "new")]
    with pytest.raises(PoolError, match="4 measured members; expected 2 to"):
        compare_pool.main(["--run", str(run), "--members", "5", *output])
    with pytest.raises(PoolError, match=r"no manifest\.json"):
        compare_pool.main(["--run", str(tmp_path), *output])
    with pytest.raises(PoolError, match="expected folders of different names"):
        compare_pool.main(["--run", str(run), "--members", "2", "--also", str(run), str(run), *output])
    assert not (tmp_path / "new").exists()


def test_rank_correlation_has_an_interval_over_members() -> None:
    """Of six members two neighbours in the other order: 14 pairs of 15 agree, one does not."""
    ours, theirs = np.arange(6.0), np.array([0.0, 1.0, 3.0, 2.0, 4.0, 5.0])
    tau, low, high = compare_pool.rank_correlation(ours, theirs)
    assert tau == pytest.approx(13 / 15) and low < tau <= high == pytest.approx(1.0)
    assert np.isnan(compare_pool.rank_correlation(np.zeros(2), np.zeros(2))).all()


def test_costs_are_measured_on_a_finished_pool(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number is there and of the right magnitude; the pool stays as it is."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert measure_pool_costs.main(["--run", str(run), "--batches", "1"]) == 0
    found = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    ratio = {name: float(text.split()[0]) for name, text in found.items() if "[" in text}
    assert 0.3 < ratio["step of the largest in the pool / plain step of the largest"] < 3
    assert 0.3 < ratio["step of the sandwich / plain steps of its members"] < 3
    assert float(found["taking it again"].split()[0]) < 1
    assert float(found["the pool's file"].split()[0]) > float(found["a trial's copy of the smallest member"].split()[0])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def task_of(run: Path) -> Task:
    return Task.from_json(json.dumps(Ledger.open(run).config["task"]["task"]))


@pytest.mark.parametrize("member", ["", ":basic-8:8x1-8x1-16x1-16x1@64"])
def test_a_member_becomes_a_teachers_file(run: Path, member: str, tmp_path: Path) -> None:
    named = Path(f"{run / 'pool'}{member}")
    spec = teachers.named_teacher_spec(named, task_of(run).student, None)
    path = teachers.named_teacher(named, task_of(run), None, tmp_path)
    detector, notes = load_detector(path)
    assert detector.spec == spec and notes["source"] == str(named.resolve())
    pool = TeacherPool.open(run / "pool")
    wanted = Member.parse(member[1:]) if member else pool.space.largest
    assert spec == pool.spec_of(wanted)
    assert teachers.named_teacher(named, task_of(run), None, tmp_path) == path


def test_a_teacher_is_the_best_member_within_a_limit(run: Path) -> None:
    """Against a reading of the table of its own."""
    members = pd.read_csv(run / "pool" / "members.csv")
    limit = members["macs_g"].median()
    best = members[members["macs_g"] <= limit].sort_values("ap").iloc[-1]
    student = task_of(run).student
    spec = teachers.named_teacher_spec(Path(f"{run / 'pool'}:macs_g<={limit}, latency_ms <= 1e9"), student, None)
    assert members.set_index("member").loc[str(Member(spec.body, spec.min_size)), "ap"] == best["ap"]
    assert teachers.named_teacher_spec(run, student, None) == pool_spec(run)  # the run stands for its pool
    identity = teachers.member_identity(Path(f"{run / 'pool'}:macs_g<={limit}"))
    assert identity == {"pool": TeacherPool.open(run / "pool").hash, "member": str(Member(spec.body, spec.min_size))}
    assert teachers.member_identity(run / "config.json") == {}
    for text, reason in [("macs_g<=0", "has macs_g ≤ 0"), ("macs_g<=x", "Expected a limit"), ("ap<=1", "limits of")]:
        with pytest.raises(PoolError, match=reason):
            teachers.named_teacher_spec(Path(f"{run / 'pool'}:{text}"), student, None)


def pool_spec(run: Path) -> DetectorSpec:
    return TeacherPool.open(run / "pool").spec


def test_what_is_no_teacher_is_refused_before_anything_starts(run: Path, tmp_path: Path) -> None:
    student = task_of(run).student
    with pytest.raises(PoolError, match=r"it has no manifest\.json"):
        teachers.named_teacher_spec(tmp_path, student, None)
    with pytest.raises(PoolError, match=r"neither a file .* nor a folder"):
        teachers.named_teacher_spec(Path("nowhere:basic-8:8x1@64"), student, None)
    with pytest.raises(SpaceError, match="is no member of the pool"):
        teachers.named_teacher_spec(Path(f"{run / 'pool'}:basic-9:9x1-8x1-16x1-16x1@64"), student, None)
    options = ["--preset", "smoke", "--family", "fcos", "--output", str(tmp_path / "new"), "--cache", str(tmp_path)]
    with pytest.raises(SpaceError, match="Expected a member as"):
        search_distiller.main([*options, "--teacher", f"{run / 'pool'}:nonsense"])
    assert not (tmp_path / "new").exists()


def test_a_detector_file_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_detector(path, build(small_spec("fcos", LABELS)))
    task = Task("", "", small_spec("fcos", LABELS), TrainSettings(1))
    assert teachers.named_teacher(path, task, None, tmp_path / "run") == path.resolve()


@pytest.mark.parametrize(
    ("option", "error"),
    [
        (["--space", "basic-=:8x1"], SpaceError),
        (["--schedule", "3*dance"], ScheduleError),
        (["--formula", "nose: l2"], ValueError),
        (["--formula", "logits.roi: l2"], ValueError),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    option: list[str], error: type[Exception], run: Path, tmp_path: Path
) -> None:
    cache = Ledger.open(run).config["options"]["cache"]
    options = ["--preset", "smoke", "--family", "fcos", "--cache", cache, "--output", str(tmp_path / "new")]
    with pytest.raises(error):
        train_teacher_pool.main([*options, *option])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("text", "workers"), [("3", 3), ("1-4", (1, 4))])
def test_workers_are_a_number_or_a_range(text: str, workers: object) -> None:
    assert train_teacher_pool.worker_range(text) == workers


def test_of_a_range_ray_is_told_what_this_machine_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    wanted: dict[Workers, int] = {(1, 4): 4, (1, 16): 6, (8, 16): 8, 3: 3}
    assert {workers: train_teacher_pool.cpus_for(workers, 1) for workers in wanted} == wanted
    assert train_teacher_pool.cpus_for((1, 16), 2) == 6 and train_teacher_pool.cpus_for(4, 2) == 8


@pytest.mark.parametrize("text", ["0", "4-1", "a", "1-"])
def test_other_numbers_of_workers_are_refused(text: str) -> None:
    with pytest.raises(Exception, match=r"expected|invalid"):
        train_teacher_pool.worker_range(text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["smoke", "demo", "cpu", "gpu"])
def test_presets_can_be_run(name: str, family: str) -> None:
    preset = pool_presets.pool_preset_of(name, family)
    assert preset.settings.epochs == preset.schedule.epochs and preset.space.count > 100
    largest = replace(preset.detector.at_size(preset.space.largest.size), body=preset.space.largest.body)
    smallest = member_spec(largest, preset.space.smallest)
    assert all(why_incomparable(term.input, smallest, largest) is None for term in preset.formula.terms)
