"""What the presets mean: detectors, recipes, budgets. All numbers are ours; the papers state no budgets.

Measured at 192 px, one CPU thread a training: a student of 0.55 M parameters does 45 images/s, the teacher of 3.2 M 18.
With AdamW, averaged weights and mirroring alone, the teacher is at its best after about 15 epochs of 200 images, and
overfits from 30 on.
"""

from __future__ import annotations

from dataclasses import dataclass

from autodet.detectors import Arch, DetectorSpec
from autodet.search.ask_tell import Rules
from autodet.search.divide_conquer import DivideSettings
from autodet.search.evolution import Breeding
from autodet.search.stopping import StopRule
from autodet.training import TrainSettings


@dataclass(frozen=True)
class Preset:
    """One scale of the experiments.

    teaching: recipe of the teacher; proxy: of the search's candidates, on ``fraction`` of the training images, their AP
    also measured after the epochs ``checks``; full: of the students that are kept, on ``full_fraction`` of them.
    shapes: generated images for training, validation and test. seeds: of a comparison.
    """

    teacher: DetectorSpec
    student: DetectorSpec
    teaching: TrainSettings
    proxy: TrainSettings
    fraction: float
    checks: tuple[int, ...]
    full: TrainSettings
    shapes: tuple[int, int, int]
    search: DivideSettings
    full_fraction: float = 1.0
    seeds: int = 5
    workers: int = 2
    threads: int = 1
    device: str = "cpu"


def small(body: str, pixels: int, neck: int = 64, head: int = 128, sampling: int = 2) -> DetectorSpec:
    """A Faster R-CNN for small images: a pyramid from stride 8; anchors and proposals that fit the shorter side."""
    scale = pixels / 192
    return DetectorSpec(
        family="faster_rcnn",
        body=Arch.parse(body),
        labels=((1, "object"),),  # replaced by the data's
        neck_width=neck,
        levels=(8, 16, 32, 64),
        anchor_sizes=tuple(round(size * scale) for size in (16, 36, 80, 170)),
        head_width=head,
        roi_size=5,
        roi_sampling=sampling,
        proposals_before_nms=(300, 200),
        proposals=(200, 100),
        regions_per_image=64,
        min_size=pixels,
        max_size=pixels * 4 // 3,
    )


def standard(body: Arch) -> DetectorSpec:
    """torchvision's fasterrcnn_resnet50_fpn with another body, and norms that learn."""
    return DetectorSpec(family="faster_rcnn", body=body, labels=((1, "object"),))


def recipe(epochs: int, lr: float = 2e-3, ema: float = 0.97, batch_size: int = 8) -> TrainSettings:
    """AdamW and averaged weights: from scratch on a few hundred small images."""
    return TrainSettings(epochs=epochs, batch_size=batch_size, lr=lr, ema=ema)


def divide(per_input: int, weights: int, population: int, controls: int = 3, finalists: int = 3) -> DivideSettings:
    """Budgets of a search; replicates of controls, of the formulas before the weight phase, and of the finalists."""
    rules = Rules(controls=controls, finalists=finalists, final_runs=controls, stop=StopRule(min_known=4, margin=0.04))
    breeding = Breeding(population=population)
    replicated = min(5, per_input)
    return DivideSettings(per_input, weights, breeding, breeding, replicated=replicated, runs=controls, rules=rules)


TEACHER = "basic-32:32x2-64x2-128x2-256x2"
STUDENT = "basic-8:8x1-16x1-32x1-64x1"

PRESETS = {
    "smoke": Preset(
        teacher=small("basic-8:16x1-16x1-32x1-32x1", 64, neck=16, head=32),
        student=small("basic-8:8x1-8x1-16x1-16x1", 64, neck=16, head=32),
        teaching=recipe(2, batch_size=8),
        proxy=recipe(1, batch_size=8),
        fraction=0.5,
        checks=(),
        full=recipe(1, batch_size=8),
        shapes=(24, 8, 8),
        search=divide(per_input=4, weights=4, population=1, controls=1, finalists=1),
        seeds=2,
    ),
    "demo": Preset(
        teacher=small(TEACHER, 96, sampling=1),
        student=small(STUDENT, 96, sampling=1),
        teaching=recipe(12),
        proxy=recipe(5, batch_size=4),
        fraction=0.25,
        checks=(3,),
        full=recipe(7, batch_size=4),
        shapes=(240, 40, 40),
        search=divide(per_input=8, weights=8, population=2, controls=2, finalists=2),
        seeds=3,
    ),
    "cpu": Preset(
        teacher=small(TEACHER, 192),
        student=small(STUDENT, 192),
        teaching=recipe(16, lr=1e-3, ema=0.99),
        proxy=recipe(16),
        fraction=0.25,
        checks=(8, 12),
        full=recipe(16),
        shapes=(400, 120, 120),
        search=divide(per_input=24, weights=30, population=6),
    ),
    "gpu": Preset(
        teacher=standard(Arch.resnet101()),
        student=standard(Arch.resnet18()),
        teaching=TrainSettings(
            24, 16, "sgd", 0.02, 1e-4, warmup=500, clip_norm=35.0, precision="bf16", channels_last=True
        ),
        proxy=TrainSettings(4, 16, "sgd", 0.02, 1e-4, warmup=200, clip_norm=35.0, precision="bf16", channels_last=True),
        fraction=0.2,
        checks=(2, 3),
        full=TrainSettings(24, 16, "sgd", 0.02, 1e-4, warmup=500, clip_norm=35.0, precision="bf16", channels_last=True),
        shapes=(2000, 400, 400),
        search=divide(per_input=60, weights=60, population=12),
        workers=1,
        threads=8,
        device="cuda",
    ),
}
