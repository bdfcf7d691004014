"""`framefusion`: inside the language model, tokens join the same place of the frame before; then attention prunes once.

Source: FrameFusion, arXiv 2501.01986 (ICCV 2025; code read: thu-nics/FrameFusion @ fbec1d2). Tokens are compared
(cosine of hidden states) with the one before them at the same place; those above `similarity` merge into runs, layer by
layer, until less than `least` of them do; then the tokens that the last prompt token attends to least are dropped so
that the cost, tokens summed over layers, comes out at `keep` of the dense one. Positions are kept.

Departures: the code counts 28 layers whatever the model; here it is the model's depth. It merges between attention and
MLP of a layer; here tokens leave at the input of the next one. A model so shallow that the budget is spent before the
prune keeps one token. A view of a picture has no frame before, so pictures are pruned by attention alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.errors import BudgetError, RecipeError
from foveate.reduce.base import Reducer, Reduction, Select, Step, top_k
from foveate.reduce.frames import clips
from foveate.reduce.merge import membership
from foveate.reduce.select import strongest, unit

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape


@dataclass(frozen=True)
class Progress:
    """How far a request is: fractions merged at the calls so far, and whether merging and pruning are over."""

    merged: tuple[float, ...] = ()
    merging_done: bool = False
    pruning_done: bool = False


@dataclass(frozen=True)
class FrameFusion(Reducer):
    """Runs of alike tokens in time merged, then the least attended dropped; `keep` of the tokens of all layers.

    similarity: cosine from which a token joins the one before it. least: fraction of merges at which merging ends.
    """

    similarity: float = 0.6
    least: float = 0.1

    name: ClassVar[str] = "framefusion"
    sites: ClassVar[tuple[str, ...]] = ("post_projector", "llm")
    signals: ClassVar[tuple[str, ...]] = ("features", "hidden", "last_attention")
    scope: ClassVar[str] = "request"
    position: ClassVar[str] = "keep"
    exact: ClassVar[bool] = False
    summary: ClassVar[str] = (
        "tokens of a clip join the same place of the frame before while alike, then attention prunes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, int):
            raise RecipeError(f"{self.name}: keep is {self.keep}; it is a fraction of the cost, such as 0.3")
        if not 0 <= self.least <= 1 or not -1 <= self.similarity <= 1:
            raise RecipeError(f"{self.name}: similarity is {self.similarity} (-1 to 1) and least {self.least} (0 to 1)")

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        progress = [Progress()]  # of this request

        def act(states: str) -> Select:
            def select(signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
                return self._act(signals, states, layout, progress, shape.layers)

            return select

        first = self.step("post_projector", act("features"), signals=("features",))
        everything = [
            self.step("llm", act("hidden"), layer=layer, signals=("hidden", "last_attention"), count=lambda n, total: n)
            for layer in range(1, shape.layers)
        ]
        return (first, *everything)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        """The first merging call alone."""
        return self._act(signals, "features", layout, [Progress()], 1)

    def _act(
        self, signals: dict[str, Tensor], states: str, layout: VisualLayout, progress: list[Progress], layers: int
    ) -> Reduction:
        """The call that is due at this layer; `progress` is brought up to date."""
        now = progress[0]
        if now.pruning_done:
            return Reduction(torch.arange(len(layout)))
        place = torch.empty(len(layout), dtype=torch.int64)
        offset = 0
        for table in clips(layout):
            columns = torch.arange(table.shape[1]).expand_as(table) + offset
            place[table[table >= 0]] = columns[table >= 0]
            offset += table.shape[1]
        # never less than what the layers so far have cost, and one token in the others
        spent = sum(accumulate((1 - fraction for fraction in now.merged), mul))
        cost = max(float(self.keep), spent / layers)
        if now.merging_done:
            kept, progress[0] = prune_call(signals["last_attention"], place, now, cost, layers)
            return Reduction(kept if len(kept) else signals["last_attention"].mean(dim=0).cpu().argmax()[None])
        kept, weights, progress[0] = merge_call(signals[states], place, now, cost, layers, self.similarity, self.least)
        return Reduction(kept, weights)


def remaining(merged: tuple[float, ...] | list[float], cost: float, layers: int) -> float:
    """The fraction of the tokens that must go now for all layers together to cost `cost` of the dense ones, at least 0.

    merged: fractions that went at the calls so far, one a layer. Raises BudgetError when those layers alone cost more.
    """
    used, left = 0.0, 1.0
    for fraction in merged:
        left *= 1 - fraction
        used += left
    budget = layers * cost - used
    if budget < -1e-9:
        raise BudgetError(f"framefusion: {len(merged)} of {layers} layers already cost more than {cost} of all")
    return max(1 - budget / ((layers - len(merged)) * left), 0.0)


def column_likeness(hidden: Tensor, place: Tensor) -> Tensor:
    """Cosine [N] of each token to the one before it at the same place of its frame; -2 for the first of a place.

    hidden: [N, D] in sequence order; place: [N] place in the frame, -1 and below for what takes no part.
    """
    order = place.argsort(stable=True)
    u = unit(hidden)[order]
    same = torch.full((len(place),), -2.0)
    follows = (place[order][1:] == place[order][:-1]) & (place[order][1:] >= 0)
    same[order[1:][follows]] = (u[1:] * u[:-1]).sum(dim=-1).cpu()[follows]
    return same


def fused(place: Tensor, joins: Tensor) -> tuple[Tensor, Tensor]:
    """Merges runs: what stays [K] ascending, and the slot [N] of every token among them.

    joins: [N] bool, tokens that join the one before them at their place; a run of them joins its head.
    """
    order = place.argsort(stable=True)
    heads = ~joins[order]
    head = order[heads.nonzero().flatten()][heads.long().cumsum(0) - 1]  # of each token in column order
    target = torch.empty_like(order)
    target[order] = head
    kept = (~joins).nonzero().flatten()
    rank = torch.full_like(order, -1)
    rank[kept] = torch.arange(len(kept))
    return kept, rank[target]


def merge_call(
    hidden: Tensor, place: Tensor, progress: Progress, cost: float, layers: int, similarity: float, least: float
) -> tuple[Tensor, Tensor | None, Progress]:
    """One merging call: what stays [K] ascending, weights [K, N] (None: nothing merged), and the progress after it.

    Tokens with place < 0 stay. When more would merge than the budget asks for, only the most alike do and all is done;
    when less than `least` merge, merging is over and the next layer prunes.
    """
    visual = int((place >= 0).sum())
    wanted = remaining(progress.merged, cost, layers)
    same = column_likeness(hidden, place)
    joins = same >= similarity
    fraction = int(joins.sum()) / max(visual, 1)
    if fraction < wanted:
        progress = Progress((*progress.merged, fraction), fraction < least, False)
    else:
        joins = torch.zeros_like(joins)
        joins[strongest(same, int(wanted * visual))] = True
        progress = Progress(progress.merged, True, True)
    if not bool(joins.any()):
        return torch.arange(len(place)), None, progress
    kept, slot = fused(place, joins)
    return kept, membership(slot, len(kept)), progress


def prune_call(
    attention: Tensor, place: Tensor, progress: Progress, cost: float, layers: int
) -> tuple[Tensor, Progress]:
    """The pruning call: what stays [K] ascending, text included. attention: [H, N] of the last prompt token."""
    visual = (place >= 0).nonzero().flatten()
    count = round(len(visual) * (1 - remaining(progress.merged, cost, layers)))
    best = visual[top_k(attention.mean(dim=0).cpu()[visual], count)]
    kept = torch.cat([(place < 0).nonzero().flatten(), best]).sort().values
    return kept, Progress(progress.merged, True, True)
