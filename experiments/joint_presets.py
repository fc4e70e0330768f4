"""What the presets mean for upgrading a detector. All numbers are ours; the paper states no budgets."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace

from presets import Preset, preset_of, recipe

from autodet.detectors import DetectorSpec
from autodet.detectors.traits import TRAITS
from autodet.morphism.actions import Steps
from autodet.training import TrainSettings


@dataclass(frozen=True)
class JointPreset:
    """One scale. base: trained by ``preset.teaching`` where the user gives none. child: recipe of a child's training.

    budget: children. schedule: of the pool, as a text. inputs, per_input, weights: of the distiller search. fractions:
    of the base's image size that may be chosen. fraction: of the training images, for the distiller's candidates.
    founders: members of the pool that children may descend from as well as from the base; where a pool is trained
    longer than the base was, they are the better beginnings, and where not, their children soon lose [ours]. larger:
    the size of images beside the base's, as a factor of it, that the pool's members learn to see. rounds: of the last
    timings, at most; earlier ones take fewer.
    """

    preset: Preset
    child: TrainSettings
    budget: int
    schedule: str | None
    members: int
    inputs: tuple[str, ...]
    fraction: float
    per_input: int
    weights: int
    steps: Steps
    fractions: tuple[float, ...] = (2 / 3, 3 / 4, 5 / 6, 11 / 12, 1.0, 13 / 12, 7 / 6, 5 / 4, 4 / 3)
    founders: int = 4
    larger: float = 7 / 6
    rounds: int = 200

    def placed(self, options: argparse.Namespace) -> JointPreset:
        """With the workers, CPUs and GPUs that a command line gives."""
        placed = self.preset.placed(options.cpus_per_trial, options.gpus_per_trial)
        return replace(self, preset=replace(placed, workers=options.workers or placed.workers))

    def inputs_of(self, family: str) -> tuple[str, ...]:
        """The knowledge inputs to search: responses first, which mean the same in any two detectors of a family."""
        dense = {"logits.roi": "logits.dense", "localization.roi": "localization.dense"}
        return self.inputs if TRAITS[family].two_stage else tuple(dense.get(name, name) for name in self.inputs)

    def steps_for(self, base: DetectorSpec) -> Steps:
        """The sizes of steps from a base."""
        return replace(self.steps, sizes=_sizes(base, self.fractions))

    def pool_sizes(self, base: DetectorSpec) -> tuple[int, ...]:
        """The sizes of images that the pool's members see, the base's among them."""
        return _sizes(base, (self.larger,))


def _sizes(base: DetectorSpec, shares: Iterable[float]) -> tuple[int, ...]:
    """A base's image size and others, in multiples of 32 pixels.

    torchvision's detectors pad images to such: what lies between costs as much as the next one.
    """
    return tuple(sorted({max(32, round(base.min_size * share / 32) * 32) for share in shares} | {base.min_size}))


def joint_preset_of(name: str, family: str) -> JointPreset:
    """A preset for a base of a family."""
    return {"smoke": smoke, "demo": demo, "cpu": cpu, "gpu": gpu}[name](preset_of(name, family))


def smoke(preset: Preset) -> JointPreset:
    """That everything runs."""
    return JointPreset(
        preset=preset,
        child=recipe(1),
        budget=4,
        schedule="1*largest > 1*sandwich(1, 0)",
        members=2,
        inputs=("logits.roi",),
        fraction=0.5,
        per_input=4,
        weights=4,
        steps=Steps(width=4),
        founders=1,
        larger=1.0,
        rounds=10,
    )


def demo(preset: Preset) -> JointPreset:
    """A few minutes on few generated images; batches of 4, for the steps."""
    return JointPreset(
        preset=replace(preset, teaching=recipe(9, batch_size=4), shapes=(100, 40, 40)),
        child=replace(recipe(2, lr=1.5e-3, batch_size=4), warmup=5),
        budget=8,
        schedule="1*largest > 1*sandwich(1, 1)",
        members=2,
        inputs=("logits.roi",),
        fraction=0.25,
        per_input=4,
        weights=4,
        steps=Steps(shrink=(0.5, 0.75)),
        fractions=(1.0,),  # on images this small nothing is gained by other sizes
        founders=1,
        larger=1.0,
        rounds=100,
    )


def cpu(preset: Preset) -> JointPreset:
    """Real results on two cores and a few hundred images."""
    batch = preset.teaching.batch_size
    return JointPreset(
        preset=preset,
        child=recipe(3, lr=5e-4, ema=0.97, batch_size=batch),
        budget=150,
        schedule="35*sandwich(1, 2)",  # on few images better than shrinking at equal compute
        members=8,
        inputs=("logits.roi", "localization.roi", "global"),
        fraction=1.0,
        per_input=8,
        weights=8,
        steps=Steps(),
    )


def gpu(preset: Preset) -> JointPreset:
    """torchvision's detectors at their own size: three epochs a child."""
    return JointPreset(
        preset=preset,
        child=replace(preset.full, epochs=3, lr=preset.full.lr / 4, warmup=200),
        budget=200,
        schedule=None,
        members=40,
        inputs=("logits.roi", "localization.roi", "global"),
        fraction=0.2,
        per_input=40,
        weights=40,
        steps=Steps(width=16),
    )
