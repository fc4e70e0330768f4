"""Actions: what one step of a search changes of a student, as values that print, parse, and can be drawn at random."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from autodet.detectors import DetectorSpec
from autodet.morphism import blocks, pruning, settings, widening
from autodet.morphism.morph import Morph, MorphError, Weights

Values = tuple[int, ...]
TEXT = re.compile(r"(\w+)\(([^()]*)\)")
JOINT = " > "  # between the actions of one step
KEEP = "keep"  # the text of no action at all
READ = 1 << 12  # texts whose actions are remembered: a search draws the same ones again and again
TRIES = 30  # of drawing an action that a detector can undergo


@dataclass(frozen=True)
class Steps:
    """How far one action goes.

    width: channels that widths are multiples of, and the fewest that may remain; shrink, grow: factors of a width;
    blocks: the most of a stage; sizes: shorter sides in pixels, proposals: numbers, of which the next ones are drawn.
    """

    width: int = 8
    shrink: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875)
    grow: tuple[float, ...] = (1.25, 1.5)
    blocks: int = 6
    sizes: tuple[int, ...] = ()
    proposals: tuple[int, ...] = (10, 20, 50, 100, 300)

    def below(self, spec: DetectorSpec) -> Steps:
        """These steps without the image sizes and proposals that are no fewer than a detector's."""
        sizes = tuple(size for size in self.sizes if size < spec.min_size)
        return replace(self, sizes=sizes, proposals=tuple(few for few in self.proposals if few < spec.proposals[1]))

    def narrower(self, width: int, rng: random.Random, step: int = 1) -> int | None:
        """A smaller width; None where there is none. step: what it must be a multiple of besides."""
        return self._scaled(width, rng.choice(self.shrink), step)

    def wider(self, width: int, rng: random.Random) -> int | None:
        """A larger width."""
        return self._scaled(width, rng.choice(self.grow), 1)

    def _scaled(self, width: int, factor: float, step: int) -> int | None:
        unit = max(self.width, step)
        found = max(unit, round(width * factor / unit) * unit)
        return found if found % step == 0 and (found < width if factor < 1 else found > width) else None


Draw = Callable[[DetectorSpec, random.Random, Steps], Iterable[int | None]]


class Kind(NamedTuple):
    """An action's function, the names of its values, how these are drawn, whether detections stay the same, how often
    it is drawn beside the others, and whether it is one of detectors with masks alone.
    """

    apply: Callable[..., Morph]
    names: tuple[str, ...]
    draw: Draw
    exact: bool = False
    often: int = 1
    masks: bool = False


@dataclass(frozen=True)
class Action:
    """One change: ``prune_inner(stage=3, block=1, width=24)``."""

    name: str
    values: Values = ()

    def __post_init__(self) -> None:
        check_actions([self.name])
        if len(self.values) != len(ACTIONS[self.name].names):
            raise MorphError(
                f"{self.name} takes {', '.join(ACTIONS[self.name].names) or 'nothing'}, found {self.values}."
            )

    def __str__(self) -> str:
        named = zip(ACTIONS[self.name].names, self.values, strict=True)
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in named)})"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The inverse of ``str``; MorphError where it is none."""
        return _read(text.strip())


def actions_text(actions: Sequence[Action]) -> str:
    """Several actions, the first one first: ``add_block(stage=3) > resize(pixels=160)``; ``keep`` for none."""
    return JOINT.join(map(str, actions)) or KEEP


@lru_cache(maxsize=READ)
def _read(text: str) -> Action:
    found = TEXT.fullmatch(text)
    if found is None or found[1] not in ACTIONS:
        raise MorphError(f"Expected an action such as prune_stage(stage=2, width=48), found {text!r}.")
    pairs = [pair.partition("=") for pair in found[2].split(",") if pair.strip()]
    names = tuple(name.strip() for name, _, _ in pairs)
    if names != ACTIONS[found[1]].names or not all(value.strip().isdecimal() for _, _, value in pairs):
        expected = ", ".join(f"{name}=<number>" for name in ACTIONS[found[1]].names)
        raise MorphError(f"Expected {found[1]}({expected}), found {text!r}.")
    return Action(found[1], tuple(int(value) for _, _, value in pairs))


def parse_actions(text: str) -> tuple[Action, ...]:
    """The inverse of ``actions_text``."""
    return () if text.strip() == KEEP else tuple(Action.parse(part) for part in text.split(JOINT.strip()))


def derive(
    actions: Sequence[Action], spec: DetectorSpec, weights: Weights, rng: random.Random
) -> tuple[DetectorSpec, dict[str, Tensor]]:
    """A parent's child: its spec and its whole state dict, which shares no memory with the parent's.

    Channels that were copied get a little noise, without which they would stay equal for ever. MorphError, SpecError or
    ArchError where the parent cannot undergo an action.
    """
    state = {name: value.clone() for name, value in weights.items()}
    for action in actions:
        morph = ACTIONS[action.name].apply(spec, state, rng, *action.values)
        state = morph.weights(state)
        widening.break_ties(morph, state, rng)
        spec = morph.spec
    return spec, state


def are_exact(actions: Iterable[Action]) -> bool:
    """Whether the features stay as they were, but for noise on copied channels, so that norm statistics still fit."""
    return all(ACTIONS[action.name].exact for action in actions)


def keep_weights(actions: Iterable[Action]) -> bool:
    """Whether all weights stay as they are."""
    return all(action.name in SETTINGS for action in actions)


def draw_action(spec: DetectorSpec, rng: random.Random, steps: Steps, names: Sequence[str]) -> Action | None:
    """A random action among those named whose values suit the detector; None where none was found.

    Kinds are drawn as often as they say, then their values. Whether the detector can undergo it, ``derive`` says.
    """
    names = [name for name in names if spec.masks or not ACTIONS[name].masks]
    for _ in range(TRIES if names else 0):
        (name,) = rng.choices(names, [ACTIONS[name].often for name in names])
        values = tuple(ACTIONS[name].draw(spec, rng, steps))
        if None not in values:
            return Action(name, tuple(int(value) for value in values if value is not None))
    return None


def _head_layer(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    """No values; impossible where the heads have one layer."""
    return () if (spec.rpn_depth if spec.two_stage else spec.head_depth) > 1 else (None,)


def _stage(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    """A stage that can lose a block."""
    deep = [number for number, depth in enumerate(spec.body.depths, 1) if depth > 1]
    return (rng.choice(deep) if deep else None,)


def _stage_to_deepen(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    shallow = [number for number, depth in enumerate(spec.body.depths, 1) if depth < steps.blocks]
    return (rng.choice(shallow) if shallow else None,)


def _boundary(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    (stage,) = _stage(spec, rng, steps)
    if stage is None:
        return (None, None)
    other = stage + rng.choice((-1, 1))
    fits = 1 <= other <= len(spec.body.stages) and spec.body.depths[other - 1] < steps.blocks
    return stage, other if fits else None


def _inner(spec: DetectorSpec, rng: random.Random, steps: Steps, wider: bool = False) -> Iterable[int | None]:
    number = rng.randrange(len(spec.body.stages))
    inner = spec.body.stages[number].inner
    block = rng.randrange(len(inner))
    width = steps.wider(inner[block], rng) if wider else steps.narrower(inner[block], rng)
    return number + 1, block, width


def _width(spec: DetectorSpec, rng: random.Random, steps: Steps, wider: bool = False) -> Iterable[int | None]:
    number = rng.randrange(len(spec.body.stages))
    width = spec.body.stages[number].width
    return number + 1, steps.wider(width, rng) if wider else steps.narrower(width, rng)


def _wider_inner(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    return _inner(spec, rng, steps, wider=True)


def _wider(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    return _width(spec, rng, steps, wider=True)


def _neck(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    return (steps.narrower(spec.neck_width, rng, spec.neck_step),)


def _head(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    return (steps.narrower(spec.head_width, rng) if spec.two_stage else None,)


def _mask_head(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    return (steps.narrower(spec.mask_width, rng) if spec.masks else None,)


def _size(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    others = _beside(spec.min_size, steps.sizes)
    return (rng.choice(others) if others else None,)


def _proposals(spec: DetectorSpec, rng: random.Random, steps: Steps) -> Iterable[int | None]:
    others = _beside(spec.proposals[1], steps.proposals)
    return (rng.choice(others) if spec.two_stage and others else None,)


def _beside(value: int, choices: Iterable[int]) -> list[int]:
    """The next smaller and the next larger one: most jumps over several lose what a parent has learned [ours]."""
    smaller = sorted(choice for choice in choices if choice < value)
    larger = sorted(choice for choice in choices if choice > value)
    return smaller[-1:] + larger[:1]


# What may be changed. The sizes of steps, and how often each is drawn, are ours: the paper's are not published.
ACTIONS: dict[str, Kind] = {
    "add_block": Kind(blocks.add_block, ("stage",), _stage_to_deepen, exact=True),
    "remove_block": Kind(blocks.remove_block, ("stage",), _stage),
    "move_boundary": Kind(blocks.move_boundary, ("stage", "other"), _boundary),
    "widen_inner": Kind(widening.widen_inner, ("stage", "block", "width"), _wider_inner, exact=True),
    "widen_stage": Kind(widening.widen_stage, ("stage", "width"), _wider, exact=True),
    "prune_inner": Kind(pruning.prune_inner, ("stage", "block", "width"), _inner),
    "prune_stage": Kind(pruning.prune_stage, ("stage", "width"), _width),
    "prune_neck": Kind(pruning.prune_neck, ("width",), _neck),
    "prune_head": Kind(pruning.prune_head, ("width",), _head),
    "prune_mask_head": Kind(pruning.prune_mask_head, ("width",), _mask_head, masks=True),
    "remove_head_layer": Kind(blocks.remove_head_layer, (), _head_layer),
    # The image's size trades the most of a detector's accuracy and time.
    "resize": Kind(settings.resize, ("pixels",), _size, often=3),
    "keep_proposals": Kind(settings.keep_proposals, ("count",), _proposals, exact=True),
}
ALL = tuple(ACTIONS)
PRUNING = (
    "remove_block",
    "prune_inner",
    "prune_stage",
    "prune_neck",
    "prune_head",
    "prune_mask_head",
    "remove_head_layer",
)
SETTINGS = ("resize", "keep_proposals")  # which anyone could change on a detector
TRIMMING = (*PRUNING, *SETTINGS)  # with steps below a detector's: all that makes it cheaper
STRUCTURE = ("add_block", "remove_block", "move_boundary", "widen_inner", "widen_stage", *SETTINGS)


def check_actions(names: Iterable[str]) -> None:
    """MorphError where there is no action of a name."""
    for name in names:
        if name not in ACTIONS:
            raise MorphError(f"There is no action {name!r}; there are {', '.join(ACTIONS)}.")
