"""Made-up joint searches for the tests of the results: records in memory, or a run's folder."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autodet.detectors import Arch, DetectorSpec
from autodet.ledger import Ledger
from autodet.records import Event, Record, records_from

HOSTILE = "prune_neck(width=<script>) & more"
FORMULA = "global: catt > pool(2) | l1 * 2; logits.roi: softmax(c, t=2) | kl * 1"
TEACHERS = (
    "basic-32:32x2-64x2-128x2-256x2@192",
    "basic-24:24x2-48x2-96x2-192x2@192",
    "basic-32:32x2(24,32)-64x2(48,64)-128x2(96,128)-256x2(192,256)@160",
    "basic-16:16x1-32x1-64x2-128x2@160",
)
BASE = DetectorSpec(
    family="faster_rcnn",
    body=Arch.parse("basic-32:32x2-64x2-128x2-256x2"),
    labels=((1, "circle"), (2, "square")),
    neck_width=64,
    head_width=256,
    anchor_sizes=(8, 16, 32, 64, 128),
    proposals=(1000, 300),
    min_size=192,
    max_size=320,
)


@dataclass
class Step:
    """One candidate: what its asked and told events say. status None: it is still running."""

    ratio: float
    ap: float | None
    parent: int | None = 0
    actions: str = "keep"
    spec: DetectorSpec = BASE
    epochs: int = 0
    phase: str = "joint"
    status: str | None = "completed"
    teacher: str | None = TEACHERS[0]
    cause: str | None = None
    rejected: Sequence[tuple[str, str]] = field(default_factory=tuple)
    mask_ap: float | None = None

    def asked(self) -> dict[str, Any]:
        """The payload of the asked event."""
        macs = 0.1 * self.ratio * 11
        cost: dict[str, float] = {"latency_ratio": self.ratio, "latency_spread": 0.004, "latency_ms": 34.0 * self.ratio}
        student: dict[str, Any] = {
            "spec": str(self.spec),
            "actions": self.actions,
            "parent": self.parent,
            "weights": "ab" * 32,
        }
        student |= {"teacher": self.teacher, "draw": 7, "cost": cost | {"macs_g": macs, "params_m": 2 * macs}}
        formula = "none" if self.teacher is None else FORMULA
        candidate = {"formula": formula, "inherit": True, "replicate": 0, "student": student | {"epochs": self.epochs}}
        parents = [] if self.parent is None else [self.parent]
        rejected = [list(pair) for pair in self.rejected]
        return {"candidate": candidate, "phase": self.phase, "parents": parents, "rejected": rejected}

    def told(self) -> dict[str, Any]:
        """The payload of the told event."""
        more = {"epochs": 0 if self.parent is None else 6, "seconds": 90.0, "weights": "cd" * 32}
        told = {"status": self.status, "ap": self.ap, "cause": self.cause, **more}
        return told | ({} if self.mask_ap is None else {"metrics": {"ap": self.ap, "mask_ap": self.mask_ap}})


def base(ap: float | None = 0.31, status: str | None = "completed", cause: str | None = None) -> Step:
    """Candidate 0."""
    return Step(1.0, ap, None, "base", phase="base", status=status, teacher=None, cause=cause)


def small_search() -> list[Step]:
    """A base, two generations of children, one that failed, one that was stopped, one that is running."""
    smaller = replace(BASE, body=Arch.parse("basic-32:32x2(24,32)-64x2-128x3-256x1"), neck_width=48).at_size(160)
    refused = [("resize(pixels=128)", "latency_ratio 0.91 is above 0.6"), ("add_block(stage=2)", "too <large>")]
    return [
        base(),
        Step(0.8, 0.33, 0, "prune_inner(stage=1, block=0, width=24)", epochs=6, teacher=TEACHERS[1], rejected=refused),
        Step(1.2, 0.36, 0, "add_block(stage=3)", epochs=6),
        Step(0.6, 0.35, 1, "prune_neck(width=48) > resize(pixels=160)", smaller, 12),
        Step(0.7, None, 1, HOSTILE, epochs=12, status="failed", cause="Diverged: <nan> in <script>"),
        Step(
            0.9,
            0.1,
            1,
            epochs=12,
            status="stopped",
            rejected=[("resize(pixels=96)", "latency_ratio 0.87 is above 0.6")],
        ),
        Step(0.5, None, 3, epochs=18, status=None),
    ]


def large_search(count: int = 60, seed: int = 0, chain: float = 0.75) -> list[Step]:
    """A search of `count` children with plausible numbers. chain: how often the newest good one is the parent."""
    dice = random.Random(seed)
    steps, best = [base()], 0
    for number in range(1, count + 1):
        parent = best if dice.random() < chain else dice.choice([i for i, s in enumerate(steps) if s.ap is not None])
        spec, actions, factor = mutated(steps[parent].spec, dice)
        ratio = max(0.25, steps[parent].ratio * factor * dice.uniform(0.99, 1.01))
        ap = (steps[parent].ap or 0.0) + dice.gauss(0.004, 0.01) - 0.05 * (1 - factor)
        step = Step(ratio, round(max(ap, 0.02), 4), parent, actions, spec, steps[parent].epochs + 6)
        step.teacher = dice.choice(TEACHERS)
        if dice.random() < 0.06:
            step.ap, step.status, step.cause = None, "failed", "Diverged: the loss is not finite"
        if dice.random() < 0.4:
            step.rejected = [(actions, f"latency_ratio {ratio * 1.4:.3g} is above 0.6, and not below its parent's")]
        steps.append(step)
        if step.ap is not None and step.ap - 0.3 * ratio > (steps[best].ap or 0) - 0.3 * steps[best].ratio:
            best = number
    return steps


def mutated(spec: DetectorSpec, dice: random.Random) -> tuple[DetectorSpec, str, float]:
    """A child's spec, the text of one or two actions, and about how the latency changes."""
    if dice.random() < 0.1:
        return spec, "keep", 1.0
    texts, factor = list[str](), 1.0
    for _ in range(dice.choice((1, 1, 2))):
        spec, text, change = one_action(spec, dice)
        texts, factor = [*texts, text], factor * change
    return spec, " > ".join(texts), factor


def one_action(spec: DetectorSpec, dice: random.Random) -> tuple[DetectorSpec, str, float]:
    """Any of a few actions, as the search's texts name them."""
    number = dice.randrange(4)
    stage = spec.body.stages[number]
    kind = dice.choice(("inner", "add", "remove", "neck", "resize", "proposals"))
    if kind == "add" or (kind == "remove" and stage.depth == 1):
        return with_inner(spec, number, (*stage.inner, stage.width)), f"add_block(stage={number + 1})", 1.06
    if kind == "remove":
        return with_inner(spec, number, stage.inner[:-1]), f"remove_block(stage={number + 1})", 0.92
    if kind == "inner":
        block = dice.randrange(stage.depth)
        width = max(8, stage.inner[block] - dice.choice((8, 16)))
        inner = (*stage.inner[:block], width, *stage.inner[block + 1 :])
        return with_inner(spec, number, inner), f"prune_inner(stage={number + 1}, block={block}, width={width})", 0.95
    if kind == "neck":
        width = max(24, spec.neck_width - 8)
        return replace(spec, neck_width=width), f"prune_neck(width={width})", 0.95
    if kind == "resize":
        size = dice.choice([size for size in (128, 144, 160, 176, 192) if size != spec.min_size])
        return spec.at_size(size), f"resize(pixels={size})", (size / spec.min_size) ** 1.2
    kept = dice.choice([count for count in (50, 100, 300) if count != spec.proposals[1]])
    changed = replace(spec, proposals=(spec.proposals[0], kept))
    return changed, f"keep_proposals(count={kept})", (kept / spec.proposals[1]) ** 0.08


def with_inner(spec: DetectorSpec, number: int, inner: tuple[int, ...]) -> DetectorSpec:
    """The spec with other inner widths in a stage (0–3)."""
    stages = list(spec.body.stages)
    stages[number] = replace(stages[number], inner=inner)
    return replace(spec, body=replace(spec.body, stages=tuple(stages)))


def records_of(steps: Sequence[Step]) -> list[Record]:
    """The records of a search whose candidates ended one after another."""
    events: list[Event] = []
    for id, step in enumerate(steps):
        events.append(Event(len(events), "asked", id, 100.0 * id, step.asked()))
        if step.status is not None:
            events.append(Event(len(events), "told", id, 100.0 * id + 90, step.told()))
    return records_from(events)


def joint_run(folder: Path, steps: Sequence[Step], config: Mapping[str, Any] | None = None) -> Path:
    """The run of these candidates."""
    command = "python derive.py --x '<'"
    with Ledger.create(folder, config or {"script": "derive_detector", "note": "<b>"}, {"command": command}) as ledger:
        for id, step in enumerate(steps):
            ledger.append("asked", id, step.asked())
            if step.status is not None:
                ledger.append("told", id, step.told())
    return folder
