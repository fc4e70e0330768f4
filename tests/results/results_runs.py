"""Small recorded runs for the tests of the results."""

from pathlib import Path
from typing import Any

from autodet.ledger import Ledger

HOSTILE = 'global: <script>alert("x")</script> | l1 * 2'


def asked(formula: str, phase: str = "divide", group: str = "global", **more: Any) -> dict[str, Any]:
    """The payload of an asked event; `inherit` and `replicate` go to the candidate."""
    candidate = {"formula": formula, "inherit": more.pop("inherit", True), "replicate": more.pop("replicate", 0)}
    return {"candidate": candidate, "phase": phase, "group": group, "origin": "random", **more}


def told(ap: float | None, status: str = "completed", mask_ap: float | None = None, **more: Any) -> dict[str, Any]:
    """The payload of a told event."""
    metrics = None if ap is None else {"ap": ap, "ap50": ap + 0.2}
    if metrics is not None and mask_ap is not None:
        metrics["mask_ap"] = mask_ap
    return {"status": status, "ap": ap, "metrics": metrics, "epochs": 3, "seconds": 2.0, **more}


def search_run(folder: Path, close: bool = True) -> Ledger:
    """Control, three completed candidates (two of one formula), a stopped, a failed, and a running one."""
    ledger = Ledger.create(
        folder, {"script": "search_distiller", "note": "<b>"}, about={"command": "python a.py --x '<'"}
    )
    steps: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
        (asked("none", "control", "control", origin="control"), told(0.30)),
        (asked("global: catt > pool(2) | l1 * 2", rejected=[["global: l2 * 1", "loss <NaN>"]]), told(0.40)),
        (asked("logits.roi: softmax(c, t=2) | kl * 1", group="logits.roi"), told(0.45, extra={"scale": 1.5})),
        (asked("global: catt > pool(2) | l1 * 2", replicate=1), told(0.44)),
        (asked("global: norm(n) | l2 * 1"), told(0.60, "stopped", cause="behind")),
        (asked(HOSTILE), told(None, "failed", cause="Diverged: <nan>")),
        (asked("global: gram | l1 * 1"), None),
    ]
    for id, (ask, result) in enumerate(steps):
        ledger.append("asked", id, ask)
        ledger.append("reported", id, {"epoch": 1, "ap": 0.1, "verdict": "continue", "seconds": 0.5})
        if result is not None:
            ledger.append("told", id, result)
    if close:
        ledger.close()
    return ledger


def comparison_run(folder: Path, arms: dict[str, list[float]], masks: bool = False) -> Path:
    """A comparison: AP per arm and seed; of masks half of it, where there are masks."""
    with Ledger.create(folder, {"script": "compare_distillers"}) as ledger:
        id = 0
        for arm, values in arms.items():
            for seed, ap in enumerate(values):
                ledger.append("asked", id, asked(f"{arm}: l1 * 1", "compare", arm, replicate=seed))
                ledger.append("told", id, told(ap, mask_ap=ap / 2 if masks else None))
                id += 1
    return folder
