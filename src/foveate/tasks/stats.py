"""Intervals and tests for accuracies: one model (Wilson), two models on the same questions (bootstrap, McNemar).

Everything is numpy and the standard library; nothing here knows what a model is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


def wilson(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a proportion of `correct` out of `n`; (0, 1) when n is 0.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    Stays inside [0, 1] and is honest at 0 and at n, where the normal interval has no width.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct is {correct}; it must lie in [0, n={n}]")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, z2 = correct / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The exact ends at 0 and n are 0 and 1; rounding alone would leave 1e-17 there.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """mean(first) - mean(second) of two models' scores on the same questions, with a percentile bootstrap interval.

    first, second: one score per question, same order. groups: the task of each question; then the value is the mean
    over tasks of each task's difference (so a small task weighs as much as a large one), resampled within tasks.
    Raises ValueError when the lengths differ or nothing is given. The same seed gives the same interval.
    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"paired scores need two equal, non-empty rows; got shapes {a.shape} and {b.shape}")
    labels = np.asarray(["all"] * a.size if groups is None else list(groups))
    if labels.shape != a.shape:
        raise ValueError(f"{labels.size} group labels for {a.size} questions")
    rng = np.random.default_rng(seed)
    names = np.unique(labels)
    value, draws = 0.0, np.zeros(resamples)
    for name in names:
        delta = (a - b)[labels == name]
        # Drawing n of n with replacement = drawing how often each distinct difference occurs: a multinomial. Scores
        # are nearly always 0 or 1, so 10,000 resamples cost 10,000 x 3 numbers whatever n is.
        levels, counts = np.unique(delta, return_counts=True)
        times = rng.multinomial(delta.size, counts / delta.size, size=resamples)
        value += delta.mean() / names.size
        draws += times @ levels / delta.size / names.size
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of `wins` against `losses` under equal chances (ties are left out by the caller)."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    term = total = 1  # integers of any size: exact also for thousands of questions
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i
        total += term
    return min(1.0, 2 * total / 2**n)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided McNemar p that two models are equally often right on the same questions.

    first, second: one right (1) or wrong (0) per question; any score above 0.5 counts as right.
    Source: Q. McNemar, Psychometrika 12 (1947), in its exact (binomial) form, right for any number of discordant pairs.
    """
    a, b = np.asarray(first, dtype=np.float64) > 0.5, np.asarray(second, dtype=np.float64) > 0.5
    if a.shape != b.shape:
        raise ValueError(f"paired answers need equal lengths; got {a.size} and {b.size}")
    return sign_test(int((a & ~b).sum()), int((b & ~a).sum()))


def median_interval(
    values: Sequence[float], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Median of `values` with a percentile bootstrap interval. Raises ValueError when there are none."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("the median of no values is undefined")
    rng = np.random.default_rng(seed)
    medians = np.median(data[rng.integers(0, data.size, size=(resamples, data.size))], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Interval(float(np.median(data)), float(low), float(high))
