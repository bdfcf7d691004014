"""Where each visual token of the families of transformers comes from, and the positions of Qwen's language models.

One function serves all families, because plans say it as data: views, levels of units x rows x cols, what was kept of a
map of tiles. NVILA's tokens (maps over several scales) are laid out in its own adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.adapters.layout import NEWLINE, PADDING, VALID, VisualLayout

if TYPE_CHECKING:
    from foveate.data.plan import MediaPlan, Plan
    from foveate.data.spec import PreprocessSpec

COLUMNS = ("view", "frame", "row", "col", "global_row", "global_col", "kind")


def layout(plan: Plan) -> VisualLayout:
    """The visual tokens of a planned request, separators included, in prompt order.

    view: index into the item's `MediaPixels.pixels` (of a clip: the temporal unit). row, col: the token in that view.
    Tiled maps (LLaVA-NeXT, LLaVA-OneVision): view 0 is the base, global_row and global_col count in the map without its
    padding; where the map was resized, row and col name the patch nearest to the token. A separator has the view and
    frame of the token before it and the global_row of the row it closes, -1 elsewhere.
    """
    parts = []
    for index, media in enumerate(plan.media):
        where = torch.cat([torch.arange(s.start, s.start + s.length) for s in plan.spans if s.media == index])
        columns = _columns(media, plan.spec)
        parts.append(
            VisualLayout(media=torch.full_like(where, index), position=where, size=torch.ones(len(where)), **columns)
        )
    return VisualLayout.join(parts)


def view_sizes(media: MediaPlan, spec: PreprocessSpec) -> tuple[int, ...]:
    """Visual tokens, without separators, of each view of a picture or unit of a clip that has any."""
    columns = _columns(media, spec)
    counts = torch.bincount(columns["view"][columns["kind"] != NEWLINE])
    return tuple(counts[counts > 0].tolist())


def _columns(media: MediaPlan, spec: PreprocessSpec) -> dict[str, Tensor]:
    """The tokens of one picture or clip: a column [num_tokens] int64 for each name in COLUMNS."""
    first = media.levels[0]
    unit, row, col = _cells(first.units, first.rows, first.cols)
    if media.kind == "video":
        table = [unit, unit * first.frames, row, col, row, col, torch.full_like(unit, VALID)]
    else:
        table = _image_columns(media, spec, unit, row, col)
    if media.kept is not None:
        table = [torch.cat(pair) for pair in zip(table, _map_columns(media, spec))]
    elif media.num_tokens > media.num_features:  # LLaVA-OneVision closes a clip, or one of several pictures
        last = [int(table[0][-1]), int(table[1][-1]), -1, -1, -1, -1, NEWLINE]
        table = [torch.cat([column, torch.tensor([value])]) for column, value in zip(table, last)]
    return dict(zip(COLUMNS, table, strict=True))


def _cells(units: int, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """(unit, row, col) of units x rows x cols cells in raster order, [units * rows * cols] int64 each."""
    cell = torch.arange(units * rows * cols)
    return cell // max(rows * cols, 1), cell // max(cols, 1) % max(rows, 1), cell % max(cols, 1)


def _image_columns(media: MediaPlan, spec: PreprocessSpec, unit: Tensor, row: Tensor, col: Tensor) -> list[Tensor]:
    """Whole views of a picture: tiles have a place in the whole picture, a view of all of it has one if it is alone."""
    level, views = media.levels[0], media.views[: media.levels[0].units]
    in_map = torch.tensor([view.scale == 1 or len(media.views) == 1 for view in views])[unit]
    rows = torch.tensor([view.row for view in views])[unit] * level.rows + row
    cols = torch.tensor([view.col for view in views])[unit] * level.cols + col
    boxes = torch.tensor([view.box for view in views], dtype=torch.float64)[unit]  # x0, y0, x1, y1
    cell = spec.patch_size * spec.downsample  # a view may end in pixels that no patch covers
    outside = torch.zeros(len(unit), dtype=torch.bool)
    for axis, index in ((0, col), (1, row)):
        step = (boxes[:, axis + 2] - boxes[:, axis]) * cell / media.view_size[axis]
        start = boxes[:, axis] + index * step
        outside |= (start + step <= 1e-6) | (start >= media.size[axis] - 1e-6)
    kind = torch.where(outside, PADDING, VALID)
    minus = torch.full_like(unit, -1)
    return [unit, minus, row, col, torch.where(in_map, rows, minus), torch.where(in_map, cols, minus), kind]


def _map_columns(media: MediaPlan, spec: PreprocessSpec) -> list[Tensor]:
    """The map of all tiles without its padding, each row closed by a separator."""
    top, left, kept_rows, kept_cols = media.kept  # type: ignore[misc]
    level, side = media.levels[1], spec.side
    tile_cols = media.canvases[1].size[0] // spec.tile_size
    _, row, col = _cells(1, level.rows, level.cols + 1)
    newline = col == level.cols
    near = col.clamp(max=max(level.cols - 1, 0))
    patch_row = top + (2 * row + 1) * kept_rows // (2 * max(level.rows, 1))
    patch_col = left + (2 * near + 1) * kept_cols // (2 * max(level.cols, 1))
    view = 1 + patch_row // side * tile_cols + patch_col // side
    minus = torch.full_like(row, -1)
    return [
        view,
        minus,
        torch.where(newline, minus, patch_row % side),
        torch.where(newline, minus, patch_col % side),
        row,
        torch.where(newline, minus, col),
        torch.where(newline, NEWLINE, VALID),
    ]


def mrope(plan: Plan, tokens_per_second: float | None = None) -> Tensor:
    """Time, row and column positions of the whole prompt: [3, L] int64 (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text advances all three by one a token; after a picture they go on from the longer of its sides. tokens_per_second:
    of the vision config, where the times of clips are in seconds (Qwen2.5-VL); None: units of a clip are one apart.
    Qwen3-VL's units of a clip stand apart in the prompt, so each is a picture of its own.
    """
    parts, at = [], 0
    for span in plan.spans:
        if span.media < 0:
            parts.append((torch.arange(span.length) + at).expand(3, -1))
            at += span.length
            continue
        media = plan.media[span.media]
        level = media.levels[0]
        unit, row, col = _cells(span.length // (level.rows * level.cols), level.rows, level.cols)
        if tokens_per_second is not None and media.kind == "video":
            unit = (unit * (tokens_per_second * torch.tensor(media.seconds_per_unit))).long()
        parts.append(torch.stack([unit, row, col]) + at)
        at += max(level.rows, level.cols)
    return torch.cat(parts, dim=1)
