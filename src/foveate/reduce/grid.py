"""Tiles of a picture as one map: which places of the joined grid show the picture, and in which order tiles read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


def stitched(rows: int, cols: int, height: int, width: int) -> Tensor:
    """The joined map of rows x cols tiles of height x width patches each: [rows * height, cols * width] int64.

    An entry is tile * height * width + patch, tiles counted row by row.
    """
    ids = torch.arange(rows * cols * height * width).view(rows, cols, height, width)
    return ids.transpose(1, 2).reshape(rows * height, cols * width)


def unpadded(height: int, width: int, picture: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a height x width map that show the picture, once its padding is cut off.

    picture: (width, height) before it was scaled to fit and centred, as LLaVA-NeXT does; part rows count as padding.
    """
    wide, high = picture
    if wide / high > width / height:
        margin = (height - int(high * (width / wide))) // 2
        return slice(margin, height - margin), slice(0, width)
    margin = (width - int(wide * (height / high))) // 2
    return slice(0, height), slice(margin, width - margin)


def overview(layout: VisualLayout, media: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """The view that shows a whole picture, and its tiles: indices of their tokens, in sequence order.

    media: indices of one picture's tokens. The whole picture is a view without a place in the joined map, beside views
    that have one. None, and all views as tiles, where the picture has no such pair.
    """
    views = [media[view] for view in layout[media].groups("view")]
    joined = [bool((layout.global_row[view] >= 0).all()) for view in views]
    apart = [view for view, inside in zip(views, joined) if not inside]
    if len(apart) != 1 or len(views) < 2:
        return None, views
    return apart[0], [view for view, inside in zip(views, joined) if inside]


def seen_by(layout: VisualLayout, whole: Tensor, tiles: Sequence[Tensor]) -> list[Tensor]:
    """For each tile, the whole picture's tokens whose centre lies in it: indices into `whole`.

    whole, tiles: as `overview` gives them; both maps show the same picture, stretched.
    """
    everything = torch.cat(list(tiles))
    height = layout.global_row[everything].max() + 1
    width = layout.global_col[everything].max() + 1
    row, col = layout.row[whole], layout.col[whole]
    down = (2 * row + 1) * height // (2 * (row.max() + 1))
    across = (2 * col + 1) * width // (2 * (col.max() + 1))
    inside = []
    for tile in tiles:
        rows, cols = layout.global_row[tile], layout.global_col[tile]
        held = (rows.min() <= down) & (down <= rows.max()) & (cols.min() <= across) & (across <= cols.max())
        inside.append(held.nonzero().flatten())
    return inside


def blocks(layout: VisualLayout) -> Tensor:
    """[N] int64, counting upwards in sequence order: tokens of views that interleave in the sequence share a number.

    A picture's joined tiles are one block where rows run across tiles; a tile, frame or thumbnail that stands by itself
    is one. A method may put the tokens of a block in another order, never across blocks (text may stand between).
    """
    spans = sorted(((int(g.min()), int(g.max()), g) for g in layout.groups("view")), key=lambda span: span[:2])
    block = torch.zeros(len(layout), dtype=torch.int64)
    number, end = -1, -1
    for first, last, group in spans:
        number += first > end
        end = max(end, last)
        block[group] = number
    return block
