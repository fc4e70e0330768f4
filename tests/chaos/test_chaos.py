"""A short round of chaos; ``chaos.py`` runs as many as wanted, of both kinds of search."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import ENVIRONMENT, one_round


def test_a_joint_search_in_an_object_store_loses_nothing_to_killed_processes_and_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    result = one_round("joint", tmp_path, seed=0, faults=4, budget=6, store=True, workers=1)
    assert result["candidates"] == 7 and len(result["faults"]) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_distiller_search_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert len(one_round("distiller", tmp_path, seed, faults=3)["faults"]) >= 2
