"""`kivi`: keys in 2 or 4 bits per channel over groups of tokens, values per token over groups of channels.

Source: Liu et al., KIVI (arXiv 2402.02750); official code jy-yuan/KIVI @ 876b4d2, whose codes, scales and minima this
gives bit for bit. Departures: a group of equal values has scale 0 and is exact (the official code divides 0 by 0);
scales and minima of a float32 cache are float16; groups start at a row's first real token, so padding is in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.base import CacheMethod, check_group
from foveate.cache.layer import PackedLayer
from foveate.cache.store import Codec, Part, Store
from foveate.errors import RecipeError
from foveate.weights.packing import pack, unpack


@dataclass(frozen=True)
class Kivi(CacheMethod):
    """bits: of keys and values (key_bits and value_bits set one alone). group: values that share a scale and a minimum.
    window: recent tokens at full precision, always so many for values, 0 .. window - 1 for keys, which are coded in
    chunks of `window` tokens.
    """

    bits: Literal[2, 4] = 2
    group: int = 32
    window: int = 128
    key_bits: Literal[2, 4] | None = None
    value_bits: Literal[2, 4] | None = None

    name: ClassVar[str] = "kivi"
    shown: ClassVar[tuple[str, ...]] = ("bits",)
    summary: ClassVar[str] = "keys per channel and values per token in 2 or 4 bits, recent tokens exact"
    space: ClassVar[dict[str, tuple[int, ...]]] = {"bits": (4, 2)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise RecipeError(f"kivi: group is {self.group}; give the number of values that share a scale, like 32")
        if self.window < self.group or self.window % self.group:
            fits = max(1, round(self.window / self.group)) * self.group
            raise RecipeError(
                f"kivi: window={self.window} is no multiple of group={self.group}, and keys are coded a window at a "
                f"time; use window={fits}"
            )

    def check_heads(self, width: int) -> None:
        check_group(self.name, self.group, width)

    def layer(self, index: int) -> CacheLayerMixin:
        keys = KeyCodec(self.key_bits or self.bits, self.group, self.window)
        values = ValueCodec(self.value_bits or self.bits, self.group)
        return PackedLayer(Store(keys), Store(values, keep=self.window))


class KeyCodec(Codec):
    """codes: [B, P, H, D, bytes of a page's tokens] uint8; scale, low: [B, P, H, D, unit / group]."""

    def __init__(self, bits: int, group: int, unit: int) -> None:
        super().__init__()
        self.bits, self.group, self.unit = bits, group, unit

    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        return _encode(pages.transpose(-1, -2), self.bits, self.group)

    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        return _decode(parts, self.bits, self.unit, dtype).transpose(-1, -2)


class ValueCodec(Codec):
    """codes: [B, P, H, 1, bytes of a token] uint8; scale, low: [B, P, H, 1, D / group]. A page is one token."""

    def __init__(self, bits: int, group: int) -> None:
        super().__init__()
        self.bits, self.group = bits, group

    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        return _encode(pages, self.bits, self.group)

    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        return _decode(parts, self.bits, parts["scale"].shape[-1] * self.group, dtype)


def quantize(states: Tensor, bits: int, group: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., N] uint8 in 0 .. 2**bits - 1, scale and low [..., N / group], over groups of the last axis.

    Asymmetric: the states are about code * scale + low, low the minimum and scale (max - min) / (2**bits - 1) of a
    group; codes round half to even. dtype: of scale and low (None: that of the states).
    """
    top = 2**bits - 1
    grouped = states.unflatten(-1, (-1, group))
    low = grouped.amin(dim=-1, keepdim=True)
    scale = (grouped.amax(dim=-1, keepdim=True) - low) / top
    if dtype is not None:
        largest = torch.finfo(dtype).max
        scale, low = scale.clamp(max=largest).to(dtype), low.clamp(-largest, largest).to(dtype)
    divisor = torch.where(scale == 0, 1, scale).to(states.dtype)
    codes = ((grouped - low.to(states.dtype)) / divisor).clamp(0, top).round().to(torch.uint8)
    return codes.flatten(-2), scale.squeeze(-1), low.squeeze(-1)


def dequantize(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """The states [..., N] back, in `dtype`."""
    grouped = codes.unflatten(-1, (scale.shape[-1], -1)).to(dtype)
    return (grouped * scale[..., None].to(dtype) + low[..., None].to(dtype)).flatten(-2)


def pack_last(codes: Tensor, bits: int) -> Tensor:
    """[..., N] codes -> [..., bytes] uint8."""
    return pack(codes.reshape(-1, codes.shape[-1]), bits).view(*codes.shape[:-1], -1)


def unpack_last(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_last`: [..., count]."""
    return unpack(packed.reshape(-1, packed.shape[-1]), bits, count).view(*packed.shape[:-1], count)


def small_float(dtype: torch.dtype) -> torch.dtype:
    """What scales are stored in: 16 bits."""
    return torch.float16 if dtype in (torch.float32, torch.float64) else dtype


def _encode(states: Tensor, bits: int, group: int) -> dict[str, Part]:
    codes, scale, low = quantize(states, bits, group, small_float(states.dtype))
    return {"codes": pack_last(codes, bits), "scale": scale, "low": low}


def _decode(parts: dict[str, Part], bits: int, count: int, dtype: torch.dtype) -> Tensor:
    return dequantize(unpack_last(parts["codes"], bits, count), parts["scale"], parts["low"], dtype)
