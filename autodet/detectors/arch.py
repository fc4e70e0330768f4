"""`Arch`: the body of a detector, any member of the ResNet family, as a small value with a text form.

Text: ``<block>[g<groups>,d<stages>]-<stem>:<stage>-<stage>-<stage>-<stage>`` with stages ``<width>x<blocks>``, each
followed by the blocks' inner widths in parentheses where they are not the default: one number for all blocks or one a
block. ``basic-64:64x2-128x2-256x2-512x2`` is ResNet-18, ``bottleneck[g32]-64:256x3(128)-512x4(256)-…`` a ResNeXt-50,
and with ``[g32,d3]`` one whose last three stages are deformable (``[d3]`` without groups).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal, NoReturn, cast, get_args

from torch import Tensor

from autodet.detectors.arch_text import TextError, TextReader

BlockKind = Literal["basic", "bottleneck"]
BLOCKS: Final[tuple[BlockKind, ...]] = get_args(BlockKind)
STAGES: Final = 4  # C2 to C5 at strides 4, 8, 16, 32: what a feature pyramid reads
JSON_VERSION: Final = 2
DEFORMABLE_SINCE: Final = 2  # version of the field; files of the first have none, and no deformable stages
OFFSETS: Final = 18  # of a 3×3 kernel's places, down and across
WIDTH_STEP: Final = 8  # scaled widths are multiples of this: odd widths waste vector units
READ: Final = 1 << 12  # texts whose bodies are remembered: the students of a search have many in common
BOTTLENECK_RATIO: Final = 4  # a bottleneck's default inner width is its output width over this


class ArchError(ValueError):
    """An architecture that cannot be built, or a text or state dict that describes none."""


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks at one stride.

    width: channels of every block's output, the expansion included. inner: one number a block, the channels between a
    block's convolutions; of a bottleneck the width of its 3×3 convolution, all groups together.
    """

    width: int
    inner: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.inner)


@dataclass(frozen=True)
class Arch:
    """A ResNet-family body (He et al. 2016, Xie et al. 2017): kind of block, stem width, four stages, groups.

    deformable: so many of the last stages have deformable convolutions (Dai et al. 2017) as their blocks' ``conv2``: a
    bottleneck's 3×3 convolution; a basic block's second one [ours].

    The first block of stages 2–4 halves the resolution. A block has a projection on its shortcut (torchvision's
    ``downsample``) exactly where it halves the resolution or its input and output widths differ. So a stage 1 of basic
    blocks as wide as the stem, as in ResNet-18, has none, and changing that width adds one.
    Values that cannot be built raise ArchError.
    """

    block: BlockKind
    stem: int
    stages: tuple[Stage, ...]
    groups: int = 1
    deformable: int = 0

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem is not None:
            raise ArchError(f"This is no body that can be built: {problem}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of the stages, C2 to C5."""
        return tuple(stage.width for stage in self.stages)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of the stages."""
        return tuple(stage.depth for stage in self.stages)

    def is_deformable(self, stage: int) -> bool:
        """Whether the blocks of a stage, 1–4, have deformable convolutions."""
        return stage > STAGES - self.deformable

    def __str__(self) -> str:
        blocks = blocks_text(self.block, self.groups, self.deformable)
        return f"{blocks}-{self.stem}:" + "-".join(_stage_text(self.block, stage) for stage in self.stages)

    @classmethod
    def parse(cls, text: str) -> Arch:
        """The inverse of ``str``. ArchError says at which position what was expected and found."""
        try:
            return _read(text)
        except TextError as error:
            raise ArchError(f"{error}; an example: {cls.resnet18()}") from None

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, with a version."""
        stages = [{"width": stage.width, "inner": list(stage.inner)} for stage in self.stages]
        return {
            "version": JSON_VERSION,
            "block": self.block,
            "stem": self.stem,
            "groups": self.groups,
            "deformable": self.deformable,
            "stages": stages,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Arch:
        """The inverse of ``to_json``, and of former versions; ArchError where fields are unknown or missing."""
        version = values.get("version")
        if not isinstance(version, int) or not 1 <= version <= JSON_VERSION:
            raise ArchError(f"Expected a version up to {JSON_VERSION}, found {version!r}: written by another release.")
        expected = {"version", "block", "stem", "groups", "stages"}
        expected |= {"deformable"} if version >= DEFORMABLE_SINCE else set()
        if set(values) != expected:
            raise ArchError(f"Expected the fields {sorted(expected)}, found {sorted(values)}.")
        try:
            stages = tuple(Stage(stage["width"], tuple(stage["inner"])) for stage in values["stages"])
        except (TypeError, KeyError) as error:
            raise ArchError(f"Expected stages of 'width' and 'inner', found {values['stages']!r}.") from error
        return cls(values["block"], values["stem"], stages, values["groups"], values.get("deformable", 0))

    @classmethod
    def of_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "") -> Arch:
        """Read the architecture off the shapes of a torchvision-style ResNet state dict.

        prefix: what precedes ``conv1.weight``, such as ``backbone.body.`` in a torchvision detector. A classifier
        (``fc``) is ignored. ArchError where keys are missing, or a shortcut's projection is not as the class says, or
        other convolutions are deformable than those of the last stages' blocks, or in another way.
        """
        return _of_state_dict(state, prefix)

    def scaled(self, width: float) -> Arch:
        """The same depths with all widths times ``width``, rounded to multiples of 8, at least 8.

        Inner widths at their default stay at their default; others become multiples of 8, or of the groups.
        """
        if not (math.isfinite(width) and width > 0):
            raise ArchError(f"Expected a width factor above 0, found {width}.")
        if width == 1:
            return self
        stages = tuple(_scaled_stage(self, stage, width) for stage in self.stages)
        return replace(self, stem=_rounded(self.stem * width, WIDTH_STEP), stages=stages)

    @classmethod
    def resnet18(cls) -> Arch:
        """torchvision's resnet18."""
        return _residual("basic", (2, 2, 2, 2))

    @classmethod
    def resnet34(cls) -> Arch:
        """torchvision's resnet34."""
        return _residual("basic", (3, 4, 6, 3))

    @classmethod
    def resnet50(cls) -> Arch:
        """torchvision's resnet50."""
        return _residual("bottleneck", (3, 4, 6, 3))

    @classmethod
    def resnet101(cls) -> Arch:
        """torchvision's resnet101."""
        return _residual("bottleneck", (3, 4, 23, 3))

    @classmethod
    def resnet152(cls) -> Arch:
        """torchvision's resnet152."""
        return _residual("bottleneck", (3, 8, 36, 3))

    @classmethod
    def resnext50_32x4d(cls) -> Arch:
        """torchvision's resnext50_32x4d: 32 groups, 4 channels each in stage 1."""
        return _residual("bottleneck", (3, 4, 6, 3), groups=32, group_width=4)

    @classmethod
    def resnext101_32x8d(cls) -> Arch:
        """torchvision's resnext101_32x8d: 32 groups, 8 channels each in stage 1."""
        return _residual("bottleneck", (3, 4, 23, 3), groups=32, group_width=8)

    @classmethod
    def wide_resnet50_2(cls) -> Arch:
        """torchvision's wide_resnet50_2: inner widths doubled (Zagoruyko & Komodakis 2016)."""
        return _residual("bottleneck", (3, 4, 6, 3), group_width=128)


def _residual(block: BlockKind, depths: tuple[int, ...], groups: int = 1, group_width: int = 64) -> Arch:
    """Stem 64; stage i has 64·2^i planes, ×4 at a bottleneck's output; inner = planes · group_width/64 · groups."""
    planes = [64 * 2**index for index in range(STAGES)]
    expansion = BOTTLENECK_RATIO if block == "bottleneck" else 1
    stages = tuple(
        Stage(width * expansion, (width * group_width // 64 * groups,) * depth)
        for width, depth in zip(planes, depths, strict=True)
    )
    return Arch(block, 64, stages, groups)


def _problem(arch: Arch) -> str | None:
    """Why a body cannot be built, or None."""
    if arch.block not in BLOCKS:
        return f"block {arch.block!r} is none of {', '.join(BLOCKS)}"
    if not _positive(arch.stem):
        return f"the stem's width is {arch.stem!r}, expected an integer of at least 1"
    if not _positive(arch.groups):
        return f"groups is {arch.groups!r}, expected an integer of at least 1"
    if arch.groups > 1 and arch.block == "basic":
        return f"basic blocks have no groups, found {arch.groups}; use bottleneck blocks"
    if type(arch.deformable) is not int or not 0 <= arch.deformable <= STAGES:
        return f"deformable is {arch.deformable!r}, expected the number of the last stages, 0 to {STAGES}"
    if not isinstance(arch.stages, tuple) or not all(isinstance(stage, Stage) for stage in arch.stages):
        return f"stages is {arch.stages!r}, expected a tuple of Stage"
    if len(arch.stages) != STAGES:
        return f"it has {len(arch.stages)} stages, expected {STAGES}"
    problems = (_stage_problem(stage, arch.groups) for stage in arch.stages)
    return next((f"in stage {number} {text}" for number, text in enumerate(problems, 1) if text is not None), None)


def _stage_problem(stage: Stage, groups: int) -> str | None:
    if not _positive(stage.width):
        return f"the width is {stage.width!r}, expected an integer of at least 1"
    if not isinstance(stage.inner, tuple) or not stage.inner:
        return f"the inner widths are {stage.inner!r}, expected a tuple of one number for each of its blocks"
    for inner in stage.inner:
        if not _positive(inner):
            return f"an inner width is {inner!r}, expected an integer of at least 1"
        if inner % groups:
            return f"the inner width {inner} is not divisible into {groups} groups"
    return None


def _positive(value: object) -> bool:
    return type(value) is int and value >= 1


def default_inner(block: BlockKind, width: int) -> int | None:
    """The inner width that the text leaves out; None where a bottleneck's width has no quarter."""
    if block == "basic":
        return width
    return width // BOTTLENECK_RATIO if width % BOTTLENECK_RATIO == 0 else None


def _stage_text(block: BlockKind, stage: Stage) -> str:
    text = f"{stage.width}x{stage.depth}"
    if len(set(stage.inner)) > 1:
        return f"{text}({','.join(map(str, stage.inner))})"
    return text if stage.inner[0] == default_inner(block, stage.width) else f"{text}({stage.inner[0]})"


def blocks_text(block: BlockKind, groups: int, deformable: int) -> str:
    """The beginning of a body's text, up to the stem's width."""
    options = [f"g{groups}"] * (groups > 1) + [f"d{deformable}"] * (deformable > 0)
    return f"{block}[{','.join(options)}]" if options else block


def parse_blocks(reader: TextReader) -> tuple[BlockKind, int, int]:
    """The inverse of ``blocks_text``: the kind of block, the number of groups, and that of deformable stages."""
    block = cast(BlockKind, reader.word(BLOCKS, "the kind of block"))
    groups, deformable = 1, 0
    if reader.skip("["):
        option = reader.word(("g", "d"), "groups or deformable stages")
        if option == "g":
            groups = reader.number("the number of groups")
        if option == "d" or reader.skip(",d"):
            deformable = reader.number("the number of deformable stages")
        reader.expect("]", "']' after the numbers of groups and of deformable stages")
    reader.expect("-", "'-' and the stem's width")
    return block, groups, deformable


@lru_cache(maxsize=READ)
def _read(text: str) -> Arch:
    return _parse(TextReader(text))


def _parse(reader: TextReader) -> Arch:
    block, groups, deformable = parse_blocks(reader)
    stem = reader.number("the stem's width")
    reader.expect(":", "':' and the stages")
    stages = [_parse_stage(reader, block)]
    while reader.skip("-"):
        stages.append(_parse_stage(reader, block))
    reader.end("'-' and another stage, or the end")
    return Arch(block, stem, tuple(stages), groups, deformable)


def _parse_stage(reader: TextReader, block: BlockKind) -> Stage:
    width = reader.number("the stage's width")
    reader.expect("x", "'x' and the stage's number of blocks")
    depth = reader.number("the stage's number of blocks")
    start = reader.position
    if not reader.skip("("):
        inner = default_inner(block, width)
        if inner is None:
            reader.fail(f"'(' and the inner width, as {width} is not divisible by {BOTTLENECK_RATIO}")
        return Stage(width, (inner,) * depth)
    inners = [reader.number("an inner width")]
    while reader.skip(","):
        inners.append(reader.number("an inner width"))
    reader.expect(")", "')' after the inner widths")
    if len(inners) not in (1, depth):
        reader.fail(f"1 or {depth} inner widths for {depth} blocks", f"{len(inners)}", start)
    return Stage(width, tuple(inners) if len(inners) == depth else (inners[0],) * depth)


def _scaled_stage(arch: Arch, stage: Stage, factor: float) -> Stage:
    width = _rounded(stage.width * factor, WIDTH_STEP)
    step = arch.groups if arch.groups > 1 else WIDTH_STEP
    old, new = default_inner(arch.block, stage.width), default_inner(arch.block, width)
    inner = [
        new if value == old and new is not None and new % arch.groups == 0 else _rounded(value * factor, step)
        for value in stage.inner
    ]
    return Stage(width, tuple(inner))


def _rounded(value: float, step: int) -> int:
    """The nearest multiple of ``step``, at least one; halves go up."""
    return max(1, math.floor(value / step + 0.5)) * step


def _of_state_dict(state: Mapping[str, Tensor], prefix: str) -> Arch:
    stem = _shape(state, prefix, "conv1.weight")[0]
    block: BlockKind = "bottleneck" if f"{prefix}layer1.0.conv3.weight" in state else "basic"
    stages, groups, before = [], set[int](), stem
    for number in range(1, STAGES + 1):
        inners, width, index = list[int](), 0, 0
        while index == 0 or f"{prefix}layer{number}.{index}.conv1.weight" in state:
            name = f"layer{number}.{index}."
            inners.append(_shape(state, prefix, f"{name}conv1.weight")[0])
            groups.add(inners[-1] // _shape(state, prefix, f"{name}conv2.weight")[1])
            width = _shape(state, prefix, f"{name}{'conv3' if block == 'bottleneck' else 'conv2'}.weight")[0]
            _check_shortcut(state, prefix + name, (number > 1 and index == 0) or before != width)
            before, index = width, index + 1
        stages.append(Stage(width, tuple(inners)))
    if len(groups) > 1:
        _foreign(f"blocks have different numbers of groups, {sorted(groups)}")
    depths = [stage.depth for stage in stages]
    return Arch(block, stem, tuple(stages), groups.pop(), _deformable_stages(state, prefix, depths))


def _deformable_stages(state: Mapping[str, Tensor], prefix: str, depths: Sequence[int]) -> int:
    """How many of the last stages are deformable."""
    blocks = [f"layer{number}.{index}" for number, depth in enumerate(depths, 1) for index in range(depth)]
    names = {block: f"{block}.conv2.conv_offset.weight" for block in blocks}
    deformed = [block for block in blocks if prefix + names[block] in state]
    first = min((int(block[len("layer")]) for block in deformed), default=STAGES + 1)
    plain = [block for block in blocks if int(block[len("layer")]) >= first and block not in deformed]
    if plain:
        _foreign(f"{deformed[0]} has a deformable convolution, but {plain[0]} has none; expected all blocks from there")
    for block in deformed:
        if (found := _shape(state, prefix, names[block])[0]) != OFFSETS:
            _foreign(
                f"{names[block]!r} makes {found} numbers, expected {OFFSETS}: one deformable group without modulation"
            )
    return STAGES + 1 - first


def _shape(state: Mapping[str, Tensor], prefix: str, name: str) -> tuple[int, ...]:
    weight = state.get(prefix + name)
    if weight is None:
        found = ", ".join(list(state)[:3]) or "an empty state dict"
        _foreign(f"it lacks {prefix + name!r} (it begins with {found}); check the prefix {prefix!r}")
    if weight.dim() != 4:
        _foreign(f"{prefix + name!r} has the shape {tuple(weight.shape)}, expected a convolution's four sizes")
    return tuple(weight.shape)


def _check_shortcut(state: Mapping[str, Tensor], block: str, expected: bool) -> None:
    if (f"{block}downsample.0.weight" in state) != expected:
        needed, found = ("a", "none") if expected else ("no", "one")
        _foreign(f"{block[:-1]} needs {needed} downsample by its stride and widths, but has {found}")


def _foreign(reason: str) -> NoReturn:
    raise ArchError(f"This is no state dict of a torchvision-style ResNet: {reason}.")
