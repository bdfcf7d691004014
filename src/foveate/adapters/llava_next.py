"""LLaVA-NeXT (January 2024): a base view, tiles by aspect ratio without padding, a newline vector after each row."""

from __future__ import annotations

from torch import Tensor

from foveate.adapters.llava import LlavaAdapter


class LlavaNextAdapter(LlavaAdapter):
    """LlavaNextForConditionalGeneration. The layout names the patches that are left after the padding is cut off."""

    family = "llava_next"
    architecture = "LlavaNextForConditionalGeneration"

    @property
    def newline(self) -> Tensor:
        return self.model.model.image_newline
