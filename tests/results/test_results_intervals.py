import math

import numpy as np
import pytest

from autodet.results.intervals import kendall, mean_interval, spearman, student_t_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "table"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.975, 30, 2.042),
        (0.95, 5, 2.015),
        (0.995, 10, 3.169),
    ],
)
def test_quantiles_of_the_printed_tables(probability: float, freedom: int, table: float) -> None:
    assert student_t_quantile(probability, freedom) == pytest.approx(table, abs=6e-4)


def test_quantiles_in_closed_form() -> None:
    assert student_t_quantile(0.9, 1) == pytest.approx(math.tan(math.pi * 0.4), rel=1e-12)
    assert student_t_quantile(0.9, 2) == pytest.approx(0.8 * math.sqrt(2 / (1 - 0.8**2)), rel=1e-12)
    assert student_t_quantile(0.1, 7) == -student_t_quantile(0.9, 7)
    assert student_t_quantile(0.975, 100_000) == pytest.approx(1.95996, abs=1e-4)


@pytest.mark.parametrize("freedom", [3, 4, 7, 12])
def test_quantile_inverts_the_integrated_density(freedom: int) -> None:
    end = student_t_quantile(0.975, freedom)
    t = np.linspace(0, end, 20_001)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    assert np.trapezoid(constant * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t) == pytest.approx(0.475, abs=1e-8)


@pytest.mark.parametrize(("probability", "freedom"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_quantile_refuses_what_has_none(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        student_t_quantile(probability, freedom)


def test_interval_by_hand() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])  # s = √2.5, s/√5 = √0.5, t(4) = 2.776
    assert (mean, low, high) == pytest.approx((3.0, 3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5)))


def test_interval_of_too_few() -> None:
    assert mean_interval([2.0])[0] == 2.0 and math.isnan(mean_interval([2.0])[1])
    assert all(map(math.isnan, mean_interval([])))


def test_spearman_by_hand() -> None:
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 6.0, 7.0, 8.0, 7.5]
    assert spearman(first, second) == pytest.approx(1 - 6 * 2 / (5 * 24))  # without ties: 1 − 6 Σd² / n(n² − 1)
    assert spearman(first, [-(value**3) for value in first]) == pytest.approx(-1)
    assert spearman([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(math.sqrt(3) / 2)  # ties share their mean rank
    assert math.isnan(spearman([1.0, 1.0], [1.0, 2.0])) and math.isnan(spearman([1.0], [1.0]))


def test_kendall_counts_pairs_in_the_same_order() -> None:
    """Against a count over all pairs; with ties τ-b divides by the untied pairs of each side."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=9), rng.normal(size=9)
    pairs = [(i, j) for i in range(9) for j in range(i)]
    agree = sum((first[i] - first[j]) * (second[i] - second[j]) > 0 for i, j in pairs)
    assert kendall(first.tolist(), second.tolist()) == pytest.approx((2 * agree - len(pairs)) / len(pairs))
    assert kendall([1, 2, 3], [10, 20, 30]) == 1 and kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert math.isnan(kendall([1, 1], [1, 2])) and math.isnan(kendall([1], [1]))
