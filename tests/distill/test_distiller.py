"""The distiller against computations by hand: terms, weights, adapter, normalising, gradients."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autodet.detectors import DetectorOutput, DetectorSpec, Regions
from autodet.distill import PUBLISHED, Distiller, Formula
from autodet.distill.distiller import NORMALISING_STEPS

TWO_TERMS = "global: l2 * 3; logits.roi: softmax(c, t=2) | kl * 4"


def answer(seed: int, images: int = 4, width: int = 16, regions: int = 5) -> DetectorOutput:
    """Random outputs of a detector of ``tiny_spec`` on images of 64×96, of leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    sizes = {8: (8, 12), 16: (4, 6), 32: (2, 3), 64: (1, 2)}
    features = {stride: leaf(images, width, *size) for stride, size in sizes.items()}
    objectness = {stride: leaf(images, 3, *size) for stride, size in sizes.items()}
    boxes = [torch.zeros(regions, 4)] * images
    return DetectorOutput(features, objectness, Regions(boxes, leaf(images * regions, 6), torch.zeros(0)))


def leaves(output: DetectorOutput) -> list[Tensor]:
    assert output.objectness is not None and output.regions is not None
    return [*output.features.values(), *output.objectness.values(), output.regions.class_logits]


def part(output: DetectorOutput, images: slice, regions: int = 5) -> DetectorOutput:
    """Some images of a batch."""
    assert output.objectness is not None and output.regions is not None
    rows = slice(images.start * regions, images.stop * regions)
    chosen = Regions(output.regions.proposals[images], output.regions.class_logits[rows], torch.zeros(0))
    features, objectness = ({s: x[images] for s, x in maps.items()} for maps in (output.features, output.objectness))
    return DetectorOutput(features, objectness, chosen)


def test_losses_are_the_terms_by_hand_times_their_weights(tiny_spec: DetectorSpec) -> None:
    student, teacher = answer(1), answer(2)
    losses = Distiller(Formula.parse(TWO_TERMS), tiny_spec, tiny_spec)(student, teacher)
    gaps = [(student.features[stride] - teacher.features[stride]).square().mean() for stride in (8, 16, 32, 64)]
    p, q = ((x.regions.class_logits / 2).softmax(1) for x in (teacher, student) if x.regions is not None)
    divergence = (p * (p / q).log()).sum(1).mean()  # all images have as many regions
    expected = [3 * sum(gaps) / 4, 4 * divergence]
    assert list(losses) == ["distill/0/global", "distill/1/logits.roi"]
    for loss, by_hand in zip(losses.values(), expected, strict=True):
        torch.testing.assert_close(loss, torch.as_tensor(by_hand))


def test_no_terms_are_no_losses(tiny_spec: DetectorSpec) -> None:
    distiller = Distiller(Formula(), tiny_spec, tiny_spec, normalise=True)
    assert distiller(answer(1), answer(2)) == {} and distiller.scales() == {}


def test_only_the_student_gets_a_gradient(tiny_spec: DetectorSpec) -> None:
    student, teacher = answer(1), answer(2)
    formula = Formula.parse("global: mask(0.35) | l1; logits.rpn: l2; logits.roi: softmax(c) | kl")
    losses = Distiller(formula, tiny_spec, tiny_spec, normalise=True)(student, teacher)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(tensor.grad is None for tensor in leaves(teacher))
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in leaves(student))


@pytest.mark.parametrize(("text", "teacher_width", "lifts"), [
    ("global: l2", 24, True), ("global: l2", 16, False), ("logits.rpn: l2", 24, False), ("none", 24, False),
])  # fmt: skip
def test_an_adapter_exists_where_widths_differ_and_maps_are_compared(
    tiny_spec: DetectorSpec, text: str, teacher_width: int, lifts: bool
) -> None:
    distiller = Distiller(Formula.parse(text), tiny_spec, replace(tiny_spec, neck_width=teacher_width))
    assert (distiller.adapter is not None) == lifts
    assert (len(list(distiller.parameters())) > 0) == lifts


def test_the_adapter_lifts_every_level_and_is_trained(tiny_spec: DetectorSpec) -> None:
    distiller = Distiller(Formula.parse("global: l2; logits.rpn: l1"), tiny_spec, replace(tiny_spec, neck_width=24))
    student, teacher = answer(1), answer(2, width=24)
    losses = distiller(student, teacher)
    assert isinstance(distiller.adapter, nn.Conv2d)
    weight, bias = distiller.adapter.weight[:, :, 0, 0], distiller.adapter.bias
    assert bias is not None
    lifted = {s: torch.einsum("oc,nchw->nohw", weight, x) + bias.view(1, -1, 1, 1) for s, x in student.features.items()}
    gaps = [(lifted[stride] - teacher.features[stride]).square().mean() for stride in lifted]
    torch.testing.assert_close(losses["distill/0/global"], torch.stack(gaps).mean())
    losses["distill/0/global"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.parameters())


def test_an_impossible_term_is_refused_by_name(tiny_spec: DetectorSpec) -> None:
    with pytest.raises(ValueError, match=r"'logits\.roi: l2 \* 1' is impossible.*labels.*Leave logits\.roi out"):
        Distiller(Formula.parse("global: l1; logits.roi: l2"), tiny_spec, tiny_spec.with_labels([(1, "cell")]))


def test_normalised_losses_are_divided_by_the_median_of_the_first_values(tiny_spec: DetectorSpec) -> None:
    formula = Formula.parse(TWO_TERMS)
    plain, ours = (Distiller(formula, tiny_spec, tiny_spec, normalise=flag) for flag in (False, True))
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


def test_scales_survive_a_checkpoint(tiny_spec: DetectorSpec) -> None:
    whole, first, second = (Distiller(Formula.parse(TWO_TERMS), tiny_spec, tiny_spec, True) for _ in range(3))
    for step in range(8):
        whole(answer(step), answer(step + 50))
        (first if step < 5 else second)(answer(step), answer(step + 50))
        if step == 4:
            second.load_state_dict(first.state_dict())
    assert second.scales() == whole.scales() != first.scales()


def test_evaluation_mode_leaves_the_scales_alone(tiny_spec: DetectorSpec) -> None:
    distiller = Distiller(Formula.parse("global: l2"), tiny_spec, tiny_spec, normalise=True)
    distiller(answer(1), answer(2))
    before = distiller.scales()
    distiller.eval()(answer(3), answer(3))
    assert distiller.scales() == before
    distiller.train()(answer(3), answer(3))
    assert distiller.scales() != before


@pytest.mark.parametrize("name", ["detkds", "fitnets", "pkd", "cwd", "at", "kd"])
def test_two_half_batches_average_to_the_whole_unless_images_are_compared(tiny_spec: DetectorSpec, name: str) -> None:
    formula = PUBLISHED[name].formula
    distiller = Distiller(formula, tiny_spec, tiny_spec)
    student, teacher = answer(1), answer(2)

    def loss(images: slice) -> float:
        return float(next(iter(distiller(part(student, images), part(teacher, images)).values())).detach())

    halves = (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    assert (halves == pytest.approx(loss(slice(0, 4)), rel=1e-5)) == (not formula.batch_dependent)


def test_a_batch_too_small_to_compare_leaves_that_term_out(tiny_spec: DetectorSpec) -> None:
    distiller = Distiller(Formula.parse("global: norm(n) | l1; logits.rpn: l1"), tiny_spec, tiny_spec, normalise=True)
    assert list(distiller(answer(1, images=1), answer(2, images=1))) == ["distill/1/logits.rpn"]
    assert distiller.scales()["global: norm(n) | l1 * 1"] == 1.0
    assert len(distiller(answer(3), answer(4))) == 2
    assert distiller.scales()["global: norm(n) | l1 * 1"] != 1.0


def test_a_generator_decides_the_masks(tiny_spec: DetectorSpec) -> None:
    distiller = Distiller(Formula.parse("global: mask(0.35) | l2"), tiny_spec, tiny_spec)
    pair = answer(1), answer(2)
    first, again, other = (
        float(distiller(*pair, torch.Generator().manual_seed(seed))["distill/0/global"].detach()) for seed in (0, 0, 1)
    )
    assert first == again != other
