"""What a term means: one mask for both sides, the fixed reduction, no gradient for the teacher, clear refusals.

That every term keeps its promises is in ``test_space``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autodet.distill.formula import INPUTS, Formula, FormulaError, Op, Term, typing_of
from autodet.distill.terms import term_loss
from autodet.distill.values import Value, map_value, vector_value

REGIONS = [3, 1, 5, 2, 4]  # of each image, for vectors


def term_of(text: str) -> Term:
    return Formula.parse(text).terms[0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values_of(input: str, images: int, dtype: torch.dtype, seed: int, shape: tuple[int, int, int] = (4, 6, 5)) -> Value:
    if INPUTS[input].kind.spatial:
        return map_value(torch.randn(images, *shape, generator=generator(seed), dtype=dtype))
    counts = REGIONS[:images]
    return vector_value(torch.randn(sum(counts), shape[0], generator=generator(seed), dtype=dtype), counts)


def with_data(value: Value, data: Tensor) -> Value:
    return Value(data, value.kind, value.axis, value.weights)


def test_a_batch_dependent_loss_is_another_when_the_batch_is_split() -> None:
    S, T = (values_of("global", 4, torch.float64, seed) for seed in (3, 4))
    for text in ("global: norm(n) | l1", "global: standardize(nhw) | l2", "global: batt | l2", "global: pearson(nhw)"):
        term = term_of(text)
        halves = [
            term_loss(term, [map_value(S.data[half])], [map_value(T.data[half])]) for half in (slice(0, 2), slice(2, 4))
        ]
        assert term.batch_dependent
        assert not torch.isclose(torch.stack(halves).mean(), term_loss(term, [S], [T]))


def test_normalising_over_one_image_is_refused() -> None:
    S, T = (values_of("global", 1, torch.float32, seed) for seed in (1, 2))
    with pytest.raises(ValueError, match=r"'norm\(n\)' works along the batch and needs at least 2 rows; found 1"):
        term_loss(term_of("global: norm(n) | l1"), [S], [T])
    with pytest.raises(ValueError, match="at least 3 rows"):
        term_loss(term_of("global: crosscorr"), [S], [T])


def test_two_rows_are_too_few_where_a_mean_over_the_batch_is_taken_out() -> None:
    """Why ``batch_rows`` is three there: two standardised rows are ±1 and have no gradient."""
    S, T = (torch.randn(2, 5, generator=generator(seed), dtype=torch.float64) for seed in (1, 2))
    S.requires_grad_()
    centred = (S - S.mean(0)) / S.std(0, correction=0)
    (gradient,) = torch.autograd.grad((centred - T).square().sum(), S)
    torch.testing.assert_close(centred.abs(), torch.ones_like(S))
    assert gradient.abs().max() < 1e-9


def test_both_sides_get_the_same_mask() -> None:
    S = torch.ones(2, 3, 8, 8)
    T = torch.zeros(2, 3, 8, 8)
    term = term_of("global: mask(0.25) | l1")
    # With one mask a quarter of the positions differs by one; zero at S = T needs the same.
    assert term_loss(term, [map_value(S)], [map_value(T)], generator()).item() == pytest.approx(0.25)
    assert term_loss(term, [map_value(S)], [map_value(S.clone())], generator()).item() == 0
    assert term_loss(term, [map_value(S)], [map_value(S.clone())]).item() == 0


def test_masks_follow_the_generator_and_move_on() -> None:
    S, T = (values_of("global", 2, torch.float32, seed) for seed in (1, 2))
    term = term_of("global: mask | l2")
    shared = generator(7)
    first, second = (term_loss(term, [S], [T], shared).item() for _ in range(2))
    assert first == term_loss(term, [S], [T], generator(7)).item()
    assert first != second


def test_levels_count_the_same_and_the_weight_is_left_to_the_caller() -> None:
    students = [map_value(torch.full((2, 1, size, size), 3.0)) for size in (8, 1)]
    teachers = [map_value(torch.full((2, 1, size, size), number)) for size, number in ((8, 1.0), (1, 0.0))]
    assert term_loss(term_of("global: l1 * 50"), students, teachers).item() == pytest.approx((2 + 3) / 2)


@pytest.mark.parametrize("text", ["global: l2", "global: norm(c) | l2", "global: mask > softmax(hw) | kl"])
def test_the_teacher_gets_no_gradient(text: str) -> None:
    S, T = (values_of("global", 2, torch.float32, seed) for seed in (1, 2))
    S.data.requires_grad_()
    T.data.requires_grad_()
    term_loss(term_of(text), [S], [T]).backward()  # type: ignore[no-untyped-call]
    assert S.data.grad is not None
    assert T.data.grad is None


def test_half_precision_is_computed_in_float32() -> None:
    S, T = (values_of("global", 2, torch.float32, seed) for seed in (1, 2))
    halves = [with_data(value, value.data.bfloat16()) for value in (S, T)]
    exact = [with_data(value, value.data.float()) for value in halves]
    term = term_of("global: gram | l2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term_loss(term, [halves[0]], [halves[1]])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, term_loss(term, [exact[0]], [exact[1]]))


def test_no_regions_at_all_is_a_loss_of_zero() -> None:
    S = vector_value(torch.zeros(0, 4, requires_grad=True), [0, 0])
    loss = term_loss(term_of("logits.roi: softmax(c) | kl"), [S], [S])
    assert loss.item() == 0
    assert loss.requires_grad


def test_mismatched_sides_are_refused_with_their_shapes() -> None:
    S, T = map_value(torch.zeros(2, 3, 4, 4)), map_value(torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"map \(2, 3, 4, 4\).*map \(2, 5, 4, 4\)"):
        term_loss(term_of("global: l2"), [S], [T])
    with pytest.raises(ValueError, match="found 1 and 0"):
        term_loss(term_of("global: l2"), [S], [])
    with pytest.raises(ValueError, match="found 0 and 0"):
        term_loss(term_of("global: l2"), [], [])
    with pytest.raises(ValueError, match="Expected 3 rows"):
        vector_value(torch.zeros(2, 4), [1, 2])


def test_a_term_that_types_wrongly_never_computes() -> None:
    with pytest.raises(FormulaError):
        typing_of(Term("logits.roi", (Op("pool", (("k", 2),)),), Op("l2")))
