"""`alisa`: each head attends to recent tokens and to those that recent queries looked at; the rest is forgotten or
cold.

Source: Zhao et al., ALISA (arXiv 2403.17312), sparse window attention; there is no official code, so this follows the
paper. Of K tokens half are the most recent ones, half those with the largest attention summed over the last queries
(H2O, arXiv 2306.14048, sums over all queries). Departures:
- What is not attended to is dropped, kept in 8 bits off the device, or recomputed from the layer's inputs, by choice.
  The paper's scheduler picks among these by profiled cost.
- 8 bits are per token and head, not per channel, so that a token can be coded when it comes.
- Attention of grouped queries is summed over a group, as its heads share keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from foveate.adapters.attention import Pass, projected
from foveate.cache.base import CacheMethod
from foveate.cache.evict import EvictingLayer
from foveate.cache.int8 import dequantize, quantize
from foveate.cache.rotations import Rotations
from foveate.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from transformers import Cache

    from foveate.adapters.base import Adapter


@dataclass(frozen=True)
class Alisa(CacheMethod):
    """keep: tokens attended to, a number or the share of those seen. rows: recent queries whose attention counts.

    cold: "drop" forgets the others for good; "int8" keeps them in 8 bits in main memory; "recompute" keeps the inputs
    of the layer in 8 bits and projects a token again that comes back, which is smaller where heads are not grouped.
    """

    keep: float | int = 0.2
    rows: int = 8
    cold: Literal["drop", "int8", "recompute"] = "drop"

    name: ClassVar[str] = "alisa"
    shown: ClassVar[tuple[str, ...]] = ("keep",)
    summary: ClassVar[str] = "each head attends to recent tokens and those that recent queries looked at"
    status: ClassVar[str] = "experimental"
    searched: ClassVar[bool] = False
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.keep, float)
        if (share and not 0 < self.keep <= 1) or (not share and self.keep < 2):
            raise RecipeError(f"alisa: keep is {self.keep}; give a share above 0 up to 1.0, or 2 or more tokens")
        if self.rows < 1:
            raise RecipeError(f"alisa: rows is {self.rows}; attention of at least 1 recent query has to count")

    def layer(self, index: int, rotations: Rotations | None = None) -> AlisaLayer:
        return AlisaLayer(self, rotations or Rotations())

    def layers(self, count: int) -> list[AlisaLayer]:
        shared = Rotations()
        return [self.layer(index, shared) for index in range(count)]

    def make(self, adapter: Adapter) -> Cache:
        cache = super().make(adapter)
        module = adapter.layers[0].self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            if not hasattr(module, name):
                raise UnsupportedError(f"alisa: {type(module).__name__} has no {name}, which attention rows need")
        for layer in cache.layers:
            layer.width = module.q_proj.in_features
        return cache


class _Even:
    """Stands in for an attention module whose attention is even."""


class AlisaLayer(EvictingLayer):
    """recent: [B, H, rows, N] float16, attention of the last queries to the candidates: the tokens held, or with a cold
    store all columns, of which those held are `column` [B, H, P] (ascending); real: [B, N] bool, candidates that are
    tokens."""

    def __init__(self, method: Alisa, rotations: Rotations) -> None:
        super().__init__()
        self.method, self.rotations = method, rotations
        self.recent: Tensor | None = None
        self.column: Tensor | None = None
        self.real: Tensor | None = None
        self.cold: dict[str, Tensor] = {}
        self._pass: Pass | None = None
        self.width = 0

    def stand_in(self, keys: Tensor) -> None:
        """A pass without queries, for keys [1, H, M, D], so that bytes can be measured: all attention is even.

        Where nothing is known of the model, the layer's inputs count as wide as its keys.
        """
        hidden = keys.new_zeros(keys.shape[0], keys.shape[2], self.width or keys.shape[1] * keys.shape[3])
        place = torch.arange(keys.shape[2], dtype=keys.dtype, device=keys.device)
        angles = place[None, :, None].expand(-1, -1, keys.shape[3])
        self._pass = Pass(_Even(), hidden, None, (angles, angles))

    def see(self, seen: Pass) -> Tensor | None:
        self._pass = seen
        return super().see(seen)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._pass is None:
            raise UnsupportedError("alisa needs the queries of each pass; make its cache by the method's `make`")
        self._remember(key_states, value_states)
        full = super().update(key_states, value_states, *args, **kwargs)
        self._pass = None
        return full

    def choose(self) -> Tensor | None:
        self._score()
        real = self._candidates()
        budget = [self._budget(n) for n in real.sum(-1)[:, 0].tolist()]
        keep = select(self.recent.float().sum(dim=2), real, budget)
        if self.method.cold == "drop":
            return None if bool(keep[real].all()) else keep
        self._swap(keep)
        return None

    def _budget(self, tokens: int) -> int:
        keep = self.method.keep
        return max(2, math.ceil(keep * tokens)) if isinstance(keep, float) else keep

    def _candidates(self) -> Tensor:
        """[B, H, N] bool."""
        batch, heads = self.keys.shape[:2]
        real = self.valid if self.method.cold == "drop" else self.real
        if real is None:
            return torch.ones(batch, heads, self.recent.shape[-1], dtype=torch.bool, device=self.keys.device)
        return real if real.dim() == 3 else real[:, None].expand(-1, heads, -1)

    def _score(self) -> None:
        """Put the attention of the newest queries into `recent`."""
        seen, module = self._pass, self._pass.module
        batch, heads, held = self.keys.shape[:3]
        new = seen.hidden.shape[1]
        last = min(self.method.rows, new)
        if isinstance(module, _Even):
            scores = self.keys.new_zeros(batch, heads, 1, last, held, dtype=torch.float32)
        else:
            queries = seen.queries(last).unflatten(1, (heads, -1)).float()  # [B, H, G, last, D]
            scores = queries @ self.keys[:, :, None].float().transpose(-1, -2) * module.scaling
        allowed = self._allowed(seen, last)  # [B or 1, H or 1, 1, last, P]
        rows = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0).sum(dim=2)  # [B, H, last, P]
        if self.valid is not None and new > 1:  # queries that are padding count for nothing
            rows = rows * self.valid[..., -last:].view(batch, -1, last, 1)
        rows = rows.to(torch.float16)
        if self.method.cold == "drop":
            old = self.recent
            width = held
        else:
            width = self.columns
            column = torch.arange(width - new, width, device=rows.device).expand(batch, heads, -1)
            where = column if self.column is None else torch.cat([self.column.long(), column], dim=2)
            spread = rows.new_zeros(batch, heads, last, width)
            held_now = rows if self.valid is None else rows.masked_fill(~_per_head(self.valid, heads)[:, :, None], 0)
            rows = spread.scatter_add(3, where[:, :, None].expand(-1, -1, last, -1), held_now)
            old, self.column = self.recent, where.to(torch.int32)
        if old is not None:
            old = torch.cat([old, old.new_zeros(*old.shape[:3], width - old.shape[3])], dim=3)
            rows = torch.cat([old, rows], dim=2)
        self.recent = rows[:, :, -self.method.rows :].clone()

    def _allowed(self, seen: Pass, last: int) -> Tensor:
        new = seen.hidden.shape[1]
        inner = seen.new_mask()[:, :, -last:]
        past = self.held - new
        valid = inner.new_ones(1, 1, past) if self.valid is None else self.valid[..., :past]
        valid = valid[:, None] if valid.dim() == 2 else valid
        before = valid[:, :, None].expand(-1, -1, last, -1)
        batch, heads = max(inner.shape[0], before.shape[0]), before.shape[1]
        parts = before.expand(batch, -1, -1, -1), inner.expand(batch, heads, -1, -1)
        return torch.cat(parts, dim=-1)[:, :, None]

    # ---- the cold store

    def _remember(self, keys: Tensor, values: Tensor) -> None:
        """Put the new tokens into the cold store."""
        if self.method.cold == "drop":
            return
        new, batch, count = self._pass.valid(), keys.shape[0], keys.shape[2]
        if new is not None or self.real is not None:
            old = self.real
            if old is None:
                old = torch.ones(batch, self.columns, dtype=torch.bool, device=keys.device)
            new = torch.ones(batch, count, dtype=torch.bool, device=keys.device) if new is None else new
            self.real = torch.cat([old, new], dim=1)
        parts: dict[str, Tensor] = {}
        if self.method.cold == "int8":
            for name, states in (("key", keys), ("value", values)):
                codes, scale = quantize(states.transpose(1, 2))  # [B, T, H, D]
                parts |= {f"{name}_codes": codes.cpu(), f"{name}_scale": scale.cpu()}
        else:
            codes, scale = quantize(self._pass.hidden)  # [B, T, width]
            number = self.rotations.add(*self._pass.rotation).expand(batch, -1)
            parts = {"codes": codes, "scale": scale, "number": number}
        self.cold = {n: torch.cat([self.cold[n], p], dim=1) if n in self.cold else p.clone() for n, p in parts.items()}

    def _swap(self, keep: Tensor) -> None:
        """Hold the candidates `keep` [B, H, N]: those held already as they are, the others from the cold store."""
        counts = keep.sum(-1)
        most = int(counts.max())
        wanted = keep.to(torch.uint8).argsort(dim=-1, stable=True)[..., keep.shape[-1] - most :]
        real = torch.arange(most, device=keep.device) >= (most - counts)[..., None]
        batch, heads = keep.shape[:2]
        place = torch.full((batch, heads, keep.shape[-1]), -1, device=keep.device)
        held = torch.arange(self.held, device=keep.device).expand(batch, heads, -1)
        usable = held if self.valid is None else held.masked_fill(~_per_head(self.valid, heads), -1)
        place = place.scatter_reduce(2, self.column.long(), usable, "amax")
        source = place.gather(2, wanted)
        missing = (source < 0) & real
        self.reorder_columns(source.clamp(min=0))
        if bool(missing.any()):
            row, head, number = missing.nonzero(as_tuple=True)
            keys, values = self._recall(row, head, wanted[row, head, number])
            self.keys[row, head, number], self.values[row, head, number] = keys, values
        self.column = wanted.to(torch.int32)
        self.valid = None if bool(real.all()) else real

    def _recall(self, row: Tensor, head: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [M, D] of cold tokens: column of a row, for one head each."""
        if self.method.cold == "int8":
            at = row.cpu(), column.cpu(), head.cpu()
            return tuple(
                dequantize(self.cold[f"{n}_codes"][at], self.cold[f"{n}_scale"][at], self.dtype).to(self.device)
                for n in ("key", "value")
            )
        hidden = dequantize(self.cold["codes"][row, column], self.cold["scale"][row, column], self.dtype)
        rotation = self.rotations.get(self.cold["number"][row, column][None])
        keys, values = projected(self._pass.module, hidden[None], rotation)  # [1, H, M, D]
        some = torch.arange(len(row), device=row.device)
        return keys[0, head, some], values[0, head, some]

    # ---- what transformers asks

    def reorder_columns(self, column: Tensor) -> None:
        super().reorder_columns(column)
        if self.method.cold == "drop":
            self.recent = self.recent.gather(3, column[:, :, None].expand(-1, -1, self.recent.shape[2], -1))

    def map(self, states: Any, marks: Any) -> None:
        super().map(states, marks)
        if self.recent is not None:
            self.recent = marks(self.recent)
        self.column = None if self.column is None else marks(self.column)
        self.real = None if self.real is None else marks(self.real)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.cold = {name: part[indices.to(part.device)] for name, part in self.cold.items()}

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.cold = {name: part[:, : self.columns].clone() for name, part in self.cold.items()}

    def reset(self) -> None:
        super().reset()
        self.recent = self.column = self.real = None
        self.cold = {}
        self.rotations.reset()


def select(score: Tensor, real: Tensor, budget: list[int]) -> Tensor:
    """[B, H, N] bool, budget[b] of the real candidates: half (rounded up) the last, the others of largest score.

    score: [B, H, N]; of equal scores the earlier token stays. A row with fewer candidates keeps all.
    """
    total = torch.tensor(budget, device=score.device)[:, None, None]
    recent = (total + 1) // 2
    rank = real.cumsum(-1) - 1
    late = real & (rank >= real.sum(-1, keepdim=True) - recent)
    others = torch.where(real & ~late, score, -torch.inf)
    order = others.argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return late | (real & ~late & (place < total - recent))


def _per_head(valid: Tensor, heads: int) -> Tensor:
    return valid if valid.dim() == 3 else valid[:, None].expand(-1, heads, -1)
