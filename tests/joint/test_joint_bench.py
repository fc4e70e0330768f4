"""Children on real images, without Ray: what they inherit, who teaches them, what is kept, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from detector_cases import stirred

from autodet.data import BatchKey, Loader
from autodet.detectors import Arch, Detector, DetectorSpec, build, load_detector, save_detector
from autodet.detectors.weights import weights_hash
from autodet.distill.formula import Formula
from autodet.joint import Examiner, JointBench, JointTask
from autodet.joint.archive import remove_strays, remove_unneeded
from autodet.joint.bench import GENTLE
from autodet.joint.examine import in_turn
from autodet.morphism.actions import Action, derive, parse_actions
from autodet.records import RelativeCost
from autodet.search import EMPTY, Ask, Candidate, Examined, JointSearch, JointSettings, Student, joint_phases
from autodet.search.session import MachineError
from autodet.teachers import Member, PoolSpace
from autodet.teachers.pool import save_pool
from autodet.teachers.statistics import statistics_of
from autodet.training import Task, Trainer, TrainSettings

COST = RelativeCost(1.0, 0.0, 1.0, 1.0, 1.0)
SPACE = PoolSpace.parse("basic-=:8..16/8x1-16x1..2-16x1-16x1@64")
TAUGHT = Formula.parse("global: l2 * 0.1")
PRUNED = "prune_stage(stage=2, width=12) > resize(pixels=48)"


@pytest.fixture(scope="module")
def pool(tiny_spec: DetectorSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "pool"
    save_pool(folder, stirred(replace(tiny_spec, body=SPACE.largest.body)), SPACE, {})
    return folder


@pytest.fixture(scope="module")
def base(tiny_spec: DetectorSpec) -> Detector:
    return stirred(replace(tiny_spec, body=Arch.parse("basic-8:8x1-16x2-16x1-16x1")))


@pytest.fixture
def task(base: Detector, pool: Path, shapes_folder: Path, tmp_path: Path) -> JointTask:
    settings = TrainSettings(2, 4, "sgd", lr=1e-3, warmup=1)
    weights = tmp_path / "weights"
    weights.mkdir()
    save_detector(weights / f"{hash_of(base)}.safetensors", base)
    plain = Task(str(shapes_folder), str(tmp_path / "cache"), base.spec, settings, weights=str(weights))
    return JointTask(replace(plain, fixed_batches=False, normalise=False), str(pool), "tests")


def hash_of(detector: Detector) -> str:
    return weights_hash(detector.model.state_dict())


def candidate(base: Detector, actions: str = "keep", formula: Formula = EMPTY, inherit: bool = True) -> Candidate:
    parsed = parse_actions(actions)
    spec, _ = derive(parsed, base.spec, base.model.state_dict(), Random(7))
    teacher = SPACE.smallest if formula.terms else None
    return Candidate(formula, inherit, 0, Student(spec, parsed, 0, hash_of(base), teacher, 7, COST, 2))


def test_the_base_is_measured_and_stays_as_it_is(task: JointTask, base: Detector) -> None:
    student = Student(base.spec, (), None, hash_of(base), None, 0, COST, 0)
    outcome = JointBench(task).evaluate(Candidate(EMPTY, True, 0, student), None)
    assert outcome.epochs == 0 and outcome.weights == hash_of(base)
    assert outcome.metrics == JointBench(task).bench(base.spec).measure(base)


def test_an_untrained_child_has_its_parents_weights(task: JointTask, base: Detector) -> None:
    child = JointBench(task).child(candidate(base))
    assert hash_of(child) == hash_of(base)
    fresh = JointBench(task).child(candidate(base, inherit=False))
    assert hash_of(fresh) != hash_of(base)
    assert hash_of(fresh) == hash_of(JointBench(task).child(candidate(base, inherit=False)))


def test_a_child_is_trained_and_kept_under_its_hash(task: JointTask, base: Detector, tmp_path: Path) -> None:
    asked = candidate(base, PRUNED, TAUGHT)
    outcome = JointBench(task).evaluate(asked, tmp_path / "trial")
    assert outcome.epochs == 2 and outcome.notes["lineage_epochs"] == 2
    assert outcome.weights is not None
    kept, notes = load_detector(task.weights_file(outcome.weights))
    assert asked.student is not None and kept.spec == asked.student.spec
    assert hash_of(kept) == outcome.weights and notes["formula"] == str(TAUGHT)
    assert JointBench(task).bench(kept.spec).measure(kept) == outcome.metrics
    again = JointBench(task).evaluate(asked, None)
    assert again.weights == outcome.weights  # the same from the same seed


def test_a_child_whose_weights_fit_is_trained_gently(
    task: JointTask, base: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    class Watched(Trainer):
        def __init__(self, detector: Detector, loader: Loader, settings: TrainSettings, *others: Any) -> None:
            rates.append(settings.lr)
            super().__init__(detector, loader, settings, *others)

    monkeypatch.setattr("autodet.training.task.Trainer", Watched)
    for actions, inherit in (("keep", True), ("resize(pixels=48)", True), ("prune_neck(width=8)", True)):
        JointBench(task).evaluate(candidate(base, actions, inherit=inherit), None)
    JointBench(task).evaluate(candidate(base, "keep", inherit=False), None)
    lr = task.task.settings.lr
    assert rates == pytest.approx([GENTLE * lr, GENTLE * lr, lr, lr])


def test_a_teacher_changes_what_a_child_learns(task: JointTask, base: Detector) -> None:
    taught = JointBench(task).evaluate(candidate(base, formula=TAUGHT), None)
    alone = JointBench(task).evaluate(candidate(base), None)
    assert taught.weights != alone.weights
    bench = JointBench(task)
    teacher = bench._teacher(SPACE.smallest, base.spec)
    assert teacher is not None
    assert bench._teacher(SPACE.smallest, base.spec) is teacher
    assert teacher.detector.spec.body == SPACE.smallest.body


def test_norm_statistics_are_measured_anew_after_a_pruning_alone(
    task: JointTask, base: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr("autodet.joint.bench.measure_statistics", lambda child, loader: measured.append(child.spec))
    JointBench(task).evaluate(candidate(base, "add_block(stage=3)"), None)
    assert measured == []
    asked = candidate(base, "prune_stage(stage=2, width=12)")
    JointBench(task).evaluate(asked, None)
    assert asked.student is not None and measured == [asked.student.spec]


def test_terms_that_need_one_image_size_are_left_out_where_sizes_differ(task: JointTask, base: Detector) -> None:
    formula = Formula.parse("global: l2; localization.dense: iou")
    bench = JointBench(task)
    assert bench.comparable(formula, base.spec, SPACE.smallest) == formula
    assert bench.comparable(formula, base.spec.at_size(48), SPACE.smallest) == Formula.parse("global: l2")


def test_detectors_with_other_numbers_of_the_categories_have_their_own_data(task: JointTask, base: Detector) -> None:
    other = base.spec.with_labels(base.spec.labels[::-1])
    bench = JointBench(task)
    for spec in (base.spec, other, base.spec):
        loader = bench.bench(spec).train_loader
        targets = loader.load(loader.keys(0)[0]).targets
        alone = JointBench(task).bench(spec).train_loader
        again = alone.load(alone.keys(0)[0]).targets
        assert all(torch.equal(ours["labels"], own["labels"]) for ours, own in zip(targets, again, strict=True))
        assert bench.bench(spec).train_loader.labels == spec.label_map


def test_children_see_other_batches_than_their_parents(task: JointTask, base: Detector) -> None:
    loader = JointBench(task).bench(base.spec).train_loader
    assert loader.dealt(1).keys(0) != loader.dealt(2).keys(0)
    assert loader.dealt(1).keys(0) == loader.dealt(1).keys(0)


def test_costs_are_those_of_the_child_beside_the_base(task: JointTask, base: Detector) -> None:
    examiner = Examiner(JointBench(task), hash_of(base))
    found = examiner(hash_of(base), parse_actions(PRUNED), 7)
    assert isinstance(found, Examined)
    assert found.spec == candidate(base, PRUNED).student.spec  # type: ignore[union-attr]
    own = examiner.base_cost()
    assert own.latency_ratio == 1.0 and own.params_m > found.cost.params_m and own.macs_g > found.cost.macs_g
    assert found.cost.latency_ms == pytest.approx(found.cost.latency_ratio * examiner.base_ms)
    params = sum(p.numel() for p in build(found.spec).model.parameters()) / 1e6
    assert found.cost.params_m == pytest.approx(params)
    refused = examiner(hash_of(base), (Action("remove_block", (1,)),), 7)
    assert isinstance(refused, str) and "one block" in refused


def test_a_users_own_measurement_replaces_the_timing(task: JointTask, base: Detector) -> None:
    def milliseconds(model: torch.nn.Module) -> float:
        return 2.0 * sum(parameter.numel() for parameter in model.parameters()) / 1e6

    examiner = Examiner(JointBench(task), hash_of(base), milliseconds)
    found = examiner(hash_of(base), parse_actions(PRUNED), 7)
    assert isinstance(found, Examined)
    assert found.cost.latency_ms == pytest.approx(2 * found.cost.params_m)
    assert found.cost.latency_ratio == pytest.approx(found.cost.params_m / examiner.base_cost().params_m)


@pytest.mark.parametrize("result", [float("nan"), 0.0, -1.0, RuntimeError("out of memory")])
def test_a_child_that_cannot_be_measured_is_refused_and_a_base_ends_it(
    task: JointTask, base: Detector, result: float | Exception
) -> None:
    """Raised, it would end the run, and every resumed one at the same child."""

    def milliseconds(model: torch.nn.Module) -> float:
        if isinstance(result, Exception):
            raise result
        return result

    examiner = Examiner(JointBench(task), hash_of(base), milliseconds, base_ms=5.0)
    refused = examiner(hash_of(base), parse_actions(PRUNED), 7)
    assert isinstance(refused, str) and ("above 0" in refused or "out of memory" in refused)
    with pytest.raises((ValueError, RuntimeError)):
        Examiner(JointBench(task), hash_of(base), milliseconds)


def test_a_measurement_that_fails_again_and_again_ends_the_search(task: JointTask, base: Detector) -> None:
    """Otherwise every child would be refused, and the budget spent on parents that are only trained on."""
    answers = iter([ValueError("unplugged")] * 7 + [1.0] + [ValueError("unplugged")] * 8)

    def milliseconds(model: torch.nn.Module) -> float:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    examiner = Examiner(JointBench(task), hash_of(base), milliseconds, base_ms=5.0)
    pruned = parse_actions(PRUNED)
    assert all("unplugged" in str(examiner(hash_of(base), pruned, 7)) for _ in range(7))
    assert isinstance(examiner(hash_of(base), pruned, 7), Examined)  # begins the count anew
    assert all("unplugged" in str(examiner(hash_of(base), pruned, 7)) for _ in range(7))
    with pytest.raises(MachineError, match=r"unplugged, 8 times in a row.*--resume"):
        examiner(hash_of(base), pruned, 7)


def test_children_are_timed_on_several_images_read_from_their_files(
    task: JointTask, base: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = JointBench(task)
    spec = base.spec.at_size(48)
    images = bench.images(spec)
    assert {size for size, _, _ in bench._benches} == {base.spec.min_size}  # nothing is decoded at another size
    cached = bench.bench(spec).eval_loader
    chosen = [cached.load(BatchKey((index,), (False,))).images[0] for index in range(len(images))]
    assert len(images) == 4
    for ours, theirs in zip(images, chosen, strict=True):
        torch.testing.assert_close(ours, theirs)
    seen: list[float] = []
    monkeypatch.setattr("autodet.joint.examine.detect", lambda detector, images: seen.append(float(images[0].sum())))
    run = in_turn(base, images)
    for _ in range(8):
        run()
    assert seen == 2 * [float(image.sum()) for image in images]


def test_a_disk_that_fails_ends_the_search_and_is_not_the_childs_fault(
    task: JointTask, base: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    examiner = Examiner(JointBench(task), hash_of(base), base_ms=5.0)

    def failing(spec: DetectorSpec) -> list[torch.Tensor]:
        raise OSError("the disk is full")

    monkeypatch.setattr(examiner._bench, "images", failing)
    with pytest.raises(OSError, match="the disk is full"):
        examiner(hash_of(base), parse_actions(PRUNED), 7)


def test_a_targets_milliseconds_are_those_of_the_searchs_beginning(task: JointTask, base: Detector) -> None:
    assert Examiner(JointBench(task), hash_of(base), base_ms=123.0).base_ms == 123.0


def test_only_needed_weights_stay_on_the_disk(task: JointTask, base: Detector, tmp_path: Path) -> None:
    def examine(weights: str, actions: Sequence[Action], draw: int) -> Examined:
        return Examined(base.spec, COST)

    own = Student(base.spec, (), None, hash_of(base), None, 0, COST, 0)
    search = JointSearch(own, examine, JointSettings(joint_phases(5), 1), 0, TAUGHT, SPACE)
    folder = Path(str(task.task.weights))
    for number, ap in enumerate((0.2, 0.4, 0.3)):
        ask = search.ask()
        assert isinstance(ask, Ask)
        hash = hash_of(base) if number == 0 else f"child{number}"
        if number:
            (folder / f"{hash}.safetensors").write_bytes(b"weights")
        search.tell(ask.id, ap, "completed", hash)
    (folder / "being-written.safetensors").write_bytes(b"weights")
    assert remove_unneeded(folder, search) == ["child2"]
    names = {path.stem for path in folder.glob("*.safetensors")}
    assert names == {hash_of(base), "child1", "being-written"}
    assert remove_strays(folder, search) == ["being-written"]


def test_a_task_survives_its_text(task: JointTask) -> None:
    assert JointTask.from_json(task.to_json()) == task


def test_statistics_of_a_taken_teacher_are_its_own(task: JointTask) -> None:
    bench = JointBench(task)
    pool = bench.pool()
    member = Member(SPACE.smallest.body, 64)
    teacher = bench._teacher(member, pool.spec)
    assert teacher is not None
    raw = statistics_of(pool.extract(member))
    assert any(not torch.equal(value, raw[name]) for name, value in statistics_of(teacher.detector).items())
