"""Whoever measures is alone, also while workers take turns without a pause; ratios are those of the times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import pytest

from autodet.evaluation import Quiet, measure_latency_ratio

Spans = list[tuple[float, float]]


def work(folder: Path, pieces: Spans, stop: threading.Event) -> None:
    """Pieces of work without a pause between them, each noted with its beginning and end."""
    quiet = Quiet(folder)
    while not stop.is_set():
        with quiet.working():
            began = time.monotonic()
            time.sleep(0.01)
            pieces.append((began, time.monotonic()))


def test_nothing_works_while_somebody_is_alone(tmp_path: Path) -> None:
    """Threads stand for processes: a lock belongs to an opened file, not to a process."""
    stop, pieces, spans = threading.Event(), Spans(), Spans()
    workers = [threading.Thread(target=work, args=(tmp_path, pieces, stop)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in range(5):
        time.sleep(0.03)
        asked = time.monotonic()
        with Quiet(tmp_path).alone():
            began = time.monotonic()
            assert began - asked < 5  # workers who take turns do not keep it waiting
            time.sleep(0.05)
            spans.append((began, time.monotonic()))
    stop.set()
    for worker in workers:
        worker.join(20)
    assert len(pieces) > 10
    assert not any(began < end and start < ended for start, end in spans for began, ended in pieces)


def test_a_ratio_is_that_of_the_times() -> None:
    found = measure_latency_ratio(lambda: time.sleep(0.006), lambda: time.sleep(0.003))
    assert found.ratio == pytest.approx(2.0, rel=0.25)
    assert 10 <= found.rounds <= 60
    assert found.spread <= 0.01 * found.ratio or found.rounds == 60


def test_a_steady_ratio_ends_soon_and_an_unsteady_one_goes_on() -> None:
    times = iter([0.001, 0.004, 0.004, 0.001] * 200)
    unsteady = measure_latency_ratio(lambda: time.sleep(next(times)), lambda: time.sleep(0.002), most=25)
    assert unsteady.rounds == 25 and unsteady.spread > 0.01 * unsteady.ratio


def test_how_the_ratio_differs_between_images_is_no_error() -> None:
    """Each image's ratio is steady, so few rounds are enough, and the result is their mean."""

    def sleeps(milliseconds: Sequence[float]) -> Callable[[], None]:
        turn = cycle(milliseconds)
        return lambda: time.sleep(next(turn) / 1000)

    found = measure_latency_ratio(sleeps((4, 8, 12, 16)), sleeps((4, 4, 4, 4)), precision=0.05, images=4)
    assert found.rounds <= 24 and found.spread <= 0.05 * found.ratio
    assert found.ratio == pytest.approx((1 + 2 + 3 + 4) / 4, rel=0.1)
