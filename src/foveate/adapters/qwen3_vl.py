"""Qwen3-VL (arXiv 2511.21631): features of three more tower blocks are added behind the first decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.adapters.qwen_vl import Qwen2VLAdapter
from foveate.adapters.sizes import Sizes


class Qwen3VLAdapter(Qwen2VLAdapter):
    """Qwen3VLForConditionalGeneration. Its deepstack features are `Encoded.deep`, cut with the tokens."""

    family = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        return cls._sizes(config, config.vision_config.hidden_size, config.vision_config.intermediate_size)

    def embed(
        self, input_ids: Tensor, features: Tensor, *, deep: Sequence[Tensor] = (), newlines: Tensor | None = None
    ) -> dict[str, Any]:
        inputs = super().embed(input_ids, features, deep=deep, newlines=newlines)
        if features.shape[0] and len(deep):
            placeholders = torch.tensor(self.placeholders, device=input_ids.device)
            inputs["visual_pos_masks"] = torch.isin(input_ids, placeholders)
            inputs["deepstack_visual_embeds"] = list(deep)
        return inputs
