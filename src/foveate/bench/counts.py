"""`Request`: what one request asks of a model, in counts, from a plan or from nothing but sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from foveate.bench.shape import ModelShape
from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.adapters.sizes import Sizes
    from foveate.data.plan import MediaPlan, Plan
    from foveate.data.spec import PreprocessSpec

CLIP = (1280, 720)
"""(width, height) of a clip of which nothing else is known."""


@dataclass(frozen=True)
class Request:
    """What one request asks for, in counts: `views` through the tower, `connector_rows` tokens through the connector.

    text: tokens that are no visual features (separators among them). visual: features before reduction; kept: after.
    groups: per picture or clip the sizes of its encoded views in tokens, which reducers share their budgets over.
    per_layer: visual tokens that each decoder layer sees, where that differs; kept is then what the last one sees.
    new: answer tokens. grids: (rows, columns) of patches of each view, where they differ from the model's usual ones.
    per_block: tokens of each view that attention, and that the MLP, of each block of the tower sees, where tokens leave
    in between.
    """

    views: int = 0
    connector_rows: int = 0
    text: int = 0
    visual: int = 0
    kept: int = 0
    groups: tuple[tuple[int, ...], ...] = ()
    new: int = 1
    per_layer: tuple[int, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()
    per_block: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @classmethod
    def from_plan(cls, plan: Plan, shape: ModelShape, *, new: int = 1) -> Request:
        """Counts of a plan, all visual tokens kept."""
        media = [cls.of_media(item, shape, plan.spec) for item in plan.media]
        visual = sum(part.visual for part in media)
        return cls.join(media, text=plan.num_tokens - visual, new=new)

    @classmethod
    def of_media(cls, media: MediaPlan, shape: ModelShape, spec: PreprocessSpec) -> Request:
        """Counts of one picture or clip; its separators are `text`."""
        if shape.sizes is not None:
            return cls._of_family(media, shape.sizes, spec)
        if media.kind == "video":
            groups = tuple(level.rows * level.cols for level in media.levels for _ in range(level.units))
            # Pooling over time comes after the connector, which therefore sees every frame of a clip.
            rows = len(media.views) * shape.view_tokens
        else:
            units, height, width = media.grid
            rows = units * height * width
            groups = (shape.view_tokens,) * (rows // shape.view_tokens)
        visual = sum(groups)
        return cls(len(media.views), rows, media.num_tokens - visual, visual, visual, (groups,))

    @classmethod
    def _of_family(cls, media: MediaPlan, sizes: Sizes, spec: PreprocessSpec) -> Request:
        from foveate.adapters.layouts import view_sizes

        width, height = media.view_size
        views = len(media.views) // (spec.temporal_patch if media.kind == "video" else 1)
        rows, cols = height // spec.patch_size, width // spec.patch_size
        groups = view_sizes(media, spec)
        visual = sum(groups)
        connected = visual if sizes.gathers else views * rows * cols // sizes.joined
        grids = ((rows, cols),) * views
        return cls(views, connected, media.num_tokens - visual, visual, visual, (groups,), grids=grids)

    @classmethod
    def join(cls, media: Sequence[Request], *, text: int, new: int = 1) -> Request:
        """One request of several pictures and clips. text: all tokens that are no visual features."""
        visual = sum(part.visual for part in media)
        return cls(
            views=sum(part.views for part in media),
            connector_rows=sum(part.connector_rows for part in media),
            text=text,
            visual=visual,
            kept=visual,
            groups=tuple(group for part in media for group in part.groups),
            new=new,
            grids=tuple(grid for part in media for grid in part.grids),
        )

    @property
    def prompt(self) -> int:
        """Tokens that the language model reads."""
        return self.text + max([self.kept, *self.per_layer])

    @property
    def cached(self) -> float:
        """Tokens of the prompt that the cache holds, mean over the decoder layers."""
        layers = self.per_layer or (self.kept,)
        return self.text + sum(layers) / len(layers)


class Blocks(NamedTuple):
    """`count` blocks of the tower in a row: rows of attention's linear layers in each, CLS among them; pairs of rows
    that attend to each other, in all of these blocks; rows of the MLP in each."""

    count: int
    rows: int
    pairs: int
    fed: int


def tower_rows(shape: ModelShape, request: Request) -> tuple[int, int]:
    """(patches, rows that enter the first block, CLS among them) of all views."""
    views = [rows * cols for rows, cols in request.grids] or [shape.patches] * request.views
    return sum(views), sum(views) + (shape.sizes.cls if shape.sizes else 0) * len(views)


def tower_blocks(shape: ModelShape, request: Request) -> list[Blocks]:
    """The blocks of the tower: all in one, or, where tokens leave in between, one by one."""
    _, rows = tower_rows(shape, request)
    if not request.per_block:
        return [Blocks(shape.vision_layers, rows, _attended(shape, request), rows)]
    whole = rows // max(1, request.views)  # such a tower has views of one size
    joined = shape.sizes.joined if shape.sizes else 1
    first = [tokens for media in request.groups for tokens in media]
    idle = request.views - len(first)  # views that no token is made of

    def lengths(tokens: tuple[int, ...]) -> list[int]:
        """Rows of each view; CLS and patches that become no token pass all blocks."""
        return [whole - joined * (n - left) for n, left in zip(first, tokens, strict=True)] + [whole] * idle

    made = [(lengths(entered), sum(lengths(fed))) for entered, fed in request.per_block]
    return [Blocks(1, sum(views), sum(n * n for n in views), fed) for views, fed in made]


def _attended(shape: ModelShape, request: Request) -> int:
    """Pairs of rows that attend to each other, over all layers and whole views of the tower."""
    sizes = shape.sizes
    cls = sizes.cls if sizes else 0
    whole = sum((rows * cols + cls) ** 2 for rows, cols in request.grids) or request.views * (shape.patches + cls) ** 2
    if sizes is None or not sizes.window:
        return shape.vision_layers * whole
    edge = sizes.window
    windows = sum(_squares(rows, edge) * _squares(cols, edge) for rows, cols in request.grids)
    return sizes.full_layers * whole + (sizes.layers - sizes.full_layers) * windows


def _squares(length: int, edge: int) -> int:
    """Sum of the squared lengths of the pieces that a side of `length` is cut into, `edge` each but the last."""
    return length // edge * edge**2 + (length % edge) ** 2


def request_of_sizes(
    spec: PreprocessSpec,
    shape: ModelShape,
    *,
    images: Sequence[tuple[int, int]] = (),
    frames: int | None = None,
    clip: tuple[int, int] = CLIP,
    text: int = 0,
    new: int = 1,
) -> Request:
    """The counts of a request of pictures of these (width, height), or of one clip of `frames` frames, without pixels.
    clip: (width, height) of a frame, which some families make more or fewer tokens of.

    text: tokens of the prompt's text; the separators of the media are added. Sizes follow the same geometry as
    `foveate.data.plan`, each separator, and each mark or word around views, counted as one token. What a chat template
    puts around a picture is not counted.
    """
    if spec.family:
        return _family_request(spec, shape, images, frames, clip, text, new)
    from foveate.data.tiling import image_layout

    parts: list[Request] = []
    for width, height in images:
        _check_size(width, height, spec)
        layout = image_layout(width, height, spec, tiled=len(images) == 1)
        units, rows, cols = layout.grid
        visual = units * rows * cols
        groups = (shape.view_tokens,) * (visual // shape.view_tokens)
        # A picture ends in one separator; tiles of mode "dynamic" have one each, and a line feed of text.
        ends = 2 * units if spec.mode == "dynamic" and len(images) == 1 else 1
        parts.append(Request(len(layout.views), visual, ends, visual, visual, (groups,)))
    if frames:
        levels = spec.video_pool or ((1, 1, 1),)
        side = spec.token_side
        groups = tuple(  # a last group that is not full counts as one
            -(-side // rows) * -(-side // cols) for time, rows, cols in levels for _ in range(-(-frames // time))
        )
        visual = sum(groups)
        parts.append(Request(frames, frames * shape.view_tokens, len(groups), visual, visual, (groups,)))
    return Request.join(parts, text=text + sum(part.text for part in parts), new=new)


def _family_request(
    spec: PreprocessSpec,
    shape: ModelShape,
    images: Sequence[tuple[int, int]],
    frames: int | None,
    clip: tuple[int, int],
    text: int,
    new: int,
) -> Request:
    from foveate.data.plan import family_clip, family_image
    from foveate.data.video import VideoInfo

    for width, height in images:
        _check_size(width, height, spec)
    media = [family_image(size, spec, len(images) == 1) for size in images]
    if frames:
        _check_size(*clip, spec)
        media.append(family_clip(VideoInfo(clip, frames, 0.0), spec, frames))
    for item in media:
        around = item.marker.replace(spec.image_token, "")
        around = around.replace(spec.video_token, "") if spec.video_token else around
        text += len(re.findall(r"<[^<>\s]*>|\n+|[^\s<>]+", around))
    parts = [Request.of_media(item, shape, spec) for item in media]
    return Request.join(parts, text=text + sum(part.text for part in parts), new=new)


def _check_size(width: int, height: int, spec: PreprocessSpec) -> None:
    if width * height > spec.max_pixels:
        raise InputError(f"a picture of {width}x{height} has {width * height} pixels, the limit is {spec.max_pixels}")
    if max(width, height) > spec.max_aspect * min(width, height):
        raise InputError(f"a picture of {width}x{height} is longer than {spec.max_aspect:g} times its width")
