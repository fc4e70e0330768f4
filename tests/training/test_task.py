"""A task end to end: one student trained on generated images, with formula and inheriting, kept, read back, resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_cases import small_spec

from autodet.detectors import DetectorSpec, build, load_detector, save_detector
from autodet.detectors.spec import FAMILIES
from autodet.detectors.weights import weights_hash
from autodet.distill import PUBLISHED, Formula
from autodet.distill.outputs import answer_to
from autodet.training import Epoch, Outcome, Task, Trainer, TrainSettings, Workbench
from autodet.training import task as task_module

NONE = Formula()

MIXED = Formula.parse("global: l2; logits.dense: sigmoid | l2; logits.roi: softmax(c, t=2) | kl * 4")


@pytest.fixture(scope="module")
def task(
    shapes_folder: Path, tiny_spec: DetectorSpec, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Task:
    folder = tmp_path_factory.mktemp("task")
    return Task(
        data=str(shapes_folder),
        cache=str(folder / "cache"),
        # Every detection counts, however unsure, so that metrics tell students apart.
        student=replace(tiny_spec, score_threshold=0.0),
        settings=TrainSettings(epochs=2, batch_size=4, lr=0.01, warmup=2),
        teacher=str(teacher_file),
        weights=str(folder / "weights"),
    )


@pytest.fixture(scope="module")
def bench(task: Task) -> Workbench:
    return Workbench(task)


@pytest.fixture(scope="module")
def distilled(bench: Workbench) -> Outcome:
    return bench.run(MIXED, inherit=True, replicate=0)


def test_a_task_passes_through_json(task: Task) -> None:
    other = replace(task, checks=(1, 2), fraction=0.5, split="test", teacher=None, device="cuda:0")
    for value in (task, other):
        assert Task.from_json(value.to_json()) == value
        assert "\n" not in value.to_json()


def test_a_distilled_student_is_measured_and_kept(task: Task, bench: Workbench, distilled: Outcome) -> None:
    assert distilled.epochs == 2 and distilled.seconds > 0
    assert distilled.metrics.ap is not None and distilled.metrics.ar100 is not None
    assert "neck and head tensors from the teacher" in str(distilled.notes["inherited"])
    assert list(distilled.notes["scales"]) == [str(term) for term in MIXED.terms]
    assert all(scale > 0 and scale != 1 for scale in distilled.notes["scales"].values())

    assert task.weights is not None and distilled.weights is not None
    detector, notes = load_detector(Path(task.weights) / f"{distilled.weights}.safetensors")
    assert weights_hash(detector.model.state_dict()) == distilled.weights
    assert detector.spec == task.student
    assert notes["formula"] == str(MIXED) and notes["seed"] == task.seed and notes["ap"] == distilled.metrics.ap
    assert bench.measure(detector) == distilled.metrics


def test_a_student_learns_its_images_and_is_read_back_with_the_same_ap(task: Task, tmp_path: Path) -> None:
    shutil.copytree(task.data, tmp_path / "data")
    shutil.copy(tmp_path / "data" / "train.json", tmp_path / "data" / "val.json")
    student = replace(task.student, neck_width=32, head_width=64, proposals=(40, 40), regions_per_image=32)
    settings = TrainSettings(epochs=25, batch_size=2, lr=0.005, weight_decay=0, warmup=2, flip=0)
    bench = Workbench(replace(task, data=str(tmp_path / "data"), student=student, settings=settings, teacher=None))
    outcome = bench.run(NONE, inherit=False, replicate=0)
    assert outcome.metrics.ap is not None and outcome.metrics.ap > 0
    assert task.weights is not None
    detector, _ = load_detector(Path(task.weights) / f"{outcome.weights}.safetensors")
    assert bench.measure(detector) == outcome.metrics


def test_the_same_seed_gives_the_same_student(task: Task, distilled: Outcome) -> None:
    again = Workbench(task).run(MIXED, inherit=True, replicate=0)
    assert (again.weights, again.metrics) == (distilled.weights, distilled.metrics)


def test_formula_inheriting_and_replicate_each_change_the_student(bench: Workbench, distilled: Outcome) -> None:
    plain = bench.run(NONE, inherit=False, replicate=0)
    assert plain.notes["inherited"] is None and plain.notes["scales"] == {}
    others = [bench.run(MIXED, True, 1), bench.run(MIXED, False, 0), bench.run(NONE, True, 0), plain]
    assert len({outcome.weights for outcome in (distilled, *others)}) == 5


def test_equal_replicates_start_from_the_same_student(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[str] = []

    class Recorded(Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            starts.append(weights_hash(self.detector.model.state_dict()))

    monkeypatch.setattr(task_module, "Trainer", Recorded)
    bench = Workbench(replace(task, settings=replace(task.settings, epochs=1), weights=None))
    for formula, replicate in ((NONE, 0), (MIXED, 0), (PUBLISHED["cwd"].formula, 0), (NONE, 1)):
        assert bench.run(formula, inherit=False, replicate=replicate).weights is None
    assert starts[0] == starts[1] == starts[2] != starts[3]


def test_a_task_without_a_teacher_trains_alone_and_refuses_the_rest(task: Task) -> None:
    alone = Workbench(replace(task, teacher=None))
    assert alone.run(NONE, inherit=False, replicate=0).metrics.ap is not None
    with pytest.raises(ValueError, match=r"formula 'global: l2 \* 1.*needs a teacher; the task names none"):
        alone.run(MIXED, inherit=False, replicate=0)
    with pytest.raises(ValueError, match=r"Inheriting.*needs a teacher; the task names none"):
        alone.run(NONE, inherit=True, replicate=0)
    with pytest.raises(ValueError, match="probe needs a teacher"):
        alone.probe()


def test_a_teacher_of_other_classes_teaches_what_needs_none(
    task: Task, teacher_spec: DetectorSpec, tmp_path: Path
) -> None:
    path = tmp_path / "blood.safetensors"
    save_detector(path, build(teacher_spec.with_labels([(1, "RBC"), (2, "WBC")])))
    bench = Workbench(replace(task, teacher=str(path), settings=replace(task.settings, epochs=1), weights=None))
    outcome = bench.run(Formula.parse("global: l2; logits.dense: sigmoid | l2"), inherit=True, replicate=0)
    assert outcome.metrics.ap is not None and "neck and head tensors" in str(outcome.notes["inherited"])
    with pytest.raises(ValueError, match=r"'logits.roi.*impossible for this pair: .*different labels"):
        bench.run(MIXED, inherit=False, replicate=0)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(family, FAMILIES[(i + 1) % len(FAMILIES)]) for i, family in enumerate(FAMILIES)],
)
def test_a_teacher_of_another_family_teaches_what_both_have(
    task: Task, tmp_path: Path, student: str, teacher: str
) -> None:
    path = tmp_path / "teacher.safetensors"
    save_detector(path, build(small_spec(teacher, task.student.labels)))
    one_epoch = replace(task, settings=replace(task.settings, epochs=1), weights=None, cache=str(tmp_path))
    bench = Workbench(replace(one_epoch, teacher=str(path), student=small_spec(student, task.student.labels)))
    outcome = bench.run(Formula.parse("fg: l2; logits.dense: sigmoid | l2"), inherit=True, replicate=0)
    assert (outcome.metrics.mask_ap is not None) == bench.task.student.masks
    assert outcome.metrics.ap is not None
    assert all(scale > 0 and scale != 1 for scale in outcome.notes["scales"].values())
    if not (small_spec(student).two_stage and small_spec(teacher).two_stage):
        with pytest.raises(ValueError, match="has no second stage"):
            bench.run(MIXED, inherit=False, replicate=0)


def test_the_teachers_answers_are_kept_for_recurring_batches_only(task: Task, tmp_path: Path) -> None:
    for fixed in (True, False):
        Workbench(replace(task, cache=str(tmp_path / str(fixed)), fixed_batches=fixed)).run(MIXED, False, 0)
    files = len(list((tmp_path / "True" / "teacher").iterdir()))
    assert 1 <= files <= 4  # two batches, each mirrored or not
    assert not (tmp_path / "False" / "teacher").exists()


def test_a_finished_training_is_only_measured_again(
    bench: Workbench, distilled: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.run(MIXED, True, 0, tmp_path)
    epochs: list[Epoch] = []
    again = bench.run(MIXED, True, 0, tmp_path, lambda epoch, ap: epochs.append(epoch))
    assert epochs == []
    for outcome in (first, again):
        assert (outcome.weights, outcome.metrics, outcome.epochs) == (distilled.weights, distilled.metrics, 2)
    assert again.notes["scales"] == distilled.notes["scales"]


def test_a_stopped_training_ends_as_if_it_had_not_been(bench: Workbench, distilled: Outcome, tmp_path: Path) -> None:
    def stop(epoch: Epoch, ap: float | None) -> None:
        if epoch.number == 2:  # its report is lost, so the epoch is repeated
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(MIXED, True, 0, tmp_path / "trial", stop)
    numbers: list[int] = []
    rest = bench.run(MIXED, True, 0, tmp_path / "trial", lambda epoch, ap: numbers.append(epoch.number))
    assert numbers == [2]
    assert (rest.weights, rest.metrics) == (distilled.weights, distilled.metrics)


def test_checks_measure_on_the_way_and_change_nothing(task: Task, distilled: Outcome) -> None:
    reports: list[tuple[int, bool]] = []
    record: Callable[[Epoch, float | None], None] = lambda epoch, ap: reports.append((epoch.number, ap is not None))  # noqa: E731
    Workbench(task).run(NONE, False, 0, None, record)
    assert reports == [(1, False), (2, True)]
    outcome = Workbench(replace(task, checks=(1,))).run(MIXED, True, 0, None, record)
    assert reports[2:] == [(1, True), (2, True)]
    assert outcome.weights == distilled.weights


def test_averaged_weights_are_those_that_are_measured_and_kept(task: Task) -> None:
    bench = Workbench(replace(task, settings=replace(task.settings, ema=0.5)))
    outcome = bench.run(NONE, inherit=False, replicate=0)
    assert task.weights is not None
    detector, _ = load_detector(Path(task.weights) / f"{outcome.weights}.safetensors")
    assert bench.measure(detector) == outcome.metrics


def test_a_fraction_is_the_same_images_for_every_candidate(task: Task) -> None:
    half, again = (Workbench(replace(task, fraction=0.5, seed=seed)) for seed in (0, 7))
    assert len(half.train_set) == 4
    assert [image.id for image in half.train_set.images] == [image.id for image in again.train_set.images]
    assert half.train_loader.keys(3) == again.train_loader.keys(3)
    assert len(half.eval_set) == 4


def test_a_teacher_that_sees_larger_images_is_asked_about_the_same_regions(
    task: Task, teacher_spec: DetectorSpec, tmp_path: Path
) -> None:
    """A student equal to its teacher but for the image's size must be asked about the same part of the image."""
    spec = replace(teacher_spec, min_size=128, max_size=192)
    torch.manual_seed(2)
    save_detector(tmp_path / "large.safetensors", build(spec))
    bench = Workbench(replace(task, teacher=str(tmp_path / "large.safetensors"), student=teacher_spec))
    assert bench.teacher is not None
    batch = bench.train_loader.load(bench.train_loader.keys(0)[0])
    student = bench.teacher.detector
    inputs = student.preprocess(batch.images)
    features = student.features(inputs)
    taught = bench.teacher(batch)
    output = answer_to(taught, student, batch, inputs, features, student.dense(inputs, features))
    assert output.regions is not None and taught.regions is not None
    torch.testing.assert_close(output.regions.class_logits, taught.regions.class_logits)


def test_the_probe_judges_on_the_first_batch(bench: Workbench) -> None:
    probe = bench.probe()
    for name, published in PUBLISHED.items():  # of which LD is for distributions, that a Faster R-CNN has not
        assert (probe(published.formula) is None) == (name != "ld")
    # Weighing terms against their own scale makes the first loss equal to the weight.
    assert "above 100" in str(probe(Formula.parse("global: l2 * 101")))
