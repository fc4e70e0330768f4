"""The median rule against a direct reading of it."""

import math
import random
from statistics import median

import pytest

from autodet.search import MedianStop, StopRule


def test_it_agrees_with_a_direct_reading_of_the_rule() -> None:
    rng = random.Random(0)
    stop = MedianStop(StopRule(min_epochs=2, min_known=3, margin=0.05))
    seen: dict[int, list[float]] = {}
    verdicts = []
    for id in range(60):
        for epoch in range(1, 4):
            ap = rng.gauss(0.3, 0.1)
            known = seen.setdefault(epoch, [])
            expected = epoch >= 2 and len(known) >= 3 and ap < median(known) - 0.05
            assert stop.report("a", id, epoch, ap) == expected
            known.append(ap)
            verdicts.append(expected)
    assert 10 < sum(verdicts) < 100


def test_with_repeated_reports_it_agrees_too() -> None:
    rng = random.Random(1)
    stop = MedianStop(StopRule(min_known=3, margin=0.02))
    known: dict[int, float] = {}
    for _ in range(300):
        id, ap = rng.randrange(40), round(rng.gauss(0.3, 0.1), 2)
        others = [value for other, value in known.items() if other != id]
        assert stop.report("a", id, 1, ap) == (len(others) >= 3 and ap < median(others) - 0.02)
        known[id] = ap


def test_groups_do_not_see_each_other_and_a_repeated_report_counts_once() -> None:
    stop = MedianStop(StopRule(min_epochs=1, min_known=2, margin=0.0))
    for _ in range(3):
        assert not stop.report("a", 0, 1, 0.9)
    assert not stop.report("a", 1, 1, 0.1)  # one other only
    assert not stop.report("b", 2, 1, 0.1)
    assert stop.report("a", 3, 1, 0.49)  # median of 0.9 and 0.1 is 0.5
    assert not stop.report("a", 4, 1, 0.49)  # median of 0.9, 0.1 and 0.49


def test_an_ap_that_is_not_a_number_is_ignored() -> None:
    stop = MedianStop(StopRule(min_known=1, margin=0.0))
    assert not stop.report("a", 0, 1, math.nan)
    assert not stop.report("a", 1, 1, 0.1)
    assert stop.report("a", 2, 1, 0.05)


def test_senseless_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="min_known"):
        StopRule(min_known=0)
