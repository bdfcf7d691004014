"""`ViewsAdapter`: families whose tower sees square views of one size - CLIP, SigLIP and InternViT towers.

The tower runs block by block: blocks behind the one that feeds the connector are left out, and signals are caught on
the way. Which patch a visual token comes from is read off the layout, so no family packs its pictures itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.adapters.base import Encoded
from foveate.adapters.hf import PATCHES_PER_PASS, HfAdapter
from foveate.adapters.tower import CLS_SIGNALS, PER_VIEW, Asked, Attention, asked, run_blocks
from foveate.clock import charge
from foveate.data.execute import normalise

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.data.execute import Inputs
    from foveate.data.plan import MediaPlan, Plan


class ViewsAdapter(HfAdapter):
    """A family says what its tower is: `tower`, `blocks`, `embed_views`, `finish`, and what its connector does."""

    @classmethod
    def used_blocks(cls, config: Any) -> int:
        """Blocks of the tower up to the one whose states the connector takes."""
        layer = config.vision_feature_layer
        return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self.model.model.vision_tower

    @property
    def has_cls(self) -> bool:  # type: ignore[override]
        return hasattr(self.tower.embeddings, "class_embedding")

    @property
    def signals(self) -> tuple[str, ...]:
        return super().signals + (CLS_SIGNALS if self.has_cls else ())

    @property
    def num_blocks(self) -> int:
        return self.used_blocks(self.model.config)

    @property
    def num_heads(self) -> int:
        return int(self.model.config.vision_config.num_attention_heads)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the tower that are used."""
        return self.tower.encoder.layers[: self.num_blocks]

    def attention_of(self, block: nn.Module) -> Attention:
        """How a block attends."""
        attention: Any = block.self_attn
        return Attention(
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.out_proj,
            attention.num_heads,
            attention.scale,
        )

    def embed_views(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, S, S] -> states [n, T, C] that enter the first block, CLS in front."""
        return self.tower.embeddings(pixels)

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block, [n, T, C] -> [n, T, C]."""
        return block(hidden, None)

    def attend(self, block: Any, hidden: Tensor) -> Tensor:
        """The first half of a block: attention and its residual."""
        return hidden + block.self_attn(hidden_states=block.layer_norm1(hidden), attention_mask=None)[0]

    def feed(self, block: Any, hidden: Tensor) -> Tensor:
        """The second half of a block: the MLP and its residual."""
        return hidden + block.mlp(block.layer_norm2(hidden))

    def finish(self, hidden: Tensor) -> Tensor:
        """States after the last block -> patches [n, P, C] as the connector takes them."""
        return hidden[:, 1:] if self.has_cls else hidden

    @property
    def cells(self) -> Tensor:
        """[T, r] int64: the patches of a view that each of its tokens is made of, in the order they are joined."""
        return torch.arange(self.spec.side**2)[:, None]

    def connect(self, features: Tensor) -> Tensor:
        """The connector, token by token: the patches of each, one after the other, [..., r * C] -> [..., D]."""
        return self.model.model.multi_modal_projector(features)

    def pool(self, values: Tensor) -> Tensor:
        """Values of patches [n, P, ...] -> of tokens [n, T, ...]: the mean over the patches that a token joins."""
        ratio, side = self.spec.downsample, self.spec.side
        if ratio == 1:
            return values
        cells = side // ratio
        maps = values.reshape(len(values), cells, ratio, cells, ratio, *values.shape[2:])
        return maps.mean(dim=4).mean(dim=2).flatten(1, 2)  # one dim at a time: seven times faster on a CPU

    def gather(self, values: Tensor, media: MediaPlan, where: VisualLayout) -> Tensor:
        """Values [n, T, ...] of one picture's or clip's views -> [N, ...] in the order of its tokens."""
        return values.flatten(0, 1).index_select(0, self._rows(where, values.shape[1]).to(values.device))

    def _rows(self, where: VisualLayout, per_view: int) -> Tensor:
        return where.view * per_view + where.row * self.spec.token_side + where.col

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
        views = [item.pixels for request in inputs for item in request.media]
        layouts = [self.layout(plan).features() for plan in plans]
        if not views:
            width = self.model.config.vision_config.hidden_size if stop == "post_encoder" else self._width
            return [self._nothing(width, wanted) for _ in plans]
        patches, found = self._run(views, wanted)
        if stop == "post_encoder":
            features = self._per_request(patches, plans, layouts)
        elif "post_encoder" in self.sites:
            # patch by patch: only those that become tokens pass the connector
            parts = self._per_request(patches, plans, layouts)
            features = list(self.connect(torch.cat(parts)).split([len(part) for part in parts]))
        else:
            cells = self.cells
            joined = patches if cells.shape[1] == 1 else patches[:, cells].flatten(2)
            features = self._per_request(self.connect(joined), plans, layouts)
        out = [Encoded(part) for part in features]
        for ask in wanted:
            with charge("select", ask.name):
                values = found[ask.name]
                if ask.kind in PER_VIEW:
                    counts = [sum(len(media.views) for media in plan.media) for plan in plans]
                    parts = list(values.split(counts))
                else:
                    parts = self._per_request(self.pool(values), plans, layouts)
                for encoded, part in zip(out, parts):
                    encoded.signals[ask.name] = part
        return out

    def _run(self, views: list[np.ndarray], wanted: list[Asked]) -> tuple[Tensor, dict[str, Tensor]]:
        """Patches [V, P, C] of all views one after the other, and the signals of each."""
        flat = np.concatenate(views)
        limit = max(1, PATCHES_PER_PASS.get(self.model.device.type, 1 << 14) // self.spec.side**2)
        patches: list[Tensor] = []
        found: dict[str, list[Tensor]] = {ask.name: [] for ask in wanted}
        for start in range(0, len(flat), limit):
            # pixels are normalised one pass at a time: as floats they take four times more
            pixels = normalise(flat[start : start + limit], self.spec).to(self.model.device, self.model.dtype)
            hidden, seen = run_blocks(
                self.blocks, self.embed_views(pixels), self.run_block, wanted, self.attention_of, self.has_cls
            )
            patches.append(self.finish(hidden))
            for name, value in seen.items():
                found[name].append(value)
        return torch.cat(patches), {name: torch.cat(parts) for name, parts in found.items()}

    def _per_request(self, values: Tensor, plans: Sequence[Plan], layouts: Sequence[VisualLayout]) -> list[Tensor]:
        """[V, T, ...] of all views -> [N, ...] for each request, in the order of its layout."""
        start = 0
        out = []
        for plan, where in zip(plans, layouts):
            parts = []
            for index, media in enumerate(plan.media):
                stop = start + len(media.views)
                parts.append(self.gather(values[start:stop], media, where[where.media == index]))
                start = stop
            out.append(torch.cat(parts) if parts else values.new_zeros(0, *values.shape[2:]))
        return out

    @property
    def _width(self) -> int:
        return int(self.text_config.hidden_size)

    def _nothing(self, width: int, wanted: list[Asked]) -> Encoded:
        """What a request without pictures becomes."""
        empty = torch.zeros(0, width, device=self.model.device, dtype=self.model.dtype)
        return Encoded(empty, {ask.name: torch.zeros(0, device=self.model.device) for ask in wanted})

    # ---- the tower in pieces, for methods that act between its blocks

    def tower_embed(self, inputs: Inputs, plan: Plan) -> Tensor:
        """States [V, T, C] that enter the first block, for all views of one request."""
        views = np.concatenate([item.pixels for item in inputs.media])
        return self.embed_views(normalise(views, self.spec).to(self.model.device, self.model.dtype))

    def tower_finish(self, hidden: Tensor) -> Tensor:
        """States after the last block -> patches [V, P', C] as the connector takes them, CLS removed."""
        return self.finish(hidden)

    def view_index(self, plan: Plan) -> Tensor:
        """[N, 2] int64: (view, row of `cells`) that each token of `layout(plan).features()` comes from, views counted
        over all pictures and clips of the request."""
        where = self.layout(plan).features()
        firsts = torch.tensor([0, *self._counts(plan)]).cumsum(0)
        cell = where.row * self.spec.token_side + where.col
        return torch.stack([firsts[where.media] + where.view, cell], dim=1)

    def _counts(self, plan: Plan) -> Iterator[int]:
        return (len(media.views) for media in plan.media)
