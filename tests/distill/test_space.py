"""The contract of the language over the space that a search walks through.

Every term is refused by typing, or its loss is finite, ≥ 0 and 0 at S = T, its gradient is finite, also there, the
teacher gets none, and the loss of a batch is the mean of its images' losses unless ``batch_dependent``.

The space depends on the input's kind alone: 84,144 terms on maps, 16,920 on planes, 3,654 on vectors, 6 on boxes. By
default this covers
every operation with every searched parameter and every pair of operations that can follow one another on a map with
dead images, cells and channels, on vectors and on boxes, and fixed random samples of all terms (1,600) on other values:
one image, one cell, one channel, large, small, half precision, no rows. ``-m slow`` covers every term.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from autodet.distill.distances import DISTANCES
from autodet.distill.formula import INPUTS, FormulaError, Op, Term, typing_of
from autodet.distill.grammar import count_terms, terms_of
from autodet.distill.terms import compared, term_loss, transformed
from autodet.distill.transforms import TRANSFORMS
from autodet.distill.values import (
    BOXES,
    MAP,
    PLANE,
    VECTOR,
    Kind,
    Operation,
    Value,
    map_value,
    region_weights,
    vector_value,
)

INPUT_OF = {spec.kind: name for name, spec in reversed(INPUTS.items())}  # one input of each kind
COUNTS = [2, 0, 3, 1, 4]  # rows of each image, for vectors and boxes
SAMPLED = 100  # terms for each way of drawing values
EXHAUSTIVE = ("partly dead", "float32", "split")  # where all adjacent pairs are judged


def random_maps(images: int, shape: tuple[int, int, int], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(len(shape) + images)
    return tuple((scale * torch.randn(images, *shape, generator=generator)).to(dtype) for _ in "ST")


def partly_dead_maps() -> tuple[Tensor, ...]:
    """What ``fg`` makes: zero outside boxes, an image without any; and two equal images, a constant channel."""
    sides = random_maps(5, (4, 6, 5), torch.float32)
    for side in sides:
        side[0, :, :3], side[1], side[3], side[:, 2] = 0, 0, side[2], 7.0
    return sides


def random_boxes(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """R×4 xyxy: ordinary ones, one without area, one with crossed corners, one that the other side does not meet."""
    generator = torch.Generator().manual_seed(5)
    first, second = (scale * torch.rand(sum(COUNTS), 4, generator=generator) for _ in "ST")
    for side in (first, second):
        side[:, 2:] += side[:, :2]
        side[0, 2] = side[0, 0]
        side[1] = side[1].flip(0)
    second[2] += 10 * scale
    return first.to(dtype), second.to(dtype)


def boxes_value(data: Tensor) -> Value:
    return Value(data, BOXES, None, region_weights(COUNTS, data))


def vectors(dtype: torch.dtype, scale: float = 1.0, width: int = 4) -> tuple[Value, ...]:
    sides = random_maps(sum(COUNTS), (width, 1, 1), dtype, scale)
    return tuple(vector_value(side[:, :, 0, 0], COUNTS) for side in sides)


def plane_value(data: Tensor, counts: list[int]) -> Value:
    return Value(data, PLANE, None, region_weights(counts, data))


def planes(dtype: torch.dtype, scale: float = 1.0) -> tuple[Value, ...]:
    """Logits of the masks of regions."""
    return tuple(plane_value(side, COUNTS) for side in random_maps(sum(COUNTS), (1, 6, 6), dtype, scale))


def maps_of(sides: tuple[Tensor, ...]) -> tuple[Value, ...]:
    return tuple(map_value(side) for side in sides)


DRAWN: dict[Kind, dict[str, tuple[Value, ...]]] = {
    MAP: {
        "one image": maps_of(random_maps(1, (4, 6, 5), torch.float32)),
        "two images of one cell": maps_of(random_maps(2, (3, 1, 1), torch.float32)),
        "one channel": maps_of(random_maps(4, (1, 5, 3), torch.float64)),
        "five images": maps_of(random_maps(5, (4, 6, 5), torch.float64)),
        "half precision": maps_of(random_maps(3, (2, 8, 8), torch.float16)),
        "large": maps_of(random_maps(3, (4, 3, 3), torch.float32, 300.0)),
        "small": maps_of(random_maps(3, (4, 3, 3), torch.float32, 1e-4)),
        "partly dead": maps_of(partly_dead_maps()),
    },
    VECTOR: {
        "float32": vectors(torch.float32),
        "float64": vectors(torch.float64),
        "bfloat16": vectors(torch.bfloat16),
        "large": vectors(torch.float32, 300.0),
        "one class": vectors(torch.float32, width=1),
        "no rows": tuple(vector_value(torch.zeros(0, 4), [0, 0]) for _ in "ST"),
    },
    PLANE: {
        "float64": planes(torch.float64),
        "saturated": planes(torch.float32, 30.0),
    },
    BOXES: {
        "float32": tuple(map(boxes_value, random_boxes(torch.float32))),
        "float64": tuple(map(boxes_value, random_boxes(torch.float64, 100.0))),
        "half precision": tuple(map(boxes_value, random_boxes(torch.float16))),
        "tiny": tuple(map(boxes_value, random_boxes(torch.float32, 1e-5))),
    },
}
CASES = [(kind, name) for kind, drawn in DRAWN.items() for name in drawn]


@functools.cache
def adjacent_terms(kind: Kind) -> list[Term]:
    """All with at most one transform; of two transforms each pair once, the distances taken in turn."""
    found, pairs = [], 0
    for chain, terms in itertools.groupby(terms_of(INPUT_OF[kind]), key=lambda term: term.transforms):
        if len(chain) < 2:
            found += list(terms)
        elif len(chain) == 2:
            options = list(terms)
            found.append(options[pairs % len(options)])
            pairs += 1
    return found


@functools.cache
def all_terms(kind: Kind) -> list[Term]:
    return list(terms_of(INPUT_OF[kind]))


def terms_for(kind: Kind, name: str) -> list[Term]:
    """A sample that is another one for each way of drawing values, after all adjacent pairs on some."""
    terms = all_terms(kind)
    return adjacent_terms(kind) * (name in EXHAUSTIVE) + random.Random(name).sample(terms, min(SAMPLED, len(terms)))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def leaf(value: Value) -> Value:
    """The same value, which wants a gradient."""
    return Value(value.data.detach().clone().requires_grad_(), value.kind, value.axis, value.weights)


def is_random(term: Term) -> bool:
    return any(TRANSFORMS[op.name].random for op in term.transforms)


def check(term: Term, student: Value, teacher: Value) -> None:
    """One term on one pair of values; AssertionError names the term."""
    typing_of(term)
    ours, theirs = leaf(student), leaf(teacher)
    loss = term_loss(term, [ours], [theirs], generator())
    assert loss.ndim == 0 and loss.isfinite() and loss >= 0, (str(term), loss)
    assert loss.dtype == torch.promote_types(student.data.dtype, torch.float32)
    loss.backward()  # type: ignore[no-untyped-call]
    assert ours.data.grad is not None and ours.data.grad.isfinite().all(), str(term)
    assert theirs.data.grad is None, f"{term}: the teacher gets a gradient"
    same = leaf(teacher)
    equal = term_loss(term, [same], [teacher], generator())
    assert equal.abs() < 1e-5, (str(term), equal)
    assert torch.autograd.grad(equal, same.data)[0].isfinite().all(), f"{term} at S = T"


@pytest.mark.parametrize(("kind", "name"), CASES, ids=str)
def test_terms_keep_the_contract(kind: Kind, name: str) -> None:
    student, teacher = DRAWN[kind][name]
    judged, terms = 0, terms_for(kind, name)
    for term in terms:
        try:
            term_loss(term, [student], [teacher], generator())
        except ValueError as error:
            assert "works along the batch" in str(error) and len(student.data) < term.min_batch, term
            continue
        check(term, student, teacher)
        judged += 1
    assert judged > len(terms) / 4


def image_of(value: Value, image: int) -> Value:
    """One image's rows, as a batch of its own."""
    if value.kind == MAP:
        return map_value(value.data[image : image + 1])
    rows = slice(sum(COUNTS[:image]), sum(COUNTS[: image + 1]))
    return Value(value.data[rows], value.kind, value.axis, region_weights(COUNTS[image : image + 1], value.data))


@pytest.mark.parametrize("kind", DRAWN, ids=str)
def test_how_images_are_split_over_workers_changes_batch_dependent_terms_only(kind: Kind) -> None:
    student, teacher = DRAWN[kind]["five images" if kind == MAP else "float64"]
    others = 0
    for term in terms_for(kind, "split"):
        if is_random(term):
            continue
        if not term.batch_dependent:
            whole = term_loss(term, [student], [teacher])
            parts = [term_loss(term, [image_of(student, i)], [image_of(teacher, i)]) for i in range(len(COUNTS))]
            torch.testing.assert_close(torch.stack(parts).mean(), whole, msg=str(term))
        others += term.batch_dependent
    assert (others > 0) == (kind != BOXES)


@pytest.mark.parametrize("input", list(INPUTS))
def test_every_input_of_a_kind_spans_the_same_terms(input: str) -> None:
    kind = INPUTS[input].kind
    assert kind in DRAWN, f"say above how values of a {kind} are drawn"
    assert count_terms(input, weights=(1,)) == len(all_terms(kind))


def every_op(table: dict[str, Operation], kind: Kind) -> Iterator[Op]:
    """Each operation with every axis of the kind and of others, otherwise with its first searched or default values."""
    for name, spec in table.items():
        options = [p.axes if p.type == "axis" else (p.searched or (p.default,))[:1] for p in spec.params]
        for values in itertools.product(*options):
            yield Op(name, tuple((p.name, v) for p, v in zip(spec.params, values, strict=True) if v is not None))


@pytest.mark.parametrize("kind", DRAWN, ids=str)
def test_outside_the_space_a_term_is_refused_by_typing_or_keeps_the_contract(kind: Kind) -> None:
    """Any two transforms in any order, and any distance; the grammar's slots do not bind the language."""
    student, teacher = DRAWN[kind]["five images" if kind == MAP else "float64"]
    refused = accepted = 0
    transforms, distances = list(every_op({**TRANSFORMS}, kind)), list(every_op({**DISTANCES}, kind))
    chains = [(op,) for op in transforms] + list(itertools.product(transforms, repeat=2))
    for number, chain in enumerate(chains):
        term = Term(INPUT_OF[kind], chain, distances[number % len(distances)])
        try:
            typing_of(term)
        except FormulaError:
            refused += 1
            continue
        check(term, student, teacher)
        accepted += 1
    assert refused > 100 and (accepted > 100) == (kind != BOXES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["five images", "partly dead", "large", "small"])
def test_every_term_on_maps_keeps_the_contract(name: str) -> None:
    student, teacher = DRAWN[MAP][name]
    walked = 0
    for chain, terms in itertools.groupby(terms_of(INPUT_OF[MAP]), key=lambda term: term.transforms):
        distances = [term.distance for term in terms]
        for ours in (leaf(student), leaf(teacher)):
            pair = ours, teacher
            draw = generator()
            for op in chain:
                pair = transformed(op, *pair, draw)
            losses = torch.stack([compared(distance, *pair) for distance in distances])
            (gradient,) = torch.autograd.grad(losses.sum(), ours.data)
            assert losses.isfinite().all() and losses.min() >= 0 and gradient.isfinite().all(), list(map(str, chain))
            walked += len(distances)
        assert losses.max() < 1e-5, list(map(str, chain))
    assert walked == 2 * len(all_terms(MAP))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(DRAWN[VECTOR]))
def test_every_term_on_vectors_keeps_the_contract(name: str) -> None:
    student, teacher = DRAWN[VECTOR][name]
    for term in all_terms(VECTOR):
        if len(student.data) >= term.min_batch:
            check(term, student, teacher)
