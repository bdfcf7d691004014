"""`Ragged`: values of which each page of each row holds any number (outliers), end to end in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ragged:
    """counts: [B, P] int32; values: [sum of counts, ...] tensors of one length, pages in row-major order."""

    def __init__(self, counts: Tensor, **values: Tensor) -> None:
        self.counts, self.values = counts.to(torch.int32), values

    @property
    def shape(self) -> torch.Size:
        return self.counts.shape

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @property
    def page(self) -> Tensor:
        """[sum] the page, row * P + number, of each value."""
        flat = self.counts.flatten().long()
        return torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)

    def tensors(self) -> list[Tensor]:
        return [self.counts, *self.values.values()]

    def to(self, *args: object, **kwargs: object) -> Ragged:
        moved = {name: value.to(*args, **kwargs) for name, value in self.values.items()}
        return Ragged(self.counts.to(*args, **kwargs), **moved)

    def __getitem__(self, rows: Tensor) -> Ragged:
        """Rows of the batch."""
        pages = torch.arange(self.shape[1], device=self.device)
        return self._pages(rows[:, None] * self.shape[1] + pages)

    def repeat_interleave(self, repeats: int, dim: int = 0) -> Ragged:
        return self[torch.arange(self.shape[0], device=self.device).repeat_interleave(repeats)]

    def first(self, pages: int) -> Ragged:
        """The first pages of each row."""
        number = torch.arange(self.shape[0] * self.shape[1], device=self.device).view(self.shape)
        return self._pages(number[:, :pages])

    def join(self, new: Ragged, have: Sequence[int], add: Sequence[int]) -> Ragged:
        """Pages of row b: the first have[b] of these, then the first add[b] of `new`; the rest is empty."""
        total = max(a + b for a, b in zip(have, add))
        first, count = (torch.tensor(x, device=self.device)[:, None] for x in (have, add))
        page = torch.arange(total, device=self.device).expand(len(have), -1)
        row = torch.arange(len(have), device=self.device)[:, None]
        empty = self.counts.numel() + new.counts.numel()
        source = torch.full_like(page, empty)
        source = torch.where(page < first, row * self.shape[1] + page, source)
        late = (page >= first) & (page < first + count)
        source = torch.where(late, self.counts.numel() + row * new.shape[1] + page - first, source)
        counts = torch.cat([self.counts.flatten(), new.counts.flatten(), self.counts.new_zeros(1)])
        values = {name: torch.cat([value, new.values[name]]) for name, value in self.values.items()}
        return Ragged(counts[None], **values)._pages(source)

    def _pages(self, source: Tensor) -> Ragged:
        """The pages [B, P] with these numbers."""
        flat = self.counts.flatten().long()
        start = flat.cumsum(0) - flat
        counts = flat[source.flatten()]
        page = torch.repeat_interleave(source.flatten(), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        index = start[page] + torch.arange(len(page), device=page.device) - before
        return Ragged(counts.view(source.shape), **{name: value[index] for name, value in self.values.items()})
