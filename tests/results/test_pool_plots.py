"""What a pool's pictures show; the drawing itself is looked at by people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from autodet.results.pool_plots import draw_training, front, openings, role_loss, save_pool_pictures

MEMBERS = pd.DataFrame(
    {
        "member": ["a", "b", "c", "d", "e"],
        "ap": [0.2, 0.1, 0.4, 0.4, 0.5],
        "ap_before": [0.1, 0.1, 0.1, 0.3, 0.5],
        "split": "val",
        "latency_ms": [10.0, 10.0, 20.0, 30.0, 40.0],
        "macs_g": [1.0, 0.5, 2.0, 1.5, 4.0],
        "params_m": [1.0, 2.0, 3.0, 4.0, 5.0],
    }
)


def entry(epoch: int, share: float, ap: dict[str, float] | None = None) -> dict[str, Any]:
    losses = {"largest/a": 1.0, "largest/b": 0.5}
    if share:
        losses |= {"random/a": 2.0, "random/distill/0/global": 7.0}
    return {"epoch": epoch, "open": share, "losses": losses} | ({"ap": ap} if ap else {})


PROGRESS = [entry(1, 0), entry(2, 0, {"largest": 0.1}), entry(3, 0.5), entry(4, 1.0, {"largest": 0.2, "random 1": 0.1})]


@pytest.mark.parametrize(("cost", "best"), [("latency_ms", ["a", "c", "e"]), ("macs_g", ["b", "a", "d", "e"])])
def test_the_front_holds_what_no_cheaper_member_equals(cost: str, best: list[str]) -> None:
    """Brute force: a member is on it unless another is no dearer and no worse, and better in one."""
    rows = MEMBERS.to_dict("records")
    dominated = {
        row["member"]
        for row in rows
        for other in rows
        if other[cost] <= row[cost]
        and other["ap"] >= row["ap"]
        and (other[cost], other["ap"]) != (row[cost], row["ap"])
    }
    found = list(front(MEMBERS, cost)["member"])
    assert found == best and set(found) == set(MEMBERS["member"]) - dominated


def test_losses_leave_distillation_out_and_openings_are_where_the_share_changes() -> None:
    assert role_loss(PROGRESS[0], "largest") == 1.5 and role_loss(PROGRESS[0], "random") is None
    assert role_loss(PROGRESS[2], "random") == 2.0
    assert openings(PROGRESS) == {3: 0.5, 4: 1.0}


def test_curves_hold_one_point_an_epoch_or_measurement() -> None:
    losses, aps = draw_training(PROGRESS).axes
    assert [len(line.get_xdata()) for line in losses.lines[:2]] == [4, 2]  # type: ignore[arg-type]
    assert {str(line.get_label()) for line in aps.lines if not str(line.get_label()).startswith("_")} == {
        "largest",
        "random 1",
    }


def test_all_pictures_are_drawn(tmp_path: Path) -> None:
    save_pool_pictures(tmp_path / "pictures", MEMBERS, PROGRESS)
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"members.png", "training.png", "statistics.png"}
    assert all((tmp_path / "pictures" / name).stat().st_size > 5_000 for name in names)
