"""Small integers in bytes: one little-endian stream of bits per row; and digits -1, 0, 1, five to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
"""Bits of weights. `pack` and `unpack` take 1 to 8."""

TRITS = 5
"""Ternary digits in a byte: 3**5 = 243."""


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` integers; bits that do not divide 8 are filled up to a multiple of 8 integers."""
    if 8 % bits:
        return -(-count // 8) * bits
    return -(-count * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """[R, C] integers in 0 .. 2**bits - 1 -> [R, packed_width(C, bits)] uint8, the first one in the lowest bits."""
    rows, count = values.shape
    if bits == 8:
        return values.to(torch.uint8)
    per, size = (8, bits) if 8 % bits else (8 // bits, 1)  # integers and bytes of one unit of the stream
    word_type = torch.int64 if per * bits > 31 else torch.int32
    units = -(-count // per)
    padded = torch.zeros(rows, units * per, dtype=word_type, device=values.device)
    padded[:, :count] = values
    shifts = torch.arange(per, device=values.device, dtype=word_type) * bits
    word = (padded.view(rows, units, per) << shifts).sum(dim=-1, dtype=word_type)
    octets = torch.arange(size, device=values.device, dtype=word_type) * 8
    return (word[..., None] >> octets & 0xFF).to(torch.uint8).view(rows, units * size)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: [R, bytes] uint8 -> [R, count] uint8."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if 8 % bits:
        word_type = torch.int64 if bits > 3 else torch.int32
        octets = packed.view(packed.shape[0], -1, bits).to(word_type)
        places = torch.arange(bits, device=packed.device, dtype=word_type) * 8
        word = (octets << places).sum(dim=-1, dtype=word_type)
        shifts = torch.arange(8, device=packed.device, dtype=word_type) * bits
        return (word[..., None] >> shifts & mask).to(torch.uint8).flatten(1)[:, :count]
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return (packed[..., None] >> shifts & mask).flatten(1)[:, :count]


def pack_ternary(values: Tensor) -> Tensor:
    """[R, C] integers -1, 0, 1 -> [R, ceil(C / 5)] uint8: 1.6 bits each, the first in the lowest digit."""
    rows, count = values.shape
    units = -(-count // TRITS)
    padded = torch.ones(rows, units * TRITS, dtype=torch.int32, device=values.device)
    padded[:, :count] = values + 1
    powers = 3 ** torch.arange(TRITS, device=values.device, dtype=torch.int32)
    return (padded.view(rows, units, TRITS) * powers).sum(dim=-1).to(torch.uint8)


def unpack_ternary(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_ternary`: [R, bytes] uint8 -> [R, count] int8."""
    powers = 3 ** torch.arange(TRITS, device=packed.device, dtype=torch.int32)
    digits = packed[..., None].to(torch.int32) // powers % 3 - 1
    return digits.to(torch.int8).flatten(1)[:, :count]
