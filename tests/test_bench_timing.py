"""The protocol of pairs, on clocks that the test controls."""

from __future__ import annotations

import random

import pytest

from foveate.bench.timing import busy_machine, compare
from foveate.machine import machine


def noisy(ms: float, seed: int, spread: float = 0.05):
    rng = random.Random(seed)
    return lambda i: {"encode": ms * rng.uniform(1 - spread, 1 + spread), "select": 0.0, "total": 2 * ms}


def quiet(load: float, steal: float) -> bool:
    return False


def test_ratio_of_a_faster_model():
    rows, run = compare(noisy(5, 1), noisy(10, 2), pairs=20, min_seconds=0, busy=quiet)
    encode, select, total = rows
    assert run == {"pairs": 20, "discarded": 0, "noisy": False, "repeats": 1}
    assert encode.ratio == pytest.approx(0.5, abs=0.05) and encode.low <= encode.ratio <= encode.high
    assert encode.real and encode.p < 1e-4 and encode.minima_ratio == pytest.approx(0.5, abs=0.05)
    assert encode.aa_low <= 1 <= encode.aa_high
    assert total.ratio == pytest.approx(0.5) and total.low == total.high
    assert select.ratio is None and select.to_dict()["ratio"] is None


def test_the_same_model_twice_is_no_gain():
    rows, _ = compare(noisy(10, 1), noisy(10, 2), pairs=30, min_seconds=0, busy=quiet)
    assert not rows[0].real and rows[0].low <= 1 <= rows[0].high


def test_a_small_difference_of_a_restless_model_is_no_gain():
    drift = iter(range(10_000))
    restless = lambda i: {"total": 10.0 * (1.3 if next(drift) % 2 else 1.0)}  # noqa: E731 against itself: 0.77 or 1.3
    (row,), _ = compare(lambda i: {"total": 9.0}, restless, pairs=30, min_seconds=0, busy=quiet)
    assert row.high < 1 and not row.real


def test_busy_pairs_are_dropped_whole_and_counted():
    calls = iter(range(10_000))
    rows, run = compare(
        noisy(5, 1), noisy(10, 2), pairs=10, min_seconds=0, aa=False, busy=lambda load, steal: next(calls) % 3 == 0
    )
    assert run["pairs"] == 10 and run["discarded"] == 5 and not run["noisy"]
    assert rows[0].aa_low is None and rows[0].real


def test_a_machine_that_is_never_quiet_is_said_to_be():
    _, run = compare(noisy(5, 1), noisy(10, 2), pairs=8, min_seconds=0, busy=lambda load, steal: True)
    assert run["noisy"] and run["pairs"] == 8 and run["discarded"] == 0
    assert busy_machine(2.0, 0.0) and busy_machine(0.1, 0.05) and not busy_machine(0.5, 0.01)


def test_pairs_share_inputs_and_mix_their_order():
    log: list[tuple[str, int]] = []

    def side(name: str):
        def timed(i: int) -> dict[str, float]:
            log.append((name, i))
            return {"total": 1.0}

        return timed

    compare(side("a"), side("b"), pairs=40, warmup=0, min_seconds=0, aa=False, busy=quiet)
    pairs = [(log[i], log[i + 1]) for i in range(0, len(log), 2)]
    assert all(first[1] == second[1] and {first[0], second[0]} == {"a", "b"} for first, second in pairs)
    assert len({first[1] for first, _ in pairs}) == 40
    assert 8 < sum(first[0] == "a" for first, _ in pairs) < 32


def test_short_units_are_repeated():
    _, run = compare(noisy(1, 1), noisy(1, 2), pairs=2, warmup=1, min_seconds=0.002, aa=False, busy=quiet)
    assert run["repeats"] > 10


def test_machine_says_what_a_time_needs():
    device, versions = machine()
    assert device["cpu"] and device["threads"] >= 1 and device["cores"] >= 1
    assert {"foveate", "torch", "transformers", "python"} <= set(versions)
