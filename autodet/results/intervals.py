"""The little statistics that the results need: Student's t, intervals of a mean, rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd


def student_t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T ≤ t) = `probability` (between 0 and 1) for `freedom` degrees of freedom (1, 2, …).

    By bisection on θ = atan(t / √freedom), for which P(|T| ≤ t) is a finite sum of cosines (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4).
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"expected 0 < probability < 1 and freedom ≥ 1, found {probability} and {freedom}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(80):  # halves the interval to below the spacing of floats
        middle = (low + high) / 2
        if _within(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(theta: float, freedom: int) -> float:
    """P(|T| ≤ √freedom · tan θ)."""
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(odd, freedom - 1, 2):  # powers of the cosine: odd ones for odd freedom, even ones for even
        total += term
        term *= math.cos(theta) ** 2 * (k + 1) / (k + 2)
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, lower and upper end of its t-interval; the ends are NaN for fewer than two values, all for none."""
    count = len(values)
    if count == 0:
        return math.nan, math.nan, math.nan
    mean = float(np.mean(values))
    if count == 1:
        return mean, math.nan, math.nan
    half = student_t_quantile((1 + confidence) / 2, count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN for fewer than two pairs or a constant side."""
    ranks = [pd.Series(list(values), dtype="float64").rank().to_numpy() for values in (first, second)]
    if len(ranks[0]) < 2 or any(np.ptp(side) == 0 for side in ranks):
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's τ-b over all pairs of positions; NaN where a side is constant or has fewer than two values."""
    signs = [np.sign(np.subtract.outer(np.asarray(side, float), np.asarray(side, float))) for side in (first, second)]
    untied = [float(np.abs(side).sum()) for side in signs]
    if min(untied) == 0:
        return math.nan
    return float((signs[0] * signs[1]).sum()) / math.sqrt(untied[0] * untied[1])
