"""A short round of chaos; ``chaos.py`` runs as many as wanted, of both kinds of search."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import ENVIRONMENT, one_round


def test_a_joint_search_in_an_object_store_loses_nothing_to_a_lost_node_and_a_killed_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed trials and caches are those of tests/runtime."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    result = one_round("joint", tmp_path, seed=2, faults=2, budget=4, store=True, workers=1)
    assert result["candidates"] == 5 and sorted(result["faults"]) == ["a node", "the driver"]


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
    assert len(one_round("distiller", tmp_path, seed, faults=3)["faults"]) >= 2
