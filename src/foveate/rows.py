"""`Row`: one request as the language model sees it, and what happens to it when visual tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.adapters.layout import NEWLINE, VisualLayout

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter
    from foveate.data.plan import Plan
    from foveate.reduce.base import Reduction, Step

UNALIGNED = ("request_key", "text_embeddings", "cls_query", "cls_key", "cls_value")
"""Signals that have no row for each visual token."""


@dataclass
class Row:
    """A sequence of n tokens, K of them visual features. Everything but features lies on the CPU.

    input_ids: [n], a placeholder per feature. positions: [n] or [3, n]; next_position: of the first generated token.
    features: [K, D]; deep: as `Encoded.deep`. layout: of the K features. where: [K] their places in the sequence.
    breaks: places of separators, ascending. origin: [K] their numbers among the request's features before anything was
    dropped, `visual` in all. steps: what is still to happen inside the language model. per_layer: visual tokens that
    each decoder layer saw, once the prompt was read. touched: whether a method had a say.
    """

    input_ids: Tensor
    positions: Tensor
    next_position: int
    features: Tensor
    layout: VisualLayout
    where: Tensor
    breaks: Tensor
    origin: Tensor
    visual: int
    deep: list[Tensor] = field(default_factory=list)
    steps: tuple[Step, ...] = ()
    key: Tensor | None = None
    per_layer: list[int] = field(default_factory=list)
    touched: bool = False

    @classmethod
    def open(cls, adapter: Adapter, plan: Plan, features: Tensor, deep: Sequence[Tensor] = ()) -> Row:
        """The whole prompt of a plan with all its features."""
        layout, positions = adapter.layout(plan), adapter.positions(plan)
        separators = layout.position[layout.kind == NEWLINE]
        layout = layout.features()
        total = len(layout)
        return cls(
            input_ids=torch.as_tensor(plan.input_ids),
            positions=positions,
            next_position=int(positions.max()) + 1,
            features=features,
            layout=layout,
            where=layout.position.clone(),
            breaks=separators,
            origin=torch.arange(total),
            visual=total,
            deep=list(deep),
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def kept(self) -> int:
        """Visual features that are left."""
        return len(self.where)

    @property
    def text(self) -> int:
        """Tokens that are not visual features."""
        return len(self) - self.kept

    def text_after(self) -> Tensor:
        """[Q] places of text tokens after the first visual feature, separators left out."""
        if not self.kept:
            return torch.zeros(0, dtype=torch.int64)
        text = torch.ones(len(self), dtype=torch.bool)
        text[: int(self.where.min())] = False
        text[self.where] = False
        text[self.breaks] = False
        return text.nonzero().flatten()

    def take(self, reduction: Reduction, step: Any) -> Tensor:
        """Let a reduction of the K features come true in ids, positions, layout and places; features stay untouched.

        Returns [n'] int64: the old place of each token of the new sequence. Tokens that are handed over in another
        order fill the kept places in that order, and bring their own positions along.
        """
        keep = reduction.keep.cpu()
        places = self.where[keep]
        stays = torch.ones(len(self), dtype=torch.bool)
        stays[self.where] = False
        stays[places] = True
        if len(keep) < self.kept:
            self._separators(stays, keep, step.newline)
        slots = places.sort().values
        order = torch.arange(len(self))
        order[slots] = places
        gather = order[stays]
        number = stays.cumsum(0) - 1
        sizes = self.layout.size
        self.layout = self.layout[keep]
        if reduction.weights is not None:
            self.layout = replace(self.layout, size=reduction.sizes(sizes))
        self.where, self.origin = number[slots], self.origin[keep]
        self.breaks = number[self.breaks[stays[self.breaks]]]
        self.input_ids, self.positions = self.input_ids[gather], self.positions[..., gather]
        if step.position == "renumber" and self.positions.dim() == 1:
            self.positions = torch.arange(len(self))
            self.next_position = len(self)
        return gather

    def cut(self, reduction: Reduction, step: Any) -> None:
        """As `take`, before the language model: features and what goes with them are cut or merged too."""
        self.touched = True
        if reduction.changes(self.kept):
            self.features = reduction.apply(self.features)
            self.deep = [reduction.apply(part) for part in self.deep]
            self.take(reduction, step)

    def narrow(self, layout: VisualLayout, step: Any) -> None:
        """As `cut`, for features that left before they came here: `layout` is of those that are left, in order."""
        self.touched = True
        if len(layout) < self.kept:
            keep = torch.searchsorted(self.layout.position, layout.position)
            self.take(_Kept(keep), step)
            self.layout = layout

    def _separators(self, stays: Tensor, keep: Tensor, policy: str) -> None:
        """Take separators out of `stays` as the policy says."""
        if policy == "drop":
            stays[self.breaks] = False
        elif policy == "row" and len(self.breaks):
            runs = torch.searchsorted(self.breaks, self.where)
            had = torch.bincount(runs, minlength=len(self.breaks) + 1)[:-1]
            has = torch.bincount(runs[keep], minlength=len(self.breaks) + 1)[:-1]
            stays[self.breaks[(had > 0) & (has == 0)]] = False


@dataclass(frozen=True)
class Prompt:
    """A request as the first layer sees it. embeddings: [n, D]; visual, text: places of features and of text tokens."""

    embeddings: Tensor
    visual: Tensor
    text: Tensor


def show_prompt(cache: Any, rows: Sequence[Row], embeddings: Tensor) -> None:
    """Show the prompt [B, L, D], padded on the left, to a cache that looks at it (it has `see_prompt`)."""
    if not hasattr(cache, "see_prompt"):
        return
    prompts = []
    for row, padded in zip(rows, embeddings):
        text = torch.ones(len(row), dtype=torch.bool)
        text[row.where] = text[row.breaks] = False
        prompts.append(Prompt(padded[padded.shape[0] - len(row) :], row.where, text.nonzero()[:, 0]))
    cache.see_prompt(prompts)


@dataclass(frozen=True)
class _Kept:
    """The form of a reduction that only prunes."""

    keep: Tensor
    weights: None = None


def narrowed(signals: dict[str, Tensor], reduction: Reduction) -> dict[str, Tensor]:
    """Signals of the features that stay; a merged token has the signals of the one at whose place it stands."""
    base = {name: name.partition("@")[0] for name in signals}
    return {
        name: value if base[name] in UNALIGNED else value[reduction.keep.to(value.device)]
        for name, value in signals.items()
    }


def pad(rows: Sequence[Row], adapter: Adapter) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Left-padded ids [B, L], mask [B, L] (None when nothing is padded), position ids [B, L] or [3, B, L], and the
    separators [B, L] whose ids are placeholders (None when there is none)."""
    mask, positions = places(rows)
    length = positions.shape[-1]
    ids = torch.full((len(rows), length), _padding_id(adapter))
    newlines = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        start = length - len(row)
        ids[index, start:] = row.input_ids
        newlines[index, start + row.breaks] = True
    newlines &= torch.isin(ids, torch.tensor(adapter.placeholders))
    return ids, None if mask is None else mask.long(), positions, newlines if bool(newlines.any()) else None


def places(rows: Sequence[Row]) -> tuple[Tensor | None, Tensor]:
    """Real columns [B, L] bool (None: nothing is padded) and position ids [B, L] or [3, B, L], padded on the left."""
    length = max(map(len, rows))
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    positions = torch.zeros(*rows[0].positions.shape[:-1], len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        real[index, length - len(row) :] = True
        positions[..., index, length - len(row) :] = row.positions
    return None if bool(real.all()) else real, positions


def _padding_id(adapter: Adapter) -> int:
    """An id for padding that is no placeholder."""
    fill = getattr(adapter.tokenizer, "pad_token_id", None)
    return next(i for i in (fill, 0, 1, 2) if i is not None and i not in adapter.placeholders)
