"""Latency, multiply-adds and parameters, against closed forms and a clock under our control."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from autodet.evaluation import cost_of, count_macs, count_params, measure_latencies_interleaved, measure_latency


class Clock:
    """Time that passes only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def takes(self, milliseconds: list[float]) -> Callable[[], None]:
        """A call that lasts the next of these times."""
        times = iter(milliseconds)

        def run() -> None:
            self.now += next(times) / 1e3

        return run


def test_median_and_90th_percentile_after_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Clock(monkeypatch).takes([900.0, 800.0, *map(float, range(11, 0, -1))])
    latency = measure_latency(run, warmup=2, repeats=11)
    assert latency == pytest.approx((6.0, 10.0))


def test_interleaved_runs_share_a_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down tenfold leaves the ratio of two runs near its true value of 2."""
    clock, calls = Clock(monkeypatch), list[str]()

    def run(name: str, work: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            clock.now += work * (1 + len(calls) / 10)

        return call

    found = measure_latencies_interleaved({"a": run("a", 1.0), "b": run("b", 2.0)}, warmup=0, repeats=40)
    assert calls[:8] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert found["b"].median_ms / found["a"].median_ms == pytest.approx(2.0, rel=0.02)


def test_threads_are_set_and_put_back_and_no_gradients_recorded() -> None:
    before = torch.get_num_threads()
    seen = set[tuple[int, bool]]()
    measure_latency(lambda: seen.add((torch.get_num_threads(), torch.is_grad_enabled())), threads=2, repeats=2)
    assert seen == {(2, False)}

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        measure_latency(fail, threads=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("setting", [{"repeats": 0}, {"warmup": -1}, {"threads": 0}])
def test_senseless_settings_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected warmup"):
        measure_latency(lambda: None, **setting)  # type: ignore[arg-type]


def test_macs_in_closed_form() -> None:
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
    model = nn.Sequential(conv, nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 5 * 7, 3)).eval()
    images = torch.rand(2, 8, 10, 14)
    per_image = 12 * 5 * 7 * (8 // 2) * 9 + 12 * 5 * 7 * 3
    assert count_macs(model, images) == pytest.approx(2 * per_image / 1e9, rel=1e-12)


def test_macs_and_parameters_of_resnet18_as_published() -> None:
    with torch.device("meta"):
        model, images = torchvision.models.resnet18().eval(), torch.rand(1, 3, 224, 224)
    assert count_macs(model, images) == pytest.approx(1.814, abs=0.001)
    assert count_params(model) == pytest.approx(11.689512)


def test_shared_parameters_count_once() -> None:
    a, b = nn.Linear(10, 10), nn.Linear(10, 10)
    b.weight = a.weight
    assert count_params(nn.ModuleList([a, b])) == pytest.approx(120 / 1e6)


def test_cost_of() -> None:
    model = nn.Conv2d(3, 4, 1).eval()
    images = torch.rand(2, 3, 8, 8)
    cost = cost_of(lambda: model(images), model, threads=1, batch=2, warmup=1, repeats=5)
    assert (cost.device, cost.threads, cost.batch) == ("cpu", 1, 2)
    assert cost.macs_g == pytest.approx(64 * 3 * 4 / 1e9)
    assert cost.params_m == pytest.approx(16 / 1e6)
    assert 0 < cost.latency_ms <= cost.latency_p90_ms
