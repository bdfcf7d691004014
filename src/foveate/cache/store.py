"""`Store`: keys or values of one decoder layer, as pages of codes and a tail at full precision.

Each row counts its own tokens from its first real one: padding enters no page, no scale and no count, so a row of a
padded batch holds what it would hold alone. A page is `Codec.unit` consecutive tokens of one row. New tokens wait in
the tail until enough are there; then whole pages are coded and never touched again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.cache.ragged import Ragged

Part = Tensor | Ragged
"""One tensor of coded pages, [B, P, ...], or values of which a page holds any number."""


class Codec(ABC):
    """How one page becomes small. unit: tokens of a page. state: tensors [B, ...] that all pages of a row share."""

    unit: int = 1

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        """[B, P, H, unit, D] -> named tensors [B, P, ...].

        first: number of the first page in each row; counts: how many pages of each row are real, the rest is filling.
        """

    @abstractmethod
    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        """What `encode` gave, back as [B, P, H, unit, D]."""


class Store:
    """keep: at least so many last tokens of a row stay at full precision. limit: pages are coded as soon as so many
    tokens beyond `keep` wait (a prompt's, as soon as one page is full)."""

    def __init__(self, codec: Codec, keep: int = 0, limit: int = 0) -> None:
        self.codec, self.keep, self.limit = codec, keep, limit or codec.unit
        self.parts: dict[str, Part] = {}
        self.tail: Tensor | None = None  # [B, H, W, D], row b in its last tails[b] columns
        self.paged: list[int] = []
        self.tails: list[int] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [pages * self.codec.unit + tail for pages, tail in zip(self.paged, self.tails)]

    def append(self, states: Tensor, counts: Sequence[int]) -> None:
        """Add tokens: [B, H, M, D], row b in its first counts[b] columns."""
        unit, rows = self.codec.unit, len(counts)
        if self.tail is None:
            self.tail, self.paged, self.tails = states[:, :, :0], [0] * rows, [0] * rows
        width = self.tail.shape[2]
        both = torch.cat([self.tail, states], dim=2)
        limit = self.limit if states.shape[2] == 1 else unit
        waiting = [tail + count - self.keep for tail, count in zip(self.tails, counts)]
        coded = [wait // unit if wait >= limit else 0 for wait in waiting]
        if most := max(coded):
            pages = _columns(both, [width - tail for tail in self.tails], most * unit)
            pages = pages.unflatten(2, (most, unit)).transpose(1, 2)
            for name, new in self.codec.encode(pages, self.paged, coded).items():
                self.parts[name] = _join(self.parts.get(name), new, self.paged, coded)
            self.paged = [old + new for old, new in zip(self.paged, coded)]
        ends = [width + count for count in counts]
        self.tails = [wait + self.keep - pages * unit for wait, pages in zip(waiting, coded)]
        self.tail = _columns(both, [end - max(self.tails) for end in ends], max(self.tails)).clone()

    def read(self, rank: Tensor | None = None) -> Tensor:
        """All tokens at the tail's precision: [B, H, N, D], row b in its first columns; or where `rank` puts them.

        rank: [B, N], which token of its row each column takes.
        """
        flat = self.tail
        pages = max(self.paged)
        if pages:
            decoded = self.codec.decode(self.parts, self.tail.dtype)  # [B, P, H, U, D]
            flat = torch.cat([decoded.transpose(1, 2).flatten(2, 3), self.tail], dim=2)
        if rank is None and len(set(self.paged)) == 1 == len(set(self.tails)):
            return flat
        paged, tails = (torch.tensor(x, device=flat.device)[:, None] for x in (self.paged, self.tails))
        if rank is None:
            rank = torch.arange(max(self.lengths), device=flat.device).expand(len(flat), -1)
        inside = paged * self.codec.unit
        column = torch.where(rank < inside, rank, flat.shape[2] - tails + rank - inside)
        return take(flat, column.clamp(0, flat.shape[2] - 1))

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the first lengths[b] tokens of row b. Tokens of a page that is cut are read back into the tail."""
        whole, unit = self.read(), self.codec.unit
        self.paged = [min(pages, max(0, size - self.keep) // unit) for pages, size in zip(self.paged, lengths)]
        self.tails = [size - pages * unit for pages, size in zip(self.paged, lengths)]
        self.tail = _columns(whole, [size - max(self.tails) for size in lengths], max(self.tails)).clone()
        self._trim()

    def select(self, index: Tensor) -> None:
        """Rows `index` of the batch, in that order, any of them repeatedly."""
        rows = index.tolist()
        self.paged, self.tails = [self.paged[i] for i in rows], [self.tails[i] for i in rows]
        self.each(lambda part: part[index.to(part.device)])
        self._trim()

    def each(self, change: Callable[[Any], Any]) -> None:
        """Replace every tensor by what `change` makes of it."""
        self.tail = change(self.tail)
        self.parts = {name: change(part) for name, part in self.parts.items()}
        self.codec.state = {name: change(part) for name, part in self.codec.state.items()}

    def reset(self) -> None:
        self.tail, self.parts, self.paged, self.tails = None, {}, [], []
        self.codec.state = {}

    def _trim(self) -> None:
        pages, width = max(self.paged), max(self.tails)
        for name, part in self.parts.items():
            if part.shape[1] > pages:
                self.parts[name] = part.first(pages) if isinstance(part, Ragged) else part[:, :pages].clone()
        if self.tail.shape[2] > width:
            self.tail = self.tail[:, :, self.tail.shape[2] - width :].clone()


def take(states: Tensor, column: Tensor) -> Tensor:
    """[B, H, N, D] at columns [B, M] or, for each head its own, [B, H, M] -> [B, H, M, D]."""
    column = column[:, None] if column.dim() == 2 else column
    column = column[..., None].expand(-1, states.shape[1], -1, states.shape[-1])
    return states.gather(2, column)


def _columns(states: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """[B, H, count, D] from column starts[b] of row b; columns outside are filled with the nearest."""
    if len(set(starts)) == 1 and 0 <= starts[0] <= states.shape[2] - count:
        return states[:, :, starts[0] : starts[0] + count]
    first = torch.tensor(starts, device=states.device)[:, None]
    column = first + torch.arange(count, device=states.device)
    return take(states, column.clamp(0, states.shape[2] - 1))


def _join(old: Part | None, new: Part, have: Sequence[int], add: Sequence[int]) -> Part:
    """Pages of row b: the first have[b] of `old`, then the first add[b] of `new`."""
    if old is None:
        return new
    if isinstance(old, Ragged):
        return old.join(new, have, add)
    if len(set(have)) == 1 == len(set(add)):
        return torch.cat([old, new], dim=1)
    device = new.device
    total = max(a + b for a, b in zip(have, add))
    out = new.new_zeros(new.shape[0], total, *new.shape[2:])
    out[:, : old.shape[1]] = old
    first, count = torch.tensor(have, device=device), torch.tensor(add, device=device)
    row, page = (torch.arange(new.shape[1], device=device) < count[:, None]).nonzero(as_tuple=True)
    out[row, first[row] + page] = new[row, page]
    return out
