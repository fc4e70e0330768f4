"""One training, many teachers: how good are the members of an elastic pool?

command:   python experiments/train_teacher_pool.py [--data DIR] [--family FAMILY] [--workers N|MIN-MAX]
hardware:  smoke, demo and cpu: two cores; gpu: one or more GPUs, one a worker
time:      smoke about a minute, demo about five, cpu about half an hour for 200 images
expected:  a folder POOL of shared weights, members.csv (AP, latency, MACs of a spread of members), pictures

Stop it at any moment (Ctrl-C, kill -9) and go on with --resume RUN. Other scripts take a member as their teacher:
--teacher RUN/pool for the largest, --teacher "RUN/pool:<member>" for another, as members.csv names it. The method is
Joint-DetNAS's integrated progressive shrinking (CVPR 2021); spaces, budgets and recipes are ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from options import common_options, data_options, main_of, new_folder, parsed, placement_options, positive, recorded
from pool_presets import PoolPreset, pool_preset_of
from presets import gpus_of, preset_of
from runs import check_device, data_folder, for_data, start_or_resume

from autodet.data import BatchKey
from autodet.detectors import build, detect
from autodet.distill import Formula
from autodet.evaluation import count_macs, count_params, device_name, measure_latencies_interleaved
from autodet.records import Cost
from autodet.results.pool_plots import draw_schedule, save_picture, save_pool_pictures
from autodet.runtime.cluster import check_address, ray_running
from autodet.runtime.pool_measuring import Aps, measure_side_by_side
from autodet.runtime.pool_training import PROGRESS, Workers, remove_leftovers, train_pool
from autodet.teachers import Member, PoolSettings, PoolSpace, Schedule
from autodet.teachers.elastic import member_spec
from autodet.teachers.pool import (
    MANIFEST,
    MEMBERS,
    MemberRow,
    TeacherPool,
    save_members,
    save_pool,
)
from autodet.teachers.statistics import measure_statistics
from autodet.teachers.task import PoolBench, PoolTask
from autodet.training import Task

RECORDED = (
    *("preset", "family", "data", "cache", "space", "max_size", "schedule", "formula"),
    *("parts", "check_every", "members", "seed", "cpus_per_trial"),
)
EXTENDABLE = ("workers", "gpus_per_trial")


def main(argv: list[str] | None = None) -> int:
    """Check everything, train, measure members, draw."""
    options = parse(argv)
    folder = options.resume or new_folder(options.output, "train-teacher-pool")
    check_address(options.address)
    preset = pool_preset_of(options.preset, options.family)
    check_device(options.preset, preset.device)
    task = pool_task(options, preset)
    print(f"{task.space.count:,} members; {task.pool.schedule}\n{task.pool.schedule.table(task.space)}")
    config = {"script": "train_teacher_pool", "options": recorded(options, (*RECORDED, *EXTENDABLE))}
    config["task"] = json.loads(task.to_json())
    bench = PoolBench(task)
    bench.trainer()  # a formula or a space that does not suit is refused here
    gpus = gpus_of(options.gpus_per_trial, task.task.device)
    if 0 < gpus < 1:
        raise ValueError(
            f"--gpus-per-trial {gpus:g}: a pool's workers exchange gradients, which takes a whole GPU each."
        )
    with start_or_resume(folder, config, [f"options.{name}" for name in EXTENDABLE]):
        save_picture(folder / "pictures" / "schedule.png", draw_schedule(task.pool.schedule.steps))
        if not (folder / "pool" / MEMBERS).exists():
            workers = worker_range(options.workers) if options.workers else preset.workers
            with ray_running(options.address, cpus=cpus_for(workers, task.task.threads)):
                if not (folder / "pool" / MANIFEST).exists():
                    keep(bench, train_pool(task, folder, workers, gpus), folder / "pool")
                members = spread(task, options.members or preset.members)
                aps = measure_side_by_side(task, folder, folder / "pool", members, gpus)
            save_members(folder / "pool", costs(bench, folder / "pool", aps))
        remove_leftovers(folder)
    print(pd.read_csv(folder / "pool" / MEMBERS).to_string(index=False))
    progress = [json.loads(line) for line in (folder / PROGRESS).read_text().splitlines()]
    save_pool_pictures(folder / "pictures", pd.read_csv(folder / "pool" / MEMBERS), progress)
    print(f"\nPool: {folder / 'pool'}\nPictures: {folder / 'pictures'}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; those of a resumed training are the recorded ones, except workers and address."""
    parser = common_options(__doc__ or "", workers=worker_text)
    data_options(parser)
    placement_options(parser)
    add = parser.add_argument
    add("--space", help="of members, as a PoolSpace's text (default: the preset's)")
    add("--max-size", type=positive, metavar="PIXELS", help="longer side of the largest images (default: the preset's)")
    add("--schedule", help="as a Schedule's text (default: the preset's, progressive shrinking)")
    add("--formula", help="what the largest member teaches the others, with plain weights (default: the preset's)")
    add("--parts", type=positive, default=1, help="parts of a batch that a member is trained on (default: 1)")
    add("--check-every", type=positive, help="epochs between measurements of members (default: the preset's)")
    add("--members", type=positive, help="members that are measured in the end (default: the preset's)")
    return parsed(parser, argv, "train_teacher_pool", RECORDED, EXTENDABLE)


def worker_text(text: str) -> str:
    """A checked number or range, as an option's type."""
    worker_range(text)
    return text


def worker_range(text: str) -> Workers:
    """``4``, or ``1-4`` for as many as there are."""
    least, dash, most = text.partition("-")
    try:
        found = positive(least), positive(most or least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of workers or MIN-MAX, found {text}") from None
    if found[0] > found[1] or (dash and not most):
        raise argparse.ArgumentTypeError(f"expected MIN-MAX with MIN at most MAX, found {text}")
    return found if dash else found[0]


def cpus_for(workers: Workers, threads: int) -> int:
    """What a Ray started here is told to have: all workers' threads; of a range as many as this machine can run."""
    if isinstance(workers, int):
        return workers * threads
    least, most = workers
    return max(least, min(most, (os.cpu_count() or 1) // threads)) * threads


def pool_task(options: argparse.Namespace, preset: PoolPreset) -> PoolTask:
    """The training of a pool whose largest member is the family's detector for the space's largest body."""
    data = data_folder(options, preset_of(options.preset, options.family))
    space = PoolSpace.parse(options.space) if options.space else preset.space
    schedule = Schedule.parse(options.schedule) if options.schedule else preset.schedule
    formula = Formula.parse(options.formula) if options.formula else preset.formula
    spec = for_data(preset.detector.at_size(space.largest.size), data)
    spec = replace(spec, max_size=options.max_size or spec.max_size)
    task = Task(
        data=str(data),
        cache=str(options.cache.resolve()),
        student=replace(spec, body=space.largest.body),
        settings=replace(preset.settings, epochs=schedule.epochs),
        fixed_batches=False,
        seed=options.seed,
        device=preset.device,
        threads=options.cpus_per_trial or preset.threads,
    )
    check_every = options.check_every or preset.check_every
    return PoolTask(task, space, PoolSettings(schedule, formula, options.parts), check_every)


def keep(bench: PoolBench, checkpoint: Path, folder: Path) -> None:
    """Write the pool of a finished training, with the largest member's norm statistics."""
    trainer = bench.trainer(checkpoint=checkpoint)
    largest = trainer.member(trainer.space.largest)
    measure_statistics(largest, bench.bench.train_loader)
    settings = trainer.pool
    notes = {
        "schedule": str(settings.schedule),
        "formula": str(settings.formula),
        "parts": settings.parts,
        "seed": trainer.seed,
        "recipe": trainer.settings.to_json(),
        "images": len(bench.bench.train_set),
        "data": bench.bench.train_set.annotations_hash,
    }
    save_pool(folder, largest, trainer.space, notes)


def spread(task: PoolTask, count: int) -> list[Member]:
    """The smallest, the largest, and random members between them at even steps of their numbers of parameters."""
    rng, space = random.Random(0), task.space
    drawn = dict.fromkeys(space.sample(rng) for _ in range(8 * count))
    drawn = {member: None for member in drawn if member not in (space.smallest, space.largest)}
    with torch.device("meta"):
        size = {member: count_params(build(member_spec(task.task.student, member)).model) for member in drawn}
    ordered = sorted(drawn, key=size.__getitem__)
    inner = min(max(0, count - 2), len(ordered))
    chosen = [ordered[round((i + 0.5) * len(ordered) / inner - 0.5)] for i in range(inner)]
    return [space.smallest, *chosen, space.largest]


def costs(bench: PoolBench, folder: Path, aps: Mapping[Member, Aps]) -> list[MemberRow]:
    """Latency, multiply-adds and parameters of the members whose APs were measured, now that nothing else runs."""
    pool, task = TeacherPool.open(folder), bench.task.task
    images = [image.to(task.device) for image in bench.bench.eval_loader.load(BatchKey((0,), (False,))).images]
    taken = {m: pool.take(m, bench.bench.train_loader, Path(task.cache), task.device) for m in aps}
    runs = {str(member): lambda d=detector: detect(d, images) for member, detector in taken.items()}
    latencies = measure_latencies_interleaved(runs, task.device, threads=task.threads)
    rows = []
    for member, detector in taken.items():
        latency = latencies[str(member)]
        macs, params = count_macs(runs[str(member)]), count_params(detector.model)
        name = device_name(torch.device(task.device))
        cost = Cost(latency.median_ms, latency.p90_ms, name, task.threads, 1, macs, params)
        ap, before, masks = aps[member]
        rows.append(MemberRow(member, ap, before, task.split, cost, masks))
    return rows


if __name__ == "__main__":
    raise SystemExit(main_of(main))
