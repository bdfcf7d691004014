"""The NVILA family: Dynamic-S2, Lite (tiles) and Video; layout of its tokens, and signals of its SigLIP tower."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from foveate.adapters.base import COMMON_SIGNALS, Adapter, Encoded
from foveate.adapters.hf import PATCHES_PER_PASS
from foveate.adapters.layout import NEWLINE, VALID, VisualLayout
from foveate.adapters.tower import PATCH_SIGNALS, Asked, Attention, States, asked, capture, measure
from foveate.clock import charge
from foveate.data.execute import normalise
from foveate.nvila.features import join_scales, join_tiles, pool_frames, split_tiles, tiles_per_image

if TYPE_CHECKING:
    from foveate.data.execute import Inputs
    from foveate.data.plan import MediaPlan, Plan
    from foveate.data.spec import PreprocessSpec


class NvilaAdapter(Adapter):
    """NvilaForConditionalGeneration, from any published layout."""

    family = "nvila"
    no_encoder = "behind its encoder maps of several scales are resized and joined, and clips are pooled over time"

    @classmethod
    def describe(cls, path: Path) -> tuple[Any, PreprocessSpec]:
        from foveate.nvila.checkpoint import load_config

        return load_config(path)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str | torch.dtype,
        device: torch.device,
        attn: str | None,
        prepare: Callable[[dict[str, nn.Module]], None] | None = None,
    ) -> NvilaAdapter:
        from foveate.nvila.checkpoint import load

        change = (lambda model: prepare(_parts(model))) if prepare else None
        return cls(*load(path, dtype=dtype, device=device, attn=attn, prepare=change))

    def save(self, path: Path, extra: dict[str, dict[str, Any]]) -> None:
        from foveate.nvila.checkpoint import save

        save(self.model, self.tokenizer, self.spec, path, extra=extra)

    def with_model(self, model: nn.Module) -> NvilaAdapter:
        return type(self)(model, self.tokenizer, self.spec)

    def parts(self) -> dict[str, nn.Module]:
        return _parts(self.model)

    @property
    def signals(self) -> tuple[str, ...]:
        return (*COMMON_SIGNALS, *PATCH_SIGNALS)

    @property
    def num_blocks(self) -> int:
        return self.model.config.num_vision_layers

    @property
    def num_heads(self) -> int:
        return self.model.config.vision_config.num_attention_heads

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the tower that are used."""
        return self.model.vision_tower.encoder.layers[: self.num_blocks]

    def attention_of(self, block: nn.Module) -> Attention:
        """How a block attends."""
        own: Any = block.self_attn
        return Attention(own.q_proj, own.k_proj, own.v_proj, own.out_proj, own.num_heads, own.scale)

    @property
    def placeholders(self) -> tuple[int, ...]:
        return (self.model.config.image_token_id, self.model.config.video_token_id)

    # ---- layout

    def layout(self, plan: Plan) -> VisualLayout:
        ids = torch.as_tensor(plan.input_ids)
        feature = torch.isin(ids, torch.tensor(self.placeholders))
        parts = []
        for index, media in enumerate(plan.media):
            spans = [torch.arange(s.start, s.start + s.length) for s in plan.spans if s.media == index]
            where = torch.cat(spans)  # a tiled Lite picture has one span per tile, with text between
            parts.append(_media_layout(media, index, feature[where], where, self.spec))
        return VisualLayout.join(parts)

    # ---- encoding

    def encode(
        self,
        inputs: Sequence[Inputs],
        plans: Sequence[Plan],
        signals: Collection[str] = (),
        *,
        stop: str = "post_projector",
    ) -> list[Encoded]:
        wanted = asked(signals, self.signals, self.num_blocks)
        with_images = [i for i in inputs if i.views is not None]
        grids = [(rows, cols) for i in with_images for rows, cols in i.image_grids.tolist()]
        images, image_maps = self._run([i.views for i in with_images], grids, False, wanted)
        with_clips = [i for i in inputs if i.frames is not None]
        lengths = [count for i in with_clips for count in i.video_frames.tolist()]
        clips, clip_maps = self._run([i.frames for i in with_clips], lengths, True, wanted)
        nothing = self.model.get_input_embeddings().weight.new_zeros(0, 0)

        def of_requests(images: list[Tensor], clips: list[Tensor], empty: Tensor) -> Iterator[Tensor]:
            pools = {"image": iter(images), "video": iter(clips)}
            for plan in plans:
                parts = [part for media in plan.media for part in _take(pools[media.kind], media.num_features)]
                yield torch.cat(parts) if parts else empty

        out = [Encoded(part) for part in of_requests(images, clips, nothing)]
        for name in image_maps:
            with charge("select", name):
                for encoded, part in zip(out, of_requests(image_maps[name], clip_maps[name], torch.zeros(0))):
                    encoded.signals[name] = part
        return out

    def _run(
        self, squares: list[np.ndarray], units: list[Any], video: bool, wanted: list[Asked]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Features, and signals by name, of each picture (units: grids) or clip (units: numbers of frames).

        squares: [n, 3, S, S] uint8 each. Pixels are normalised one pass at a time: as floats they take four times more.
        """
        features: list[Tensor] = []
        maps: dict[str, list[Tensor]] = {ask.name: [] for ask in wanted}
        if not units:
            return features, maps
        flat = np.concatenate(squares)
        counts = units if video else [tiles_per_image(grid, self.spec) for grid in units]
        limit = max(1, PATCHES_PER_PASS.get(self.model.device.type, 1 << 14) // self.spec.side**2)
        watched: dict[str, nn.Module] = {}
        for index in {ask.block for ask in wanted}:
            facts = self.attention_of(self.blocks[index])
            watched |= {
                f"q{index}": facts.q,
                f"k{index}": facts.k,
                f"v{index}": facts.v,
                f"{index}": self.blocks[index],
            }
        start = 0
        for first, last, size in _chunks(counts, limit):
            part = normalise(flat[start : start + size], self.spec).to(self.model.device, self.model.dtype)
            start += size
            method = self.model.get_video_features if video else self.model.get_image_features
            with capture(watched) as seen:
                features += method(part, units[first:last]).pooler_output
            for ask in wanted:
                with charge("select", ask.name):
                    states = States(*(torch.cat(seen[f"{kind}{ask.block}"]) for kind in ("q", "k", "v", "")))
                    facts = self.attention_of(self.blocks[ask.block])
                    views = measure(ask.kind, states, facts.heads, facts.scale, cls=False)
                    views = views.mean(dim=-1) if ask.averaged else views
                    for unit, values in zip(units[first:last], views.split(counts[first:last])):
                        maps[ask.name].append(self._to_tokens(values, unit, video))
        return features, maps

    def _to_tokens(self, values: Tensor, unit: Any, video: bool) -> Tensor:
        """Values of patches [views, side*side, ...] of one picture or clip -> [N, ...] of its tokens, in their order.

        The views take the path of the features: Dynamic-S2 scales are stitched, resized by area to the map of the
        connector and averaged with equal weight (each view's attention has the same mean); then the mean over each
        r x r cell, cells that reach into the connector's padding counting their real patches only; clips are then
        averaged over their frame groups.
        """
        spec, tail = self.spec, values.shape[2:]
        maps = values.float().reshape(len(values), spec.side, spec.side, -1)  # [views, side, side, F]
        if video:
            cells = _cells(maps, spec)
            levels = [pool_frames(cells, level) for level in self.model.config.video_pool_sizes or [[1, 1, 1]]]
            return torch.cat([level.reshape(-1, *tail) for level in levels])
        if spec.mode != "dynamic_s2":
            return _cells(maps, spec).reshape(-1, *tail)
        joined, block = join_scales(maps[None], unit, spec)
        chunks = split_tiles(joined.unflatten(-1, (-1, maps.shape[-1])).mean(dim=-2), *block)[0]
        return join_tiles(_cells(chunks, spec)[None], *block).reshape(-1, *tail)

    # ---- language model

    def forward(self, *, past_key_values: Cache, position_ids: Tensor, **inputs: Any) -> Tensor:
        # The decoder is called directly: the model around it takes the last row as a slice [B, 1, D] that keeps the
        # strides of the prompt, for which a CPU in bfloat16 copies the whole head (466 MB of a 2B model, and seconds).
        out = self.text_model(past_key_values=past_key_values, position_ids=position_ids, use_cache=True, **inputs)
        return self.model.get_output_embeddings()(out.last_hidden_state[:, -1]).float()


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    return {"vision_tower": model.vision_tower, "mm_projector": model.mm_projector, "llm": model.llm}


def _chunks(counts: list[int], limit: int) -> list[tuple[int, int, int]]:
    """(first, last, views) of consecutive runs of at most `limit` views; one picture is never cut."""
    out: list[tuple[int, int, int]] = []
    first, size = 0, 0
    for index, count in enumerate(counts):
        if size and size + count > limit:
            out.append((first, index, size))
            first, size = index, 0
        size += count
    return [*out, (first, len(counts), size)]


def _cells(maps: Tensor, spec: PreprocessSpec) -> Tensor:
    """[n, side, side, F] -> [n, token_side, token_side, F], the mean over the real patches of each cell."""
    pooled = F.avg_pool2d(maps.permute(0, 3, 1, 2), spec.downsample, ceil_mode=True, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1)


def _take(pool: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """The next tensors whose rows make up `count` features: a tiled Lite picture is one per tile, others are one."""
    while count > 0:
        part = next(pool)
        count -= len(part)
        yield part


def _media_layout(media: MediaPlan, index: int, feature: Tensor, where: Tensor, spec: PreprocessSpec) -> VisualLayout:
    """The tokens of one picture or clip. feature: [n] bool, a placeholder; where: [n] positions in the prompt."""
    parts, first = [], 0
    for level in media.levels:
        cell = torch.arange(level.units * level.rows * level.cols)
        unit = cell // (level.rows * level.cols)
        parts.append((unit + first, unit * level.frames, cell // level.cols % level.rows, cell % level.cols))
        first += level.units
    view, start, row, col = (torch.cat(column) for column in zip(*parts))
    frame, global_row, global_col = torch.full_like(view, -1), row, col
    units, rows, cols = media.grid
    side = spec.token_side
    if media.kind == "video":
        frame = start
    elif spec.mode == "dynamic_s2":  # one map over all tiles of the last scale; a view is one of these tiles
        view = (row // side) * (cols // side) + col // side
        row, col = row % side, col % side
    elif units > 1:  # Lite: tiles in raster order, the thumbnail last
        tile_cols = media.resizes[0][0]
        thumbnail = view == units - 1
        global_row = torch.where(thumbnail, -1, (view // tile_cols) * rows + row)
        global_col = torch.where(thumbnail, -1, (view % tile_cols) * cols + col)
    number = (feature.cumsum(0) - 1).clamp(min=0)  # the feature that a token is, or that a separator follows

    def spread(column: Tensor, separator: int | None = None) -> Tensor:
        return column[number] if separator is None else torch.where(feature, column[number], separator)

    return VisualLayout(
        media=torch.full_like(where, index),
        view=spread(view),
        frame=spread(frame),
        row=spread(row, -1),
        col=spread(col, -1),
        global_row=spread(global_row, -1),
        global_col=spread(global_col, -1),
        kind=torch.where(feature, VALID, NEWLINE),
        position=where,
        size=torch.ones(len(where)),
    )
