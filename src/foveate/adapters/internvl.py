"""InternVL 2.5 and 3 (arXiv 2412.05271): InternViT tiles and a thumbnail, 2 x 2 patches joined by pixel shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters.base import Adapter
from foveate.adapters.sizes import Sizes
from foveate.adapters.tower import Attention
from foveate.adapters.views import ViewsAdapter
from foveate.errors import CheckpointError


class InternVLAdapter(ViewsAdapter):
    """InternVLForConditionalGeneration."""

    family = "internvl"
    architecture = "InternVLForConditionalGeneration"
    sites = ("encoder", *Adapter.sites)

    @classmethod
    def check_config(cls, config: Any) -> None:
        if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
            raise CheckpointError(
                f"vision_feature_layer {config.vision_feature_layer} with vision_feature_select_strategy "
                f"{config.vision_feature_select_strategy!r} is not supported; InternVL has -1 and 'default'"
            )

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        vision, width = config.vision_config, config.get_text_config().hidden_size
        joined = round(1 / config.downsample_ratio) ** 2
        return Sizes(
            layers=cls.used_blocks(config),
            width=vision.hidden_size,
            mlp=vision.intermediate_size,
            heads=vision.num_attention_heads,
            patch_inputs=vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
            connector=((vision.hidden_size * joined, width), (width, width)),
            joined=joined,
            cls=1,
        )

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layer[: self.num_blocks]

    def attention_of(self, block: nn.Module) -> Attention:
        attention: Any = block.attention
        return Attention(
            attention.q_norm if _normed(attention.q_norm) else attention.q_proj,
            attention.k_norm if _normed(attention.k_norm) else attention.k_proj,
            attention.v_proj,
            attention.projection_layer,
            attention.num_heads,
            attention.scale,
        )

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return block(hidden)

    def finish(self, hidden: Tensor) -> Tensor:
        if self.model.config.vision_feature_layer == -1:
            hidden = self.tower.layernorm(hidden)
        return super().finish(hidden)

    def attend(self, block: Any, hidden: Tensor) -> Tensor:
        return block.lambda_1 * block.attention(block.layernorm_before(hidden))[0] + hidden

    def feed(self, block: Any, hidden: Tensor) -> Tensor:
        return block.lambda_2 * block.dropout(block.mlp(block.layernorm_after(hidden))) + hidden

    @property
    def cells(self) -> Tensor:
        numbers = torch.arange(self.spec.side**2, dtype=torch.float32).view(1, self.spec.side, self.spec.side, 1)
        shuffled = self.model.model.pixel_shuffle(numbers, scale_factor=self.model.config.downsample_ratio)
        return shuffled[0].flatten(0, 1).long()


def _normed(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)
