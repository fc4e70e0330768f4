"""The distiller against computations by hand: terms, weights, adapter, normalising, gradients."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distill_outputs import GFL, counted_steps, leaves, part, spec_of
from distill_outputs import answer as random_answer
from torch import nn

from autodet.data import Loader
from autodet.detectors import DetectorSpec, build, load_detector
from autodet.distill import PUBLISHED, Distiller, Formula, Teacher
from autodet.distill.distiller import NORMALISING_STEPS
from autodet.distill.inputs import INPUTS, Pairs, comparable_inputs
from autodet.distill.outputs import DetectorOutput
from autodet.training import Trainer, TrainSettings
from autodet.training.task import Distillation

SPEC = spec_of("mask_rcnn")  # which has every input
TWO_TERMS = "global: l2 * 3; logits.roi: softmax(c, t=2) | kl * 4"
EVERY_INPUT = "; ".join(
    f"{name}: {'giou' if INPUTS[name].kind.boxes else 'l2'}" for name in comparable_inputs(SPEC, SPEC)
)


def answer(seed: int, images: int = 4, width: int = 16) -> DetectorOutput:
    """Random outputs on images of 64×96, with three objects and five proposals each."""
    return random_answer(replace(SPEC, neck_width=width), seed, [3] * images, [5] * images)


def test_losses_are_the_terms_by_hand_times_their_weights() -> None:
    student, teacher = answer(1), answer(2)
    losses = Distiller(Formula.parse(TWO_TERMS), SPEC, SPEC)(student, teacher)
    gaps = [(student.features[stride] - teacher.features[stride]).square().mean() for stride in (8, 16, 32, 64)]
    p, q = ((x.regions.class_logits / 2).softmax(1) for x in (teacher, student) if x.regions is not None)
    divergence = (p * (p / q).log()).sum(1).mean()  # all images have as many regions
    expected = [3 * sum(gaps) / 4, 4 * divergence]
    assert list(losses) == ["distill/0/global", "distill/1/logits.roi"]
    for loss, by_hand in zip(losses.values(), expected, strict=True):
        torch.testing.assert_close(loss, torch.as_tensor(by_hand))


def test_no_terms_are_no_losses() -> None:
    distiller = Distiller(Formula(), SPEC, SPEC, normalise=True)
    assert distiller(answer(1), answer(2)) == {} and distiller.scales() == {}


def test_every_input_gives_the_student_a_gradient_and_the_teacher_none() -> None:
    student, teacher = answer(1), answer(2)
    losses = Distiller(Formula.parse(EVERY_INPUT), SPEC, SPEC, normalise=True)(student, teacher)
    assert len(losses) == len(comparable_inputs(SPEC, SPEC))
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(tensor.grad is None for tensor in leaves(teacher).values())
    for name, tensor in leaves(student).items():
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name


def test_terms_on_one_input_share_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    pairs = INPUTS["fg"].pairs

    def counted(student: DetectorOutput, teacher: DetectorOutput) -> Pairs:
        calls["fg"] += 1
        return pairs(student, teacher)

    monkeypatch.setitem(INPUTS, "fg", replace(INPUTS["fg"], pairs=counted))
    assert len(Distiller(Formula.parse("fg: l2; fg: pool(2) | l1"), SPEC, SPEC)(answer(1), answer(2))) == 2
    assert calls["fg"] == 1


@pytest.mark.parametrize(
    ("text", "teacher_width", "lifts"),
    [
        ("global: l2", 24, True),
        ("global: l2", 16, False),
        ("instance: l2", 24, True),
        ("logits.roi: l1; fg: l1", 24, True),
        ("logits.dense: l2; localization.roi: iou", 24, False),
        ("none", 24, False),
    ],
)
def test_an_adapter_exists_where_widths_differ_and_maps_are_compared(
    text: str, teacher_width: int, lifts: bool
) -> None:
    distiller = Distiller(Formula.parse(text), SPEC, replace(SPEC, neck_width=teacher_width))
    assert (distiller.adapter is not None) == lifts
    assert (len(list(distiller.parameters())) > 0) == lifts


def test_the_adapter_lifts_every_level_and_is_trained() -> None:
    formula = Formula.parse("global: l2; logits.dense: l1; instance: l2")
    distiller = Distiller(formula, SPEC, replace(SPEC, neck_width=24))
    student, teacher = answer(1), answer(2, width=24)
    losses = distiller(student, teacher)
    assert isinstance(distiller.adapter, nn.Conv2d)
    weight, bias = distiller.adapter.weight[:, :, 0, 0], distiller.adapter.bias
    assert bias is not None
    lifted = {s: torch.einsum("oc,nchw->nohw", weight, x) + bias.view(1, -1, 1, 1) for s, x in student.features.items()}
    gaps = [(lifted[stride] - teacher.features[stride]).square().mean() for stride in lifted]
    torch.testing.assert_close(losses["distill/0/global"], torch.stack(gaps).mean())
    for name in ("distill/0/global", "distill/2/instance"):
        distiller.zero_grad()
        losses[name].backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.parameters()), name


def test_an_impossible_term_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'logits\.roi: l2 \* 1' is impossible.*labels.*Leave logits\.roi out"):
        Distiller(Formula.parse("global: l1; logits.roi: l2"), SPEC, SPEC.with_labels([(1, "cell")]))


def test_normalised_losses_are_divided_by_the_median_of_the_first_values() -> None:
    formula = Formula.parse(TWO_TERMS)
    plain, ours = (Distiller(formula, SPEC, SPEC, normalise=flag) for flag in (False, True))
    seen: list[list[float]] = []
    for step in range(NORMALISING_STEPS + 4):
        pair = answer(2 * step), answer(2 * step + 1)
        raw = [float(loss.detach()) / weight for loss, weight in zip(plain(*pair).values(), (3, 4), strict=True)]
        found = [float(loss.detach()) for loss in ours(*pair).values()]
        history = [column[:NORMALISING_STEPS] for column in zip(*(seen or [raw]), strict=True)]
        expected = [w * r / statistics.median_low(h) for w, r, h in zip((3, 4), raw, history, strict=True)]
        assert found == pytest.approx(expected, rel=1e-5), step
        seen.append(raw)
    first = [statistics.median_low(column[:NORMALISING_STEPS]) for column in zip(*seen, strict=True)]
    assert list(ours.scales().values()) == pytest.approx(first, rel=1e-5)
    assert list(ours.scales()) == [str(term) for term in formula.terms]
    assert set(plain.scales().values()) == {1.0}


def test_scales_survive_a_checkpoint() -> None:
    whole, first, second = (Distiller(Formula.parse(TWO_TERMS), SPEC, SPEC, True) for _ in range(3))
    for step in range(8):
        whole(answer(step), answer(step + 50))
        (first if step < 5 else second)(answer(step), answer(step + 50))
        if step == 4:
            second.load_state_dict(first.state_dict())
    assert second.scales() == whole.scales() != first.scales()


def test_evaluation_mode_leaves_the_scales_alone() -> None:
    distiller = Distiller(Formula.parse("global: l2"), SPEC, SPEC, normalise=True)
    distiller(answer(1), answer(2))
    before = distiller.scales()
    distiller.eval()(answer(3), answer(3))
    assert distiller.scales() == before
    distiller.train()(answer(3), answer(3))
    assert distiller.scales() != before


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_two_half_batches_average_to_the_whole_unless_images_are_compared(name: str) -> None:
    formula = PUBLISHED[name].formula
    spec = GFL if name == "ld" else SPEC
    distiller = Distiller(formula, spec, spec)
    student, teacher = (random_answer(spec, seed, [3] * 4, [5] * 4) for seed in (1, 2))

    def loss(images: slice) -> float:
        losses = distiller(part(student, images), part(teacher, images))
        return float(torch.stack(list(losses.values())).sum().detach())

    halves = (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    assert (halves == pytest.approx(loss(slice(0, 4)), rel=1e-5)) == (not formula.batch_dependent)


@pytest.mark.parametrize("text", [f"{name}: {'iou' if s.kind.boxes else 'l2'}" for name, s in INPUTS.items()])
def test_a_training_in_half_precision_changes_no_loss(text: str) -> None:
    """Where sizes differ, positions are computed on the way; a canvas of many cells shows their rounding."""
    spec = GFL if "localization.sides" in text else SPEC
    large = spec if "localization.dense" in text or "localization.sides" in text else spec.at_size(96)
    student = random_answer(spec, 1, canvas=(256, 384))
    teacher = random_answer(large, 2, canvas=(256, 384) if large == spec else (320, 544))
    distiller = Distiller(Formula.parse(text), spec, large)
    expected = next(iter(distiller(student, teacher).values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = next(iter(distiller(student, teacher).values()))
    assert torch.equal(found, expected)


def test_a_batch_too_small_to_compare_leaves_that_term_out() -> None:
    distiller = Distiller(Formula.parse("global: norm(n) | l1; logits.dense: l1"), SPEC, SPEC, normalise=True)
    assert list(distiller(answer(1, images=1), answer(2, images=1))) == ["distill/1/logits.dense"]
    assert distiller.scales()["global: norm(n) | l1 * 1"] == 1.0
    assert len(distiller(answer(3), answer(4))) == 2
    assert distiller.scales()["global: norm(n) | l1 * 1"] != 1.0


def test_a_batch_without_objects_leaves_out_what_compares_objects() -> None:
    distiller = Distiller(Formula.parse("instance: l1; global: l1"), SPEC, SPEC, normalise=True)
    nothing = [random_answer(SPEC, seed, [0, 0], [0, 0]) for seed in (1, 2)]
    assert list(distiller(*nothing)) == ["distill/1/global"]
    assert list(distiller(answer(1), answer(2))) == ["distill/0/instance", "distill/1/global"]
    assert distiller.scales()["instance: l1 * 1"] > 0.1


@pytest.mark.parametrize(
    ("text", "once"),
    [
        ("global: l2; fg: l1", {"preprocess", "features"}),
        ("logits.dense: l2; localization.dense: iou", {"preprocess", "features", "dense", "boxes"}),
        ("logits.roi: l2", {"preprocess", "features", "dense", "proposals", "regions", "region_corners"}),
    ],
)
def test_student_and_teacher_run_once_a_step_and_only_as_far_as_needed(
    tiny_spec: DetectorSpec,
    teacher_file: Path,
    tiny_loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    once: set[str],
) -> None:
    """Trap 7. The student trains, so it runs all its steps, and its second stage again for the shared proposals."""
    student, teacher = build(tiny_spec), load_detector(teacher_file)[0]
    formula = Formula.parse(text)
    extra = Distillation(Distiller(formula, tiny_spec, teacher.spec), Teacher(teacher, INPUTS), student)
    trainer = Trainer(student, tiny_loader, TrainSettings(epochs=1, batch_size=4), seed=0, extra=extra)
    ours, theirs = counted_steps(monkeypatch, student), counted_steps(monkeypatch, teacher)
    next(iter(trainer.epochs()))
    steps = trainer.steps_per_epoch
    assert theirs == dict.fromkeys(once, steps)
    again = steps * ("regions" in once)
    needed = dict.fromkeys(("preprocess", "features", "dense"), steps) | {"regions": steps + again}
    assert {name: count for name, count in ours.items() if name in needed} == needed
    assert ours["boxes"] == steps * ("boxes" in once) and ours["region_corners"] == again


def test_a_generator_decides_the_masks() -> None:
    distiller = Distiller(Formula.parse("global: mask(0.35) | l2"), SPEC, SPEC)
    pair = answer(1), answer(2)
    first, again, other = (
        float(distiller(*pair, torch.Generator().manual_seed(seed))["distill/0/global"].detach()) for seed in (0, 0, 1)
    )
    assert first == again != other
