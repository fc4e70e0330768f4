"""upgrade_detector.py as a user runs it, and what it leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import analyze
import compare_upgrades
import measure_inheritance
import pandas as pd
import pytest
import ray
import torch
import train_teacher_pool
import upgrade_detector
from chaos import check
from detector_cases import small_spec, stirred
from finishing import doubts, excess
from joint_presets import joint_preset_of
from joint_runs import PHASES, SEARCHES, joint_task, limits, locks_name, warn_of_another_machine
from options import main_of
from pool_presets import pool_preset_of
from runs import processor, start_or_resume
from upgrading import (
    Stages,
    given_base,
    pool_arguments,
    pool_identity,
    say_accuracy,
    searched_inputs,
    usable_formula,
)

from autodet.data import read_dataset, write_shapes
from autodet.detectors import DetectorSpec, build, detect, load_detector, save_detector
from autodet.detectors.spec import COCO_LABELS
from autodet.detectors.weights import weights_hash
from autodet.distill import Formula
from autodet.event_files import new_events
from autodet.joint import Examiner, JointBench
from autodet.joint.bench import LOCKS
from autodet.ledger import Ledger
from autodet.records import Cost, RelativeCost, records_from
from autodet.results.lineage import front, lineage
from autodet.search import Ask, JointSearch, JointSettings, Student, joint_phases
from autodet.teachers import PoolSpace
from autodet.teachers.pool import MemberRow, save_members, save_pool
from autodet.training import Task, TrainSettings

SPACE = PoolSpace.parse("basic-=:8..16/8x1-16x1..2-16x1-16x1@64")
POOL_EPOCHS = 5


def given(folder: Path, spec: DetectorSpec) -> list[str]:
    """Options that name a base, a pool and data, so that only the search is left to run."""
    torch.manual_seed(0)
    data = write_shapes(folder / "data", 8, 4, 4, size=(96, 64), seed=3)
    save_detector(folder / "base.safetensors", stirred(spec))
    notes = {"recipe": {"epochs": POOL_EPOCHS}}
    save_pool(folder / "pool", stirred(replace(spec, body=SPACE.largest.body)), SPACE, notes)
    cost = Cost(1.0, 1.0, "cpu", 1, 1, 0.01, 0.01)
    save_members(folder / "pool", [MemberRow(SPACE.smallest, 0.1, 0.1, "val", cost)])
    options = ["--data", str(data), "--base", str(folder / "base.safetensors"), "--pool", str(folder / "pool")]
    return [*options, "--formula", "global: l2 * 0.1", "--cache", str(folder / "cache"), "--preset", "smoke"]


@pytest.fixture(scope="module")
def upgraded(ray_cluster: None, tiny_spec: DetectorSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose driver was killed on its way. (Nodes are lost in tests/chaos.)"""
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("runs") / "upgrade"
    options = [*given(inputs, tiny_spec), "--budget", "5", "--latency-target", "0.95", "--epochs", "2"]
    command = [sys.executable, upgrade_detector.__file__, *options, "--workers", "1", "--output", str(folder)]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([*command, "--address", "auto"], env=environment)
    while sum(event.kind == "told" for event in new_events(folder, 0)) < 3:
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    before = Ledger.open(folder).events()
    assert upgrade_detector.main(["--resume", str(folder)]) == 0
    assert Ledger.open(folder).events()[: len(before)] == before
    return folder


def test_every_candidate_ends_once(upgraded: Path) -> None:
    assert len(check(upgraded)) == 7
    events = Ledger.open(upgraded).events()
    assert [event.id for event in events if event.kind == "told"] == list(range(7))
    records = records_from(events)
    assert all(record.status == "completed" for record in records)
    assert [record.epochs for record in records] == [0, 0] + 5 * [2]
    assert [record.phase for record in records[:3]] == ["base", "founders", "settings"]
    for record in records[2:]:
        path = lineage(records, record.id)
        before = POOL_EPOCHS if path[0].id == 1 else 0  # the founder has the pool's epochs
        assert record.student is not None and record.student["epochs"] == before + 2 * (len(path) - 1)
        assert record.student["weights"] == path[-2].weights


def test_the_disk_holds_the_front_and_the_base_alone(upgraded: Path) -> None:
    records = records_from(Ledger.open(upgraded).events())
    named = {record.weights for record in front(records)} | {record.weights for record in records[:2]}
    final = json.loads((upgraded / "final.json").read_text())
    named.add(records[final["derived"]].weights)
    kept = {path.stem for path in (upgraded / "weights").glob("*.safetensors")}
    assert kept == named
    assert not list(LOCKS.glob(f"*{locks_name(upgraded)}"))
    for hash in kept:
        detector, _ = load_detector(upgraded / "weights" / f"{hash}.safetensors")
        assert weights_hash(detector.model.state_dict()) == hash


def test_the_derived_detector_gives_what_the_run_reported(upgraded: Path) -> None:
    final = json.loads((upgraded / "final.json").read_text())
    row = final["rows"][-1]
    assert final["rows"][0]["detector"] == "base" and row["detector"] == "derived"
    path = lineage(records_from(Ledger.open(upgraded).events()), final["derived"])
    before = f"{POOL_EPOCHS} in the pool" if path[0].id == 1 else "given"
    assert row["epochs"] == before + (f" + {2 * (len(path) - 1)}" if len(path) > 1 else "")
    detector, notes = load_detector(upgraded / "derived.safetensors")
    record = records_from(Ledger.open(upgraded).events())[final["derived"]]
    assert notes["val_ap"] == record.ap and notes["candidate"] == record.id
    options = Ledger.open(upgraded).config["options"]
    task = joint_task(
        upgrade_detector.parse(["--resume", str(upgraded)]),
        joint_preset_of(options["preset"], options["family"]),
        Path(options["data"]),
        upgraded / "base.safetensors",
        None,
        upgraded,
    )
    bench = JointBench(replace(task, quiet=None)).bench(detector.spec)
    assert bench.measure(detector).ap == pytest.approx(record.ap, abs=1e-4)
    assert len(detect(detector, [torch.rand(3, 64, 96)])) == 1


def test_report_table_and_onnx_are_there(upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (upgraded / "report.html").read_text()
    assert "derived" in page and "Lineage" in page and "data:image/png" in page
    assert (upgraded / "derived.onnx").exists(), json.loads((upgraded / "final.json").read_text())["usage"][-1]
    assert analyze.main([str(upgraded)]) == 0
    assert "How to use it" in (upgraded / "report.html").read_text()
    assert "completed" in capsys.readouterr().out


def test_what_inheriting_saves_is_measured(upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_inheritance.main(["--run", str(upgraded), "--children", "2"]) == 0
    printed = capsys.readouterr().out
    assert "the aim is AP" in printed and "scratch over inherited, of these" in printed and "prune_" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--base", "other.safetensors"], "knows the labels"),
        (["--pool", "data"], "no complete pool"),
        (["--formula", "global: nonsense"], "nonsense"),
        (["--latency-target", "fast"], "--latency-target as 0.6"),
        (["--latency-target", "0"], "above 0"),
        (["--limit", "macs_g=3"], "--limit as macs_g<=1.5"),
        (["--limit", "watts<=3"], "watts"),
        (["--limit", "latency_ratio<=0.9"], "of latency it is --latency-target"),
        (["--limit", "macs_g<=nan"], "above 0"),
        (["--cost", "nowhere.py:ms"], "nowhere.py"),
        (["--cost", "broken.py:ms"], "broken.py cannot be run: ZeroDivisionError"),
        (["--cost", "other.safetensors:ms"], "no Python file"),
        (["--base", "renamed.safetensors"], "where names alone differ"),
        (["--base-size", "320"], "says its size itself"),
        (["--search", "pipeline", "--teachers", "none"], "teachers of its own"),
        (["--formula-rate", "3"], "from 0 to 1"),
        (["--formula", "global: l2 * nonsense; " + "global: l2; " * 40], "nonsense"),
        (["--latency-target", "60"], "at most 1"),
        (["--latency-target", "nan"], "above 0"),
        (["--search", "random", "--teachers", "largest"], "teachers of its own"),
        (["--teachers", "none"], "leave them out"),
        (["--search", "pipeline", "--budget", "2"], "three phases"),
        (["--preset", "gpu"], "needs a GPU"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_found_before_anything_is_trained(
    arguments: list[str],
    message: str,
    tiny_spec: DetectorSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = given(tmp_path, tiny_spec)
    other = tiny_spec.with_labels([(index, f"class {index}") for index in range(1, 6)])
    save_detector(tmp_path / "other.safetensors", stirred(other))
    renamed = tiny_spec.with_labels([(id, name + "s") for id, name in tiny_spec.labels])
    save_detector(tmp_path / "renamed.safetensors", stirred(renamed))
    (tmp_path / "broken.py").write_text("1 / 0")
    assert main_of(lambda _: upgrade_detector.main([*options, "--output", "new", *arguments])) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_the_smallest_budgets_are_searches() -> None:
    for name in SEARCHES:
        least = 3 if name == "pipeline" else 1
        assert sum(phase.budget for phase in PHASES[name](least)) == least


def test_a_base_needs_the_data_that_it_is_for(tmp_path: Path, tiny_spec: DetectorSpec) -> None:
    save_detector(tmp_path / "base.safetensors", stirred(tiny_spec))
    options = upgrade_detector.parse(["--base", str(tmp_path / "base.safetensors")])
    with pytest.raises(ValueError, match=r"base.safetensors without --data"):
        given_base(options, tiny_spec.labels)


def test_cocos_names_must_fit_its_raw_ids(tmp_path: Path, tiny_spec: DetectorSpec) -> None:
    save_detector(tmp_path / "coco.safetensors", stirred(tiny_spec.with_labels(COCO_LABELS)))
    options = upgrade_detector.parse(["--base", str(tmp_path / "coco.safetensors"), "--data", str(tmp_path)])
    data = [(90, "toothbrush"), (1, "Person"), (3, "car")]
    detector = given_base(options, data)
    assert detector is not None and detector.spec.labels == tuple(data)
    known = load_detector(tmp_path / "coco.safetensors")[0].model.state_dict()
    scores = detector.model.state_dict()["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(scores, known["roi_heads.box_predictor.cls_score.weight"][[0, 90, 1, 3]])
    with pytest.raises(ValueError, match=r"the data has \(2, 'WBC'\)"):
        given_base(options, [(1, "person"), (2, "WBC")])


def test_a_formulas_terms_that_cannot_be_compared_are_left_out(tmp_path: Path, tiny_spec: DetectorSpec) -> None:
    given(tmp_path, tiny_spec)
    base = tmp_path / "fcos.safetensors"
    save_detector(base, stirred(small_spec("fcos")))
    text = "global: l2 * 0.1; logits.roi: l2 * 1"
    assert usable_formula(Formula.parse(text), tmp_path / "base.safetensors", tmp_path / "pool") == Formula.parse(text)
    found = usable_formula(Formula.parse(text), base, tmp_path / "pool")
    assert [term.input for term in found.terms] == ["global"]
    with pytest.raises(ValueError, match="nothing in it can be compared"):
        usable_formula(Formula.parse("logits.roi: l2 * 1"), base, tmp_path / "pool")
    assert usable_formula(Formula(()), base, tmp_path / "pool") == Formula(())


@pytest.mark.parametrize("family", ["faster_rcnn", "fcos", "mask_rcnn"])
def test_a_pool_sees_what_the_base_sees_and_all_inputs_can_be_searched(
    family: str, tmp_path: Path, tiny_spec: DetectorSpec
) -> None:
    """Also where the base's images are of another shape than the preset's."""
    base, preset = small_spec(family, tiny_spec.labels, max_size=107), joint_preset_of("cpu", family)
    save_detector(tmp_path / "base.safetensors", build(base))
    data = write_shapes(tmp_path / "data", 4, 2, size=(96, 64), seed=3)
    options = upgrade_detector.parse(["--data", str(data), "--preset", "cpu", "--cache", str(tmp_path / "cache")])
    arguments = pool_arguments(options, preset, tmp_path / "base.safetensors", data, tmp_path / "run")
    parsed = train_teacher_pool.parse(arguments)
    teacher = train_teacher_pool.pool_task(parsed, pool_preset_of("cpu", family)).task.student.at_size(base.min_size)
    assert (teacher.min_size, teacher.max_size) == (64, 107)
    assert searched_inputs(preset, base, teacher) == list(preset.inputs_of(family))


def test_inputs_that_a_given_pool_lacks_are_left_out_and_none_at_all_is_refused() -> None:
    preset = joint_preset_of("cpu", "faster_rcnn")
    assert searched_inputs(preset, small_spec("faster_rcnn"), small_spec("fcos")) == ["global"]
    with pytest.raises(ValueError, match="Name one by --formula"):
        searched_inputs(joint_preset_of("smoke", "faster_rcnn"), small_spec("faster_rcnn"), small_spec("fcos"))


def test_a_given_base_is_measured_and_doubted_where_it_finds_nothing(
    tmp_path: Path, tiny_spec: DetectorSpec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = write_shapes(tmp_path / "data", 4, 2, size=(96, 64), seed=3)
    task = Task(str(data), str(tmp_path / "cache"), tiny_spec, TrainSettings(1, 4))
    say_accuracy(stirred(tiny_spec), task)
    assert "AP 0.0" in caplog.text and "finds hardly anything" in caplog.text and "--base-size 64" in caplog.text


def test_a_pool_that_saw_other_images_is_mentioned(
    tmp_path: Path, tiny_spec: DetectorSpec, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_shapes(tmp_path / "data", 4, 2, size=(96, 64), seed=3)
    for seen, said in ((read_dataset(data)["train"].annotations_hash, False), ("another", True)):
        caplog.clear()
        save_pool(tmp_path / seen, stirred(replace(tiny_spec, body=SPACE.largest.body)), SPACE, {"data": seen})
        cost = Cost(1.0, 1.0, "cpu", 1, 1, 0.01, 0.01)
        save_members(tmp_path / seen, [MemberRow(SPACE.smallest, 0.1, 0.1, "val", cost)])
        pool_identity(tmp_path / seen, tiny_spec.labels, 2, data)
        assert ("trained on other images" in caplog.text) == said
        caplog.clear()
        pool_identity(tmp_path / seen, tiny_spec.labels, 0, data)
        assert not caplog.text  # as teachers they may have seen what they like


def test_a_machine_of_another_kind_is_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with start_or_resume(tmp_path / "run", {}) as ledger:
        warn_of_another_machine(ledger)
        assert not caplog.text and processor()
        monkeypatch.setattr("joint_runs.processor", lambda: "a slower one")
        warn_of_another_machine(ledger)
        assert "will be on a slower one" in caplog.text


def test_where_no_candidate_is_within_the_limits_the_closest_is_kept(tiny_spec: DetectorSpec) -> None:
    def cost(ratio: float, macs: float) -> RelativeCost:
        return RelativeCost(ratio, 0.01, 10 * ratio, macs, 1.0)

    base = Student(tiny_spec, (), None, "base", None, 0, cost(1.0, 1.0), 0)
    slow, near = (replace(base, weights=name, cost=value) for name, value in (("a", cost(1.8, 3)), ("b", cost(0.7, 1))))
    settings = JointSettings(joint_phases(5), 1, {"latency_ratio": 0.5, "macs_g": 0.8})
    search = JointSearch(base, lambda *_: "no", settings, 0, Formula(()), SPACE, founders=(slow, near))
    for ap, name in ((0.5, "base"), (0.6, "a"), (0.3, "b")):
        ask = search.ask()
        assert isinstance(ask, Ask)
        search.tell(ask.id, ap, "completed", name)
    assert [excess(search, point) for point in search.front()] == pytest.approx([1.4, 2.0, 3.75])


def test_a_derived_detector_that_is_worse_on_test_is_said_to_be() -> None:
    rows = [{"detector": "base", "AP": 50.0}, {"detector": "derived", "AP": 49.5}]
    assert "AP 49.5 against 50.0" in doubts(rows)[0]
    assert doubts(rows[::-1]) == []


def test_a_stages_seconds_are_noted_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upgrading.TICK", 0.05)
    stages = Stages(tmp_path)
    with stages.timed("search"):
        time.sleep(0.4)
        noted = Stages(tmp_path).seconds["search"]  # what a killed sitting leaves
        assert noted >= 0.1
    with stages.timed("search"):
        pass
    assert Stages(tmp_path).seconds["search"] >= 0.4


def test_a_target_is_a_share_or_milliseconds() -> None:
    def of(*arguments: str) -> dict[str, float]:
        return limits(upgrade_detector.parse(list(arguments)), base_ms=20.0)

    assert of() == {"latency_ratio": 1.0}
    assert of("--latency-target", "0.6") == {"latency_ratio": 0.6}
    assert of("--latency-target", "55%") == {"latency_ratio": 0.55}
    assert of("--latency-target", "12ms") == {"latency_ratio": 0.6}
    assert of("--limit", "macs_g<=1.5", "--limit", "params_m<=2")["params_m"] == 2.0


@pytest.mark.parametrize("arm", compare_upgrades.ARMS)
def test_every_arm_of_the_comparison_is_a_run_that_can_start(arm: str, tiny_spec: DetectorSpec, tmp_path: Path) -> None:
    options = compare_upgrades.parse([*given(tmp_path, tiny_spec), "--workers", "1"])
    found = upgrade_detector.parse(compare_upgrades.arguments(tmp_path / "new", arm, 3, options))
    upgrade_detector.check(found)
    assert (found.seed, found.budget, found.latency_target, found.workers) == (3, 18, "0.75", 1)
    assert found.founders == (1 if arm == "founders" else 0)
    assert (found.teachers == "none") == (found.pool is None) == (arm == "no-teacher")


def test_finished_arms_are_compared(
    upgraded: Path, tiny_spec: DetectorSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "comparison"
    for arm, gain in (("joint", 0.0), ("pipeline", 2.5)):
        for seed in (0, 1):
            shutil.copytree(upgraded, output / f"{arm}-{seed}")
            final = json.loads((upgraded / "final.json").read_text())
            final["rows"][-1]["AP"] += gain * seed
            (output / f"{arm}-{seed}" / "final.json").write_text(json.dumps(final))
    options = [*given(tmp_path, tiny_spec), "--output", str(output), "--seeds", "2", "--arms", "joint", "pipeline"]
    assert compare_upgrades.main(options) == 0
    table = pd.read_csv(output / "arms.csv")
    aps = dict(zip(zip(table["arm"], table["seed"], strict=True), table["AP"], strict=True))
    assert aps["pipeline", 1] - aps["joint", 1] == pytest.approx(2.5)
    records = records_from(Ledger.open(upgraded).events())
    within = [record.ap for record in records if (record.student or {})["cost"]["latency_ratio"] <= final["target"]]
    best = max((100 * ap for ap in within if ap is not None), default=math.nan)
    assert table["AP val"].to_list() == pytest.approx(4 * [best], nan_ok=True)
    # The differences are 0 and 2.5: their mean is 1.25, and the t-interval of two values is 12.706 standard errors.
    assert "+1.2 [-14.6, +17.1]" in capsys.readouterr().out


def test_a_finished_run_is_only_shown_again(
    upgraded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its choice, timed anew, is beyond the limit."""
    before, final = Ledger.open(upgraded).events(), json.loads((upgraded / "final.json").read_text())
    cost = Examiner.cost

    def slower(self: Examiner, *arguments: Any) -> RelativeCost:
        return replace(cost(self, *arguments), latency_ratio=1.5)

    monkeypatch.setattr(Examiner, "cost", slower)
    assert upgrade_detector.main(["--resume", str(upgraded)]) == 0
    assert Ledger.open(upgraded).events() == before
    assert load_detector(upgraded / "derived.safetensors")[1]["candidate"] == final["derived"]
    again = json.loads((upgraded / "final.json").read_text())
    assert again["derived"] == final["derived"] and again["rows"][0]["AP"] == final["rows"][0]["AP"]
    assert str(upgraded / "report.html") in capsys.readouterr().out
