"""`EvictingLayer`: a cache layer that forgets tokens, with a mask of its own.

Rows of a batch, and heads of a row, may forget different tokens, so that columns no longer line up with the padded
batch: as soon as something was forgotten, the layer answers `see` with a mask over what it holds.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from foveate.adapters.attention import Pass, like_mask
from foveate.cache.layer import ColumnsLayer, join_valid
from foveate.cache.store import take
from foveate.errors import UnsupportedError


class EvictingLayer(ColumnsLayer):
    """keys, values: [B, H, P, D] of the tokens held. valid: [B, P] or [B, H, P] bool. The tokens of a pass attend to
    all of that pass; then it is chosen."""

    @abstractmethod
    def choose(self) -> Tensor | None:
        """[B, P] or [B, H, P] bool, what stays of the tokens held, or None when all do."""

    def see(self, seen: Pass) -> Tensor | None:
        """Learn which new tokens are padding; returns the attention mask over the held and the new tokens."""
        self._new = seen.valid()
        if self.columns == self.held:  # nothing was forgotten, so columns line up
            return seen.mask
        new, given = seen.hidden.shape[1], seen.mask
        if self.valid is None and new == 1:
            return None
        if given is not None and given.dim() == 2:
            return self._flash_mask(given, new)
        inner = seen.new_mask()
        batch = seen.hidden.shape[0]
        valid = inner.new_ones(batch, 1, self.held) if self.valid is None else self.valid
        valid = valid[:, None] if valid.dim() == 2 else valid
        if valid.shape[1] > 1:
            valid = valid.repeat_interleave(seen.module.num_key_value_groups, dim=1)
        past = valid[:, :, None].expand(-1, -1, new, -1)
        return like_mask(torch.cat([past, inner.expand(batch, past.shape[1], -1, -1)], dim=-1), given)

    def _flash_mask(self, given: Tensor, new: int) -> Tensor:
        if self.valid is not None and self.valid.dim() == 3:
            raise UnsupportedError(
                "each head has forgotten other tokens, which flash attention has no mask for; load with attn='sdpa'"
            )
        past = given.new_ones(len(given), self.held) if self.valid is None else self.valid.to(given.dtype)
        return torch.cat([past, given[:, -new:]], dim=1)

    @property
    def held(self) -> int:
        """Columns in memory."""
        return 0 if self.keys is None else self.keys.shape[2]

    # ---- what transformers asks

    @property
    def is_croppable(self) -> bool:
        return self.columns == self.held

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All tokens held and the new ones, [B, H, P + new, D] each; then what is not chosen is forgotten."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, count = key_states.shape[0], key_states.shape[2]
        new, self._new = self._new, None
        if self.valid is not None and self.valid.dim() == 3:
            new = key_states.new_ones(batch, count, dtype=torch.bool) if new is None else new
            self.valid = torch.cat([self.valid, new[:, None].expand(-1, self.valid.shape[1], -1)], dim=2)
        else:
            self.valid = join_valid(self.valid, self.held, new, count, batch, key_states.device)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.columns += count
        full = self.keys, self.values
        keep = self.choose()
        if keep is not None:
            self.keep_only(keep)
        return full

    def keep_only(self, keep: Tensor) -> None:
        """Forget all but `keep`. Each row's (and head's) tokens move to the right, in their order."""
        counts = keep.sum(dim=-1)
        most = int(counts.max())
        column = keep.to(torch.uint8).argsort(dim=-1, stable=True)[..., keep.shape[-1] - most :]
        self.reorder_columns(column)
        held = torch.arange(most, device=keep.device) >= (most - counts)[..., None]
        self.valid = None if bool((counts == most).all()) else held

    def reorder_columns(self, column: Tensor) -> None:
        """Hold these columns only, [B, P'] or [B, H, P']."""
        self.keys, self.values = take(self.keys, column), take(self.values, column)

    def reset(self) -> None:
        self.keys = self.values = self.valid = None
        self.columns, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns. Raises UnsupportedError once others were forgotten: they cannot come back."""
        gone = abs(tokens_to_remove)
        if not gone or not self.columns:
            return
        if self.columns != self.held:
            raise UnsupportedError(
                f"this cache has forgotten {self.columns - self.held} of {self.columns} tokens, so it cannot be rolled "
                "back (as assisted decoding does); use a cache that keeps all"
            )
        self.columns -= gone
        self.map(lambda part: part[..., : self.columns, :].clone(), lambda part: part[..., : self.columns].clone())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.columns:
            rows = torch.arange(len(self.keys), device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.columns:
            self.map(lambda part: part[indices.to(part.device)], lambda part: part[indices.to(part.device)])

    def offload(self) -> None:
        if self.is_initialized:
            self.map(lambda part: part.to("cpu", non_blocking=True), lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.map(
                lambda part: part.to(self.device, non_blocking=True), lambda p: p.to(self.device, non_blocking=True)
            )

    def map(self, states: Any, marks: Any) -> None:
        """Replace keys and values [B, H, P, D] by `states` of them, and what is [B, (H,) P] by `marks` of it."""
        self.keys, self.values = states(self.keys), states(self.values)
        self.valid = None if self.valid is None else marks(self.valid)
