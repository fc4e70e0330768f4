"""How much sooner is a child as good as its parent when it inherits its parent's weights?

command:   python experiments/measure_inheritance.py --run RUN [--children 4]
hardware:  as the upgrade that RUN holds (its base, data and recipes are used)
time:      children times one training from scratch; with preset cpu about 5 minutes each on one core
expected:  seconds and epochs until AP is within a point of the parent's, inherited and from scratch, and their ratio

RUN is a run of upgrade_detector.py that has a base. Children are the base's by one action that does not preserve its
function. Inherited ones are trained by the search's recipe for children, over as many epochs as the base's recipe has,
by which the others are trained. AP is measured after every epoch, and the time of that left out. A training stops as
soon as it is there; one from scratch that never gets there counts whole, so that the ratio is a lower bound.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import torch
from joint_presets import joint_preset_of
from options import main_of, positive
from runs import data_folder
from upgrading import BASE

from autodet.detectors import Detector, DetectorSpec, build, load_detector, steps_of
from autodet.ledger import Ledger
from autodet.morphism.actions import PRUNING, Action, derive, draw_action
from autodet.teachers.statistics import measure_statistics
from autodet.training import Task, Trainer, TrainSettings, Workbench

LOST = 0.01  # of the parent's AP, that a child may lack
ROUNDED = 0.05  # points, in the table


def main(argv: list[str] | None = None) -> int:
    """Train children both ways and print."""
    options = parse(argv)
    base, _ = load_detector(options.run / BASE)
    state_of_base = base.model.state_dict()
    recorded = Ledger.open(options.run).config["options"]
    preset = joint_preset_of(recorded["preset"], base.spec.family)
    data = data_folder(argparse.Namespace(data=recorded["data"], cache=recorded["cache"]), preset.preset)
    task = Task(str(data), recorded["cache"], base.spec, preset.preset.teaching, fixed_batches=False)
    task = replace(task, device=preset.preset.device)
    base.model.to(task.device)
    aim = (Workbench(task).measure(base).ap or 0.0) - LOST
    print(f"parent {base.spec.body}: the aim is AP {aim:.3f}")
    rows = []
    for index, action in enumerate(chosen(base.spec, options.children, preset.steps_for(base.spec), options.seed)):
        spec, state = derive([action], base.spec, state_of_base, Random(index))
        settings = {True: replace(preset.child, epochs=task.settings.epochs), False: task.settings}
        found = {}
        for inherit in (True, False):
            torch.manual_seed(index)
            child = build(spec)
            found[inherit] = until(child, state if inherit else None, replace(task, settings=settings[inherit]), aim)
        rows.append(row_of(action, found[True], found[False]))
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    ratios = table["ratio"][table["inherited AP"] >= 100 * aim - ROUNDED]
    print(f"\nof {len(table)} inherited children {len(ratios)} reached the aim; scratch over inherited, of these:")
    print(f"median {ratios.median():.1f} (from {ratios.min():.1f} to {ratios.max():.1f})")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="of upgrade_detector.py")
    parser.add_argument("--children", type=positive, default=4, help="actions that are tried (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def chosen(spec: DetectorSpec, count: int, steps: Any, seed: int) -> list[Action]:
    """Different kinds of pruning, drawn at random."""
    rng, found = Random(seed), dict[str, Action]()
    for _ in range(50 * count):
        action = draw_action(spec, rng, steps, PRUNING)
        if action is not None and len(found) < count:
            found.setdefault(action.name, action)
    return list(found.values())


def until(child: Detector, state: dict[str, torch.Tensor] | None, task: Task, aim: float) -> tuple[float, int, float]:
    """Seconds and epochs of training until the aim, and the AP then; of weights that are given, or as the child is."""
    torch.set_num_threads(1)
    settings: TrainSettings = task.settings
    bench = Workbench(replace(task, student=child.spec))
    started, seconds = time.perf_counter(), 0.0
    child.model.to(task.device)
    if state is not None:
        child.model.load_state_dict(state)
        measure_statistics(child, bench.train_loader)
        seconds = time.perf_counter() - started
        if (ap := bench.measure(child).ap or 0.0) >= aim:
            return seconds, 0, ap
    trainer = Trainer(child, bench.train_loader, settings, task.seed, device=task.device)
    for epoch in trainer.epochs():
        seconds += sum(epoch.seconds.values())
        ap = bench.measure(steps_of(trainer.model, child.spec)).ap or 0.0
        if ap >= aim:
            break
    return seconds, trainer.epoch, ap


def row_of(action: Action, inherited: tuple[float, int, float], scratch: tuple[float, int, float]) -> dict[str, Any]:
    """A line of the table."""
    return {
        "action": str(action),
        "inherited s": round(inherited[0], 1),
        "epochs": inherited[1],
        "inherited AP": round(100 * inherited[2], 1),
        "scratch s": round(scratch[0], 1),
        "scratch epochs": scratch[1],
        "scratch AP": round(100 * scratch[2], 1),
        "ratio": round(scratch[0] / inherited[0], 1),
    }


if __name__ == "__main__":
    raise SystemExit(main_of(main))
