"""`vidkv`: keys in a mean of 1 to 2 bits, values in 1, 1.58 or 2 bits, both per channel over groups of tokens.

Source: Tao et al., VidKV (arXiv 2503.16257); official code KD-TAO/VidKV @ 0e55c39, whose channel split, codes and
scales this gives. Departures, all of them about what the release gets wrong or leaves out:
- Its dequantisers lose the scale of ternary codes and the sign of binary ones. Here: scale * code and scale * (2 code
  - 1).
- The spectrum of real keys is stored once, not with its mirror image, so an easy channel truly takes 1 bit.
- Coded tokens are never coded again; channels are split anew for each group of tokens and for each request.
- Ternary codes take 1.6 bits (five to a byte) instead of 2. bits=1 puts all channels at 1 bit.
- Protected tokens are those that the score chooses. The release drops the last 32 of them, and takes the first visual
  token to stand at place 14, where it does in one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.base import CacheMethod
from foveate.cache.kivi import KeyCodec, dequantize, pack_last, quantize, small_float, unpack_last
from foveate.cache.layer import PackedLayer
from foveate.cache.split import SplitStore
from foveate.cache.store import Codec, Part, Store
from foveate.errors import RecipeError, UnsupportedError
from foveate.weights.packing import pack_ternary, unpack_ternary

if TYPE_CHECKING:
    from transformers import Cache

    from foveate.adapters.base import Adapter
    from foveate.rows import Prompt
    from foveate.vlm import VLM


@dataclass(frozen=True)
class VidKV(CacheMethod):
    """key_bits: 1 to 2; the share key_bits - 1 of the channels, those of widest range, takes 2 bits, the rest 1 bit in
    the Fourier domain. value_bits: 1, 1.58 (three levels) or 2. group: tokens that share scales. window: new tokens are
    coded when so many wait; a prompt's at once, but for the last that fill no group.

    protect: the share of the visual tokens, those most like the text, whose values take 2 bits (the paper: 0.2).
    It needs a prompt that foveate reads; `generate()` of transformers protects none.
    """

    key_bits: float = 1.5
    value_bits: Literal[1, 1.58, 2] = 1.58
    group: int = 32
    window: int = 128
    protect: float = 0.0

    name: ClassVar[str] = "vidkv"
    shown: ClassVar[tuple[str, ...]] = ("key_bits", "value_bits")
    summary: ClassVar[str] = "keys in 1 to 2 bits by channel and spectrum, values in 1, 1.58 or 2 bits"
    status: ClassVar[str] = "experimental"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.key_bits <= 2:
            raise RecipeError(f"vidkv: key_bits is {self.key_bits}; it mixes channels of 1 and 2 bits, so give 1 to 2")
        if self.group < 1:
            raise RecipeError(f"vidkv: group is {self.group}; give the number of tokens that share a scale, like 32")
        if self.window < self.group:
            raise RecipeError(
                f"vidkv: window={self.window} is shorter than group={self.group}, and a group is coded at once; "
                f"use window={self.group} or more"
            )
        if not 0 <= self.protect <= 1:
            raise RecipeError(f"vidkv: protect is {self.protect}; it is a share of the visual tokens, so give 0 to 1")
        if self.protect and self.value_bits == 2:
            raise RecipeError("vidkv: protect gives values 2 bits, which value_bits=2 does already; drop one of them")

    def layer(self, index: int) -> CacheLayerMixin:
        two = self.value_bits == 2
        fine = KeyCodec(2, self.group, self.group)
        values = Store(fine if two else ScaleCodec(self.value_bits, self.group), limit=self.window)
        kept = SplitStore(Store(fine, limit=self.window), values) if self.protect else values
        return PackedLayer(Store(MixedCodec(self.key_bits, self.group), limit=self.window), kept)

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        if self.protect and "vision_tower" not in vlm.adapter.parts():
            raise UnsupportedError(
                "vidkv: protect chooses among visual tokens, and this model sees nothing; leave it out"
            )

    def make(self, adapter: Adapter) -> Cache:
        cache = super().make(adapter)
        if self.protect:
            cache.see_prompt = lambda prompts: self._mark(cache, prompts)
        return cache

    def _mark(self, cache: Cache, prompts: Sequence[Prompt]) -> None:
        """Tell the layers which tokens of each row of the prompt to protect."""
        marks = torch.zeros(len(prompts), max(len(prompt.embeddings) for prompt in prompts), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            found = most_like(
                prompt.embeddings[prompt.visual], prompt.embeddings[prompt.text], self.protect, self.group
            )
            marks[row, prompt.visual[found.cpu()]] = True
        for layer in cache.layers:
            layer.stores[1].coming = marks


class MixedCodec(Codec):
    """Keys. hard_channels: [B, P, bytes of D bits]; of them, 2-bit codes with scale and low, of the other channels
    1-bit codes of their spectrum with a scale. A page is one group of tokens."""

    def __init__(self, bits: float, group: int) -> None:
        super().__init__()
        self.bits, self.unit = bits, group

    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        width = pages.shape[-1]
        hard, easy = split_channels(pages, int(width * (self.bits - 1)))
        small = small_float(pages.dtype)
        is_hard = torch.zeros(*hard.shape[:2], width, dtype=torch.uint8, device=pages.device).scatter(-1, hard, 1)
        parts: dict[str, Part] = {"hard_channels": pack_last(is_hard, 1)}
        if hard.shape[-1]:
            codes, scale, low = quantize(_channels(pages, hard).transpose(-1, -2), 2, self.unit, small)
            parts |= {"hard_codes": pack_last(codes, 2), "hard_scale": scale, "hard_low": low}
        if easy.shape[-1]:
            spectrum = half_spectrum(_channels(pages, easy)).transpose(-1, -2)  # [B, P, H, n, U]
            codes, scale = binary(spectrum, self.unit)
            parts |= {"easy_codes": pack_last(codes, 1), "easy_scale": scale.to(small)}
        return parts

    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        bits = parts["hard_channels"]
        hard_width = parts["hard_scale"].shape[3] if "hard_scale" in parts else 0
        easy_width = parts["easy_scale"].shape[3] if "easy_scale" in parts else 0
        is_hard = unpack_last(bits, 1, hard_width + easy_width)
        order = is_hard.argsort(dim=-1, descending=True, stable=True)  # hard channels first, each kind in order
        states = []
        if hard_width:
            codes = unpack_last(parts["hard_codes"], 2, self.unit)
            states.append(dequantize(codes, parts["hard_scale"], parts["hard_low"], dtype).transpose(-1, -2))
        if easy_width:
            signs = unpack_last(parts["easy_codes"], 1, self.unit)
            spectrum = signs.to(torch.float32).mul_(2).sub_(1) * parts["easy_scale"].float()
            states.append(from_half_spectrum(spectrum.transpose(-1, -2), easy_width).to(dtype))
        joined = torch.cat(states, dim=-1)
        where = order[:, :, None, None].expand_as(joined)
        return torch.empty_like(joined).scatter_(-1, where, joined)


class ScaleCodec(Codec):
    """Values in 1 or 1.58 bits. codes: [B, P, H, bytes of D * U]; scale: [B, P, H, D, 1]."""

    def __init__(self, bits: float, group: int) -> None:
        super().__init__()
        self.ternary, self.unit = bits != 1, group

    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        states = pages.transpose(-1, -2)
        codes, scale = (ternary if self.ternary else binary)(states, self.unit)
        flat = codes.flatten(-2)
        rows = flat.reshape(-1, flat.shape[-1])
        packed = pack_ternary(rows).view(*flat.shape[:-1], -1) if self.ternary else pack_last(flat, 1)
        return {"codes": packed, "scale": scale.to(small_float(pages.dtype))}

    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        packed, scale = parts["codes"], parts["scale"].to(dtype)
        count = scale.shape[-2] * self.unit
        if self.ternary:
            codes = unpack_ternary(packed.reshape(-1, packed.shape[-1]), count).view(*packed.shape[:-1], count)
            values = codes.to(dtype)
        else:
            values = unpack_last(packed, 1, count).to(dtype) * 2 - 1
        return (values.unflatten(-1, (-1, self.unit)) * scale).transpose(-1, -2)


def most_like(visual: Tensor, text: Tensor, share: float, group: int) -> Tensor:
    """Numbers [k] of the visual embeddings [N, D] with the largest mean product with text embeddings [T, D], ascending.

    k: the share of N in whole groups, at least one; none where there is no text or no group of visual tokens.
    """
    count = min(max(group, int(len(visual) * share / group) * group), len(visual) // group * group)
    score = (visual.float() @ text.float().T).mean(dim=1) if len(text) else visual.new_zeros(0)
    return score.argsort(descending=True, stable=True)[:count].sort().values


def split_channels(pages: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Channels of widest range and the others, ascending: pages [B, P, H, U, D] -> [B, P, count], [B, P, D - count].

    The range, maximum minus minimum, is over heads and tokens of a page; of equal ranges the lower channel is taken.
    """
    extent = pages.amax(dim=(2, 3)) - pages.amin(dim=(2, 3))
    order = extent.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values, order[..., count:].sort(dim=-1).values


def binary(states: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [..., N] uint8, 1 for values >= 0, and scale [..., N / group], the mean |value| of a group."""
    grouped = states.unflatten(-1, (-1, group))
    return (states >= 0).to(torch.uint8), grouped.abs().mean(dim=-1)


def ternary(states: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [..., N] int8 -1, 0, 1 and scale [..., N / group]: 0 where |value| <= mean / 2, mean |value| the scale."""
    grouped = states.unflatten(-1, (-1, group))
    scale = grouped.abs().mean(dim=-1, keepdim=True)
    codes = (grouped > 0.5 * scale).to(torch.int8) - (grouped < -0.5 * scale).to(torch.int8)
    return codes.flatten(-2), scale.squeeze(-1)


def half_spectrum(states: Tensor) -> Tensor:
    """[..., n] real -> [..., n] float32: the Fourier coefficients, real and imaginary parts in turn.

    Those that a real signal has twice are given once, and those that are always 0 not at all.
    """
    columns = torch.view_as_real(torch.fft.rfft(states.float(), dim=-1)).flatten(-2)
    last = columns.shape[-1] - (states.shape[-1] % 2 == 0)
    return torch.cat([columns[..., :1], columns[..., 2:last]], dim=-1)


def from_half_spectrum(columns: Tensor, width: int) -> Tensor:
    """The inverse of `half_spectrum`: [..., width] float32."""
    zero = torch.zeros_like(columns[..., :1])
    parts = [columns[..., :1], zero, columns[..., 1:], *([zero] if width % 2 == 0 else [])]
    pairs = torch.cat(parts, dim=-1).unflatten(-1, (-1, 2)).contiguous()
    return torch.fft.irfft(torch.view_as_complex(pairs), n=width, dim=-1)


def _channels(pages: Tensor, channels: Tensor) -> Tensor:
    """[B, P, H, U, D] at channels [B, P, n] -> [B, P, H, U, n]."""
    return pages.gather(-1, channels[:, :, None, None].expand(*pages.shape[:-1], -1))
