"""`sparsevlm`: the words that look at the picture rate the visual tokens, in three stages of the language model.

Source: SparseVLM, ICML 2025, arXiv 2410.04417 (code read: Gumpest/SparseVLMs @ 26a5f48). Text tokens after the picture
whose embeddings are most like the visual ones (softmax over the text, mean over the picture, above the mean) are the
raters. After each of three layers the tokens with the largest attention from the raters stay. Version 1 takes the best
30 % of what was dropped, clusters it and appends a mean for each cluster, and renumbers; version 2 ("SparseVLM+") drops
only, keeps positions, looks at the heads that pay the picture most attention, and divides attention by what the rotary
embedding alone would give.

The paper chooses how many to drop by the rank of the attention matrix; the released code has tables of counts for 576
tokens and the budgets 192, 128, 96 and 64 (mean over the layers), and so has this. Between the budgets, and for other
numbers of tokens, the tables are interpolated and scaled. Departures: clusters break ties by the earlier token, where
the code adds noise below 1e-6; a model with three positions a token (M-RoPE) keeps the original ones.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Reducer, Reduction, Step, distinct, layer_index, top_k
from foveate.reduce.cluster import density_peaks
from foveate.reduce.merge import membership, one_hot
from foveate.reduce.select import rest, strongest

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape

TOKENS = 576
"""Visual tokens of the published tables."""
TABLES: dict[str, dict[int, tuple[int, ...]]] = {
    "v1": {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    "v2": {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}
"""Tokens that stay after each stage, by the mean over the layers of LLaVA-1.5."""
RECYCLED, PER_CLUSTER = 0.3, 10


@dataclass(frozen=True)
class SparseVLM(Reducer):
    """Three stages rated by the text.

    keep: the mean over the layers of LLaVA-1.5 that the published tables are named after, as a fraction of the visual
    tokens or as a number; 1.0 keeps all. version: v1 appends means of what it dropped and renumbers, v2 drops only and
    keeps positions. layers: the first that see fewer tokens, one for each stage; the paper's are 3, 7 and 16 of 32.
    heads, prior: of version 2 only; how many heads are looked at, and whether attention is divided by the rotary
    embedding's own part.
    """

    version: Literal["v1", "v2"] = "v1"
    layers: tuple[float | int, ...] = (3 / 32, 7 / 32, 16 / 32)
    heads: int = 14
    prior: bool = True

    name: ClassVar[str] = "sparsevlm"
    sites: ClassVar[tuple[str, ...]] = ("llm",)
    signals: ClassVar[tuple[str, ...]] = ("text_attention", "text_input", "visual_input", "hidden", "entered")
    scope: ClassVar[str] = "request"
    summary: ClassVar[str] = "the words that look at the picture rate its tokens, in three stages"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != 3:
            raise RecipeError(f"{self.name}: layers is {list(self.layers)}; the published tables have three stages")

    def target(self, stage: int, total: int) -> int:
        """Tokens that stay after a stage, before clusters are added, of those `total` that entered."""
        budget = TOKENS * (self.keep / total if isinstance(self.keep, int) else self.keep)
        return max(1, int(interpolated(TABLES[self.version], budget)[stage] * total / TOKENS + 0.5))

    def left(self, stage: int, n: int, total: int) -> int:
        """Tokens after a stage that `n` of `total` tokens reach, clusters included."""
        count = self.target(stage, total)
        if count >= n:
            return n
        return count + (clusters_of(n - count) if self.version == "v1" else 0)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout, stage: int = -1) -> Reduction:
        count = self.target(stage, int(signals["entered"]))
        n = len(layout)
        if count >= n:
            return Reduction(torch.arange(n))
        raters = text_raters(signals["visual_input"], signals["text_input"])
        attention = signals["text_attention"][:, raters]
        if self.version == "v2":
            attention = attention / signals["text_prior"][raters] if self.prior else attention
            attention = attention[strongest_heads(attention, self.heads)]
        score = attention.mean(dim=(0, 1)).cpu()
        kept = top_k(score, count)
        if self.version == "v2":
            return Reduction(kept)
        order = recycled(score, kept)
        centres, weights = clustered(signals["hidden"].cpu(), order)
        return Reduction(torch.cat([kept, centres]), torch.cat([one_hot(kept, n), weights]))

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        return distinct([self._stage(shape, stage) for stage in range(len(self.layers))])

    def _stage(self, shape: Shape, stage: int) -> Step:
        layer = layer_index(self.layers[stage], shape.layers, self.name, "layers")

        def count(n: int, total: int) -> int:
            return self.left(stage, n, total)

        second = self.version == "v2"
        return self.step(
            "llm",
            partial(self.select, stage=stage),
            layer=layer,
            count=count,
            position="keep" if second else "renumber",
            signals=(*self.signals, "text_prior") if second else self.signals,
        )


def interpolated(table: dict[int, tuple[int, ...]], budget: float) -> list[float]:
    """Counts after each stage for a budget between published ones; below the least they shrink in proportion."""
    known = {**table, TOKENS: (TOKENS,) * 3}
    names = sorted(known)
    if budget <= names[0]:
        return [count * budget / names[0] for count in known[names[0]]]
    upper = min(bisect_left(names, budget), len(names) - 1)
    low, high = names[upper - 1], names[upper]
    part = min(1.0, (budget - low) / (high - low))
    return [a + (b - a) * part for a, b in zip(known[low], known[high])]


def text_raters(visual: Tensor, text: Tensor) -> Tensor:
    """Indices of the text tokens that are most like the picture, above the mean; where all are equally alike, of all.

    visual: [N, D]; text: [Q, D] embeddings.
    """
    weight = (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)
    raters = (weight > weight.mean()).nonzero().flatten()
    return raters if len(raters) else torch.arange(len(weight), device=weight.device)


def strongest_heads(attention: Tensor, count: int) -> Tensor:
    """Indices of the `count` heads that pay the picture most attention, strongest first. attention: [H, R, N]."""
    return strongest(attention.sum(dim=(1, 2)), min(count, len(attention)))


def clusters_of(dropped: int) -> int:
    """Merged tokens that come out of so many dropped ones."""
    return (int(RECYCLED * dropped) + 1) // PER_CLUSTER + 1


def recycled(score: Tensor, kept: Tensor) -> Tensor:
    """Dropped tokens that are merged, best first. score: [N]; kept: what stays as it is."""
    dropped = rest(len(score), kept)
    return dropped[strongest(score[dropped], int(RECYCLED * len(dropped)) + 1)]


def clustered(hidden: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [c] among N tokens, the most central first, and weights [c, N] of their clusters' means.

    hidden: [N, D]; order: the tokens to be merged. A token's density is taken over as many neighbours as clusters.
    """
    count = len(order) // PER_CLUSTER + 1
    centres, member = density_peaks(hidden[order], count, count)
    weights = torch.zeros(len(centres), len(hidden))
    weights[:, order] = membership(member, len(centres)).to_dense()
    return order[centres], weights
