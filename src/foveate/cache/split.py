"""`SplitStore`: two stores in one, for tokens of a prompt that are marked when they come and for all others.

Each keeps its tokens in their order, in pages of its own, so marked tokens share scales with marked ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.cache.store import Store, take


class SplitStore:
    """As `Store`. coming: [B, M] bool, which tokens of the next `append` are marked (row b: its first counts[b])."""

    def __init__(self, marked: Store, rest: Store) -> None:
        self.stores = (marked, rest)
        self.coming: Tensor | None = None
        self.marks: list[Tensor] = []  # of each row, [tokens] bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.marks]

    @property
    def paged(self) -> list[int]:
        """Pages of marked tokens of each row."""
        return self.stores[0].paged

    def append(self, states: Tensor, counts: Sequence[int]) -> None:
        """Add tokens: [B, H, M, D], row b in its first counts[b] columns."""
        size, device = states.shape[2], states.device
        real = torch.arange(size, device=device) < torch.tensor(counts, device=device)[:, None]
        marks = torch.zeros_like(real) if self.coming is None else self.coming.to(device) & real
        self.coming = None
        for store, mine in zip(self.stores, (marks, real & ~marks)):
            order = (~mine).to(torch.uint8).argsort(dim=1, stable=True)
            store.append(take(states, order), mine.sum(1).tolist())
        new = [row[:count] for row, count in zip(marks, counts)]
        self.marks = [torch.cat(pair) for pair in zip(self.marks, new)] if self.marks else [row.clone() for row in new]

    def read(self, rank: Tensor | None = None) -> Tensor:
        """All tokens: [B, H, N, D], row b in its first columns; or where `rank` [B, N] puts them."""
        marked, rest = (store.read() for store in self.stores)
        longest = max(self.lengths)
        column = torch.zeros(len(self.marks), longest, dtype=torch.int64, device=marked.device)
        for row, mark in enumerate(self.marks):
            others = marked.shape[2] + (~mark).cumsum(0) - 1
            column[row, : len(mark)] = torch.where(mark, mark.cumsum(0) - 1, others)
        both = torch.cat([marked, rest], dim=2)
        return take(both, column if rank is None else column.gather(1, rank))

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the first lengths[b] tokens of row b."""
        self.marks = [row[:size].clone() for row, size in zip(self.marks, lengths)]
        self.stores[0].crop([int(row.sum()) for row in self.marks])
        self.stores[1].crop([int((~row).sum()) for row in self.marks])

    def select(self, index: Tensor) -> None:
        """Rows `index` of the batch, in that order, any of them repeatedly."""
        for store in self.stores:
            store.select(index)
        self.marks = [self.marks[i] for i in index.tolist()]

    def each(self, change: Callable[[Any], Any]) -> None:
        """Replace every tensor by what `change` makes of it."""
        for store in self.stores:
            store.each(change)
        self.marks = [change(row) for row in self.marks]

    def reset(self) -> None:
        for store in self.stores:
            store.reset()
        self.coming, self.marks = None, []
