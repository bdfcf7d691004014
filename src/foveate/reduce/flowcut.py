"""`flowcut`: tokens leave the encoder every second block, by what has flowed between them and CLS so far.

Source: FlowCut, arXiv 2505.19536 (NeurIPS 2025; code read: TungChintao/FlowCut @ a2ecd24). In each block a patch scores
(c + e) * z: c its share of the attention of CLS, e its share of the softmax over tokens of v_cls . v, z the L1 norm of
its value (attention and value mean over heads); the cumulative score is half the earlier one and half the new one.
How many leave a block follows from the target and from how even c is: even attention, few.

Departures: each view follows its own entropy (the code takes the batch's largest count). On a tower without CLS, and
where no token may leave the encoder, the cumulative score of the last four used blocks is taken at the end and tokens
leave once. Where CLS is missing, the attention of the mean query takes the place of c + e, as in the code's form for
Qwen; it is that of one view (with Qwen of one picture or clip), whatever else passes the encoder beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Reduction, Scorer, Select, Step, in_order, layer_index, top_k
from foveate.reduce.signals import given, per_view, split_heads

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape

LAST = 4
"""Blocks whose scores count at the end: the weight of anything earlier is 1/16 in all."""


def needs(block: int) -> tuple[str, str, str]:
    """What is asked of one block: attention of CLS (or of the mean query), its value, and the values of the patches."""
    return (
        f"cls_attention@{block}|mean_query_attention@{block}",
        f"cls_value@{block}|mean_query_attention@{block}",
        f"values@{block}",
    )


@dataclass(frozen=True)
class FlowCut(Scorer):
    """Top tokens of each view by cumulative score over the encoder's blocks.

    inner, layer: fraction of what entered the language model that a second choice inside it leaves, by the last prompt
    token, and the layer before which it happens (an index, or a fraction of the depth). The authors use it for tiled
    pictures. How many patches leave the encoder early hangs on their attention; `count` expects an even one, with which
    all leave in the last block that may.
    """

    inner: float = 1.0
    layer: float | int = 2 / 32

    name: ClassVar[str] = "flowcut"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "post_encoder", "post_projector")
    signals: ClassVar[tuple[str, ...]] = needs(-1)  # and those of the blocks before: `steps`
    scope: ClassVar[str] = "view"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "tokens through which most information has flowed over the blocks of the encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.inner <= 1:
            raise RecipeError(f"{self.name}: inner is {self.inner}; a kept fraction lies above 0 and at most at 1")

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        outer = self._in_encoder(shape) if "encoder" in shape.sites and shape.cls else self._after_encoder(shape)
        if self.inner == 1:
            return outer
        inside = self.step(
            "llm",
            self.select_inside,
            layer=layer_index(self.layer, shape.layers, self.name),
            signals=("last_attention", "last_value_attention", "values"),
            scope="request",
            newline="keep",
            count=lambda n, total: self.count_inside(n),
        )
        return (*outer, inside)

    def _after_encoder(self, shape: Shape) -> tuple[Step, ...]:
        """Once, by the last blocks; a small encoder has fewer of them."""
        site = next(site for site in ("post_encoder", "post_projector") if site in shape.sites)
        known = range(-min(LAST, shape.blocks), 0)
        return (self.step(site, self.select, signals=tuple(need for block in known for need in needs(block))),)

    def _in_encoder(self, shape: Shape) -> tuple[Step, ...]:
        """In every block a score, in every second one tokens leave; the last block only runs what is left."""
        seen: dict[str, Any] = {}  # of this request: patches of each view at first, score so far
        last = max(shape.blocks - 2, 0)

        def act(block: int) -> Select:
            def select(signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
                targets = seen.setdefault("targets", [self.count(len(view)) for view in layout.groups("view")])
                kept, score = self.select_in_block(
                    signals, layout, targets, seen.get("score"), last - block, shape.heads
                )
                seen["score"] = score[kept]
                return Reduction(kept)

            return select

        return tuple(
            self.step(
                "encoder",
                act(block),
                layer=block,
                signals=("cls_attention", "cls_value", "values"),
                count=lambda n, total, end=block == last: min(n, self.count(total)) if end else n,
            )
            for block in range(last + 1)
        )

    def select_in_block(
        self,
        signals: dict[str, Tensor],
        layout: VisualLayout,
        targets: Sequence[int],
        before: Tensor | None,
        blocks_left: int,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        """In one block: what stays [K] ascending, and the cumulative score [N] before anything left.

        targets: tokens of each view in the end. before: the cumulative score so far.
        """
        attention = signals["cls_attention"].float()
        values, of_cls = (split_heads(x, heads) for x in (signals["values"], per_view(signals["cls_value"], layout)))
        views = layout.groups("view")
        score = cumulated(before, block_score(attention, values.float(), of_cls.float(), views).cpu())
        kept = []
        for view, target in zip(views, targets):
            if len(view) > target and blocks_left % 2 == 0:
                gone = leaving(attention[view][None], target, blocks_left)
                view = view[top_k(score[view], len(view) - gone)]
            kept.append(view)
        return in_order(kept), score

    def count_inside(self, n: int) -> int:
        """Tokens of n that the second choice leaves."""
        return max(int(n * self.inner), 1)

    def select_inside(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        """The choice inside the language model."""
        score = flow_inside(signals["last_attention"], signals["last_value_attention"], signals["values"])
        return Reduction(top_k(score.cpu(), self.count_inside(len(layout))))

    def score(self, signals: dict[str, Tensor], layout: VisualLayout) -> Tensor:
        views, total = layout.groups("view"), None
        for block in (block for block in range(-LAST, 0) if f"values@{block}" in signals):
            attention, cls_value, values = (given(signals, need) for need in needs(block))
            heads = attention.shape[1]
            told = f"cls_value@{block}" in signals
            of_cls = split_heads(per_view(cls_value, layout), heads) if told else None
            total = cumulated(total, block_score(attention.mean(dim=1), split_heads(values, heads), of_cls, views))
        return torch.zeros(len(layout)) if total is None else total


def block_score(attention: Tensor, values: Tensor, of_cls: Tensor | None, views: Sequence[Tensor]) -> Tensor:
    """Score [N] of one block: `flow` in each view, or, without CLS, attention * norm.

    attention: [N] of CLS, or of the mean query; values: [N, H, d]; of_cls: [V, H, d]; views: V groups of the N.
    """
    norm = values.mean(dim=1).abs().sum(dim=-1)
    score = attention * norm
    for own, view in zip(() if of_cls is None else of_cls, views):
        semantic = semantic_attention(own, values.index_select(0, view.to(values.device)))
        score[view] = flow(attention[view], semantic, norm[view])
    return score


def flow(attention: Tensor, semantic: Tensor, norm: Tensor) -> Tensor:
    """Score [B, n] of one block: (attention / its sum + semantic / its sum) * norm, each [B, n]."""
    return (attention / attention.sum(-1, keepdim=True) + semantic / semantic.sum(-1, keepdim=True)) * norm


def cumulated(before: Tensor | None, score: Tensor) -> Tensor:
    """The cumulative score after a block: half of what was there and half of the new one; the new one in the first."""
    return score if before is None else 0.5 * before + 0.5 * score


def semantic_attention(cls_value: Tensor, values: Tensor) -> Tensor:
    """e [n]: mean over heads of softmax over all tokens, CLS among them, of v_cls . v, unscaled; CLS left out.

    cls_value: [H, d]; values: [n, H, d].
    """
    products = torch.cat([(cls_value * cls_value).sum(dim=-1)[None], (values * cls_value).sum(dim=-1)])  # [1 + n, H]
    return products.softmax(dim=0)[1:].mean(dim=1)


def flow_inside(attention: Tensor, semantic: Tensor, values: Tensor) -> Tensor:
    """Score [n] inside the language model, of the last prompt token's row over the n visual tokens.

    attention: [H, n] softmax over keys, at least the visual ones; semantic: [H, n] softmax over visual tokens of the
    product of values; values: [n, H, d].
    """
    shown = (attention / attention.sum(dim=-1, keepdim=True)).mean(dim=0)
    return flow(shown, semantic.mean(dim=0), values.mean(dim=1).abs().sum(dim=-1))


def leaving(attention: Tensor, target: int, blocks_left: int) -> int:
    """How many of n patches leave: (n - target) / sqrt(blocks_left) * (1 - eta^2), the most of the batch, rounded.

    attention: [B, n] of CLS; eta: its entropy as a share of log n. blocks_left: blocks after this one in which patches
    may still leave; at 0 all above the target do. A patch without attention adds nothing to the entropy.
    """
    n = attention.shape[-1]
    if blocks_left <= 0:
        return n - target
    p = attention / attention.sum(dim=-1, keepdim=True)
    eta = -torch.xlogy(p, p).sum(dim=-1) / math.log(n)
    return min(round(float(((n - target) / blocks_left**0.5 * (1 - eta**2)).max())), n - target)
