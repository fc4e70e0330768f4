"""What a comparison takes over from other searches; nothing is trained here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transfer
from presets import preset_of
from runs import SearchRun

from autodet.detectors import DetectorSpec
from autodet.distill import Formula
from autodet.training import Task

FOUND = Formula.parse("global: catt | l1 * 6; logits.roi: softmax(c, t=2) | kl * 0.5")


@pytest.fixture
def target(tiny_spec: DetectorSpec, monkeypatch: pytest.MonkeyPatch) -> SearchRun:
    """A finished search whose teacher knows other classes than its student; other searches are like it."""
    preset = preset_of("smoke")
    task = Task(data="data", cache="cache", student=tiny_spec, settings=preset.proxy, teacher="teacher.safetensors")
    run = SearchRun(Path("here"), preset, task, tiny_spec, True, 1.0, 4, FOUND)
    others = {"a.1": FOUND, "roi": Formula(FOUND.terms[1:]), "global": Formula(FOUND.terms[:1])}
    raw = replace(run, task=replace(task, normalise=False))
    found: dict[str, SearchRun] = {name: replace(run, found=formula) for name, formula in others.items()}
    monkeypatch.setattr(transfer, "read_search", lambda folder: (found | {"raw": raw})[folder.name])
    teacher = SimpleNamespace(spec=replace(tiny_spec, labels=((1, "cell"),)))
    monkeypatch.setattr(transfer, "load_detector", lambda path: (teacher, {}))
    return run


def arms(target: SearchRun, *names: str) -> dict[str, str]:
    found = transfer.transferred([Path("runs") / name for name in names], target)
    return {arm: str(formula) for arm, formula in found.items()}


def test_a_term_that_cannot_be_compared_is_left_out_and_said(
    target: SearchRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arms(target, "a.1", "global") == {
        "from a.1 (without logits.roi)": "global: catt | l1 * 6",
        "from global": "global: catt | l1 * 6",
    }
    printed = capsys.readouterr().out
    assert printed.count("left out") == 1
    assert "from a.1: left out 'logits.roi: softmax(c, t=2) | kl * 0.5': student and teacher have different" in printed


def test_nothing_left_is_refused_with_the_reason(target: SearchRun) -> None:
    with pytest.raises(ValueError, match=r"runs/roi: nothing of its formula .* different labels"):
        arms(target, "roi")


def test_weights_that_mean_something_else_are_refused(target: SearchRun) -> None:
    with pytest.raises(ValueError, match="runs/raw: its weights were found with --no-normalise"):
        arms(target, "raw")


def test_a_pair_that_has_all_inputs_keeps_the_formula(
    target: SearchRun, tiny_spec: DetectorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher: Any = SimpleNamespace(spec=tiny_spec)
    monkeypatch.setattr(transfer, "load_detector", lambda path: (teacher, {}))
    assert arms(target, "a.1") == {"from a.1": str(FOUND)} and arms(target) == {}
