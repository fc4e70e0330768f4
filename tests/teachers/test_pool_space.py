"""The members of a space: how many there are, which, and how they are drawn; against going through all of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from pool_cases import SPACES, space_of

from autodet.detectors import Arch
from autodet.detectors.channels import body_counts
from autodet.teachers.space import R50_TO_R101, SMALL, Member, PoolSpace, Range, SpaceError

spaces = pytest.mark.parametrize("name", SPACES)


@spaces
def test_count_is_the_number_of_different_members_and_each_is_inside(name: str) -> None:
    space = space_of(name)
    members = list(space.members())
    assert len(members) == len(set(members)) == space.count > 3
    assert all(space.why_outside(member) is None for member in members)
    assert {space.smallest, space.largest} <= set(members)


@spaces
def test_the_largest_and_smallest_bound_every_channel_group_and_depth(name: str) -> None:
    space = space_of(name)
    low, high = (body_counts(member.body) for member in (space.smallest, space.largest))
    for member in space.members():
        counts = body_counts(member.body)
        assert all(low.get(group, 0) <= count <= high[group] for group, count in counts.items())


@pytest.mark.parametrize("text", [*SPACES.values(), R50_TO_R101, SMALL])
def test_a_space_survives_printing_and_parsing(text: str) -> None:
    assert str(PoolSpace.parse(text)) == text


@spaces
def test_members_survive_printing_and_parsing(name: str) -> None:
    for member in space_of(name).members():
        assert Member.parse(str(member)) == member


def test_the_provided_spaces_have_as_many_members_as_is_said() -> None:
    large = PoolSpace.parse(R50_TO_R101)
    assert large.count == 3 * 3**4 * (3 * 3 * 18 * 2) == 78_732
    assert large.largest == Member(Arch.resnet101(), 800)
    assert large.why_outside(Member(Arch.resnet50(), 800)) is None
    # Stage 1: three widths, one or two blocks; the others five widths, and of each block five inner widths.
    assert PoolSpace.parse(SMALL).count == (3 * 2) * (5 * (5 + 5**2)) ** 3 == 20_250_000


def test_every_choice_is_drawn_uniformly() -> None:
    space = space_of("tied")
    rng = random.Random(0)
    members = [space.sample(rng) for _ in range(4000)]
    depths = Counter(member.body.stages[1].depth for member in members)
    inner = Counter(inner for member in members for inner in member.body.stages[1].inner)
    sizes = Counter(member.size for member in members)
    for counts in (depths, inner, sizes):
        expected = sum(counts.values()) / len(counts)
        deviation = sum((count - expected) ** 2 / expected for count in counts.values())
        assert deviation < 13.8, counts  # of chi-square with at most two degrees of freedom, once in a thousand


def test_where_inner_widths_are_defaults_every_member_is_as_likely() -> None:
    space = PoolSpace.parse("basic-=:8..16/8x1..2-8..16/8x1-16x1-16..24/8x1@64")
    rng = random.Random(1)
    drawn = Counter(space.sample(rng) for _ in range(4000))
    assert len(drawn) == space.count == 16
    assert sum((count - 250) ** 2 / 250 for count in drawn.values()) < 37.7  # 15 degrees of freedom, once in a thousand


def test_under_a_limit_only_members_below_it_are_drawn() -> None:
    space = space_of("tied")

    def blocks(member: Member) -> float:
        return float(sum(member.body.depths))

    rng = random.Random(0)
    assert {blocks(space.sample_below(rng, 5, blocks)) for _ in range(100)} == {4, 5}
    assert blocks(space.sample_below(rng, 4, blocks)) == 4
    with pytest.raises(SpaceError, match=r"No member costs at most 3: the smallest, basic-8.*, costs 4\."):
        space.sample_below(rng, 3, blocks)


def test_a_rare_member_below_a_limit_is_at_worst_the_smallest() -> None:
    space = PoolSpace.parse(R50_TO_R101)
    found = space.sample_below(random.Random(0), 3 + 2 + 6 + 2, lambda member: float(sum(member.body.depths)))
    assert sum(found.body.depths) <= 13


@pytest.mark.parametrize(("share", "low"), [(0, 48), (0.25, 40), (0.5, 32), (0.74, 24), (1, 16)])
def test_a_range_opens_downwards(share: float, low: int) -> None:
    assert Range(16, 48, 8).opened(share) == Range(low, 48, 8)


@spaces
def test_a_space_opens_from_its_largest_member_to_all(name: str) -> None:
    space = space_of(name)
    parts = [space.opened(share) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert set(parts[0].members()) == {space.largest} and parts[-1] == space
    inside = [set(part.members()) for part in parts]
    assert all(smaller <= larger for smaller, larger in pairwise(inside))
    with pytest.raises(SpaceError, match="share of the space"):
        space.opened(1.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 50}, "its input size 50 is none of 48, 64"),
        ({"body": "basic-8:16x1-8x1-16x1-16x1"}, "its stem's width 8 is not that of stage 1, 16"),
        ({"body": "basic-12:12x1-8x1-16x1-16x1"}, "stage 1's width 12 is not in 8..16/8"),
        ({"body": "basic-8:8x3-8x1-16x1-16x1"}, "stage 1 has 3 blocks, which is not in 1..2"),
        ({"body": "basic-8:8x1-8x2(4,5)-16x1-16x1"}, "stage 2's inner width 5 is not in 4..12/4"),
        ({"body": "basic-8:8x1-8x1-16x1(8)-16x1"}, "stage 3's inner width 8 is not in 16"),
        ({"body": "bottleneck-8:16x1-16x1-16x1-16x1"}, "its blocks are bottleneck of 1 groups, the pool's basic"),
    ],
)
def test_a_member_outside_is_refused_with_the_reason(change: dict[str, str | int], reason: str) -> None:
    member = Member(Arch.parse(str(change.get("body", "basic-8:8x1-8x1-16x1-16x1"))), int(change.get("size", 64)))
    with pytest.raises(SpaceError, match="is no member of the pool basic-=") as error:
        space_of("tied").check(member)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("basic-=:8x1-8x1-8x1@64", "it has 3 stages, expected 4"),
        ("basic-=:8x1-8x1-8x1-8x1@64,48", "input sizes are (64, 48), expected rising"),
        ("basic-8..16/8:8x1-8x1-8x1-8x1@64", "stem 8..16/8 and stage 1's width 8 can be equal"),
        ("bottleneck-8:30..34/2x1-8x1-8x1-8x1@64", "the width 30 has no default inner width"),
        ("bottleneck[g2]-8:16x1(8..16/8)-16x1(8)-16x1(8)-16x1(8)@64", "grouped convolutions cannot be elastic"),
        ("bottleneck[g2]-8:16..32/16x1-16x1(8)-16x1(8)-16x1(8)@64", "grouped convolutions cannot be elastic"),
        ("bottleneck[g3]-8:16x1(8)-16x1(8)-16x1(8)-16x1(8)@64", "not divisible into 3 groups"),
        ("basic-=:8..10/4x1-8x1-8x1-8x1@64", "Expected low..high/step"),
        ("basic-=:16..8x1-8x1-8x1-8x1@64", "Expected low..high/step"),
        ("basic-=:8x1-8x1-8x1-8x1", "position 23: expected '-' and another stage, or '@' and the input sizes"),
        ("basic-8x1", "position 7: expected ':' and the stages, found 'x1'"),
        ("yolo", "expected the kind of block (basic, bottleneck)"),
    ],
)
def test_what_is_no_space_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(SpaceError) as error:
        PoolSpace.parse(text)
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["basic-8:8x1-8x1-16x1-16x1", "basic-8:8x1@64", "@64", ""])
def test_what_is_no_member_is_refused(text: str) -> None:
    with pytest.raises(SpaceError, match="Expected a member as '<body>@<pixels>'"):
        Member.parse(text)


def test_a_space_of_one_stage_too_many_is_refused() -> None:
    space = space_of("tied")
    with pytest.raises(SpaceError, match="it has 5 stages"):
        replace(space, stages=(*space.stages, space.stages[0]))
