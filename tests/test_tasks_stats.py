"""Intervals and tests against published values and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from foveate.tasks.scores import exact_match, normalise
from foveate.tasks.stats import mcnemar, median_interval, paired_bootstrap, sign_test, wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # R. G. Newcombe, "Two-sided confidence intervals for the single proportion",
        # Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_table(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(7, 7)[1] == 1.0 and wilson(7, 7)[0] == pytest.approx(1 - wilson(0, 7)[1])
    with pytest.raises(ValueError, match="correct is 5"):
        wilson(5, 4)


def test_sign_test_is_the_binomial_tail():
    for wins, losses in itertools.product(range(7), range(7)):
        n = wins + losses
        tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
        assert sign_test(wins, losses) == pytest.approx(min(1.0, 2 * tail))
    assert sign_test(4000, 4000) == 1.0
    assert 0 < sign_test(2300, 2000) < 1e-5  # beyond the range of a float power of two


def test_mcnemar_counts_only_discordant_pairs():
    # twelve discordant pairs, all one way: two tails of one outcome each
    first = [1] * 12 + [1] * 20 + [0] * 18
    second = [0] * 12 + [1] * 20 + [0] * 18
    assert mcnemar(first, second) == pytest.approx(2 / 2**12)
    assert mcnemar(second, first) == mcnemar(first, second)
    assert mcnemar(first, first) == 1.0
    with pytest.raises(ValueError, match="equal lengths"):
        mcnemar([1], [1, 0])


def test_bootstrap_equals_drawing_whole_questions():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    fast = paired_bootstrap(a, b, resamples=20_000, seed=1)
    rows = rng.integers(0, 80, size=(20_000, 80))  # the definition, question by question
    low, high = np.quantile((a - b)[rows].mean(1), [0.025, 0.975])
    assert fast.value == pytest.approx(a.mean() - b.mean())
    assert (fast.low, fast.high) == pytest.approx((low, high), abs=0.015)


def test_bootstrap_covers_the_truth_about_95_times_of_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        a, b = rng.random(150) < 0.8, rng.random(150) < 0.7
        found = paired_bootstrap(a, b, resamples=1000, seed=trial)
        hits += found.low <= 0.1 <= found.high
    assert 178 <= hits <= 199


def test_bootstrap_weighs_tasks_alike_and_repeats_itself():
    first = [1] * 100 + [0] * 10
    second = [1] * 100 + [1] * 10
    tasks = ["big"] * 100 + ["small"] * 10
    found = paired_bootstrap(first, second, groups=tasks)
    assert found.value == found.low == found.high == pytest.approx(-0.5)  # within a task nothing varies
    assert paired_bootstrap(first, second).value == pytest.approx(-10 / 110)
    assert found == paired_bootstrap(first, second, groups=tasks)
    with pytest.raises(ValueError, match="equal, non-empty"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match="labels"):
        paired_bootstrap([1, 0], [1, 1], groups=["x"])


def test_median_interval_holds_the_median():
    values = np.random.default_rng(2).normal(5, 1, 60)
    found = median_interval(values)
    assert found.low <= found.value <= found.high and found.value == np.median(values)
    assert found.high - found.low < 1
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (" The Red circle. ", "red circle"),
        ("A", "a"),  # nothing else would be left
        ("an  apple,", "apple"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("3.5!", "3.5"),
        ("-4", "-4"),
        ("top-left", "top-left"),
        ("Yes.", "yes"),
        ("ＡＢ", "ab"),
        ("", ""),
    ],
)
def test_normal_form(text, form):
    assert normalise(text) == form
    assert normalise(form) == form


def test_exact_match_accepts_any_answer():
    assert exact_match("The circle", ["square", "Circle."]) == 1.0
    assert exact_match("circles", ["circle"]) == 0.0
    assert exact_match("", ["no"]) == 0.0
