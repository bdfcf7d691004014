"""From how many visual tokens on a recipe pays: measured at a few sizes of input, the crossing in between.

What a recipe saves grows with the tokens of a request, what choosing costs hardly does; below some number of visual
tokens x requests in a batch it does not pay. Requests of growing size are timed against dense ones, halving the
interval in which the ratio crosses 1, and the crossing is put between the two nearest sizes, straight in the logarithm
of the tokens. Only stages that the recipe can change count: select and prefill, and the tower where tokens leave there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from foveate.bench.requests import Load, timed_request
from foveate.bench.timing import compare

if TYPE_CHECKING:
    from foveate.recipe import Recipe
    from foveate.vlm import VLM

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Sides of the pictures that are tried, as shares of the given ones, and frames of clips likewise."""


@dataclass(frozen=True)
class Point:
    """One size: visual tokens x batch, and time with the recipe / time without, with its 95 % interval."""

    tokens: int
    ratio: float
    low: float
    high: float


def crossing(points: Sequence[Point]) -> dict[str, Any]:
    """{"tokens", "low", "high", "points", "text"}: where the ratio of growing sizes crosses 1, with an interval.

    tokens: None where it does not cross among the sizes that were measured. low, high: where the interval's lower and
    upper ends do; None where that end does not cross.
    """
    points = sorted(points, key=lambda point: point.tokens)
    least, most = points[0], points[-1]
    found = _cross([(point.tokens, point.ratio) for point in points])
    if found is not None:
        text = f"pays from about {found:.0f} visual tokens x batch on"
    elif most.ratio < 1:
        text = f"pays at every size measured, the smallest has {least.tokens} visual tokens x batch"
    else:
        text = f"does not pay up to {most.tokens} visual tokens x batch, the largest size measured"
    return {
        "tokens": found,
        "low": _cross([(point.tokens, point.low) for point in points]),
        "high": _cross([(point.tokens, point.high) for point in points]),
        "text": text,
        "points": [{name: round(value, 4) for name, value in vars(point).items()} for point in points],
    }


def _cross(values: Sequence[tuple[int, float]]) -> float | None:
    """Where values that fall with growing tokens come below 1 for good; None where they begin below or end above."""
    last = max((i for i, (_, ratio) in enumerate(values) if ratio >= 1), default=-1)
    if last in (-1, len(values) - 1):
        return None
    (x0, y0), (x1, y1) = values[last], values[last + 1]
    part = (y0 - 1) / (y0 - y1)
    return round(math.exp(math.log(x0) + part * (math.log(x1) - math.log(x0))), 1)


def search(sizes: int, measure: Callable[[int], Point]) -> list[Point]:
    """The points that tell where the ratio of sizes 0 .. sizes - 1, ascending, crosses 1, by halving."""
    known = {index: measure(index) for index in sorted({0, sizes - 1})}
    low, high = 0, sizes - 1
    if known[low].ratio >= 1 > known[high].ratio:
        while high - low > 1:
            middle = (low + high) // 2
            known[middle] = measure(middle)
            low, high = (middle, high) if known[middle].ratio >= 1 else (low, middle)
    return list(known.values())


def ladder(vlm: VLM, load: Load) -> list[tuple[int, Load]]:
    """(visual tokens x batch, load) of growing size, up to the given one; sizes of equally many tokens once."""
    found: dict[int, Load] = {}
    for share in SHARES:
        if load.frames is None:
            width, height = (max(16, round(side * share)) for side in load.size)
            smaller = replace(load, size=(width, height))
        else:
            smaller = replace(load, frames=max(1, round(load.frames * share)))
        found.setdefault(visual_tokens(vlm, smaller) * load.batch, smaller)
    if load.batch > 1:
        least = min(found)
        found.setdefault(least // load.batch, replace(found[least], batch=1))
    return sorted(found.items(), key=lambda item: item[0])


def visual_tokens(vlm: VLM, load: Load) -> int:
    """Visual tokens of one request, before any recipe."""
    from foveate.data.sample import media_parts

    content = [*media_parts(load.media(0)[:1]), {"type": "text", "text": load.prompt}]
    plan = vlm.plan([{"role": "user", "content": content}], num_frames=load.frames)
    return len(vlm.adapter.layout(plan).features())


def break_even(
    vlm: VLM,
    recipe: Recipe,
    load: Load,
    *,
    pairs: int = 10,
    seed: int = 0,
    min_seconds: float = 0.3,
    on_pair: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """`crossing` of a recipe on a model for requests up to `load`. Raises RecipeError, BudgetError."""
    from foveate.adapters.shape import steps_of

    small = recipe.apply(vlm, quiet=True)
    inside = any(step.site == "encoder" for step in steps_of(small.reducers(), vlm.adapter.shape))
    changed = ("tower", "select", "prefill") if inside else ("select", "prefill")

    def only(run: Callable[[int], dict[str, float]]) -> Callable[[int], dict[str, float]]:
        def timed(index: int) -> dict[str, float]:
            ms = run(index)
            return {"changed": sum(ms[stage] for stage in changed)}

        return timed

    sizes = ladder(vlm, load)

    def measure(index: int) -> Point:
        tokens, one = sizes[index]
        sides = [only(timed_request(side, replace(one, new_tokens=1), seed)[0]) for side in (small, vlm)]
        rows, _ = compare(*sides, pairs=pairs, warmup=1, min_seconds=min_seconds, seed=seed, aa=False, on_pair=on_pair)
        (row,) = rows
        return Point(tokens, row.ratio or 1.0, row.low or 1.0, row.high or 1.0)

    return {**crossing(search(len(sizes), measure)), "stages": list(changed), "pairs": pairs}
