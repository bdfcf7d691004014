"""Where the views of a picture lie: pure geometry, no pixels (specification: NVILA, arXiv 2412.04468, section 3.1).

A *view* is one square of `tile_size` pixels that the vision tower sees. Shapes are (columns, rows) when they describe
a choice by aspect ratio and (rows, columns) in a `block`, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from foveate.data.spec import PreprocessSpec


class View(NamedTuple):
    """One square that the tower sees. box = (x0, y0, x1, y1) in pixels of the source (may leave it in mode "pad").

    scale: index of the S2 scale; in other modes 0 = the whole picture (thumbnail, base), 1 = a tile. row, column: place
    in that scale's grid of tiles. frame: position among the sampled frames of a clip, 0 for a picture.
    """

    box: tuple[float, float, float, float]
    scale: int = 0
    row: int = 0
    col: int = 0
    frame: int = 0


class Level(NamedTuple):
    """Tokens of one part of a picture or one pooling level of a clip: units x rows x cols, frames joined per unit."""

    units: int
    rows: int
    cols: int
    frames: int = 1


@dataclass(frozen=True)
class ImageLayout:
    """Views of one picture and the tokens they become.

    resizes: ((columns, rows), ...) the whole picture is resized to columns x rows tiles and cut in raster order, one
    entry after the other; this yields `views`. block: (rows, cols) of tiles in the joined S2 map, or None.
    grid: (units, rows, cols) of tokens: one unit for a picture, one for each tile in mode "dynamic".
    """

    views: tuple[View, ...]
    resizes: tuple[tuple[int, int], ...]
    block: tuple[int, int] | None
    grid: tuple[int, int, int]


@lru_cache(maxsize=64)
def candidate_shapes(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles <= columns * rows <= max_tiles, by area, then columns."""
    sides = range(1, max_tiles + 1)
    shapes = [(w, h) for w in sides for h in sides if min_tiles <= w * h <= max_tiles]
    return tuple(sorted(shapes, key=lambda s: (s[0] * s[1], s[0])))


def tile_shape(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) whose aspect ratio is nearest to the picture's.

    On an exact tie the larger area wins if the picture has more than half of its pixels (specification A.2).
    """
    aspect, best, best_gap = width / height, (1, 1), float("inf")
    for w, h in candidate_shapes(min_tiles, max_tiles):
        gap = abs(aspect - w / h)
        if gap < best_gap or (gap == best_gap and width * height > 0.5 * tile * tile * w * h):
            best, best_gap = (w, h), gap
    return best


@lru_cache(maxsize=4096)
def image_layout(width: int, height: int, spec: PreprocessSpec, tiled: bool = True) -> ImageLayout:
    """Views, block and token grid of a picture of width x height; tiled=False: one square."""
    side = spec.token_side
    if tiled and spec.mode == "dynamic_s2":
        return _dynamic_s2(width, height, spec)
    if tiled and spec.mode == "dynamic":
        cols, rows = tile_shape(width, height, spec.tile_size, spec.min_tiles, spec.max_tiles)
        resizes = ((cols, rows),) + (((1, 1),) if cols * rows > 1 else ())
        views = _grid_views(width, height, cols, rows, scale=1 if cols * rows > 1 else 0)
        if cols * rows > 1:
            views += (View((0.0, 0.0, float(width), float(height))),)
        return ImageLayout(views, resizes, None, (len(views), side, side))
    box = (0.0, 0.0, float(width), float(height))
    if spec.mode == "pad":  # every picture and frame, centred in a square of its longer side
        long = max(width, height)
        x0, y0 = -float((long - width) // 2), -float((long - height) // 2)
        box = (x0, y0, x0 + long, y0 + long)
    return ImageLayout((View(box),), ((1, 1),), None, (1, side, side))


def _dynamic_s2(width: int, height: int, spec: PreprocessSpec) -> ImageLayout:
    """All scales but the last as squares, the last one tiled by aspect ratio; tokens of one joined map."""
    tile, scales = spec.tile_size, spec.scales
    least = (scales[-1] // scales[0]) ** 2
    resizes = [(s // tile, s // tile) for s in scales[:-1]]
    resizes.append(tile_shape(width, height, tile, least, spec.max_tiles))
    views: list[View] = []
    for scale, (cols, rows) in enumerate(resizes):
        views += _grid_views(width, height, cols, rows, scale)
    cols, rows = resizes[spec.resize_to_scale]
    grid = (1, rows * spec.token_side, cols * spec.token_side)
    return ImageLayout(tuple(views), tuple(resizes), (resizes[-1][1], resizes[-1][0]), grid)


def _grid_views(width: int, height: int, cols: int, rows: int, scale: int) -> tuple[View, ...]:
    w, h = width / cols, height / rows
    return tuple(View((c * w, r * h, (c + 1) * w, (r + 1) * h), scale, r, c) for r in range(rows) for c in range(cols))
