"""The recipe: its schedule in closed form, what it refuses, and which parameters decay."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from autodet.training import TrainSettings
from autodet.training.settings import make_optimizer


def test_the_rate_is_a_warm_up_times_half_a_cosine() -> None:
    settings = TrainSettings(epochs=1, lr=0.2, warmup=10)
    assert settings.rate(0, 100) == pytest.approx(0.2 / 10)
    assert settings.rate(4, 100) == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi * 4 / 100)) / 2)
    assert settings.rate(50, 100) == pytest.approx(0.1)
    assert settings.rate(75, 100) == pytest.approx(0.2 * math.sin(math.pi / 8) ** 2)
    assert settings.rate(100, 100) == pytest.approx(0, abs=1e-12)
    assert settings.rate(250, 100) == pytest.approx(0, abs=1e-12)


def test_without_warm_up_the_rate_starts_at_its_peak_and_falls() -> None:
    rates = [TrainSettings(epochs=1, lr=0.2, warmup=0).rate(step, 40) for step in range(40)]
    assert rates[0] == 0.2
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert sum(rates) == pytest.approx(0.2 * 0.5 * (40 + 1))  # the cosines of steps 1 to 39 cancel


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a positive number"),
        ({"batch_size": -1}, "batch_size is -1, expected a positive number"),
        ({"lr": math.nan}, "lr is nan, expected a positive number"),
        ({"clip_norm": 0}, "clip_norm is 0, expected a positive number"),
        ({"ema": 1.0}, r"ema is 1.0, expected a decay in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected a number of at least 0"),
        ({"warmup": -1}, "warmup is -1, expected a number of at least 0"),
        ({"flip": 2}, "flip is 2, expected a probability"),
        ({"optimizer": "adam"}, "optimizer is 'adam', expected sgd or adamw"),
        ({"precision": "fp16"}, "precision is 'fp16', expected float32 or bf16"),
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"TrainSettings\.{message}"):
        TrainSettings(**{"epochs": 1, **wrong})


def test_settings_pass_through_json() -> None:
    settings = TrainSettings(epochs=3, optimizer="sgd", ema=0.5, precision="bf16")
    assert TrainSettings(**json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_matrices_and_kernels_decay(name: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    adapter = nn.Conv2d(4, 8, 1)
    settings = TrainSettings(epochs=1, optimizer=name, weight_decay=0.1, lr=0.3)
    decayed, plain = make_optimizer([model, adapter], settings).param_groups
    assert {id(p) for p in decayed["params"]} == {id(m.weight) for m in (model[0], model[2], adapter)}
    vectors = (model[0].bias, model[1].weight, model[1].bias, adapter.bias)
    assert {id(p) for p in plain["params"]} == {id(p) for p in vectors}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == plain["lr"] == 0.3


def test_decay_alone_shrinks_weights_by_rate_times_decay() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer([layer], TrainSettings(epochs=1, weight_decay=0.1, lr=0.5)).step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.05))
