"""A plan to the model's inputs: the only place where pixels are cut, resized and normalised.

Exact: pixels equal the official NVILA code bit for bit (PIL bicubic resize to whole tiles, cuts, x * (1 / 255), then
(x - mean) / std in float32), and those of the families of transformers their PIL processors. Views stay uint8 until the
model asks for floats: one table look-up. Putting patches into rows is the model's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from foveate.data.fit import Canvas
from foveate.data.images import load_image
from foveate.data.plan import MediaPlan, Plan
from foveate.data.spec import PreprocessSpec
from foveate.data.video import decode_frames
from foveate.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class MediaPixels:
    """The pixels of one picture or clip.

    pixels: [n, 3, h, w] uint8, its views or frames in the order of the tower. grid: (n or temporal units, rows, cols)
    of the tower's patches. size: (width, height) of the source.
    """

    kind: str
    pixels: np.ndarray
    grid: tuple[int, int, int]
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the model takes. B requests; n image views, f frames and S = tile_size over all of them, in order.

    input_ids, attention_mask: [B, L] int64. labels: [B, L] int64 or None. media: every picture and clip, in the order
    of `Plan.media`. The others are NVILA's form of the same pixels: views: [n, 3, S, S] uint8 or None.
    image_grids: [placeholder blocks of pictures, 2] int64: (rows, cols) of tiles of the joined S2 map, (0, 0) for one
    plain square; in mode "dynamic" each tile is such a block. frames: [f, 3, S, S] uint8 or None.
    video_frames: [clips] int64, frames of each clip.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None
    views: np.ndarray | None
    image_grids: torch.Tensor | None
    frames: np.ndarray | None
    video_frames: torch.Tensor | None
    spec: PreprocessSpec
    media: tuple[MediaPixels, ...] = ()

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """[n, 3, S, S] float32, normalised; computed at each call."""
        return None if self.views is None else normalise(self.views, self.spec)

    @property
    def pixel_values_videos(self) -> torch.Tensor | None:
        """[f, 3, S, S] float32, normalised; computed at each call."""
        return None if self.frames is None else normalise(self.frames, self.spec)

    def model_kwargs(self, device: Any = None, dtype: Any = None) -> dict[str, torch.Tensor]:
        """Keyword arguments for the model's `forward` and `generate`; what is absent is left out.

        device: where to put all tensors. dtype: of the pixel tensors. Labels are not included.
        """
        found = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": self.pixel_values,
            "image_grids": self.image_grids,
            "pixel_values_videos": self.pixel_values_videos,
            "video_frames": self.video_frames,
        }
        return {
            key: value.to(device=device, dtype=dtype if key.startswith("pixel") else None)
            for key, value in found.items()
            if value is not None
        }


def execute(plan: Plan) -> Inputs:
    """The inputs of one request. Raises InputError when a file is damaged or has changed since it was planned."""
    import torch

    views: np.ndarray | None = None
    frames: np.ndarray | None = None
    grids: list[tuple[int, int]] = []
    clips: list[int] = []
    if plan.spec.family:
        media = tuple(cut_media(item, plan.spec) for item in plan.media)
    else:
        views, grids, frames, clips = cut_views(plan.media, plan.spec)
        media = tuple(_slices(plan.media, plan.spec, views, frames))
    ids = torch.from_numpy(plan.input_ids.copy())[None]
    return Inputs(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=None if plan.labels is None else torch.from_numpy(plan.labels.copy())[None],
        views=views,
        image_grids=torch.tensor(grids, dtype=torch.int64) if grids else None,
        frames=frames,
        video_frames=torch.tensor(clips, dtype=torch.int64) if clips else None,
        spec=plan.spec,
        media=media,
    )


def _slices(
    media: Sequence[MediaPlan], spec: PreprocessSpec, views: np.ndarray | None, frames: np.ndarray | None
) -> Iterator[MediaPixels]:
    """The items of `cut_views` one by one, without a copy."""
    stacks, at = {"image": views, "video": frames}, {"image": 0, "video": 0}
    for item in media:
        count = len(item.frames) if item.kind == "video" else len(item.views)
        pixels = stacks[item.kind][at[item.kind] : at[item.kind] + count]  # type: ignore[index]
        at[item.kind] += count
        yield MediaPixels(item.kind, pixels, (count, spec.side, spec.side), item.size)


def cut_media(item: MediaPlan, spec: PreprocessSpec) -> MediaPixels:
    """The pixels of one picture or clip for a family of transformers; needs no torch. Raises as `execute`."""
    width, height = item.view_size
    pixels = np.empty((len(item.views), 3, height, width), np.uint8)
    if item.kind == "image":
        image = load_image(item.source, spec)
        if image.size != item.size:
            raise InputError(f"{item.name}: {_by(image.size)} pixels, but it was planned as {_by(item.size)}")
        _lay(image, item.canvases, spec, pixels)
    else:

        def cut(image: Image.Image) -> np.ndarray:
            out = np.empty((1, 3, height, width), np.uint8)
            _lay(image, item.canvases, spec, out)
            return out[0]

        for number, frame in enumerate(decode_frames(item.source, item.frames, item.info, spec, cut)):
            pixels[number] = frame
    units = len(item.views) // (spec.temporal_patch if item.kind == "video" else 1)
    return MediaPixels(item.kind, pixels, (units, height // spec.patch_size, width // spec.patch_size), item.size)


def _lay(image: Image.Image, canvases: Sequence[Canvas], spec: PreprocessSpec, out: np.ndarray) -> None:
    """Fill out [n, 3, h, w] uint8 with the views of each canvas, in raster order."""
    height, width = out.shape[2:]
    resample = Image.Resampling[spec.filter.upper()]
    done: dict[tuple[Any, ...], Image.Image] = {}
    at = 0
    for canvas in canvases:
        laid = _square_of(image, spec) if canvas.square else image
        for step, size in enumerate(canvas.resizes):
            key = (canvas.square, canvas.resizes[: step + 1])
            if key not in done:
                done[key] = laid if laid.size == size else laid.resize(size, resample)
            laid = done[key]
        pixels = np.asarray(laid)
        if canvas.size != laid.size or canvas.place != (0, 0):
            pixels = _placed(pixels, canvas)
        rows, cols = canvas.size[1] // height, canvas.size[0] // width
        tiles = pixels.reshape(rows, height, cols, width, 3).transpose(0, 2, 4, 1, 3)
        out[at : at + rows * cols].reshape(rows, cols, 3, height, width)[:] = tiles
        at += rows * cols


def _placed(pixels: np.ndarray, canvas: Canvas) -> np.ndarray:
    """[h, w, 3] uint8: black with the picture at its place; what lies outside is cut off."""
    (width, height), (x, y) = canvas.size, canvas.place
    out = np.zeros((height, width, 3), np.uint8)
    rows, cols = min(pixels.shape[0] + min(y, 0), height), min(pixels.shape[1] + min(x, 0), width)
    top, left = max(y, 0), max(x, 0)
    part = pixels[max(-y, 0) :, max(-x, 0) :][: min(rows, height - top), : min(cols, width - left)]
    out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out


def cut_views(
    media: Sequence[MediaPlan], spec: PreprocessSpec
) -> tuple[np.ndarray | None, list[tuple[int, int]], np.ndarray | None, list[int]]:
    """(views [n, 3, S, S] uint8, image grids, frames [f, 3, S, S] uint8, frames per clip); needs no torch."""
    size = spec.tile_size
    num_views = sum(len(item.views) for item in media if item.kind == "image")
    num_frames = sum(len(item.frames) for item in media)
    views = np.empty((num_views, 3, size, size), np.uint8) if num_views else None
    frames = np.empty((num_frames, 3, size, size), np.uint8) if num_frames else None
    grids: list[tuple[int, int]] = []
    clips: list[int] = []
    at_view = at_frame = 0
    for item in media:
        if item.kind == "image":
            image = load_image(item.source, spec)
            if image.size != item.size:
                raise InputError(f"{item.name}: {_by(image.size)} pixels, but it was planned as {_by(item.size)}")
            _cut(image, item.resizes, spec, views[at_view : at_view + len(item.views)])  # type: ignore[index]
            at_view += len(item.views)
            grids += [item.block or (0, 0)] * item.blocks
        else:
            squares = decode_frames(item.source, item.frames, item.info, spec, lambda image: _square(image, spec))
            for square in squares:
                frames[at_frame] = square  # type: ignore[index]
                at_frame += 1
            clips.append(len(item.frames))
    return views, grids, frames, clips


def _cut(image: Image.Image, resizes: Sequence[tuple[int, int]], spec: PreprocessSpec, out: np.ndarray) -> None:
    """Fill out [n, 3, S, S] uint8 with the tiles of each resize of the picture, in raster order."""
    size, at = spec.tile_size, 0
    if spec.mode == "pad":
        out[0] = _square(image, spec)
        return
    for cols, rows in resizes:
        pixels = _pixels(image, cols * size, rows * size)
        tiles = pixels.reshape(rows, size, cols, size, 3).transpose(0, 2, 4, 1, 3)
        out[at : at + rows * cols].reshape(rows, cols, 3, size, size)[:] = tiles
        at += rows * cols


def _square(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """[3, S, S] uint8: the whole picture squashed to one square, or letterboxed in mode "pad"."""
    if spec.mode == "pad":
        image = _square_of(image, spec)
    return _pixels(image, spec.tile_size, spec.tile_size).transpose(2, 0, 1)


def _square_of(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """The picture in the middle of a square of its longer side, in the mean colour."""
    if image.width == image.height:
        return image
    long = max(image.size)
    square = Image.new("RGB", (long, long), tuple(int(m * 255) for m in spec.mean))
    square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
    return square


def _pixels(image: Image.Image, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8 by PIL's bicubic filter."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


@lru_cache(maxsize=16)
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """[3, 256] float32: the normalised value of each uint8 value in each channel."""
    values = (np.arange(256) * 0.00392156862745098).astype(np.float32)
    columns = [(values - np.float32(m)) / np.float32(s) for m, s in zip(mean, std)]
    return np.stack(columns).astype(np.float32)


def normalise(views: np.ndarray, spec: PreprocessSpec) -> torch.Tensor:
    """[n, 3, S, S] float32 from uint8: (x * (1 / 255) - mean) / std, each step rounded as in the official code."""
    import torch

    table = _table(spec.mean, spec.std)
    if (table == table[0]).all():
        return torch.from_numpy(table[0].take(views))
    return torch.from_numpy(np.stack([table[c].take(views[:, c]) for c in range(3)], axis=1))


def collate(batch: Sequence[Inputs], pad_id: int, side: str = "left") -> Inputs:
    """One batch [B, L] of several requests, padded to the longest on `side` with pad_id, mask 0 and label -100."""
    import torch

    if not batch:
        raise InputError("there is nothing to batch; give at least one request")
    if side not in ("left", "right"):
        raise InputError(f"padding side is {side!r}; it must be left or right")
    if any(item.spec != batch[0].spec for item in batch):
        raise InputError("requests that were prepared with different specs cannot be batched")

    def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        long = max(row.shape[1] for row in rows)
        padded = [torch.nn.functional.pad(r, _room(long - r.shape[1], side), value=value) for r in rows]
        return torch.cat(padded)

    def join(parts: list[Any], how: Any) -> Any:
        parts = [part for part in parts if part is not None]
        return how(parts) if parts else None

    labelled = all(item.labels is not None for item in batch)
    return Inputs(
        input_ids=pad([item.input_ids for item in batch], pad_id),
        attention_mask=pad([item.attention_mask for item in batch], 0),
        labels=pad([item.labels for item in batch], -100) if labelled else None,  # type: ignore[misc]
        views=join([item.views for item in batch], np.concatenate),
        image_grids=join([item.image_grids for item in batch], torch.cat),
        frames=join([item.frames for item in batch], np.concatenate),
        video_frames=join([item.video_frames for item in batch], torch.cat),
        spec=batch[0].spec,
        media=tuple(pixels for item in batch for pixels in item.media),
    )


def _room(amount: int, side: str) -> tuple[int, int]:
    return (amount, 0) if side == "left" else (0, amount)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
