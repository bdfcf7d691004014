"""How the families of transformers fit a picture or a frame into views: pure geometry, no pixels.

Every rule here is one of a published processor, written down as sizes: the picture is resized (once or several times in
a row), laid on a canvas, and the canvas is cut into views in raster order. `foveate.data.execute` does that to pixels.
Sources: LLaVA (arXiv 2304.08485), LLaVA-NeXT and LLaVA-OneVision (2408.03326), Qwen2-VL (2409.12191), Qwen2.5-VL
(2502.13923), InternVL 2.5 (2412.05271), Idefics3 (2408.12637), SmolVLM (2504.05299), as transformers 5.19 to 5.23 has
them. NVILA has its own rules, in `foveate.data.tiling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from foveate.data.spec import PreprocessSpec
from foveate.data.tiling import Level, View, tile_shape
from foveate.errors import InputError

MAX_SIDE = 4096
"""Longest side that Idefics3 and SmolVLM resize to, in pixels."""


class Canvas(NamedTuple):
    """One way through a picture: resized to each (width, height) in turn, laid at `place` on black of `size`, cut.

    square: first centred on a square of its longer side, in the mean colour of the spec.
    """

    resizes: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    place: tuple[int, int] = (0, 0)
    square: bool = False


@dataclass(frozen=True)
class Fit:
    """What one picture, or the frames of a clip, become.

    canvases: cut one after the other, they give `views` (of a clip: the views of one frame). view: (width, height) of a
    view in pixels. levels: units x rows x cols of language-model tokens. newlines: separators among them. kept: in mode
    "anyres" (row, col, rows, cols) of the map of all tiles' patches that lies on the picture; it becomes levels[1].
    """

    canvases: tuple[Canvas, ...]
    view: tuple[int, int]
    views: tuple[View, ...]
    levels: tuple[Level, ...]
    newlines: int = 0
    kept: tuple[int, int, int, int] | None = None

    @property
    def num_tokens(self) -> int:
        """Placeholders, separators among them."""
        return self.newlines + sum(level.units * level.rows * level.cols for level in self.levels)


@lru_cache(maxsize=4096)
def fit_image(width: int, height: int, spec: PreprocessSpec, alone: bool = True) -> Fit:
    """The fit of a picture. alone: no other picture is in the prompt (LLaVA-OneVision tiles only then)."""
    tile, side = spec.tile_size, spec.token_side
    if spec.mode == "anyres" and (alone or spec.family != "llava_onevision"):
        return _anyres(width, height, spec)
    if spec.mode == "native":
        w, h = smart_resize(width, height, spec.patch_size * spec.downsample, spec.min_area, spec.max_area)
        cell = spec.patch_size * spec.downsample
        return _fit((width, height), (Canvas(((w, h),), (w, h)),), (w, h), (Level(1, h // cell, w // cell),))
    if spec.mode == "crop":
        canvases: tuple[Canvas, ...] = (_crop(width, height, spec),)
    elif spec.mode == "dynamic":
        cols, rows = tile_shape(width, height, tile, spec.min_tiles, spec.max_tiles)
        canvases = (_whole(cols * tile, rows * tile), *((_whole(tile, tile),) if cols * rows > 1 else ()))
    elif spec.mode == "split":
        canvases = _split(width, height, spec)
    else:
        canvases = (_whole(tile, tile)._replace(square=spec.mode != "resize"),)
    fit = _fit((width, height), canvases, (tile, tile), (), newlines=int(spec.mode == "anyres"))
    return replace(fit, levels=(Level(len(fit.views), side, side),))


@lru_cache(maxsize=1024)
def fit_clip(width: int, height: int, frames: int, spec: PreprocessSpec) -> Fit:
    """The fit of a clip of `frames` sampled frames of width x height; views are those of one frame."""
    tile = spec.tile_size
    if spec.mode == "native":
        w, h = _native_frame(width, height, frames, spec)
        cell, units = spec.patch_size * spec.downsample, -(-frames // spec.temporal_patch)
        level = Level(units, h // cell, w // cell, spec.temporal_patch)
        return _fit((width, height), (Canvas(((w, h),), (w, h)),), (w, h), (level,))
    resizes = ((tile, tile),)
    if spec.mode == "split":
        resizes = (_longest(width, height, min(spec.video_edge or spec.edge, MAX_SIDE)), *resizes)
    canvas = Canvas(resizes, (tile, tile))
    _, pool_rows, pool_cols = spec.video_pool[0] if spec.video_pool else (1, 1, 1)
    level = Level(frames, -(-spec.token_side // pool_rows), -(-spec.token_side // pool_cols))
    return _fit((width, height), (canvas,), (tile, tile), (level,), 1 if spec.family == "llava_onevision" else 0)


def smart_resize(
    width: int, height: int, factor: int, least: int, most: int, frames: int = 1, rounded: int = 1
) -> tuple[int, int]:
    """(width, height) of multiples of `factor`, the aspect ratio about kept, with least..most pixels in all.

    frames, rounded: frames whose pixels count together (Qwen3-VL), and that number rounded to whole temporal patches,
    which decides whether the limits are kept. Halves round to even, as in Qwen2-VL.
    """
    w, h = round(width / factor) * factor, round(height / factor) * factor
    if rounded * w * h > most:
        shrink = math.sqrt(frames * height * width / most)
        w, h = (max(factor, math.floor(length / shrink / factor) * factor) for length in (width, height))
    elif rounded * w * h < least:
        grow = math.sqrt(least / (frames * height * width))
        w, h = (math.ceil(length * grow / factor) * factor for length in (width, height))
    return w, h


def _native_frame(width: int, height: int, frames: int, spec: PreprocessSpec) -> tuple[int, int]:
    """Size of each frame: Qwen2-VL counts the pixels of a frame, Qwen3-VL those of the clip."""
    factor, joined = spec.patch_size * spec.downsample, spec.temporal_patch
    least, most = spec.video_min_area, spec.video_max_area
    if spec.family != "qwen3_vl":
        if spec.video_tokens:
            share = int(spec.video_tokens * factor * factor * 0.9) * joined // frames
            most = max(min(most, share), int(least * 1.05))
        return smart_resize(width, height, factor, least, most)
    if spec.video_tokens:
        most = frames * max(min(spec.video_tokens * factor**2, most // frames), int(least * 1.05))
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        width, height = int(width * scale), int(height * scale)
    if max(width, height) > 200 * min(width, height):
        raise InputError(f"frames of {width}x{height} px are too long and thin; the limit is 200 to 1")
    frames = max(frames, joined)  # the last frame is repeated to fill a temporal patch
    return smart_resize(width, height, factor, least, most, frames, round(frames / joined) * joined)


def _whole(width: int, height: int) -> Canvas:
    return Canvas(((width, height),), (width, height))


def _crop(width: int, height: int, spec: PreprocessSpec) -> Canvas:
    """Shortest side to `edge`, then the centre square; a side shorter than it is padded with black."""
    short, long = sorted((width, height))
    longer = int(spec.edge * long / short)
    w, h = (spec.edge, longer) if width <= height else (longer, spec.edge)
    tile = spec.tile_size
    return Canvas(((w, h),), (tile, tile), (-((w - tile) // 2), -((h - tile) // 2)))


def _longest(width: int, height: int, edge: int) -> tuple[int, int]:
    """(width, height) with the longer side `edge`, the other one even."""
    aspect = width / height
    if width >= height:
        other = int(edge / aspect)
        return edge, max(other + other % 2, 1)
    other = int(edge * aspect)
    return max(other + other % 2, 1), edge


def _split(width: int, height: int, spec: PreprocessSpec) -> tuple[Canvas, ...]:
    """Longest side to `edge`, up to whole tiles; the tiles, then the whole; or one view when one tile holds it."""
    tile = spec.tile_size
    w, h = first = _bounded(*_longest(width, height, spec.edge))
    if spec.max_tiles == 1:
        return (Canvas((first, (tile, tile)), (tile, tile)),)
    aspect = w / h
    if w >= h:
        w = math.ceil(w / tile) * tile
        h = math.ceil(int(w / aspect) / tile) * tile
    else:
        h = math.ceil(h / tile) * tile
        w = math.ceil(int(h * aspect) / tile) * tile
    w, h = max(w, tile), max(h, tile)
    tiles = Canvas((first, (w, h)), (w, h))
    return (tiles,) if w == h == tile else (tiles, Canvas((first, (w, h), (tile, tile)), (tile, tile)))


def _bounded(width: int, height: int) -> tuple[int, int]:
    if max(width, height) <= MAX_SIDE:
        return width, height
    aspect = width / height
    if width >= height:
        return MAX_SIDE, max(int(MAX_SIDE / aspect), 1)
    return max(int(MAX_SIDE * aspect), 1), MAX_SIDE


def best_canvas(width: int, height: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """(height, width) of the canvas on which the picture keeps most pixels, and of those the least empty one."""
    best, most, least = None, 0, math.inf
    for rows, cols in pinpoints:
        scale = min(cols / width, rows / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if used > most or (used == most and rows * cols - used < least):
            best, most, least = (rows, cols), used, rows * cols - used
    if best is None or most == 0:
        raise InputError(f"a picture of {width}x{height} px is too long and thin for this model; crop it")
    return best


def _anyres(width: int, height: int, spec: PreprocessSpec) -> Fit:
    """The base view and the padded tiles; tokens of the base, then of the map without its padding, row by row."""
    tile, side = spec.tile_size, spec.side
    rows, cols = best_canvas(width, height, spec.pinpoints)
    scale_w, scale_h = cols / width, rows / height
    if scale_w < scale_h:
        w, h = cols, min(math.ceil(height * scale_w), rows)
    else:
        w, h = min(math.ceil(width * scale_h), cols), rows
    tiled = Canvas(((w, h),), (cols, rows), ((cols - w) // 2, (rows - h) // 2))
    kept = _unpad(width, height, cols // tile * side, rows // tile * side)
    kept_rows, kept_cols = out_rows, out_cols = kept[2:]
    if spec.max_anyres:
        ratio = math.sqrt(kept_rows * kept_cols / (spec.max_anyres * side**2))
        if ratio > 1.1:
            out_rows, out_cols = int(kept_rows // ratio), int(kept_cols // ratio)
    levels = (Level(1, side, side), Level(1, out_rows, out_cols))
    return _fit((width, height), (_whole(tile, tile), tiled), (tile, tile), levels, out_rows, kept)


def _unpad(width: int, height: int, cols: int, rows: int) -> tuple[int, int, int, int]:
    """(row, col, rows, cols) of the part of a map of rows x cols patches on which the picture lies."""
    if width / height > cols / rows:
        pad = (rows - int(round(height * (cols / width), 7))) // 2
        return pad, 0, rows - 2 * pad, cols
    pad = (cols - int(round(width * (rows / height), 7))) // 2
    return 0, pad, rows, cols - 2 * pad


def _fit(
    source: tuple[int, int],
    canvases: tuple[Canvas, ...],
    view: tuple[int, int],
    levels: tuple[Level, ...],
    newlines: int = 0,
    kept: tuple[int, int, int, int] | None = None,
) -> Fit:
    """The fit with its views: scale 1 for tiles of a larger canvas, 0 for a view of the whole picture."""
    views: list[View] = []
    for canvas in canvases:
        rows, cols = canvas.size[1] // view[1], canvas.size[0] // view[0]
        tiled = int(rows * cols > 1 or (len(canvases) > 1 and canvas is canvases[kept is not None]))
        views += [
            View(_box(source, canvas, view, row, col), tiled, row, col) for row in range(rows) for col in range(cols)
        ]
    return Fit(canvases, view, tuple(views), levels, newlines, kept)


def _box(
    source: tuple[int, int], canvas: Canvas, view: tuple[int, int], row: int, col: int
) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of a view in pixels of the source; it leaves the picture where the view holds padding."""
    out = []
    for corner in ((col, row), (col + 1, row + 1)):
        for axis in (0, 1):
            length = max(source) if canvas.square else source[axis]
            offset = (length - source[axis]) // 2
            at = corner[axis] * view[axis] - canvas.place[axis]
            out.append(at * length / canvas.resizes[-1][axis] - offset)
    return tuple(out)  # type: ignore[return-value]
