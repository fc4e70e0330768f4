"""What the presets mean: detectors, recipes, budgets. All numbers are ours; the papers state no budgets.

Measured at 192 px, one CPU thread a training: a student of 0.42 to 0.46 M parameters does 45 images/s, the teacher of
3.2 M 17. With AdamW, averaged weights and mirroring alone, the teacher is at its best after about 15 epochs of 200
images, and overfits from 30 on.

Floors of preset cpu on 205 images of blood cells (AP on validation, from scratch; below them something is wrong):

    family        teacher  student, 8 to 16 epochs
    faster_rcnn   0.52     0.49
    retinanet     0.46     0.40
    fcos          0.47     0.42
    cascade_rcnn  0.53     0.51
    gfl           0.48     0.46
    reppoints     0.47     0.46

What made RetinaNet and FCOS learn from so few images (one seed each): batches of 4 instead of 8, for the steps; in FCOS
anchor sizes of half the stride, since with torchvision's nearly all objects fall on the finest level (0.43 against
0.37); in RetinaNet a GIoU loss (0.24 against 0.21 on a quarter of the images). Cascade R-CNN takes the recipe of Faster
R-CNN (0.542 and 0.520, one seed each); its three box heads make the student one of 0.9 M parameters.

Mask R-CNN, for which these cells have no masks, has the recipe of Faster R-CNN too: on 200 generated images its teacher
reaches 0.372, its masks 0.284 (one seed).

GFL and RepPoints take FCOS's recipes (0.493 and 0.477; 0.487 and 0.481, one seed each), with anchors of two strides: of
four, half of GFL's public ones, its teacher saw no small object (0.426 and 0.448).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autodet.detectors import Arch, DetectorSpec, standard_spec
from autodet.search.ask_tell import Rules
from autodet.search.divide_conquer import DivideSettings
from autodet.search.evolution import Breeding
from autodet.search.stopping import StopRule
from autodet.training import TrainSettings


@dataclass(frozen=True)
class Preset:
    """One scale of the experiments, for one pair of families.

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
    gpus: float = 0.0
    device: str = "cpu"

    def placed(self, cpus: int | None, gpus: float | None) -> Preset:
        """With the CPUs and GPUs that a trial takes, where given. ValueError for GPUs that it has no use for."""
        return replace(self, threads=cpus or self.threads, gpus=gpus_of(gpus, self.device))


def gpus_of(given: float | None, device: str) -> float:
    """The share of a GPU that a training takes. ValueError where it computes on none."""
    if given is not None and device != "cuda":
        raise ValueError(f"--gpus-per-trial {given:g}: this preset computes on the CPU. Leave it out.")
    return (given or 1.0) if device == "cuda" else 0.0


def preset_of(name: str, family: str = "faster_rcnn", teacher_family: str | None = None) -> Preset:
    """A preset for a student of one family and a teacher of the same, or of another."""
    return {"smoke": smoke, "demo": demo, "cpu": cpu, "gpu": gpu}[name](family, teacher_family or family)


def smoke(family: str, teacher_family: str) -> Preset:
    """Half a minute: that everything runs."""
    return Preset(
        teacher=small(teacher_family, "basic-8:16x1-16x1-32x1-32x1", 64, neck=16, head=32),
        student=small(family, "basic-8:8x1-8x1-16x1-16x1", 64, neck=16, head=32),
        teaching=recipe(2),
        proxy=recipe(1),
        fraction=0.5,
        checks=(),
        full=recipe(1),
        shapes=(24, 8, 8),
        search=divide(per_input=4, weights=4, population=1, controls=1, finalists=1),
        seeds=2,
    )


def demo(family: str, teacher_family: str) -> Preset:
    """Under five minutes on generated images: what a search looks like."""
    return Preset(
        teacher=small(teacher_family, TEACHER, 96, sampling=1),
        student=small(family, STUDENT, 96, sampling=1),
        teaching=recipe(12),
        proxy=recipe(4, batch_size=4),
        fraction=0.25,
        checks=(2,),
        full=recipe(7, batch_size=4),
        shapes=(200, 40, 40),
        search=divide(per_input=4, weights=4, population=1, controls=2, finalists=2, runs=1),
        seeds=3,
    )


def cpu(family: str, teacher_family: str) -> Preset:
    """Real results on two cores and a few hundred images."""
    return Preset(
        teacher=small(teacher_family, TEACHER, 192),
        student=small(family, STUDENT, 192),
        teaching=TEACHING[teacher_family],
        proxy=recipe(8, batch_size=4),
        fraction=0.25,
        checks=(5,),
        full=FULL[family],
        shapes=(400, 120, 120),
        search=divide(per_input=12, weights=16, population=2),
    )


def gpu(family: str, teacher_family: str) -> Preset:
    """torchvision's detectors at their own size."""
    sgd = TrainSettings(24, 16, "sgd", RATES[family], 1e-4, 500, clip_norm=35.0, precision="bf16", channels_last=True)
    return Preset(
        teacher=standard(teacher_family, Arch.resnet101()),
        student=standard(family, Arch.resnet18()),
        teaching=replace(sgd, lr=RATES[teacher_family]),
        proxy=replace(sgd, epochs=4, warmup=200),
        fraction=0.2,
        checks=(2, 3),
        full=sgd,
        shapes=(2000, 400, 400),
        search=divide(per_input=60, weights=60, population=12),
        workers=1,
        threads=8,
        gpus=1.0,
        device="cuda",
    )


def small(family: str, body: str, pixels: int, neck: int = 64, head: int = 128, sampling: int = 2) -> DetectorSpec:
    """A detector for small images: a pyramid from stride 8; anchors and proposals that fit the shorter side."""
    one_stage: dict[str, Any] = {"levels": (8, 16, 32, 64, 128), "top": "neck", "head_depth": 2, "candidates": 300}
    two_stage: dict[str, Any] = {
        "levels": (8, 16, 32, 64),
        "anchor_sizes": (16, 36, 80, 170),
        "head_width": head,
        "roi_size": 5,
        "roi_sampling": sampling,
        "proposals_before_nms": (300, 200),
        "proposals": (200, 100),
        "regions_per_image": 64,
    }
    values: dict[str, dict[str, Any]] = {
        "faster_rcnn": two_stage,
        "cascade_rcnn": two_stage | {"stage_ious": (0.5, 0.6, 0.7)},
        # torchvision's mask head would take more time than all the rest of so small a detector.
        "mask_rcnn": two_stage | {"mask_depth": 2, "mask_width": neck // 2, "mask_roi_size": 7},
        "retinanet": one_stage
        | {
            "anchor_sizes": (16, 36, 80, 130, 170),
            "head_groups": 8,
            "box_loss": "giou",
        },
        "fcos": one_stage
        | {
            "anchor_sizes": (4, 8, 16, 32, 64),
            "anchor_ratios": (1.0,),
            "head_groups": 8,
            "nms_threshold": 0.6,
        },
        "gfl": one_stage
        | {
            "anchor_sizes": (16, 32, 64, 128, 256),
            "anchor_ratios": (1.0,),
            "head_groups": 8,
            "nms_threshold": 0.6,
        },
        "reppoints": one_stage
        | {
            "anchor_sizes": (16, 32, 64, 128, 256),
            "anchor_ratios": (1.0,),
            "head_groups": 8,
        },
    }
    at_192 = DetectorSpec(
        family=family,
        body=Arch.parse(body),
        labels=((1, "object"),),  # replaced by the data's
        neck_width=neck,
        min_size=192,
        max_size=256,
        **values[family],
    )
    return at_192.at_size(pixels)


def standard(family: str, body: Arch) -> DetectorSpec:
    """torchvision's <family>_resnet50_fpn with another body, and norms that learn."""
    return standard_spec(family, body, ((1, "object"),))


def recipe(epochs: int, lr: float = 2e-3, ema: float = 0.97, batch_size: int = 8) -> TrainSettings:
    """AdamW and averaged weights: from scratch on a few hundred small images."""
    return TrainSettings(epochs=epochs, batch_size=batch_size, lr=lr, ema=ema)


def divide(
    per_input: int, weights: int, population: int, controls: int = 3, finalists: int = 3, runs: int = 2
) -> DivideSettings:
    """Budgets of a search; runs: of the best formulas before the weights; controls and finalists get ``controls``."""
    rules = Rules(controls=controls, finalists=finalists, final_runs=controls, stop=StopRule(min_known=4, margin=0.04))
    breeding = Breeding(population=population)
    return DivideSettings(per_input, weights, breeding, breeding, replicated=3, runs=min(runs, controls), rules=rules)


TEACHER = "basic-32:32x2-64x2-128x2-256x2"
STUDENT = "basic-8:8x1-16x1-32x1-64x1"
# For batches of 16: torchvision's reference recipes; of others, their public configurations.
RATES = {
    "faster_rcnn": 0.02,
    "retinanet": 0.01,
    "fcos": 0.01,
    "cascade_rcnn": 0.02,
    "gfl": 0.01,
    "mask_rcnn": 0.02,
    "reppoints": 0.01,
}
TEACHING = {  # preset cpu's teachers
    "faster_rcnn": recipe(16, lr=1e-3, ema=0.99),
    "retinanet": recipe(12, lr=1e-3, ema=0.99, batch_size=4),
    "fcos": recipe(12, lr=1e-3, ema=0.99, batch_size=4),
    "cascade_rcnn": recipe(16, lr=1e-3, ema=0.99),
    "gfl": recipe(12, lr=1e-3, ema=0.99, batch_size=4),
    "mask_rcnn": recipe(16, lr=1e-3, ema=0.99),
    "reppoints": recipe(12, lr=1e-3, ema=0.99, batch_size=4),
}
FULL = {  # preset cpu's students
    "faster_rcnn": recipe(16),
    "retinanet": recipe(12, batch_size=4),
    "fcos": recipe(12, batch_size=4),
    "cascade_rcnn": recipe(16),
    "gfl": recipe(12, batch_size=4),
    "mask_rcnn": recipe(16),
    "reppoints": recipe(12, batch_size=4),
}
