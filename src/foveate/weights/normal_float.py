"""NormalFloat: levels at the quantiles of a normal distribution, with block scales that are quantized themselves.

Source: QLoRA (arXiv 2305.14314) for the levels, LQ-LoRA (arXiv 2311.12023), read in HanGuo97/lq-lora @ c2424b3, for the
scales: an offset for the whole tensor, 8-bit integers, and one real scale for every so many blocks. Codes are chosen
for the scales that are stored. Departure: blocks run over a matrix as it lies in memory, and one that ends early is
filled with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.weights.packing import pack, packed_width, unpack

TOP = 0.9677083
"""Largest cumulative probability of the levels."""
SCALE_BITS = 8


def normal_float(bits: int) -> Tensor:
    """The 2**bits NormalFloat levels, float64, ascending in -1 .. 1 with 0 among them."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    half = 2 ** (bits - 1)
    low = torch.linspace(1 - TOP, 0.5, half, dtype=torch.float64)[:-1]
    high = torch.linspace(0.5, TOP, half + 1, dtype=torch.float64)
    levels = normal.icdf(torch.cat([low, high]))
    return levels / levels.abs().amax()


def quantize(
    weight: Tensor, bits: int, block: int = 64, outer: int = 256, scale_bits: int = SCALE_BITS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [blocks, block] uint8, scale codes [blocks] int32, outer scales [ceil(blocks / outer)] and offset [].

    weight: any shape, float32. block: values that share a scale; outer: scales that share one of the outer scales.
    """
    flat = weight.float().flatten()
    flat = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = flat.abs().amax(dim=1)
    offset = largest.amin()
    top = 2**scale_bits - 1
    grouped = F.pad(largest - offset, (0, -len(largest) % outer)).view(-1, outer)
    outer_scale = grouped.abs().amax(dim=1)
    rate = top / torch.where(outer_scale == 0, 1, outer_scale)
    scale_codes = (grouped * rate[:, None]).round().clamp(0, top).to(torch.int32).flatten()[: len(largest)]
    scale = _scales(scale_codes, outer_scale, offset, outer, scale_bits)
    levels = normal_float(bits).to(flat)
    inner = flat / torch.where(scale == 0, 1, scale)[:, None]
    codes = torch.bucketize(inner, (levels[1:] + levels[:-1]) / 2)
    return codes.to(torch.uint8), scale_codes, outer_scale, offset


def dequantize(
    codes: Tensor,
    scale_codes: Tensor,
    outer_scale: Tensor,
    offset: Tensor,
    bits: int,
    shape: tuple[int, ...] | torch.Size,
    outer: int = 256,
    scale_bits: int = SCALE_BITS,
) -> Tensor:
    """What `quantize` stands for, as float32 of `shape`."""
    scale = _scales(scale_codes, outer_scale, offset, outer, scale_bits)
    values = normal_float(bits).to(scale)[codes.long()] * scale[:, None]
    return values.flatten()[: torch.Size(shape).numel()].view(shape)


def rounded(weight: Tensor, bits: int, block: int = 64, outer: int = 256, scale_bits: int = SCALE_BITS) -> Tensor:
    """The weight as it is read back."""
    parts = quantize(weight, bits, block, outer, scale_bits)
    return dequantize(*parts, bits, weight.shape, outer, scale_bits)


def bits_per_weight(bits: int, block: int, outer: int, scale_bits: int = SCALE_BITS) -> float:
    """Bits of one weight, scales included; the outer scales are float32."""
    return bits + scale_bits / block + 32 / (block * outer)


def _scales(codes: Tensor, outer_scale: Tensor, offset: Tensor, outer: int, scale_bits: int) -> Tensor:
    top = 2**scale_bits - 1
    rate = top / torch.where(outer_scale == 0, 1, outer_scale)
    each = rate.repeat_interleave(outer)[: len(codes)]
    return codes.float() / each + offset


class NormalFloatLinear(nn.Module):
    """y = x W^T + b with W in NormalFloat. Buffers: packed [blocks, bytes] uint8, scale_codes [blocks] uint8,
    outer_scale [groups] and offset [] float32. The weight is made anew in each call: the layer is small, not fast."""

    def __init__(
        self, in_features: int, out_features: int, bits: int, block: int, outer: int, bias: bool, device: object = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.block, self.outer = bits, block, outer
        blocks = -(-in_features * out_features // block)
        kinds = {
            "packed": ((blocks, packed_width(block, bits)), torch.uint8),
            "scale_codes": ((blocks,), torch.uint8),
            "outer_scale": ((-(-blocks // outer),), torch.float32),
            "offset": ((), torch.float32),
        }
        for name, (shape, dtype) in kinds.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, weight: Tensor, bits: int, block: int, outer: int) -> NormalFloatLinear:
        """A layer for another weight [out, in] of `linear`, whose bias it shares."""
        made = cls(linear.in_features, linear.out_features, bits, block, outer, False, device="meta")
        codes, scale_codes, made.outer_scale, made.offset = quantize(weight, bits, block, outer)
        made.packed, made.scale_codes = pack(codes, bits), scale_codes.to(torch.uint8)
        made.bias = linear.bias
        return made

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in], float32."""
        codes = unpack(self.packed, self.bits, self.block)
        shape = self.out_features, self.in_features
        return dequantize(codes, self.scale_codes, self.outer_scale, self.offset, self.bits, shape, self.outer)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.bits}-bit NormalFloat in blocks of {self.block}"
