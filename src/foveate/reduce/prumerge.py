"""`prumerge`: tokens whose attention stands out, each enriched by its nearest neighbours, and one for all the others.

Source: LLaVA-PruMerge, arXiv 2403.15388 (ICCV 2025; code read: 42Shawn/LLaVA-PruMerge @ 097c041). The attention of CLS
is taken over whole keys, without heads. Selected tokens come in order of attention; to each the 32 tokens with the most
similar keys are added, weighted by their attention; a last token sums up what was not selected. `plus` adds tokens at
equal steps; `adaptive` sets the number by the outliers of the attention (above Q3 + 1.5 IQR). Renumbered.

Where paper and code differ: the paper merges pruned tokens by a weighted average; the code adds, without dividing, and
lets selected tokens be neighbours too. `strict="paper"` takes pruned neighbours only and divides by the weights' sum.

Departures: the layer that feeds the connector instead of the last one; steps follow the number of tokens (575 in the
code); in the method (not in `selected`) no token is selected twice. A tower without CLS scores by received attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from foveate.reduce.base import Reducer, Reduction, evenly
from foveate.reduce.grid import blocks
from foveate.reduce.merge import Part, reduction
from foveate.reduce.select import cosines, rest, strongest
from foveate.reduce.signals import given, head_mean, per_view

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout

NEIGHBOURS = 32


@dataclass(frozen=True)
class PruMerge(Reducer):
    """Tokens of each view with outstanding attention, neighbours merged in; `keep` counts the token of the rest too.

    plus: a half of the selected tokens at equal steps instead. adaptive: only outliers are selected, `keep` at most.
    strict: neighbours are pruned tokens, and averaged (paper), or any tokens, and added (code).
    """

    plus: bool = False
    adaptive: bool = False
    strict: Literal["paper", "code"] = "code"

    name: ClassVar[str] = "prumerge"
    sites: ClassVar[tuple[str, ...]] = ("post_encoder", "post_projector")
    signals: ClassVar[tuple[str, ...]] = (
        "cls_query@-1|received_attention@-1|received_attention",
        "cls_key@-1|received_attention@-1|received_attention",
        "keys@-1|features",
    )
    scope: ClassVar[str] = "view"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "tokens whose attention stands out, with their neighbours merged in, and one for the rest"

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the number of tokens is known before the picture is seen."""
        return not self.adaptive

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        keys, views = given(signals, self.signals[2]), layout.groups("view")
        if "cls_query@-1" in signals:
            queries, of_cls = (per_view(signals[f"cls_{name}@-1"], layout) for name in ("query", "key"))
            scores = [
                cls_attention(query, torch.cat([key[None], keys[view]]))
                for query, key, view in zip(queries, of_cls, views)
            ]
        else:
            received = head_mean(signals, self.signals[0])
            scores = [received[view] for view in views]
        return reduction([self._part(view, score, keys[view]) for view, score in zip(views, scores)], blocks(layout))

    def _part(self, view: Tensor, attention: Tensor, keys: Tensor) -> Part:
        n, count = len(view), self.count(len(view))
        if count == n:
            return Part(view, torch.arange(n))
        if self.adaptive:
            count = min(count, 1 + max(1, int(n * outlier_ratio(attention))))
        wanted = max(count - 1, 1)
        order = strongest(attention, n)
        chosen = order[: wanted - wanted // 2] if self.plus else order[:wanted]
        if self.plus:
            spread = evenly(wanted, n)
            spread = spread[~torch.isin(spread, chosen)]  # at least the other half, wherever the chosen ones are
            chosen = torch.cat([chosen, spread[evenly(wanted // 2, len(spread))]])
        weights = merged(attention, keys, chosen, paper=self.strict == "paper")
        keep = torch.cat([chosen, order[~torch.isin(order, chosen)][:1]])  # the rest stands at its strongest
        return Part(view, keep[:count], weights[:count], late=None)


def cls_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention [N] of CLS to the patches over whole, unsplit keys. query: [C]; keys: [1 + N, C], CLS first."""
    return (keys @ query * keys.shape[-1] ** -0.5).softmax(dim=0)[1:].cpu()


def outlier_ratio(attention: Tensor) -> float:
    """The fraction of [N] values above the third quartile plus 1.5 times the distance between first and third."""
    values = attention.numpy()
    low, high = np.percentile(values, [25, 75])
    return float((values > high + 1.5 * (high - low)).sum()) / values.size


def selected(attention: Tensor, ratio: float, plus: bool = False, adaptive: bool = False) -> Tensor:
    """The released code's selection from [N] attention: int(N * ratio) by attention, largest first, then `plus` steps.

    plus and adaptive: every int(int(1 / ratio) / 3)-th place that is not selected yet. plus alone: as many again at
    equal steps, whether selected already or not, so that places may repeat.
    """
    n = len(attention)
    count = int(n * ratio)
    chosen = strongest(attention, count)
    if not plus or not count:
        return chosen
    step = int(1 / ratio)
    if adaptive:
        more = torch.arange(0, n - 1, max(step // 3, 1))
        return torch.cat([chosen, more[~torch.isin(more, chosen)]])
    return torch.cat([chosen, torch.arange(step // 2, n - 1, step)])[: 2 * count]


def merged(attention: Tensor, keys: Tensor, chosen: Tensor, paper: bool = False) -> Tensor:
    """Weights [S + 1, N] of S selected tokens with their neighbours, and of the token that sums up the others.

    attention: [N]; keys: [N, C]; chosen: [S], places may repeat. Code: neighbours come from all other tokens, weights
    are 1 and raw attention. paper: from the tokens that are not selected, and rows are divided by their sum. As in
    the code, each repetition in `chosen` costs the lowest of the other places: it is nobody's neighbour and not summed.
    """
    n, count = len(attention), len(chosen)
    others = rest(n, chosen)[count - len(chosen.unique()) :]
    candidates = others if paper else torch.cat([chosen, others])
    likeness = cosines(keys[chosen], keys[candidates])
    if not paper:
        likeness[torch.arange(count), torch.arange(count)] = -torch.inf
    near = likeness.topk(max(0, min(NEIGHBOURS, len(candidates) - (not paper))), dim=1).indices
    weights = torch.zeros(count + 1, n)
    weights[:count].scatter_add_(1, candidates[near], attention[candidates[near]])
    weights[torch.arange(count), chosen] += 1
    weights[count, others] = attention[others]
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12) if paper else weights
