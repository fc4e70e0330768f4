"""How a pool's training on Ray Train ends; that it survives is tested with its script."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from ray.train import WorkerGroupError

from autodet.runtime import pool_training
from autodet.search.session import MachineError
from autodet.training import Diverged


class Fails:
    """A training that ends with an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def fit(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray leaves one of its own behind
        raise self.error


@pytest.mark.parametrize(
    ("error", "becomes"),
    [(SystemExit(0), KeyboardInterrupt), (WorkerGroupError("full disk", {0: OSError("full disk")}), MachineError)],
)
def test_how_a_training_ends_is_told_in_our_words(error: BaseException, becomes: type[BaseException]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(becomes) as told:
        pool_training._fit(Fails(error))  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is handler
    assert becomes is KeyboardInterrupt or "full disk" in str(told.value)


def test_a_diverged_training_is_told_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(config: object) -> None:
        raise Diverged("The gradient's norm is nan at step 7.")

    monkeypatch.setattr(pool_training, "_train_on_worker", diverge)
    pool_training.train_on_worker({"folder": str(tmp_path)})
    assert (tmp_path / pool_training.DIVERGED).read_text() == "The gradient's norm is nan at step 7."


def test_lost_machines_are_forgiven_as_long_as_epochs_end_between() -> None:
    ends = iter([3, 5, 5])  # epochs done when the first, second and third attempt failed
    done = [0]

    class Loses:
        def fit(self) -> str:
            done[0] = next(ends)
            raise WorkerGroupError("a machine was lost", {0: OSError("lost")})

    with pytest.raises(MachineError, match="a machine was lost"):
        pool_training.fit_while_it_advances(Loses, lambda: done[0])  # type: ignore[arg-type]
    assert list(ends) == []

    class Succeeds:
        def fit(self) -> str:
            return "a result"

    attempts = iter([Loses, Succeeds])
    ends = iter([8])
    assert pool_training.fit_while_it_advances(lambda: next(attempts)(), lambda: done[0]) == "a result"  # type: ignore[arg-type, return-value]
