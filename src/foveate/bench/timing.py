"""Ratios of times that can be believed: interleaved pairs, an A/A run first, intervals, and discarded noise.

A single timing on a shared machine is good to some 15 %. Therefore two models are timed in pairs, in random order in
the pair, on the same fresh inputs; the estimate is the median of the pairs' log-ratios, and a difference counts only
beyond twice what the model shows against itself. Pairs timed while the machine was busy are dropped whole, and counted.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from foveate.machine import load_average
from foveate.tasks.stats import Interval, median_interval, sign_test

Timed = Callable[[int], dict[str, float]]
"""Runs one request on input number i and returns the milliseconds of its stages."""

SLOWEST_STEAL = 0.02
BUSIEST_LOAD = 1.25
"""Limits of a quiet pair: share of stolen time, and load average per core (2.5 on the two-core reference machine)."""


@dataclass(frozen=True)
class Row:
    """One stage of a comparison; times in milliseconds, ratio = A / B, so below 1 A is faster."""

    stage: str
    a_ms: float
    b_ms: float
    ratio: float | None
    low: float | None
    high: float | None
    minima_ratio: float | None
    """Fastest A over fastest B: the check without noise."""
    p: float | None
    aa_low: float | None
    aa_high: float | None
    """Interval of B against itself."""
    real: bool
    """Beyond twice the half width of B against itself."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: (round(v, 6) if isinstance(v, float) else v) for name, v in vars(self).items()}


@dataclass
class Pairs:
    """Times of A and B, pair by pair: stage to a list as long as there are kept pairs."""

    a: dict[str, list[float]] = field(default_factory=dict)
    b: dict[str, list[float]] = field(default_factory=dict)
    kept: int = 0
    discarded: int = 0
    noisy: bool = False
    """True when so many pairs were busy that all are kept: the machine was never quiet."""

    def ratio(self, stage: str, seed: int = 0) -> Interval | None:
        """Median ratio A / B with a 95 % bootstrap interval; None where a side spent no time."""
        a, b = self.a.get(stage, []), self.b.get(stage, [])
        if not a or not b or min(a) <= 0 or min(b) <= 0:
            return None
        logs = np.log(np.asarray(a) / np.asarray(b))
        return Interval(*(math.exp(value) for value in median_interval(logs, seed=seed)))


def compare(
    a: Timed,
    b: Timed,
    *,
    pairs: int = 30,
    warmup: int = 3,
    min_seconds: float = 0.3,
    seed: int = 0,
    aa: bool = True,
    busy: Callable[[float, float], bool] | None = None,
    on_pair: Callable[[], None] | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Rows by stage, and {"pairs", "discarded", "noisy", "repeats"} of the run.

    a, b: what to time. pairs: pairs wanted. min_seconds: a timed unit shorter than this is repeated inside. aa: also
    time B against itself first. busy(load, steal): whether to discard a pair. on_pair is called after every pair.
    """
    for i in range(warmup):
        a(i)
        b(i)
    repeats = max(_repeats(a, min_seconds), _repeats(b, min_seconds))
    rng = random.Random(seed)
    is_busy = busy or busy_machine
    null = _run_pairs(b, b, pairs, repeats, rng, is_busy, on_pair) if aa else Pairs()
    real = _run_pairs(a, b, pairs, repeats, rng, is_busy, on_pair)
    stages = list(dict.fromkeys([*real.a, *real.b]))
    rows = [_row(stage, real, null, seed) for stage in stages]
    return rows, {"pairs": real.kept, "discarded": real.discarded, "noisy": real.noisy, "repeats": repeats}


def busy_machine(load: float, steal: float) -> bool:
    """Whether a pair timed under this load average per core and share of stolen time is to be dropped."""
    return load > BUSIEST_LOAD or steal > SLOWEST_STEAL


def _row(stage: str, real: Pairs, null: Pairs, seed: int) -> Row:
    a, b = real.a.get(stage, [0.0]), real.b.get(stage, [0.0])
    ratio, itself = real.ratio(stage, seed), null.ratio(stage, seed)
    beyond = False
    if ratio:
        half = (itself.high - itself.low) / 2 if itself else 0.0
        beyond = (ratio.low > 1 or ratio.high < 1) and abs(ratio.value - 1) > 2 * half
    return Row(
        stage=stage,
        a_ms=float(np.median(a)),
        b_ms=float(np.median(b)),
        ratio=ratio and ratio.value,
        low=ratio and ratio.low,
        high=ratio and ratio.high,
        minima_ratio=min(a) / min(b) if ratio else None,
        p=sign_test(sum(x < y for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))) if ratio else None,
        aa_low=itself and itself.low,
        aa_high=itself and itself.high,
        real=beyond,
    )


def _repeats(timed: Timed, min_seconds: float) -> int:
    if min_seconds <= 0:
        return 1
    start = time.perf_counter()
    timed(0)
    return max(1, math.ceil(min_seconds / max(1e-6, time.perf_counter() - start)))


def _run_pairs(
    a: Timed,
    b: Timed,
    pairs: int,
    repeats: int,
    rng: random.Random,
    is_busy: Callable[[float, float], bool],
    on_pair: Callable[[], None] | None,
) -> Pairs:
    kept: list[tuple[dict[str, float], dict[str, float]]] = []
    dropped: list[tuple[dict[str, float], dict[str, float]]] = []
    inputs = 0
    with _quiet_collector():
        while len(kept) < pairs and len(kept) + len(dropped) < 2 * pairs:
            before = ticks()
            if rng.random() < 0.5:
                times_a = _timed(a, inputs, repeats)
                times_b = _timed(b, inputs, repeats)
            else:
                times_b = _timed(b, inputs, repeats)
                times_a = _timed(a, inputs, repeats)
            inputs += repeats
            busy = is_busy(load_average(), stolen(before, ticks()))
            (dropped if busy else kept).append((times_a, times_b))
            if on_pair:
                on_pair()
            if len(dropped) >= pairs and len(kept) < max(1, pairs // 2):
                break  # never quiet: more of the same would not help
    noisy = len(kept) < max(1, pairs // 2)
    used = kept + dropped if noisy else kept
    result = Pairs(kept=len(used), discarded=0 if noisy else len(dropped), noisy=noisy)
    for side, index in ((result.a, 0), (result.b, 1)):
        for stage in dict.fromkeys(name for pair in used for name in pair[index]):
            side[stage] = [pair[index].get(stage, 0.0) for pair in used]
    return result


def _timed(run: Timed, first: int, repeats: int) -> dict[str, float]:
    """Mean milliseconds by stage over `repeats` fresh inputs."""
    total: dict[str, float] = {}
    for i in range(first, first + repeats):
        for stage, spent in run(i).items():
            total[stage] = total.get(stage, 0.0) + spent
    return {stage: spent / repeats for stage, spent in total.items()}


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def ticks() -> tuple[int, int]:
    """(stolen, total) processor ticks since boot; zeros where /proc is missing."""
    try:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return fields[7] if len(fields) > 7 else 0, sum(fields)


def stolen(before: tuple[int, int], after: tuple[int, int]) -> float:
    spent = after[1] - before[1]
    return (after[0] - before[0]) / spent if spent > 0 else 0.0
