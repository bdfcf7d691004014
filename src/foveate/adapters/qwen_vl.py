"""The Qwen-VL families: pictures and clips in their own shape, 2 x 2 patches merged, M-RoPE positions.

Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923: windows in most tower blocks) and Qwen3-VL (arXiv 2511.21631:
deepstack features, arXiv 2406.04334). Rotary state lives in the request: the decoder is called with the positions that
the plan gives, cut with the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.adapters.base import Encoded
from foveate.adapters.compat import window_order
from foveate.adapters.hf import PATCHES_PER_PASS, HfAdapter
from foveate.adapters.layouts import mrope
from foveate.adapters.sizes import Sizes
from foveate.adapters.tower import Asked, Attention, asked, capture, mean_query_attention, received
from foveate.clock import charge
from foveate.data.execute import normalise

if TYPE_CHECKING:
    from foveate.data.execute import Inputs, MediaPixels
    from foveate.data.plan import Plan


class Qwen2VLAdapter(HfAdapter):
    """Qwen2VLForConditionalGeneration."""

    family = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    no_encoder = "windows, rotary positions and deepstack features of its encoder are laid out for whole pictures"
    renames = (("visual.", "model.visual."), ("model.", "model."), ("lm_head.", "lm_head."))

    @classmethod
    def canonical(cls, key: str) -> str:
        key = super().canonical(key)
        text = key.removeprefix("model.")
        if text.startswith(("layers.", "embed_tokens.", "norm.")):  # older checkpoints
            return "model.language_model." + text
        return key

    @classmethod
    def parts_of(cls, model: Any) -> dict[str, nn.Module]:
        tower = model.model.visual
        return {"vision_tower": tower, "mm_projector": tower.merger, "llm": model.model.language_model}

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        vision = config.vision_config
        width = vision.embed_dim
        return cls._sizes(config, width, int(width * vision.mlp_ratio))

    @staticmethod
    def _sizes(config: Any, width: int, mlp: int, **more: Any) -> Sizes:
        vision = config.vision_config
        joined = vision.spatial_merge_size**2
        merger = ((joined * width, joined * width), (joined * width, config.get_text_config().hidden_size))
        return Sizes(
            layers=vision.depth,
            width=width,
            mlp=mlp,
            heads=vision.num_heads,
            patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            connector=merger * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))),
            joined=joined,
            **more,
        )

    @property
    def tower(self) -> Any:
        """The vision tower, with its merger."""
        return self.model.model.visual

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the tower; all are used."""
        return self.tower.blocks

    @property
    def num_blocks(self) -> int:
        return len(self.tower.blocks)

    @property
    def num_heads(self) -> int:
        return int(self.model.config.vision_config.num_heads)

    def attention_of(self, block: nn.Module) -> Attention:
        """How a block attends; queries, keys and values come from one projection, side by side."""
        attention: Any = block.attn
        scale = (attention.qkv.in_features // attention.num_heads) ** -0.5
        return Attention(attention.qkv, attention.qkv, attention.qkv, attention.proj, attention.num_heads, scale)

    def positions(self, plan: Plan) -> Tensor:
        return mrope(plan, self.seconds)

    @property
    def seconds(self) -> float | None:
        """Positions for each second of a clip; None: its units are one apart."""
        return None

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
        items = [item for request in inputs for item in request.media]
        width = int(self.text_config.hidden_size)
        rows = [[media.num_features for media in plan.media] for plan in plans]
        passes = [self._run(part, wanted) for part in self._passes(items)]
        counts = [sum(part) for part in rows]

        def split(parts: list[Tensor]) -> Sequence[Tensor]:
            if not parts:
                return [torch.zeros(0, width, device=self.model.device, dtype=self.model.dtype) for _ in plans]
            return torch.cat(parts).split(counts)

        out = [Encoded(part) for part in split([tokens for tokens, _, _ in passes])]
        for level in range(len(passes[0][1]) if passes else 0):
            for encoded, part in zip(out, split([deep[level] for _, deep, _ in passes])):
                if len(part):  # a request without pictures has no features of any layer
                    encoded.deep.append(part)
        for ask in wanted:
            for encoded, part in zip(out, split([found[ask.name] for _, _, found in passes])):
                encoded.signals[ask.name] = part
        return out

    def _passes(self, items: Sequence[MediaPixels]) -> list[list[MediaPixels]]:
        """Pictures and clips that go through the tower together; none is cut."""
        limit = PATCHES_PER_PASS.get(self.model.device.type, 1 << 14)
        out: list[list[MediaPixels]] = []
        size = 0
        for item in items:
            patches = item.grid[0] * item.grid[1] * item.grid[2]
            if not out or size + patches > limit:
                out.append([])
                size = 0
            out[-1].append(item)
            size += patches
        return out

    def _run(
        self, items: Sequence[MediaPixels], wanted: Sequence[Asked]
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Tokens [N, D] of pictures and clips, their deepstack features, and their signals [N, ...]."""
        patches = torch.cat([self._patchify(item) for item in items]).to(self.model.device, self.model.dtype)
        grids = torch.tensor([item.grid for item in items], device=self.model.device)
        watched: dict[str, nn.Module] = {}
        for index in {ask.block for ask in wanted}:
            block = self.blocks[index]
            watched |= {f"{index}": block, f"{index}.attn": block.attn, f"{index}.qkv": block.attn.qkv}
        with capture(watched, with_inputs=True) as seen:
            output = self.tower(patches, grid_thw=grids)
        order = window_order(self.tower, grids)
        back = None if order is None else torch.argsort(order)
        found = {}
        sizes = [math.prod(item.grid) for item in items]
        for ask in wanted:
            with charge("select", ask.name):
                value = self._measure(ask, seen, sizes)
                value = value.unflatten(0, (-1, self.spec.downsample**2)).mean(dim=1)
                found[ask.name] = value if back is None else value[back]
        return output.pooler_output, list(getattr(output, "deepstack_features", ())), found

    def _measure(self, ask: Asked, seen: dict[str, list[Any]], sizes: list[int]) -> Tensor:
        """A signal of one block for every patch, in the tower's order, float32.

        Keys and values are as the projection gives them, before rotary positions. Received attention is the mean over
        the queries that see a patch: those of its window or frame. The mean query is that of a whole picture or clip,
        and looks at all of it. sizes: patches of each picture and clip.
        """
        _, hidden = seen[f"{ask.block}"][0]
        if ask.kind == "hidden":
            return hidden.float()
        options, _ = seen[f"{ask.block}.attn"][0]
        _, projected = seen[f"{ask.block}.qkv"][0]
        query, key, value = projected.chunk(3, dim=-1)
        if ask.kind in ("keys", "values"):
            return (key if ask.kind == "keys" else value).float()
        facts = self.attention_of(self.blocks[ask.block])
        query, key = (_rotate(x, facts.heads, *options["position_embeddings"]) for x in (query, key))
        if ask.kind == "received_attention":
            ends, of = options["cu_seqlens"].tolist(), received
        else:
            ends, of = [0, *accumulate(sizes)], mean_query_attention
        scores = torch.cat(
            [
                of(query[None, start:end], key[None, start:end], facts.heads, facts.scale)[0]
                for start, end in pairwise(ends)
            ]
        )
        return scores.mean(dim=-1) if ask.averaged else scores

    def _patchify(self, item: MediaPixels) -> Tensor:
        """[frames * rows * columns, 3 * temporal * patch * patch] float32, patches of a merged token side by side.

        A picture is a clip whose one frame is repeated.
        """
        times, size, merge = self.spec.temporal_patch, self.spec.patch_size, self.spec.downsample
        pixels = normalise(item.pixels, self.spec)
        if item.kind == "image":
            pixels = pixels.repeat(times, 1, 1, 1)
        frames, rows, cols = item.grid
        cut = pixels.reshape(frames, times, 3, rows // merge, merge, size, cols // merge, merge, size)
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(frames * rows * cols, -1)


class Qwen25VLAdapter(Qwen2VLAdapter):
    """Qwen2_5_VLForConditionalGeneration."""

    family = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        vision = config.vision_config
        return cls._sizes(
            config,
            vision.hidden_size,
            vision.intermediate_size,
            mlp_matrices=3,
            full_layers=len(vision.fullatt_block_indexes),
            window=vision.window_size // vision.patch_size,
        )

    @property
    def seconds(self) -> float:
        return float(self.model.config.vision_config.tokens_per_second)


def _rotate(states: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads * d] with rotary positions [T, d] applied, halves paired, in float32."""
    x = states.float().unflatten(-1, (heads, -1))
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos.float()[:, None] + turned * sin.float()[:, None]).flatten(1)
