"""The teacher's answers: computed or from its cache, only what is asked for, shared, never half written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_outputs import counted_steps, leaves, spec_of
from torch import Tensor

from autodet.data import Batch, Loader
from autodet.detectors import DetectorSpec, Features, Inputs, TwoStage, build, load_detector
from autodet.distill import Teacher
from autodet.distill import teacher as teacher_module
from autodet.distill.inputs import INPUTS, comparable_inputs, parts_of
from autodet.distill.outputs import DetectorOutput


@pytest.fixture
def detector(teacher_file: Path) -> TwoStage:
    found = load_detector(teacher_file)[0]
    assert isinstance(found, TwoStage)
    return found


def tensors(output: DetectorOutput) -> dict[str, Tensor]:
    named = leaves(output) | {f"boxes {i}": boxes for i, boxes in enumerate(output.boxes)}
    if output.regions is not None:
        named |= {f"proposals {i}": boxes for i, boxes in enumerate(output.regions.proposals)}
    return named


def assert_same(found: DetectorOutput, expected: DetectorOutput) -> None:
    """Equal within the rounding of float16: 11 significant bits, 2^-24 among the smallest numbers."""
    ours, theirs = tensors(found), tensors(expected)
    assert set(ours) == set(theirs)
    assert (found.spec, found.canvas, found.sizes) == (expected.spec, expected.canvas, expected.sizes)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value.float(), rtol=2**-11, atol=2**-24, msg=name)


def test_a_cached_answer_equals_a_computed_one(detector: TwoStage, tiny_batch: Batch, tmp_path: Path) -> None:
    computed = Teacher(detector, INPUTS)(tiny_batch)
    cached = Teacher(detector, INPUTS, tmp_path)
    assert_same(cached(tiny_batch), computed)
    assert_same(cached(tiny_batch), computed)
    assert len(list(tmp_path.iterdir())) == 1
    assert computed.regions is not None and sum(len(boxes) for boxes in computed.regions.proposals) > 0


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet", "fcos", "reppoints"])
def test_every_familys_cached_answer_equals_a_computed_one(family: str, tiny_batch: Batch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = build(spec_of(family).at_size(96))  # larger than the batch, whose boxes follow
    inputs = comparable_inputs(other.spec, other.spec)
    computed, cached = Teacher(other, inputs)(tiny_batch), Teacher(other, inputs, tmp_path)
    first = cached(tiny_batch)
    assert_same(first, computed)
    assert_same(cached(tiny_batch), computed)
    halved = {name.split()[0] for name, tensor in tensors(first).items() if tensor.dtype == torch.float16}
    assert halved == {"features", "logits", "corners"}
    for name in inputs:
        kept, exact = (
            INPUTS[name].pairs(computed, answer) for answer in (cached.asked_for([name])(tiny_batch), computed)
        )
        for (_, ours), (_, theirs) in zip(kept, exact, strict=True):
            torch.testing.assert_close(ours.data, theirs.data, rtol=2e-3, atol=2e-3)
            # A logit of −4.6, a fresh head's, is off by up to 2e-3 in half precision, and so may be the sum of weights.
            torch.testing.assert_close(ours.weights, theirs.weights, rtol=4e-3, atol=0)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    "asked", [("global",), ("logits.dense",), ("logits.roi",), ("fg", "localization.roi"), ("localization.dense",), ()]
)
def test_an_answer_holds_only_what_was_asked_for(
    detector: TwoStage, tiny_batch: Batch, tmp_path: Path, asked: tuple[str, ...], kept: bool
) -> None:
    answer = Teacher(detector, INPUTS, tmp_path if kept else None).asked_for(asked)(tiny_batch)
    parts = parts_of(asked)
    assert bool(answer.features) == ("features" in parts)
    assert (answer.logits is not None) == (answer.corners is not None) == ("dense" in parts)
    assert (answer.regions is not None) == ("regions" in parts)
    assert len(answer.boxes) == len(tiny_batch.images)


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        (("global",), {"preprocess", "features"}),
        (("fg", "instance"), {"preprocess", "features"}),
        (("logits.dense",), {"preprocess", "features", "dense", "boxes"}),
        (("global", "logits.roi"), {"preprocess", "features", "dense", "proposals", "regions", "region_corners"}),
    ],
)
def test_without_a_cache_only_the_needed_steps_run_once(
    detector: TwoStage,
    tiny_batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
    asked: Iterable[str],
    steps: set[str],
) -> None:
    calls = counted_steps(monkeypatch, detector)
    Teacher(detector, asked)(tiny_batch)
    assert calls == dict.fromkeys(steps, 1)


def test_two_teachers_share_their_files(
    detector: TwoStage, teacher_file: Path, tiny_batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Teacher(detector, ("global",), tmp_path)(tiny_batch)
    other, _ = load_detector(teacher_file)
    calls = counted_steps(monkeypatch, other)
    assert_same(Teacher(other, ("global",), tmp_path)(tiny_batch), first)
    assert calls == {}


def test_another_batch_mirroring_content_or_weights_is_another_answer(
    detector: TwoStage, tiny_loader: Loader, tiny_batch: Batch, tmp_path: Path
) -> None:
    key = tiny_batch.key
    mirrored = tiny_loader.load(replace(key, flipped=tuple(not flag for flag in key.flipped)))
    reordered = tiny_loader.load(replace(key, indices=key.indices[::-1]))
    teacher = Teacher(detector, INPUTS, tmp_path)
    for batch in (tiny_batch, mirrored, reordered):
        assert_same(teacher(batch), Teacher(detector, INPUTS)(batch))
    assert len(list(tmp_path.iterdir())) == 3

    Teacher(detector, INPUTS, tmp_path, content="other images")(tiny_batch)
    assert len(list(tmp_path.iterdir())) == 4

    with torch.no_grad():
        next(detector.model.parameters()).mul_(1.5)
    changed = Teacher(detector, INPUTS, tmp_path)
    assert_same(changed(tiny_batch), Teacher(detector, INPUTS)(tiny_batch))
    assert len(list(tmp_path.iterdir())) == 5


def test_answers_carry_no_gradient_but_may_enter_one(detector: TwoStage, tiny_batch: Batch, tmp_path: Path) -> None:
    for directory in (None, tmp_path):
        found = tensors(Teacher(detector, INPUTS, directory)(tiny_batch))
        assert not any(tensor.requires_grad or tensor.is_inference() for tensor in found.values())


def test_the_teacher_is_put_into_evaluation_mode(detector: TwoStage, tiny_batch: Batch) -> None:
    detector.model.train()
    before = {name: tensor.clone() for name, tensor in detector.model.state_dict().items()}
    Teacher(detector, INPUTS)(tiny_batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.model.state_dict().items())


def test_the_best_proposals_up_to_a_limit_are_shared(
    detector: TwoStage, tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Teacher(detector, INPUTS)(tiny_batch).regions
    monkeypatch.setattr(teacher_module, "PROPOSALS", 5)
    few = Teacher(detector, INPUTS)(tiny_batch).regions
    assert whole is not None and few is not None
    assert max(map(len, whole.proposals)) > 5
    for ours, all_of_them in zip(few.proposals, whole.proposals, strict=True):
        assert torch.equal(ours, all_of_them[:5])
    assert len(few.class_logits) == sum(map(len, few.proposals))


def test_proposals_are_in_the_batchs_pixels_whatever_size_the_teacher_sees(
    teacher_spec: DetectorSpec, detector: TwoStage, tiny_batch: Batch
) -> None:
    large = build(replace(teacher_spec, min_size=teacher_spec.min_size * 2, max_size=teacher_spec.max_size * 2))
    assert isinstance(large, TwoStage)
    large.model.load_state_dict(detector.model.state_dict())
    found = Teacher(large, INPUTS)(tiny_batch).regions
    with torch.no_grad():
        inputs = large.preprocess(tiny_batch.images)
        own = large.proposals(inputs, large.dense(inputs, large.features(inputs)))
    assert found is not None and max(float(boxes.max()) for boxes in own) > teacher_spec.max_size
    for ours, theirs in zip(found.proposals, own, strict=True):
        torch.testing.assert_close(ours, theirs[: teacher_module.PROPOSALS] / 2)


def test_the_students_precision_does_not_change_an_answer(detector: TwoStage, tiny_batch: Batch) -> None:
    teacher = Teacher(detector, INPUTS)
    expected = tensors(teacher(tiny_batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tensors(teacher(tiny_batch))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_level_beyond_half_precision_keeps_full_precision(
    detector: TwoStage, tiny_batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = detector.features

    def large(inputs: Inputs) -> Features:
        return {stride: level * (1e7 if stride == 8 else 1) for stride, level in features(inputs).items()}

    monkeypatch.setattr(detector, "features", large)
    expected = Teacher(detector, ("global",))(tiny_batch).features
    found = Teacher(detector, ("global",), tmp_path)(tiny_batch).features
    assert float(expected[8].abs().max()) > torch.finfo(torch.float16).max
    assert torch.equal(found[8], expected[8])
    assert found[16].dtype == torch.float16


def test_an_interrupted_write_leaves_no_answer_behind(
    detector: TwoStage, tiny_batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher(detector, INPUTS, tmp_path)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(os, "replace", full)
        teacher(tiny_batch)
    assert list(tmp_path.iterdir()) == []
    teacher(tiny_batch)
    (answer,) = tmp_path.iterdir()
    answer.rename(tmp_path / f".{answer.name}.1.00.tmp").write_bytes(b"cut off")  # what a killed process leaves
    assert_same(teacher(tiny_batch), Teacher(detector, INPUTS)(tiny_batch))
    assert answer.exists()


def test_answers_may_be_asked_for_at_once(detector: TwoStage, tiny_batch: Batch, tmp_path: Path) -> None:
    teacher = Teacher(detector, INPUTS, tmp_path)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(teacher, [tiny_batch] * 6))
    expected = Teacher(detector, INPUTS)(tiny_batch)
    for answer in answers:
        assert_same(answer, expected)
    assert len(list(tmp_path.iterdir())) == 1
