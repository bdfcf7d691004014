"""`ts_llava`: a clip as one thumbnail of a few frames and tokens at equal steps of all frames.

Source: TS-LLaVA, arXiv 2411.11066 (code read: tingyu215/TS-LLaVA @ 03cdeae). `frames` frames at equal steps are tiled
into one picture, which is encoded like a frame; of the tokens of all frames, in time and raster order, some stay at
equal steps of a float32 linspace, rounded half to even. There is no score of importance.

Departures: a method sees tokens, not pixels, so the thumbnail is put together from the frames' feature maps, averaged
to a part of a map each; that costs no extra pass of the encoder. `thumbnail` makes the pixel thumbnail of the paper,
to be asked about as a picture beside the clip. The thumbnail's tokens stand where the chosen frames do, so order in
time holds. The thumbnail's share of a budget is its size in the paper (576 of 3456), where it fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Reducer, Reduction, evenly
from foveate.reduce.frames import budgets
from foveate.reduce.grid import blocks
from foveate.reduce.merge import Part, one_hot, reduction
from foveate.reduce.select import rest

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class TSLLaVA(Reducer):
    """Tokens at equal steps of each clip, and a thumbnail of `frames` frames; share: the thumbnail's part of them."""

    frames: int = 6
    share: float = 1 / 6

    name: ClassVar[str] = "ts_llava"
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "tokens at equal steps of a clip, and a thumbnail of a few frames"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1 or not 0 <= self.share <= 1:
            raise RecipeError(f"{self.name}: frames is {self.frames} (at least 1) and share {self.share} (from 0 to 1)")

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        parts: list[Part] = []
        for table, count in budgets(layout, self.count):
            tokens = table[table >= 0]
            if len(table) == 1 or count == len(tokens):
                parts.append(Part(tokens, equal_steps(len(tokens), count)))
                continue
            parts += self._clip(layout, table, count)
        return reduction(parts, blocks(layout))

    def _clip(self, layout: VisualLayout, table: Tensor, count: int) -> list[Part]:
        picked = equal_steps(len(table), min(self.frames, len(table), max(int(count * self.share), 1)))
        shares = torch.diff(torch.arange(len(picked) + 1) * int(count * self.share) // len(picked))
        parts, taken = [], []
        for frame, share in zip(picked.tolist(), shares.tolist()):
            source = table[frame][table[frame] >= 0]
            weights = shrunk(layout.row[source], layout.col[source], share)
            places = evenly(len(weights), len(source))
            taken.append(source[places])
            parts.append(Part(source, places, weights))
        tokens = table[table >= 0]
        free = tokens[rest_of(tokens, torch.cat(taken))]
        parts.append(Part(free, equal_steps(len(free), count - sum(map(len, taken)))))
        return parts


def rest_of(tokens: Tensor, taken: Tensor) -> Tensor:
    """Places of those of `tokens` that are not in `taken`."""
    return rest(len(tokens), torch.isin(tokens, taken).nonzero().flatten())


def shrunk(row: Tensor, col: Tensor, count: int) -> Tensor:
    """Weights [k, n], k <= count, that average the tokens at these rows and columns over the cells of a small map."""
    rows, cols = int(row.max()) + 1, int(col.max()) + 1
    high = max(1, min(rows, round((count * rows / cols) ** 0.5), count))
    wide = max(1, min(cols, count // high))
    cell = (row * high // rows) * wide + col * wide // cols
    used, cell = torch.unique(cell, return_inverse=True)
    weights = one_hot(cell, len(used)).T[: max(count, 0)]
    return weights / weights.sum(dim=1, keepdim=True)


def equal_steps(n: int, count: int) -> Tensor:
    """`count` of n places from the first to the last: a float32 linspace, rounded half to even. Returns int64.

    float32 is part of the method: in float64 some places of long clips differ.
    """
    return torch.linspace(0, n - 1, count).round().long()


def thumbnail_grid(frames: int) -> tuple[int, int]:
    """Rows and columns of a thumbnail of so many frames: the factors nearest to each other, rows the larger."""
    rows = min(d for d in range(1, frames + 1) if frames % d == 0 and d * d >= frames)
    return rows, frames // rows


def thumbnail(frames: Tensor, side: int) -> Tensor:
    """One picture [C, side, side] of G frames [G, C, H, W], tiled row by row; float32.

    Each becomes side // rows by side // cols pixels: area average where it shrinks, bilinear where it grows. What the
    tiles leave over of `side` at the lower and right edge is 0.
    """
    rows, cols = thumbnail_grid(len(frames))
    size = (side // rows, side // cols)
    smaller = size[0] <= frames.shape[-2] and size[1] <= frames.shape[-1]
    small = F.interpolate(frames.float(), size, mode="area" if smaller else "bilinear")
    tiled = small.view(rows, cols, *small.shape[1:]).permute(2, 0, 3, 1, 4).reshape(-1, rows * size[0], cols * size[1])
    return F.pad(tiled, (0, side - tiled.shape[2], 0, side - tiled.shape[1]))
