"""`PackedLayer`: a cache layer of transformers that holds keys and values in a `Store` each.

A column is a place in the padded batch, as masks and transformers count them; a token is a column that is not padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.adapters.attention import Pass
from foveate.cache.store import Store


class ColumnsLayer(CacheLayerMixin):
    """A cache layer that knows about padding. columns: tokens and padding seen; valid: which of the columns held are
    tokens, or None while all are."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0
        self.valid: Tensor | None = None
        self._new: Tensor | None = None

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


class PackedLayer(ColumnsLayer):
    """The tokens of a pass attend to each other exactly, and to older ones as the stores hold them. valid: [B, columns]
    bool."""

    is_croppable = True

    def __init__(self, keys: Store, values: Store) -> None:
        super().__init__()
        self.stores = (keys, values)

    def see(self, seen: Pass) -> Tensor | None:
        """Learn which tokens of the coming `update` are padding; returns the attention mask as it was."""
        self._new = seen.valid()
        return seen.mask

    def incoming(self, keys: Tensor) -> Tensor:
        """Keys [B, H, M, D] as they are to be stored."""
        return keys

    def outgoing(self, keys: Tensor) -> Tensor:
        """Stored keys [B, H, columns, D] as the attention takes them."""
        return keys

    # ---- what transformers asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return all: old ones as stored, new ones as given. [B, H, columns, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        full = key_states, value_states
        if self.columns:
            rank = None if self.valid is None else (self.valid.cumsum(1) - 1).clamp(min=0)
            keys, values = (store.read(rank) for store in self.stores)
            full = torch.cat([self.outgoing(keys), key_states], 2), torch.cat([values, value_states], 2)
        new, batch, count = self._new, key_states.shape[0], key_states.shape[2]
        self._new = None
        arriving = self.incoming(key_states), value_states
        counts = [count] * batch
        if new is not None:
            order = (~new).to(torch.uint8).argsort(dim=1, stable=True)  # the row's tokens first
            arriving = tuple(states.gather(2, order[:, None, :, None].expand_as(states)) for states in arriving)
            counts = new.sum(1).tolist()
        for store, states in zip(self.stores, arriving):
            store.append(states, counts)
        self.valid = join_valid(self.valid, self.columns, new, count, batch, key_states.device)
        self.columns += count
        return full

    def reset(self) -> None:
        for store in self.stores:
            store.reset()
        self.columns, self.valid, self.is_initialized = 0, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns (transformers gives their number as a negative one)."""
        gone = abs(tokens_to_remove)
        if not gone or not self.columns:
            return
        if self.valid is None:
            lengths = [self.columns - gone] * len(self.stores[0].paged)
        else:
            self.valid = self.valid[:, : self.columns - gone].clone()
            lengths = self.valid.sum(1).tolist()
        for store in self.stores:
            store.crop(lengths)
        self.columns -= gone

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.stores[0].paged)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.columns:
            for store in self.stores:
                store.select(indices)
            if self.valid is not None:
                self.valid = self.valid[indices.to(self.valid.device)]

    def offload(self) -> None:
        self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda part: part.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Any], Any]) -> None:
        if self.is_initialized:
            for store in self.stores:
                store.each(change)
            self.valid = None if self.valid is None else change(self.valid)


def join_valid(
    old: Tensor | None, columns: int, new: Tensor | None, count: int, batch: int, device: torch.device
) -> Tensor | None:
    """[B, columns + count] bool from its two parts, of which None means: no padding."""
    if old is None and new is None:
        return None
    old = torch.ones(batch, columns, dtype=torch.bool, device=device) if old is None else old
    new = torch.ones(batch, count, dtype=torch.bool, device=device) if new is None else new
    return torch.cat([old, new], dim=1)
