"""What measure_overhead.py takes for waiting; the whole script is slow."""

from __future__ import annotations

import measure_overhead
import pytest
from measure_overhead import Training, summary


def test_a_wait_is_between_a_workers_two_trainings() -> None:
    # Two workers: the first trains from 1 to 4 and from 6 to 10, the second from 2 to 5 and from 6.5 to 9.
    trainings = [Training(3, 4), Training(4, 10), Training(3, 5), Training(2.5, 9)]
    assert summary(trainings, 0.5, workers=2) == {"training_s": 3.125, "between_s": 1.75, "first_s": 0.5}


def test_one_candidate_a_worker_is_not_enough() -> None:
    with pytest.raises(ValueError, match="first ones do not count"):
        measure_overhead.main(["--preset", "smoke", "--candidates", "2"])


@pytest.mark.slow
def test_both_kinds_are_measured(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    arguments = ["--preset", "smoke", "--candidates", "4", "--rounds", "2", "--cache", str(tmp_path)]
    assert measure_overhead.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Ray Tune alone" in printed and "of a training" in printed
