"""SmolVLM (arXiv 2504.05299) and Idefics3 (arXiv 2408.12637): SigLIP tiles and the whole, patches joined r x r."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapters.base import Adapter
from foveate.adapters.sizes import Sizes
from foveate.adapters.views import ViewsAdapter


class SmolVLMAdapter(ViewsAdapter):
    """SmolVLMForConditionalGeneration."""

    family = "smolvlm"
    architecture = "SmolVLMForConditionalGeneration"
    renames = ()
    sites = ("encoder", *Adapter.sites)
    embedding = "model.text_model.embed_tokens.weight"

    @classmethod
    def parts_of(cls, model: Any) -> dict[str, nn.Module]:
        inner = model.model
        return {
            "vision_tower": inner.vision_model,
            "mm_projector": inner.connector.modality_projection,
            "llm": inner.text_model,
        }

    @classmethod
    def used_blocks(cls, config: Any) -> int:
        return config.vision_config.num_hidden_layers

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        vision, joined = config.vision_config, config.scale_factor**2
        return Sizes(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            mlp=vision.intermediate_size,
            heads=vision.num_attention_heads,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            connector=((vision.hidden_size * joined, config.get_text_config().hidden_size),),
            joined=joined,
        )

    @property
    def tower(self) -> Any:
        return self.model.model.vision_model

    def embed_views(self, pixels: Tensor) -> Tensor:
        side = self.spec.side
        real = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
        return self.tower.embeddings(pixel_values=pixels, patch_attention_mask=real)

    def finish(self, hidden: Tensor) -> Tensor:
        return self.tower.post_layernorm(hidden)

    @property
    def cells(self) -> Tensor:
        numbers = torch.arange(self.spec.side**2, dtype=torch.float32)[None, :, None]
        connector = self.model.model.connector
        return connector.pixel_shuffle(numbers, connector.scale_factor)[0].long()

    def connect(self, features: Tensor) -> Tensor:
        return self.model.model.connector.modality_projection(features)


class Idefics3Adapter(SmolVLMAdapter):
    """Idefics3ForConditionalGeneration."""

    family = "idefics3"
    architecture = "Idefics3ForConditionalGeneration"
