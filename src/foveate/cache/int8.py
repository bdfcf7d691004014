"""`int8`: keys and values in 8 bits, one symmetric scale per token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from foveate.cache.base import CacheMethod

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
        return Int8Layer()


class Int8Layer(DynamicLayer):
    """keys, values: [B, H, T, D] int8; key_scale, value_scale: [B, H, T, 1] float16."""

    _stored = ("keys", "values", "key_scale", "value_scale")

    def __init__(self) -> None:
        super().__init__()
        self.key_scale: Tensor | None = None
        self.value_scale: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("key", key_states), ("value", value_states)):
            empty = states[..., :0, :]
            setattr(self, f"{name}s", empty.to(torch.int8))
            setattr(self, f"{name}_scale", empty[..., :1].to(torch.float16))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens, and return all: old ones from 8 bits, new ones as given. [B, H, T_new, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        full = []
        for name, states in (("key", key_states), ("value", value_states)):
            codes, scale = getattr(self, f"{name}s"), getattr(self, f"{name}_scale")
            full.append(torch.cat([dequantize(codes, scale, states.dtype), states], dim=-2))
            new_codes, new_scale = quantize(states)
            setattr(self, f"{name}s", torch.cat([codes, new_codes], dim=-2))
            setattr(self, f"{name}_scale", torch.cat([scale, new_scale], dim=-2))
        return full[0], full[1]

    def reset(self) -> None:
        super().reset()
        self.key_scale = self.value_scale = None

    def crop(self, tokens_to_remove: int) -> None:
        kept = self.get_seq_length() - abs(tokens_to_remove)
        self._each(lambda tensor: tensor[..., :kept, :])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices])

    def offload(self) -> None:
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _each(self, change: Any) -> None:
        if self.is_initialized:
            for name in self._stored:
                setattr(self, name, change(getattr(self, name)))


def quantize(states: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> codes [..., D] int8 in -127 .. 127 and scale [..., 1] float16, |states| <= 127 * scale."""
    largest = states.float().abs().amax(dim=-1, keepdim=True) / 127
    scale = (largest * (1 + 2**-10)).clamp(min=SMALLEST).to(torch.float16)
    return (states.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The states back, in `dtype`."""
    return codes.to(dtype) * scale.to(dtype)
