"""`int8`: keys and values in 8 bits, one symmetric scale per token and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.base import CacheMethod
from foveate.cache.layer import PackedLayer
from foveate.cache.store import Codec, Part, Store

SMALLEST = 2.0**-14
"""Smallest scale: below it float16 loses precision; keys that small are noise."""


@dataclass(frozen=True)
class Int8Cache(CacheMethod):
    """Half the bytes of a 16-bit cache and a quarter of a float32 one, plus 2 bytes per token and head.

    Keys are quantized after the rotary embedding, as they are stored. The tokens of the current pass attend to each
    other exactly; from the next pass on they are read back from 8 bits.
    """

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "keys and values in 8 bits, one scale per token and head"

    def layer(self, index: int) -> CacheLayerMixin:
        return PackedLayer(Store(Int8Codec()), Store(Int8Codec()))


class Int8Codec(Codec):
    """codes: [B, P, H, 1, D] int8; scale: [B, P, H, 1, 1] float16. A page is one token."""

    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        codes, scale = quantize(pages)
        return {"codes": codes, "scale": scale}

    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        return dequantize(parts["codes"], parts["scale"], dtype)


def quantize(states: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> codes [..., D] int8 in -127 .. 127 and scale [..., 1] float16, |states| <= 127 * scale."""
    largest = states.float().abs().amax(dim=-1, keepdim=True) / 127
    scale = (largest * (1 + 2**-10)).clamp(min=SMALLEST).to(torch.float16)
    return (states.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The states back, in `dtype`."""
    return codes.to(dtype) * scale.to(dtype)
