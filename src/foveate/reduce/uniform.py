"""`uniform`: tokens spread evenly over the picture, and over the frames of a clip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.reduce.base import Reducer, Reduction, evenly, in_order

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class Uniform(Reducer):
    """An even grid in each picture; in a clip or a tiled picture each view gets an equal share (the remainder spread).

    Tokens that do not fill a rectangle are sampled at equal steps of their raster order instead.
    """

    name: ClassVar[str] = "uniform"
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "keep"
    summary: ClassVar[str] = "visual tokens spread evenly over rows, columns and frames"

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        kept = []
        for group in layout.groups(self.scope):
            planes = _planes(layout[group])
            total = self.count(len(group))
            sizes = torch.tensor([len(plane) for plane in planes])
            ends = sizes.cumsum(0) * total  # each plane gets its share; cumulative rounding spreads the remainder
            shares = torch.diff(ends.div(len(group), rounding_mode="floor"), prepend=torch.zeros(1, dtype=torch.int64))
            for plane, share in zip(planes, shares.tolist()):
                raster, rows, cols = _raster(layout[group[plane]])
                picked = grid(rows, cols, share) if rows else evenly(share, len(plane))
                kept.append(group[plane[raster[picked]]])
        return Reduction(in_order(kept))


def grid(rows: int, cols: int, count: int) -> Tensor:
    """`count` places of a rows x cols raster, spread over both directions. Returns [count] int64, ascending.

    The number of rows used follows the aspect ratio; rows get equal shares, odd ones shifted by half a step.
    """
    if count >= rows * cols:
        return torch.arange(rows * cols)
    used = min(rows, max(math.ceil(count / cols), round(math.sqrt(count * rows / cols)), 1), max(count, 1))
    shares = torch.diff(torch.arange(used + 1) * count // used)
    lines = []
    for index, (row, share) in enumerate(zip(evenly(used, rows).tolist(), shares.tolist())):
        quarter = (0.25 if index % 2 else -0.25) if used > 1 else 0.0
        places = ((torch.arange(share) + 0.5 + quarter) * cols / max(share, 1)).floor().long()
        lines.append(row * cols + places)
    return torch.cat(lines)


def _planes(layout: VisualLayout) -> list[Tensor]:
    """Indices of the tokens of each plane: a whole picture or frame where its tiles join into one map, else a view."""
    joined = layout.global_row >= 0
    key = torch.stack([joined.long(), torch.where(joined, layout.frame, layout.view)])
    _, inverse = torch.unique(key, dim=1, return_inverse=True)
    return list(torch.split(torch.argsort(inverse, stable=True), torch.bincount(inverse).tolist()))


def _raster(layout: VisualLayout) -> tuple[Tensor, int, int]:
    """Indices of a plane's tokens row by row, and its (rows, columns), (0, 0) when they do not fill a rectangle."""
    joined = bool((layout.global_row >= 0).all())
    row, col = (layout.global_row, layout.global_col) if joined else (layout.row, layout.col)
    rows, cols = int(row.max()) + 1, int(col.max()) + 1
    place, order = (row * cols + col).sort(stable=True)
    full = rows * cols == len(layout) and torch.equal(place, torch.arange(len(layout)))
    return (order, rows, cols) if full else (order, 0, 0)
