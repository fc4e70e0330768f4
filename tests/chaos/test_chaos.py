"""Rounds of chaos; ``chaos.py`` runs as many as wanted. What is killed alone is tested beside its room."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import ENVIRONMENT, one_round


@pytest.mark.slow
@pytest.mark.parametrize("store", [True, False])
def test_a_joint_search_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: bool) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert len(one_round("joint", tmp_path, seed=0, faults=6, store=store)["faults"]) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_distiller_search_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert len(one_round("distiller", tmp_path, seed, faults=3, budget=60)["faults"]) >= 2
