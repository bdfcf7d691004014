"""The map algebra of NVILA: tiles to maps, scales joined (Dynamic-S2), maps to chunks, frames pooled. Pure functions.

Maps are channels-last here, [..., rows, columns, C], so that stacked pictures of one grid need no transposes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.data.spec import PreprocessSpec
from foveate.errors import InputError


def join_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[..., rows*columns, h, w, C] tiles in raster order -> one map [..., rows*h, columns*w, C]."""
    *lead, _, h, w, channels = tiles.shape
    grid = tiles.reshape(*lead, rows, columns, h, w, channels).transpose(-4, -3)
    return grid.reshape(*lead, rows * h, columns * w, channels)


def split_tiles(maps: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `join_tiles`: [..., rows*h, columns*w, C] -> [..., rows*columns, h, w, C]."""
    *lead, height, width, channels = maps.shape
    h, w = height // rows, width // columns
    grid = maps.reshape(*lead, rows, h, columns, w, channels).transpose(-4, -3)
    return grid.reshape(*lead, rows * columns, h, w, channels)


def resize_area(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Mean over the area of each target cell: [n, h, w, C] -> [n, rows, columns, C], in float32, same dtype out.

    Whole-number enlargement is replication, and takes that fast path; else cell i averages the source cells
    floor(i*h/rows) .. ceil((i+1)*h/rows), as `interpolate(mode="area")` does.
    """
    n, h, w, channels = maps.shape
    if (h, w) == (rows, columns):
        return maps
    if rows % h == 0 and columns % w == 0:
        grid = maps[:, :, None, :, None].expand(n, h, rows // h, w, columns // w, channels)
        return grid.reshape(n, rows, columns, channels)
    pooled = F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2).float(), (rows, columns))
    return pooled.permute(0, 2, 3, 1).to(maps.dtype)


def tiles_per_image(grid: tuple[int, int], spec: PreprocessSpec) -> int:
    """Views that the tower sees for one picture whose last scale has `grid` = (rows, columns) tiles.

    (0, 0) is one square alone. Without S2 it is the only grid: each tile of a Lite picture counts as a picture.
    """
    if grid == (0, 0) or spec.mode != "dynamic_s2":
        return 1
    return sum((scale // spec.scales[0]) ** 2 for scale in spec.scales[:-1]) + grid[0] * grid[1]


def join_scales(tiles: Tensor, grid: tuple[int, int], spec: PreprocessSpec) -> tuple[Tensor, tuple[int, int]]:
    """Dynamic-S2 maps of pictures that share one grid, and the block of chunks that each map falls into.

    tiles: [n, tiles, side, side, C]; grid: (rows, columns) of the last scale, or (0, 0) for a single square.
    Returns [n, block rows*side, block columns*side, C*scales], channels from the smallest scale to the largest.
    Source: NVILA's merge of dynamic S2 features; a square alone repeats its map along the channels.
    """
    if grid == (0, 0):
        return tiles[:, 0].repeat(1, 1, 1, len(spec.scales)), (1, 1)
    blocks = [(scale // spec.scales[0],) * 2 for scale in spec.scales[:-1]] + [grid]
    maps, start = [], 0
    for rows, columns in blocks:
        maps.append(join_tiles(tiles[:, start : start + rows * columns], rows, columns))
        start += rows * columns
    target = maps[spec.resize_to_scale]
    joined = torch.cat([resize_area(m, target.shape[1], target.shape[2]) for m in maps], dim=-1)
    return joined, blocks[spec.resize_to_scale]


def pool_frames(frames: Tensor, level: Sequence[int]) -> Tensor:
    """Mean over groups of (frames, rows, columns): [T, h, w, D] -> [ceil(T/t), ceil(h/r), ceil(w/c), D].

    The last group of an axis may be shorter; it is the mean of what is there (the official code refuses such a clip).
    """
    for axis, size in enumerate(level):
        frames = _pool_axis(frames, axis, size)
    return frames


def split_by_image(count: int, grids: Sequence[tuple[int, int]], spec: PreprocessSpec) -> list[int]:
    """Tiles of each picture; raises InputError if they do not add up to `count`."""
    sizes = [tiles_per_image(grid, spec) for grid in grids]
    if sum(sizes) != count:
        raise InputError(f"pixel_values hold {count} tiles, image_grids {list(grids)} ask for {sum(sizes)}")
    return sizes


def _pool_axis(x: Tensor, axis: int, size: int) -> Tensor:
    length = x.shape[axis]
    whole = length // size * size
    if size == 1:
        return x
    parts = []
    if whole:
        parts.append(x.narrow(axis, 0, whole).unflatten(axis, (whole // size, size)).mean(axis + 1))
    if whole < length:
        parts.append(x.narrow(axis, whole, length - whole).mean(axis, keepdim=True))
    return torch.cat(parts, dim=axis)
