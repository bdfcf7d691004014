"""LLaVA-1.5 (arXiv 2310.03744): one square view, CLIP patches through an MLP, token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.adapters.sizes import Sizes
from foveate.adapters.views import ViewsAdapter
from foveate.errors import CheckpointError

SITES = ("encoder", "post_encoder", "post_projector", "llm", "compute", "cache")
"""Of a connector that works patch by patch: tokens may leave or merge anywhere."""


class LlavaAdapter(ViewsAdapter):
    """LlavaForConditionalGeneration with a CLIP or SigLIP tower."""

    family = "llava"
    architecture = "LlavaForConditionalGeneration"
    sites = SITES

    @classmethod
    def check_config(cls, config: Any) -> None:
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not isinstance(layer, int):
            raise CheckpointError(
                f"vision_feature_layer is {list(layer)}: connectors that join several tower layers are not supported"
            )
        kind = config.vision_config.model_type
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise CheckpointError(
                f"the vision tower is a {kind}; {cls.family} takes clip_vision_model, siglip_vision_model"
            )
        wanted = "default" if kind == "clip_vision_model" else "full"
        if strategy != wanted:
            raise CheckpointError(
                f"vision_feature_select_strategy is {strategy!r}; with a {kind} tower only {wanted!r} is supported"
            )

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        vision, width = config.vision_config, config.get_text_config().hidden_size
        return Sizes(
            layers=cls.used_blocks(config),
            width=vision.hidden_size,
            mlp=vision.intermediate_size,
            heads=vision.num_attention_heads,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            connector=((vision.hidden_size, width), (width, width)),
            cls=int(vision.model_type == "clip_vision_model"),
            gathers="post_encoder" in cls.sites,
        )

    def embed_views(self, pixels: Tensor) -> Tensor:
        embedded = super().embed_views(pixels)
        return self.tower.pre_layrnorm(embedded) if self.has_cls else embedded
