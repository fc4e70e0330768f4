"""Which locations learn which object, against a search through all of them."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from autodet.detectors.atss import assign

Box = tuple[float, float, float, float]


def grid(strides: tuple[int, ...], size: int, anchor: float = 8.0) -> tuple[Tensor, list[int]]:
    """Square anchors of ``anchor`` strides around every location of a square image, and locations a level."""
    rows, counts = [], []
    for stride in strides:
        places = [stride * i for i in range(size // stride)]
        half = anchor * stride / 2
        rows += [[x - half, y - half, x + half, y + half] for y in places for x in places]
        counts.append(len(places) ** 2)
    return torch.tensor(rows), counts


def overlap(one: Box, other: Box) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (areas - width * height)


def centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def by_hand(anchors: list[Box], objects: list[Box], per_level: list[int], candidates: int) -> list[int]:
    """Algorithm 1 of the paper, line by line."""
    best: dict[int, tuple[float, int]] = {}
    for number, box in enumerate(objects):
        chosen, start = [], 0
        for count in per_level:
            level = range(start, start + count)
            (bx, by), start = centre(box), start + count
            far = {i: (centre(anchors[i])[0] - bx) ** 2 + (centre(anchors[i])[1] - by) ** 2 for i in level}
            chosen += sorted(level, key=far.__getitem__)[:candidates]
        overlaps = {i: overlap(anchors[i], box) for i in chosen}
        spread = statistics.stdev(overlaps.values()) if len(chosen) > 1 else 0.0
        least = statistics.mean(overlaps.values()) + spread
        for i in chosen:
            x, y = centre(anchors[i])
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlaps[i] >= least and inside and overlaps[i] > best.get(i, (-1.0, -1))[0]:
                best[i] = (overlaps[i], number)
    return [best[i][1] if i in best else -1 for i in range(len(anchors))]


def random_boxes(count: int, size: float) -> Tensor:
    side = (0.05 + 0.9 * torch.rand(count, 2)) * size
    corner = torch.rand(count, 2) * (size - side)
    return torch.cat([corner, corner + side], dim=1)


@pytest.mark.parametrize("candidates", [1, 4, 9])
@pytest.mark.parametrize("strides", [(4, 8, 16), (8, 16, 32, 64), (16,)], ids=str)
def test_it_is_the_papers_algorithm(strides: tuple[int, ...], candidates: int) -> None:
    """Also where a level has fewer locations than an object may take, and where objects share locations."""
    anchors, counts = grid(strides, 64, anchor=2.0)  # where all anchors cover an object, rounding would decide
    learned, shared = 0, 0
    for count in (1, 3, 12):
        boxes = random_boxes(count, 64.0)
        found = assign(anchors, boxes, counts, candidates)
        expected = by_hand([tuple(x) for x in anchors.double().tolist()], [tuple(x) for x in boxes.double().tolist()],
                           counts, candidates)  # fmt: skip
        assert found.tolist() == expected
        learned += sum(number >= 0 for number in expected)
        alone = [assign(anchors, box[None], counts, candidates) >= 0 for box in boxes]
        shared += int((torch.stack(alone).sum(0) > 1).sum())
    assert learned > 3 and (shared > 0 or candidates == 1)


def test_without_objects_no_location_learns() -> None:
    anchors, counts = grid((8, 16), 64)
    found = assign(anchors, torch.zeros(0, 4), counts)
    assert found.tolist() == [-1] * len(anchors) and found.dtype == torch.int64


def test_an_object_between_the_locations_has_none() -> None:
    anchors, counts = grid((8, 16, 32), 64)
    between, around = [[17.0, 17.0, 23.0, 23.0]], [[15.0, 15.0, 25.0, 25.0]]
    assert (assign(anchors, torch.tensor(between), counts) == -1).all()
    assert (assign(anchors, torch.tensor(around), counts) == 0).sum() > 0
    # A location on the edge is not inside.
    edge = torch.tensor([[16.0, 17.0, 23.0, 23.0]])
    assert (assign(anchors, edge, counts) == -1).all()


def test_a_single_location_is_taken_by_the_object_around_it() -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    assert assign(anchors, torch.tensor([[20.0, 20, 30, 30], [2, 2, 30, 30]]), [1]).tolist() == [1]


def test_the_level_whose_anchors_are_as_large_learns_most() -> None:
    """Section 3.3: a high mean or deviation of overlaps singles out the level that suits the object."""
    anchors, counts = grid((8, 16, 32), 256)
    for level, side in enumerate((64.0, 128.0, 240.0)):
        box = torch.tensor([[5.0, 5.0, 5.0 + side, 5.0 + side]])
        own = torch.split(assign(anchors, box, counts) == 0, counts)
        assert max(range(3), key=lambda i: int(own[i].sum())) == level
