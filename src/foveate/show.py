"""Pictures of what the language model still sees: kept visual tokens clear, dropped ones faded, over the input itself.

Works for every method and model, because it reads only the `VisualLayout` and the indices that stayed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from foveate.adapters.layout import VisualLayout
    from foveate.data.plan import MediaPlan, Plan
    from foveate.data.spec import PreprocessSpec

VEIL, FADE = (62, 76, 90), 0.84
"""What a dropped token is covered with, and how much: not white, which pictures of documents are themselves."""
GAP = 6
"""Pixels between the panels of a strip."""
COLUMNS = 8
"""Panels in a line, and by default of one clip."""


def draw_grid(picture: Image.Image, kept: np.ndarray, side: int = 256) -> Image.Image:
    """The picture with one cell a token. kept: float or bool [rows, cols], 1 stays, 0 is faded; shares are in between.

    side: length of the longer side of the result in pixels. Raises InputError for an empty grid.
    """
    from PIL import Image, ImageDraw

    rows, cols = kept.shape
    if not rows or not cols:
        raise InputError(f"a token grid of {rows} x {cols} cannot be drawn")
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    small = min(picture.size) * scale > min(picture.size)
    image = picture.convert("RGB").resize(
        (width, height), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )
    veil = Image.fromarray(np.uint8(np.clip(1 - np.asarray(kept, float), 0, 1) * 255 * FADE))
    image.paste(Image.new("RGB", image.size, VEIL), mask=veil.resize(image.size, Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(image, "RGBA")
    for row in range(1, rows):
        pen.line([(0, row * height // rows), (width, row * height // rows)], fill=(255, 255, 255, 90))
    for col in range(1, cols):
        pen.line([(col * width // cols, 0), (col * width // cols, height)], fill=(255, 255, 255, 90))
    return image


def strip(panels: Sequence[Image.Image], columns: int = COLUMNS) -> Image.Image:
    """The panels beside each other on white, aligned at the top, `columns` of them in a line."""
    from PIL import Image

    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    widths = [sum(panel.width for panel in line) + GAP * (len(line) - 1) for line in lines]
    heights = [max(panel.height for panel in line) for line in lines]
    sheet = Image.new("RGB", (max(widths), sum(heights) + GAP * (len(lines) - 1)), "white")
    top = 0
    for line, height in zip(lines, heights):
        left = 0
        for panel in line:
            sheet.paste(panel, (left, top))
            left += panel.width + GAP
        top += height + GAP
    return sheet


def grids(layout: VisualLayout, kept: Any, media: int) -> list[tuple[int, np.ndarray]]:
    """(frame, float [rows, cols]) for each panel of one media item; frame -1 for a picture. A dropped token is 0.

    layout: all visual features of the request (`VisualLayout.features()`). kept: int64 [K], indices into it.
    A picture gives its joined grid, then one grid for every view that has no place in the whole (a thumbnail).
    """
    stays = np.zeros(len(layout))
    stays[np.asarray(kept, dtype=np.int64)] = 1.0
    fields = {name: np.asarray(getattr(layout, name)) for name in ("media", "view", "frame", "row", "col")}
    whole_row, whole_col = np.asarray(layout.global_row), np.asarray(layout.global_col)
    mine = fields["media"] == media
    panels = []
    joined = mine & (whole_row >= 0) & (fields["frame"] < 0)
    if joined.any():
        panels.append((-1, _grid(whole_row[joined], whole_col[joined], stays[joined])))
    rest = mine & ~joined
    for view in np.unique(fields["view"][rest]):
        of_view = rest & (fields["view"] == view)
        frame = int(fields["frame"][of_view][0])
        panels.append((frame, _grid(fields["row"][of_view], fields["col"][of_view], stays[of_view])))
    return panels


def _grid(row: np.ndarray, col: np.ndarray, stays: np.ndarray) -> np.ndarray:
    cells = np.zeros((int(row.max()) + 1, int(col.max()) + 1))
    np.maximum.at(cells, (row, col), stays)
    return cells


def kept_strip(
    pictures: Sequence[Sequence[Image.Image]],
    layout: VisualLayout,
    kept: Any,
    *,
    side: int = 256,
    max_panels: int | None = COLUMNS,
) -> Image.Image:
    """All media of a request in one strip, each as the model sees it after a reduction.

    pictures: for each media item its picture, or the frames that were sampled of a clip; a group of frames is drawn
    over its first one. max_panels: of a long clip, that many groups at even distances are shown; None: all.
    """
    panels = []
    for index, own in enumerate(pictures):
        found = grids(layout, kept, index)
        if max_panels and len(found) > max_panels:
            found = [found[round(i * (len(found) - 1) / (max_panels - 1))] for i in range(max_panels)]
        for frame, cells in found:
            at = min(max(frame, 0), len(own) - 1)
            panels.append(draw_grid(own[at], cells, side if len(found) <= 3 else side // 2))
    if not panels:
        raise InputError("there is no visual token to show; the request holds text only")
    return strip(panels)


def kept_picture(plan: Plan, spec: PreprocessSpec, layout: VisualLayout, kept: Any, **options: Any) -> Image.Image:
    """`kept_strip` for a planned request: its pictures, and the sampled frames of its clips, are read again.

    layout: of the adapter for this plan, separators left out or not. kept: as `foveate.vlm.Answer.kept` (None: all).
    """
    from foveate.data.images import load_image
    from foveate.data.video import decode_frames

    layout = layout.features()
    pictures = []
    for media in plan.media:
        clip = media.kind == "video"
        own = decode_frames(media.source, media.frames, spec=spec) if clip else [load_image(media.source, spec)]
        pictures.append([_seen(picture, media) for picture in own])
    return kept_strip(pictures, layout, range(len(layout)) if kept is None else kept, **options)


def _seen(picture: Image.Image, media: MediaPlan) -> Image.Image:
    """What the tower sees of a picture that is not tiled: a cut-out, or padding around it, belongs to its grid."""
    boxes = {view.box for view in media.views}
    box = tuple(round(edge) for edge in boxes.pop())
    return picture if boxes or box == (0, 0, *picture.size) else picture.crop(box)


def png(picture: Image.Image) -> bytes:
    """The picture as an encoded PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
