"""`fp8`: keys and values as 8-bit floats, with one scale per token and head or none.

Source: FP8 formats (arXiv 2209.05433); caches of serving engines store e4m3 with one scale for a whole tensor, mostly
1. That is scaled=false here; one scale per token and head is our addition, and needs no calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.base import CacheMethod
from foveate.cache.layer import PackedLayer
from foveate.cache.store import Codec, Part, Store

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8Cache(CacheMethod):
    """One byte a value. format: e4m3 (3 bits of mantissa, up to 448) or e5m2 (2 bits, up to 57344). scaled: 2 bytes per
    token and head bring the largest value to the top of the format; without, larger values saturate.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    scaled: bool = True

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "keys and values as 8-bit floats"
    status: ClassVar[str] = "experimental"

    def layer(self, index: int) -> CacheLayerMixin:
        kind = FORMATS[self.format]
        return PackedLayer(Store(Fp8Codec(kind, self.scaled)), Store(Fp8Codec(kind, self.scaled)))


class Fp8Codec(Codec):
    """codes: [B, P, H, 1, D] uint8, the bits of the floats; scale: [B, P, H, 1, 1] float16. A page is one token."""

    def __init__(self, kind: torch.dtype, scaled: bool) -> None:
        super().__init__()
        self.kind, self.scaled = kind, scaled

    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        top = torch.finfo(self.kind).max
        states = pages.float()
        if not self.scaled:
            return {"codes": states.clamp(-top, top).to(self.kind).view(torch.uint8)}
        largest = states.abs().amax(dim=-1, keepdim=True)
        scale = (largest / top * (1 + 2**-10)).clamp(min=2.0**-24).to(torch.float16)
        codes = (states / scale.float()).clamp(-top, top).to(self.kind)
        return {"codes": codes.view(torch.uint8), "scale": scale}

    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        states = parts["codes"].view(self.kind).to(torch.float32)
        return (states * parts["scale"].float() if self.scaled else states).to(dtype)
