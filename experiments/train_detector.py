"""How good is a plain detector, and what does it cost?

command:   python experiments/train_detector.py [--data DIR] [--role teacher|student] [--preset smoke|demo|cpu|gpu]
hardware:  smoke, demo and cpu: two cores; gpu: one GPU
time:      demo about a minute; cpu about 3 minutes for 200 images
expected:  a detector file (safetensors), its AP on the validation split (on test with --split test), latency, MACs

Stop it at any moment and go on with --resume FOLDER. The file is what other scripts take as --teacher.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from options import common_options, data_options, main_of, new_folder, parsed, positive, recorded
from presets import Preset, preset_of
from runs import all_threads, check_device, data_folder, for_data, say_epoch, start_or_resume

from autodet.data import BatchKey
from autodet.detectors import DetectorSpec, detect, load_detector
from autodet.evaluation import cost_of
from autodet.training import Task, Workbench, train_plain
from autodet.working_copy import move

RECORDED = ("preset", "family", "data", "cache", "role", "spec", "epochs", "split", "seed")


def main(argv: list[str] | None = None) -> int:
    """Train, measure, print."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "train-detector")
    preset = preset_of(options.preset, options.family)
    check_device(options.preset, preset.device)
    task = plain_task(options, preset, folder)
    config = {"script": "train_detector", "options": recorded(options, RECORDED)}
    config["task"] = json.loads(task.to_json())
    with start_or_resume(folder, config, ["task.threads"]):
        result = folder / f"{options.role}.safetensors"
        if not result.exists():
            weights = train_plain(task, folder / "training", say_epoch(options.role))
            move(weights, result)
    report(task, result)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed training are the recorded ones."""
    parser = common_options(__doc__ or "", runs_ray=False)
    data_options(parser)
    add = parser.add_argument
    add("--role", choices=("teacher", "student"), default="teacher", help="which of the preset's detectors and recipes")
    add("--spec", help="another detector, as a DetectorSpec's text (its labels are replaced by the data's)")
    add("--epochs", type=positive, help="default: the preset's")
    add("--split", choices=("val", "test"), default="val", help="where AP is measured (default: val)")
    return parsed(parser, argv, "train_detector", RECORDED)


def plain_task(options: argparse.Namespace, preset: Preset, folder: Path) -> Task:
    """The training of the preset's teacher or student, or of the user's spec, on all data."""
    data = data_folder(options, preset)
    spec = preset.teacher if options.role == "teacher" else preset.student
    spec = DetectorSpec.parse(options.spec) if options.spec else spec
    settings = preset.teaching if options.role == "teacher" else preset.full
    return Task(
        data=str(data),
        cache=str(options.cache.resolve()),
        student=for_data(spec, data),
        settings=replace(settings, epochs=options.epochs) if options.epochs else settings,
        split=options.split,
        fixed_batches=False,
        weights=str((folder / "weights").resolve()),
        seed=options.seed,
        device=preset.device,
        threads=all_threads(preset),
    )


def report(task: Task, path: Path) -> None:
    """Print what the file's detector is, its twelve numbers, and its cost."""
    bench = Workbench(task)
    detector, notes = load_detector(path)
    detector.model.to(task.device)
    metrics = bench.measure(detector)
    print(f"\n{path}\n{detector.spec}\nseed {notes['seed']}, {task.settings.epochs} epochs, split {task.split}")
    print(
        f"trained at {notes['images_per_second']} images/s, {notes['overhead']:.1%} outside forward, backward and step"
    )
    print("  ".join(f"{name} {'–' if value is None else f'{value:.3f}'}" for name, value in metrics.to_json().items()))
    images = [image.to(task.device) for image in bench.eval_loader.load(BatchKey((0,), (False,))).images]
    cost = cost_of(lambda: detect(detector, images), detector.model, task.device, threads=task.threads)
    print(
        f"{cost.params_m:.2f} M parameters, {cost.macs_g:.2f} G MACs, "
        f"{cost.latency_ms:.1f} ms an image (median; 90 % below {cost.latency_p90_ms:.1f}) "
        f"on {cost.device} with {cost.threads} threads"
    )


if __name__ == "__main__":
    raise SystemExit(main_of(main))
