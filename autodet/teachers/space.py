"""`PoolSpace`: which detectors a pool of teachers contains, as ranges of depths, widths and input sizes.

Text: a body's text (see ``detectors.arch``) with ranges for numbers, then input sizes, largest last::

    bottleneck-32..64/16:128..256/64x1..3-256..512/128x2..4-512..1024/256x6..23-1024..2048/512x2..3@800
    basic-=:16..32/8x1..2-32..64/16x1..2(32..64/16)-64..128/32x1..2-128..256/64x1..2@160,192
    bottleneck[g32,d3]-64:256x3(256)-512x4(512)-1024x6..23(1024)-2048x3(2048)@800

``low..high/step`` is a range (a step of 1 and a range of one number are left out), a stem ``=`` is as wide as stage 1,
and inner widths that are not given are their block's default. Given ones are chosen for each block by itself.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

from autodet.detectors.arch import STAGES, Arch, ArchError, BlockKind, Stage, blocks_text, default_inner, parse_blocks
from autodet.detectors.arch_text import TextError, TextReader

TRIES = 1000  # of drawing a member under a limit


class SpaceError(ValueError):
    """A space that cannot be built, a text that describes none, or a member that is not in it."""


@dataclass(frozen=True)
class Range:
    """``low``, ``low + step``, … up to ``high``, which must be among them."""

    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.low < 1 or self.step < 1 or self.high < self.low or (self.high - self.low) % self.step:
            raise SpaceError(f"Expected low..high/step with whole steps of at least 1 between them, found {self}.")

    @property
    def values(self) -> range:
        """All numbers, rising."""
        return range(self.low, self.high + 1, self.step)

    def opened(self, share: float) -> Range:
        """The upper ``share`` of the steps below ``high``: 0 for ``high`` alone, 1 for all."""
        steps = math.floor(share * (len(self.values) - 1) + 0.5)
        return replace(self, low=self.high - steps * self.step)

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        return f"{self.low}..{self.high}" + (f"/{self.step}" if self.step > 1 else "")


@dataclass(frozen=True)
class StageSpace:
    """A stage's output widths, numbers of blocks, and inner widths of each block (None: the block's default)."""

    width: Range
    depth: Range
    inner: Range | None = None

    @property
    def count(self) -> int:
        """How many different stages there are."""
        inners = len(self.inner.values) if self.inner else 1
        blocks: int = sum(inners**depth for depth in self.depth.values)
        return len(self.width.values) * blocks

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}" + (f"({self.inner})" if self.inner else "")


@dataclass(frozen=True)
class Member:
    """One detector of a pool: a body and the shorter side of its images in pixels. Text: ``<body>@<pixels>``."""

    body: Arch
    size: int

    def __str__(self) -> str:
        return f"{self.body}@{self.size}"

    @classmethod
    def parse(cls, text: str) -> Member:
        """The inverse of ``str``; SpaceError where it is none."""
        body, _, size = text.partition("@")
        if not size.isdecimal():
            raise SpaceError(f"Expected a member as '<body>@<pixels>', found {text!r}.")
        try:
            return cls(Arch.parse(body), int(size))
        except ArchError as error:
            raise SpaceError(f"Expected a member as '<body>@<pixels>': {error}") from error


@dataclass(frozen=True)
class PoolSpace:
    """The members of a pool. stem: None where it is as wide as stage 1, as in a body of basic blocks.

    sizes: shorter sides of the images in pixels, rising; groups, deformable: of all bodies. SpaceError says what of it
    cannot be built.
    """

    block: BlockKind
    stages: tuple[StageSpace, ...]
    sizes: tuple[int, ...]
    stem: Range | None = None
    groups: int = 1
    deformable: int = 0

    def __post_init__(self) -> None:
        if problem := _problem(self):
            raise SpaceError(f"This is no space of detectors: {problem}.")

    @property
    def count(self) -> int:
        """How many members there are."""
        stems = len(self.stem.values) if self.stem else 1
        return len(self.sizes) * stems * math.prod(stage.count for stage in self.stages)

    def at_size(self, pixels: int) -> PoolSpace:
        """Its members for images of one size, where there are any; else itself."""
        return replace(self, sizes=(pixels,)) if pixels in self.sizes else self

    @property
    def largest(self) -> Member:
        """The member with the most of everything, whose weights all share."""
        return self._member(lambda values: values[-1])

    @property
    def smallest(self) -> Member:
        """The member with the least of everything."""
        return self._member(lambda values: values[0])

    def sample(self, rng: random.Random) -> Member:
        """A random member: each depth, width, inner width and size is drawn uniformly, whatever the others are.

        Where inner widths are defaults, and so every stage has equally many members of each depth, this is uniform over
        members. Else uniform over members would hardly ever be a shallow one, as deep ones have more inner widths.
        """
        return self._member(lambda values: values[rng.randrange(len(values))])

    def sample_below(self, rng: random.Random, limit: float, cost: Callable[[Member], float]) -> Member:
        """A random member whose cost is at most ``limit``; SpaceError where the smallest's is above it."""
        for _ in range(TRIES):
            member = self.sample(rng)
            if cost(member) <= limit:
                return member
        least = cost(self.smallest)
        if least <= limit:
            return self.smallest
        raise SpaceError(f"No member costs at most {limit:g}: the smallest, {self.smallest}, costs {least:g}.")

    def opened(self, share: float) -> PoolSpace:
        """The upper ``share`` of every range (progressive shrinking): 0 for the largest alone, 1 for all."""
        if not 0 <= share <= 1:
            raise SpaceError(f"Expected a share of the space in [0, 1], found {share}.")
        steps = math.floor(share * (len(self.sizes) - 1) + 0.5)
        return replace(
            self,
            stages=tuple(
                StageSpace(s.width.opened(share), s.depth.opened(share), s.inner and s.inner.opened(share))
                for s in self.stages
            ),
            sizes=self.sizes[len(self.sizes) - 1 - steps :],
            stem=self.stem and self.stem.opened(share),
        )

    def members(self) -> Iterator[Member]:
        """All members, for spaces small enough to go through."""
        for size in self.sizes:
            for stages in itertools.product(*(_all_stages(self.block, stage) for stage in self.stages)):
                for stem in self.stem.values if self.stem else (stages[0].width,):
                    yield Member(Arch(self.block, stem, stages, self.groups, self.deformable), size)

    def why_outside(self, member: Member) -> str | None:
        """The reason why a detector is no member, None where it is one."""
        body = member.body
        if (body.block, body.groups) != (self.block, self.groups):
            return f"its blocks are {body.block} of {body.groups} groups, the pool's {self.block} of {self.groups}"
        if body.deformable != self.deformable:
            return f"its last {body.deformable} stages are deformable, the pool's last {self.deformable}"
        if member.size not in self.sizes:
            return f"its input size {member.size} is none of {', '.join(map(str, self.sizes))}"
        stems = self.stem.values if self.stem else (body.stages[0].width,)
        if body.stem not in stems:
            return f"its stem's width {body.stem} is not {self.stem or f'that of stage 1, {stems[0]}'}"
        for number, (stage, space) in enumerate(zip(body.stages, self.stages, strict=True), 1):
            if stage.width not in space.width.values:
                return f"stage {number}'s width {stage.width} is not in {space.width}"
            if stage.depth not in space.depth.values:
                return f"stage {number} has {stage.depth} blocks, which is not in {space.depth}"
            inner = space.inner.values if space.inner else (default_inner(self.block, stage.width),)
            if wrong := [value for value in stage.inner if value not in inner]:
                return f"stage {number}'s inner width {wrong[0]} is not in {space.inner or inner[0]}"
        return None

    def check(self, member: Member) -> None:
        """SpaceError with the reason unless the member is in the space."""
        if reason := self.why_outside(member):
            raise SpaceError(f"{member} is no member of the pool {self}: {reason}.")

    def __str__(self) -> str:
        blocks = blocks_text(self.block, self.groups, self.deformable)
        stages = "-".join(map(str, self.stages))
        return f"{blocks}-{self.stem or '='}:{stages}@{','.join(map(str, self.sizes))}"

    @classmethod
    def parse(cls, text: str) -> PoolSpace:
        """The inverse of ``str``; SpaceError says at which position what was expected and found."""
        try:
            return _parse(TextReader(text))
        except TextError as error:
            raise SpaceError(f"{error}; an example: {R50_TO_R101}") from None

    def _member(self, choose: Callable[[tuple[int, ...]], int]) -> Member:
        """A member from one choice a range. All are made in a fixed order, so that equal seeds give equal members."""
        stages = []
        for space in self.stages:
            width, depth = choose(tuple(space.width.values)), choose(tuple(space.depth.values))
            inner = [choose(_inner_widths(self.block, space, width)) for _ in range(depth)]
            stages.append(Stage(width, tuple(inner)))
        stem = choose(tuple(self.stem.values)) if self.stem else stages[0].width
        return Member(Arch(self.block, stem, tuple(stages), self.groups, self.deformable), choose(self.sizes))


def _inner_widths(block: BlockKind, space: StageSpace, width: int) -> tuple[int, ...]:
    default = default_inner(block, width)
    assert space.inner is not None or default is not None  # checked when the space was made
    return tuple(space.inner.values) if space.inner is not None else (cast(int, default),)


def _all_stages(block: BlockKind, space: StageSpace) -> Iterator[Stage]:
    for width, depth in itertools.product(space.width.values, space.depth.values):
        for inner in itertools.product(_inner_widths(block, space, width), repeat=depth):
            yield Stage(width, inner)


def _problem(space: PoolSpace) -> str | None:
    """Why a space cannot be built, or None."""
    if len(space.stages) != STAGES:
        return f"it has {len(space.stages)} stages, expected {STAGES}"
    if not space.sizes or list(space.sizes) != sorted(set(space.sizes)) or space.sizes[0] < 1:
        return f"its input sizes are {space.sizes}, expected rising numbers of pixels"
    for number, stage in enumerate(space.stages, 1):
        odd = [width for width in stage.width.values if default_inner(space.block, width) is None]
        if stage.inner is None and odd:
            return f"in stage {number} the width {odd[0]} has no default inner width; give a range in parentheses"
        inner = stage.inner or stage.width
        if space.groups > 1 and inner.low != inner.high:
            return f"in stage {number} inner widths of grouped convolutions cannot be elastic; give one number"
    if space.stem is not None and set(space.stem.values) & set(space.stages[0].width.values):
        return (
            f"stem {space.stem} and stage 1's width {space.stages[0].width} can be equal, and a block between equal"
            " widths has no projection to share; use '=' for a stem as wide as stage 1"
        )
    try:
        stages = space._member(lambda values: values[-1]).body.stages
        Arch(space.block, 1, stages, space.groups, space.deformable)
    except ArchError as error:
        return f"its largest member cannot be built ({error})"
    return None


def _parse(reader: TextReader) -> PoolSpace:
    block, groups, deformable = parse_blocks(reader)
    stem = None if reader.skip("=") else _parse_range(reader, "the stem's width, or '='")
    reader.expect(":", "':' and the stages")
    stages = [_parse_stage(reader)]
    while reader.skip("-"):
        stages.append(_parse_stage(reader))
    reader.expect("@", "'-' and another stage, or '@' and the input sizes")
    sizes = [reader.number("an input size")]
    while reader.skip(","):
        sizes.append(reader.number("an input size"))
    reader.end("',' and another input size, or the end")
    return PoolSpace(block, tuple(stages), tuple(sizes), stem, groups, deformable)


def _parse_stage(reader: TextReader) -> StageSpace:
    width = _parse_range(reader, "the stage's width")
    reader.expect("x", "'x' and the stage's number of blocks")
    depth = _parse_range(reader, "the stage's number of blocks")
    inner = None
    if reader.skip("("):
        inner = _parse_range(reader, "the blocks' inner width")
        reader.expect(")", "')' after the inner width")
    return StageSpace(width, depth, inner)


def _parse_range(reader: TextReader, what: str) -> Range:
    low = reader.number(what)
    high = reader.number(f"the end of {what}") if reader.skip("..") else low
    return Range(low, high, reader.number(f"the step of {what}") if reader.skip("/") else 1)


# A space whose largest body is ResNet-101 and which contains ResNet-50, of about as many members (78,732) as GAIA-det's
# (Bu et al. 2021, 85,000).
R50_TO_R101 = "bottleneck-32..64/16:128..256/64x1..3-256..512/128x2..4-512..1024/256x6..23-1024..2048/512x2..3@800"
# For two cores: 20,250,000 members, bodies of 0.3 to 2.8 million weights.
SMALL = "basic-=:16..32/8x1..2-32..64/8x1..2(32..64/8)-64..128/16x1..2(64..128/16)-128..256/32x1..2(128..256/32)@192"
