"""Clips as tables of frames and places, whatever the layout: what the video reducers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.reduce.allocate import largest_remainder
from foveate.reduce.select import unit

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


def clips(layout: VisualLayout) -> list[Tensor]:
    """One table [F, P] int64 for each clip, frames in time order: the token at each place of each frame, or -1.

    Places are matched by row and column, so frames may have different sizes. A view of a picture is a clip of one
    frame, since its tiles do not follow each other in time.
    """
    tables = []
    for media in layout.groups("media"):
        part = layout[media]
        if int(part.frame.max()) < 0:
            tables += [media[view][None] for view in part.groups("view")]
            continue
        _, frame = torch.unique(part.frame, return_inverse=True)
        joined = bool((part.global_row >= 0).all())
        row, col = (part.global_row, part.global_col) if joined else (part.row, part.col)
        first = torch.full((int(frame.max()) + 1,), int(part.view.max())).scatter_reduce(0, frame, part.view, "amin")
        beside = torch.zeros_like(row) if joined else part.view - first[frame]  # several views of one frame
        _, place = torch.unique(torch.stack([beside, row, col]), dim=1, return_inverse=True)
        table = torch.full((int(frame.max()) + 1, int(place.max()) + 1), -1)
        table[frame, place] = media
        tables.append(table)
    return tables


def budgets(layout: VisualLayout, count: Callable[[int], int]) -> list[tuple[Tensor, int]]:
    """Each clip's table with the tokens that it keeps: count(tokens of the picture or clip), views sharing by size."""
    out, tables = [], clips(layout)
    for media in layout.media.unique():
        own = [table for table in tables if layout.media[table.max()] == media]
        sizes = [int((table >= 0).sum()) for table in own]
        out += zip(own, largest_remainder(torch.tensor(sizes), count(sum(sizes)), sizes))
    return out


def at(features: Tensor, table: Tensor) -> Tensor:
    """[N, ...] as [F, P, ...]; 0 where a frame has no such place."""
    values = features[table.clamp_min(0)]
    empty = (table < 0).view(*table.shape, *[1] * (values.dim() - 2))
    return values.masked_fill(empty.to(values.device), 0)


def likeness(x: Tensor) -> Tensor:
    """Cosine of each place with the same place of the next frame: [F, P, D] -> [F - 1, P] on the CPU."""
    u = unit(x)
    return (u[:-1] * u[1:]).sum(dim=-1).cpu()
