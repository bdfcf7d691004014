"""Labels for every patch of every view, rasterised from the boxes of a sample: what the "dense" loss learns from.

Five channels a patch: shape, colour, and up to three characters in reading order. 0 is background, IGNORE means that
nothing can be said (a character too small to be read at this scale).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from foveate.world.vocabulary import COLOURS, DIGITS, SHAPES

if TYPE_CHECKING:
    from foveate.data.plan import View
    from foveate.data.sample import Box

IGNORE = -100
CHAR_SLOTS = 3
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1) + (len(DIGITS) + 1,) * CHAR_SLOTS
"""Classes of each channel, background included."""
CHANNELS = len(CLASSES)
MIN_CHAR_PIXELS = 5.0
"""A character lower than this many pixels in the view cannot be read, so it is neither label nor background."""

_SHAPE = {name: i + 1 for i, name in enumerate(SHAPES)}
_COLOUR = {name: i + 1 for i, name in enumerate(COLOURS)}
_CHAR = {name: i + 1 for i, name in enumerate(DIGITS)}


def rasterise(objects: Sequence[Box], views: Sequence[View], side: int, tile_size: int) -> np.ndarray:
    """Labels [len(views), side, side, CHANNELS] int64 of views of one picture (or frame).

    objects: boxes in pixels of the picture; later ones lie on top. side: patches along a view; tile_size: its pixels.
    """
    labels = np.zeros((len(views), side, side, CHANNELS), np.int64)
    if not objects or not views:
        return labels
    boxes = np.array([(b.x0, b.y0, b.x1, b.y1) for b in objects], np.float64)
    frames = np.array([v.box for v in views], np.float64)
    origin, span = frames[:, None, :2], frames[:, None, 2:] - frames[:, None, :2]
    # [views, objects, 2]: edges and centres in patches of each view
    low, high = ((boxes[None, :, k : k + 2] - origin) / span * side for k in (0, 2))
    seen = (low < side).all(-1) & (high > 0).all(-1)
    first = np.clip(np.rint(low), 0, side - 1).astype(int)
    last = np.clip(np.maximum(np.rint(high), first + 1), 1, side).astype(int)
    centre = np.floor((low + high) / 2).astype(int)
    inside = (centre >= 0).all(-1) & (centre < side).all(-1)
    readable = (boxes[None, :, 3] - boxes[None, :, 1]) * tile_size / span[..., 1] >= MIN_CHAR_PIXELS

    chars = [j for j, box in enumerate(objects) if box.chars in _CHAR]
    for j in sorted(chars, key=lambda j: boxes[j, 0] + boxes[j, 2]):
        code = _CHAR[objects[j].chars]
        for view in np.flatnonzero(inside[:, j]):
            cell = labels[view, centre[view, j, 1], centre[view, j, 0], 2:]
            if not readable[view, j]:
                cell[:] = IGNORE
                continue
            free = np.flatnonzero(cell == 0)
            if free.size:
                cell[free[0]] = code
    for j, box in enumerate(objects):
        shape, colour = _SHAPE.get(box.shape, 0), _COLOUR.get(box.colour, 0)
        if box.chars is not None or not (shape or colour):
            continue
        for view in np.flatnonzero(seen[:, j]):
            (x0, y0), (x1, y1) = first[view, j], last[view, j]
            labels[view, y0:y1, x0:x1, 0] = shape
            labels[view, y0:y1, x0:x1, 1] = colour
    return labels
