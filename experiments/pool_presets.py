"""What the presets mean for pools of teachers: spaces, schedules, recipes. All numbers are ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from presets import RATES, TEACHER, recipe, small, standard

from autodet.detectors import Arch, DetectorSpec
from autodet.detectors.traits import TRAITS
from autodet.distill import Formula
from autodet.teachers import PoolSpace, Schedule
from autodet.teachers.space import R50_TO_R101, SMALL
from autodet.training import TrainSettings


@dataclass(frozen=True)
class PoolPreset:
    """One scale. detector: all but the body and the labels. members: how many are measured in the end."""

    space: PoolSpace
    detector: DetectorSpec
    schedule: Schedule
    settings: TrainSettings
    formula: Formula
    check_every: int
    members: int
    workers: int = 2
    threads: int = 1
    device: str = "cpu"


def pool_preset_of(name: str, family: str) -> PoolPreset:
    """A preset for detectors of a family."""
    return {"smoke": smoke, "demo": demo, "cpu": cpu, "gpu": gpu}[name](family)


def smoke(family: str) -> PoolPreset:
    """That everything runs."""
    return PoolPreset(
        space=PoolSpace.parse("basic-=:8..16/8x1..2-8..16/8x1..2(8..16/8)-16x1..2-16..32/16x1@64"),
        detector=small(family, TEACHER, 64, neck=16, head=32),
        schedule=Schedule.shrinking(3, largest=1, random=1, openings=2),
        settings=TrainSettings(3, 8, "sgd", lr=1e-3),  # rounding stays as small as it is, for the tests
        formula=TAUGHT,
        check_every=1,
        members=4,
    )


def demo(family: str) -> PoolPreset:
    """A few minutes on generated images."""
    return PoolPreset(
        space=replace(PoolSpace.parse(SMALL), sizes=(96,)),
        detector=small(family, TEACHER, 96, sampling=1),
        schedule=Schedule.shrinking(20, largest=6, random=1),
        settings=recipe(20),
        formula=TAUGHT,
        check_every=4,
        members=8,
    )


def cpu(family: str) -> PoolPreset:
    """Real members on two cores and a few hundred images."""
    return PoolPreset(
        space=PoolSpace.parse(SMALL),
        detector=small(family, TEACHER, 192),
        schedule=Schedule.shrinking(40, largest=10, random=2),
        settings=recipe(40, lr=1e-3, ema=0.99, batch_size=8 if TRAITS[family].two_stage else 4),
        formula=TAUGHT,
        check_every=4,
        members=24,
    )


def gpu(family: str) -> PoolPreset:
    """ResNet-50 to ResNet-101 at torchvision's sizes."""
    settings = TrainSettings(
        36, 16, "sgd", RATES[family], 1e-4, 500, clip_norm=35.0, precision="bf16", channels_last=True
    )
    return PoolPreset(
        space=PoolSpace.parse(R50_TO_R101),
        detector=standard(family, Arch.resnet101()),
        schedule=Schedule.shrinking(36, largest=12, random=2),
        settings=settings,
        formula=TAUGHT,
        check_every=4,
        members=40,
        workers=1,
        threads=8,
        device="cuda",
    )


TAUGHT = Formula.parse("global: standardize(nhw) | l2")  # PKD's distance: its weight does not depend on the maps' scale
