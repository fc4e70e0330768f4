"""How much sooner is a child as good as its parent when it inherits its parent's weights?

command:   python experiments/measure_inheritance.py --run RUN [--children 4]
hardware:  as the upgrade that RUN holds (its base, data and recipes are used)
time:      with preset cpu about 10 minutes a child on one core
expected:  the shortest training after which AP is within a point of the parent's, inherited and from scratch: epochs,
           seconds, and their ratio

RUN is a run of upgrade_detector.py that has a base. Children are the base's by one action that does not preserve its
function. Inherited ones are trained by the search's recipe for children, for 0, 1, 2, 4 … epochs; those from scratch by
the base's recipe, for a quarter to twice of its epochs. Every length is a training of its own, since a learning rate
that has not come down yet hides what was learned. What no length reaches counts as the longest one: then the ratio is a
lower bound (from scratch), or the child is left out (inherited).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import pandas as pd
import torch
from joint_presets import joint_preset_of
from options import main_of, positive, source
from runs import data_folder
from upgrading import BASE

from autodet.detectors import DetectorSpec, build, load_detector, steps_of
from autodet.ledger import Ledger
from autodet.morphism.actions import PRUNING, Action, derive, draw_action
from autodet.teachers.statistics import measure_statistics
from autodet.training import Task, Trainer, Workbench

LOST = 0.01  # of the parent's AP, that a child may lack
NEVER = "never"


class Training(NamedTuple):
    """A training's length, and the AP (0–1) after it."""

    epochs: int
    seconds: float
    ap: float
    reached: bool


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
    longest, rows = task.settings.epochs, []
    for index, action in enumerate(chosen(base.spec, options.children, preset.steps_for(base.spec), options.seed)):
        spec, state = derive([action], base.spec, state_of_base, Random(index))
        inherited = shortest(spec, state, replace(task, settings=preset.child), [0, *doubled(1, longest)], aim)
        scratch = shortest(spec, None, task, doubled(max(1, longest // 4), 2 * longest), aim)
        rows.append(row_of(action, inherited, scratch))
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    ratios = table["ratio"][table["inherited"] != NEVER]
    print(f"\nof {len(table)} inherited children {len(ratios)} reached the aim; scratch over inherited, of these:")
    print(f"median {ratios.median():.1f} (from {ratios.min():.1f} to {ratios.max():.1f})")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=source, required=True, help="of upgrade_detector.py")
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


def doubled(least: int, most: int) -> list[int]:
    """least, 2 · least, 4 · least … up to ``most``."""
    found = [least]
    while 2 * found[-1] <= most:
        found.append(2 * found[-1])
    return found


def shortest(
    spec: DetectorSpec, state: dict[str, torch.Tensor] | None, task: Task, lengths: Sequence[int], aim: float
) -> Training:
    """The first of the trainings, by their epochs, that reaches the aim; the last one where none does.

    state: the weights to start from, whose norm statistics are measured anew; None for fresh ones.
    """
    torch.set_num_threads(1)
    bench = Workbench(replace(task, student=spec))
    found = Training(0, 0.0, 0.0, False)
    for epochs in lengths:
        torch.manual_seed(task.seed)
        child, started = build(spec), time.perf_counter()
        child.model.to(task.device)
        if state is not None:
            child.model.load_state_dict(state)
            measure_statistics(child, bench.train_loader)
        if epochs:
            settings = replace(task.settings, epochs=epochs)
            trainer = Trainer(child, bench.train_loader, settings, task.seed, device=task.device)
            for _ in trainer.epochs():
                pass
            child = steps_of(trainer.model, spec)
        seconds, ap = time.perf_counter() - started, bench.measure(child).ap or 0.0
        found = Training(epochs, seconds, ap, ap >= aim)
        if found.reached:
            break
    return found


def row_of(action: Action, inherited: Training, scratch: Training) -> dict[str, Any]:
    """A line of the table: epochs, seconds and AP (points) of both."""
    return {
        "action": str(action),
        "inherited": f"{inherited.epochs} epochs" if inherited.reached else NEVER,
        "seconds": round(inherited.seconds, 1),
        "AP": round(100 * inherited.ap, 1),
        "from scratch": f"{scratch.epochs} epochs" if scratch.reached else NEVER,
        "its seconds": round(scratch.seconds, 1),
        "its AP": round(100 * scratch.ap, 1),
        "ratio": round(scratch.seconds / inherited.seconds, 1),
    }


if __name__ == "__main__":
    raise SystemExit(main_of(main))
