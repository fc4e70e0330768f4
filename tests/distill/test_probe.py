"""The probe: what it rejects and why, what it accepts, and that it is cheap and leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from distill_outputs import answer, part, spec_of
from torch import Tensor

from autodet.data import Batch, Loader
from autodet.detectors import DetectorSpec, build, load_detector
from autodet.detectors.spec import FAMILIES
from autodet.distill import PUBLISHED, Formula, Probe, Teacher
from autodet.distill.distances import DISTANCES
from autodet.distill.inputs import INPUTS, comparable_inputs
from autodet.distill.outputs import DetectorOutput, output_of
from autodet.distill.values import Value
from autodet.training import Trainer, TrainSettings


@dataclass(frozen=True)
class Pair:
    """Specs and outputs of an untrained student and its teacher on one batch."""

    specs: tuple[DetectorSpec, DetectorSpec]
    student: DetectorOutput
    teacher: DetectorOutput

    def probe(self, normalise: bool = False) -> Probe:
        return Probe(*self.specs, self.student, self.teacher, normalise)


@pytest.fixture(scope="module")
def pair(tiny_spec: DetectorSpec, teacher_file: Path, tiny_batch: Batch) -> Pair:
    torch.manual_seed(0)
    student, (teacher, _) = build(tiny_spec), load_detector(teacher_file)
    taught = Teacher(teacher, INPUTS)(tiny_batch)
    assert taught.regions is not None
    with torch.no_grad():
        inputs = student.preprocess(tiny_batch.images)
        features = student.features(inputs)
        dense = student.dense(inputs, features)
        output = output_of(student, tiny_batch, inputs, features, dense, taught.regions.proposals)
    return Pair((tiny_spec, teacher.spec), output, taught)


def judge(pair: Pair, text: str) -> str:
    return str(pair.probe()(Formula.parse(text)))


def replaced_l1(monkeypatch: pytest.MonkeyPatch, function: Callable[[Value, Value], Tensor]) -> None:
    monkeypatch.setitem(DISTANCES, "l1", replace(DISTANCES["l1"], function=function))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_formulas_are_accepted(pair: Pair, name: str, normalise: bool) -> None:
    if name == "ld":  # which a Faster R-CNN has nothing for
        assert "has no distributions" in str(pair.probe(normalise)(PUBLISHED[name].formula))
        spec = spec_of("gfl")
        pair = Pair((spec, spec), answer(spec, 1), answer(spec, 2))
    assert pair.probe(normalise)(PUBLISHED[name].formula) is None


def test_no_distillation_is_accepted(pair: Pair) -> None:
    assert pair.probe()(Formula()) is None


@pytest.mark.parametrize(("size", "found"), [(float("nan"), "nan"), (float("inf"), "inf|nan"), (1e30, "inf")])
def test_a_loss_that_is_not_finite_is_rejected(pair: Pair, size: float, found: str) -> None:
    broken = {stride: level * size for stride, level in pair.student.features.items()}
    reason = judge(replace(pair, student=replace(pair.student, features=broken)), "logits.dense: l1; global: l2")
    assert reason in [f"distill/1/global: the loss is {word}" for word in found.split("|")]


def test_a_loss_above_the_threshold_is_rejected(pair: Pair) -> None:
    weight = 1000.0
    wide = {stride: level + 1 for stride, level in pair.teacher.features.items()}
    shifted = replace(pair, student=replace(pair.student, features=wide))
    assert judge(shifted, f"global: l2 * {weight}") == "distill/0/global: the loss 1e+03 is above 100"
    assert judge(shifted, "global: l2 * 99") == "None"


def test_a_negative_loss_is_rejected(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced_l1(monkeypatch, lambda student, teacher: student.data.square().flatten(1).mean(1) * 0 - 2)
    for normalise in (False, True):
        assert "distill/0/global: the loss is negative (-2" in str(pair.probe(normalise)(Formula.parse("global: l1")))


def test_a_loss_without_slope_is_rejected(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    same = replace(pair, student=pair.teacher)
    assert judge(same, "global: l2") == "distill/0/global: the gradient is zero"
    replaced_l1(monkeypatch, lambda student, teacher: teacher.data.abs().flatten(1).mean(1))
    assert judge(pair, "global: l1") == "distill/0/global: no gradient reaches the student"
    replaced_l1(monkeypatch, lambda student, teacher: (student.data - teacher.data).abs().sqrt().flatten(1).mean(1))
    assert judge(same, "global: l1") == "distill/0/global: the gradient's norm is nan"


def test_every_term_must_pass(pair: Pair) -> None:
    same = replace(pair, student=replace(pair.student, features=pair.teacher.features))
    assert judge(same, "logits.dense: l1; global: l1") == "distill/1/global: the gradient is zero"


@pytest.mark.parametrize("text", ["global: norm(n) | l1", "logits.roi: crosscorr", "global: standardize(n) | l2"])
def test_images_cannot_be_compared_in_a_batch_of_one(pair: Pair, text: str) -> None:
    first = slice(0, 1)
    single = replace(pair, student=part(pair.student, first), teacher=part(pair.teacher, first))
    assert "compares images of a batch with one another, and the local batch is 1" in judge(single, text)
    assert judge(pair, text) == "None"


def test_too_few_regions_are_a_reason_not_an_error(pair: Pair) -> None:
    spec = spec_of("faster_rcnn")
    few = Pair((spec, spec), *(answer(spec, seed, (3, 2, 1, 2), (1, 1, 0, 0)) for seed in (1, 2)))
    reason = judge(few, "logits.dense: l1; logits.roi: crosscorr")
    assert reason == "'logits.roi: crosscorr * 1' needs 3 images or regions to compare, and the batch has fewer"
    empty = Pair((spec, spec), *(answer(spec, seed, (0, 0), (0, 0)) for seed in (1, 2)))
    assert "'instance: l2 * 1' needs 1 images or regions" in judge(empty, "global: l2; instance: l2")


@pytest.mark.parametrize("name", list(INPUTS))
@pytest.mark.parametrize("student", FAMILIES)
@pytest.mark.parametrize("teacher", FAMILIES)
def test_every_input_of_every_pair_of_families_is_judged(student: str, teacher: str, name: str) -> None:
    specs = spec_of(student), spec_of(teacher)
    made_up = Pair(specs, answer(specs[0], 1), answer(specs[1], 2))
    reason = judge(made_up, f"{name}: {'giou' if INPUTS[name].kind.boxes else 'l1'}")
    assert (reason == "None") == (name in comparable_inputs(*specs)), reason


def test_an_impossible_pair_is_a_reason_not_an_error(pair: Pair) -> None:
    other = replace(pair, specs=(pair.specs[0], pair.specs[1].with_labels([(1, "cell")])))
    assert "different labels" in judge(other, "logits.roi: l1")


def test_judging_is_repeatable_and_leaves_the_generator_alone(pair: Pair) -> None:
    wide = {stride: torch.cat([level, level], 1) for stride, level in pair.teacher.features.items()}
    specs = (pair.specs[0], replace(pair.specs[1], neck_width=32))
    lifted = replace(pair, specs=specs, teacher=replace(pair.teacher, features=wide))
    state = torch.get_rng_state()
    reasons = set()
    for seed in (1, 2, 3):  # the adapter's weights and the masks are random, and the number is in the reason
        torch.manual_seed(seed)
        reasons.add(judge(lifted, "global: mask(0.35) | l2 * 1e9"))
    assert len(reasons) == 1 and "above 100" in reasons.pop()
    torch.set_rng_state(state)
    judge(lifted, "global: mask(0.35) | l2")
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_are_left_as_they_were(pair: Pair) -> None:
    judge(pair, "global: l2; logits.roi: l2")
    assert not any(level.requires_grad for level in pair.student.features.values())


def test_judging_costs_a_small_fraction_of_a_training(pair: Pair, tiny_spec: DetectorSpec, tiny_loader: Loader) -> None:
    trainer = Trainer(build(tiny_spec), tiny_loader, TrainSettings(epochs=2, batch_size=4), seed=0)
    started = time.process_time()
    list(trainer.epochs())
    training = time.process_time() - started
    probe, formula = pair.probe(), PUBLISHED["cwd"].formula
    probe(formula)
    started = time.process_time()
    for _ in range(5):
        probe(formula)
    judging = (time.process_time() - started) / 5
    # The smallest training there is, four steps; a proxy has a hundred or more, and its batches are larger.
    assert judging < training / 4
