"""`schedule`: a keep rate for every layer of the language model, by a sigmoid of depth or as a search found it.

Source: "Accelerating multimodal large language models by searching optimal vision token reduction" (G-Search and
P-Sigmoid), CVPR 2025, arXiv 2412.00556. There is no public code, and the paper's text was not at hand: what is said
here beyond its abstract is a reconstruction. Visual tokens are ranked, in every layer, by the attention that the text
after the picture pays them, mean over heads and words, and the best of those still there stay; since the ranking hardly
changes with depth, the number that is needed never grows. Positions are kept.

`g_search` finds the fewest tokens for each layer, from the first on, with which quality on calibration samples does not
fall below a target (bisection, as quality is taken to rise with the number). `p_sigmoid` gives the curve for a budget:
1 / (1 + exp(steepness * (depth - shift))), the shift solved so that the mean over the layers is `keep`; `steepest`
tries steepnesses on calibration samples and returns the best one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Reducer, Reduction, Step, top_k

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape
    from foveate.vlm import VLM, Request


@dataclass(frozen=True)
class Schedule(Reducer):
    """A curve over depth.

    keep: the mean over all layers, as a fraction of the tokens that enter, or as a number. The first layer always sees
    all of them, so the least possible mean is one layer's share. steepness: of the sigmoid over the whole depth. rates:
    fractions at equal depths from the first layer on, never rising, instead of the sigmoid; `keep` says nothing then.
    """

    steepness: float = 8.0
    rates: tuple[float, ...] | None = None

    name: ClassVar[str] = "schedule"
    sites: ClassVar[tuple[str, ...]] = ("llm",)
    signals: ClassVar[tuple[str, ...]] = ("mean_text_attention", "entered")
    scope: ClassVar[str] = "request"
    position: ClassVar[str] = "keep"
    status: ClassVar[str] = "experimental"
    summary: ClassVar[str] = "a keep rate for every layer, by a sigmoid of depth or as a search found it"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steepness <= 0:
            raise RecipeError(f"{self.name}: steepness is {self.steepness}; it must be above 0")
        if self.rates is not None and not (self.rates and all(a >= b for a, b in pairwise((1.0, *self.rates, 0.0)))):
            raise RecipeError(f"{self.name}: rates is {list(self.rates)}; give fractions from 1 down, never rising")

    def counts(self, total: int, layers: int) -> Sequence[int]:
        """Tokens that each layer sees of `total` that entered; the first sees all."""
        if self.rates is not None:
            rates = [self.rates[index * len(self.rates) // layers] for index in range(1, layers)]
            return [total, *(max(1, int(total * rate + 0.5)) for rate in rates)]
        keep = min(1.0, self.keep / max(total, 1)) if isinstance(self.keep, int) else self.keep
        return sigmoid_counts(total, layers, keep, self.steepness)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout, layer: int = 1, layers: int = 2) -> Reduction:
        """The tokens that layer `layer` sees."""
        count = min(len(layout), self.counts(int(signals["entered"]), layers)[layer])
        if count == len(layout):  # no row of attention is made for nothing
            return Reduction(torch.arange(count))
        return Reduction(top_k(signals["mean_text_attention"].mean(dim=0), count))

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        return tuple(self._at(layer, shape.layers) for layer in range(1, shape.layers))

    def _at(self, layer: int, layers: int) -> Step:
        def count(n: int, total: int) -> int:
            return min(n, self.counts(total, layers)[layer])

        return self.step("llm", partial(self.select, layer=layer, layers=layers), layer=layer, count=count)


@cache  # each layer asks for its own number
def sigmoid_counts(total: int, layers: int, keep: float, steepness: float) -> tuple[int, ...]:
    """Tokens of each layer under a sigmoid whose mean over the layers is `keep` of `total`, within one token.

    The first layer sees all, every other one at least one token. A mean that this makes impossible comes out as the
    nearest possible one.
    """
    if keep >= 1:
        return (total,) * layers

    def at(shift: float) -> list[float]:
        return [1.0, *(p_sigmoid(layer / layers, shift, steepness) for layer in range(1, layers))]

    low, high = -40.0 / steepness, 1 + 40.0 / steepness
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < keep * layers else (low, middle)
    return (total, *(max(1, int(rate * total + 0.5)) for rate in at(high)[1:]))


def p_sigmoid(depth: float, shift: float, steepness: float) -> float:
    """The keep rate at a depth in 0 .. 1."""
    return 1 / (1 + math.exp(min(700.0, steepness * (depth - shift))))


def g_search(quality: Callable[[Sequence[int]], float], layers: int, total: int, target: float) -> list[int]:
    """The fewest tokens of each layer with which `quality(counts)` stays at or above `target`, greedily from the first.

    While a layer is searched, the deeper ones have its number. quality must not fall when a number grows; it is called
    about layers * log2(total) times. The first layer sees all `total`. Returns `layers` counts, never rising.
    """
    counts = [total]
    for _ in range(1, layers):
        low, high = 0, counts[-1]  # quality holds at high
        while low < high:
            middle = (low + high) // 2
            trial = [*counts, *[middle] * (layers - len(counts))]
            low, high = (low, middle) if quality(trial) >= target else (middle + 1, high)
        counts.append(high)
    return counts


def steepest(
    quality: Callable[[Schedule], float], keep: float | int, tries: int = 12, least: float = 1.0, most: float = 64.0
) -> Schedule:
    """The sigmoid of budget `keep` whose steepness answers best; `tries` calls of quality, steepnesses between `least`
    and `most` on a logarithmic scale, coarse first and then around the best. Ties: the gentler curve."""
    coarse = max(3, tries * 2 // 3)
    grid = [least * (most / least) ** (i / (coarse - 1)) for i in range(coarse)]
    scored = [(quality(Schedule(keep=keep, steepness=s)), -s) for s in grid]
    width = (most / least) ** (1 / (coarse - 1))
    around = -max(scored)[1]
    for step in range(tries - coarse):
        width = width**0.5 if step % 2 == 0 else width
        value = min(most, max(least, around * (width if step % 2 == 0 else 1 / width)))
        scored.append((quality(Schedule(keep=keep, steepness=value)), -value))
        around = -max(scored)[1]
    return Schedule(keep=keep, steepness=-max(scored)[1])


def as_schedule(counts: Sequence[int]) -> Schedule:
    """The schedule of counts that `g_search` found; on requests with other numbers of tokens the fractions hold."""
    total = max(counts[0], 1)
    return Schedule(keep=1.0, rates=tuple(count / total for count in counts))


def quality_on(
    vlm: VLM, requests: Sequence[Request], accepted: Sequence[Sequence[str]], max_new_tokens: int = 32
) -> Callable[[Schedule], float]:
    """A quality for `g_search` (on `as_schedule(counts)`) and `steepest`: the share of requests that are answered with
    an accepted answer, letters' case and outer blanks aside."""
    wanted = [{answer.strip().lower() for answer in answers} for answers in accepted]

    def quality(schedule: Schedule) -> float:
        asked = [replace(request, reduce=schedule) for request in requests]
        found = vlm.answer(asked, max_new_tokens)
        return sum(a.text.strip().lower() in own for a, own in zip(found, wanted)) / max(len(wanted), 1)

    return quality
