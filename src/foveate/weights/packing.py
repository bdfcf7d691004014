"""Integers of 2, 3, 4 or 8 bits in bytes: one little-endian stream of bits per row."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of `count` integers; 3-bit rows are filled up to a multiple of 8 integers."""
    if bits == 3:
        return -(-count // 8) * 3
    return -(-count * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """[R, C] integers in 0 .. 2**bits - 1 -> [R, packed_width(C, bits)] uint8, the first one in the lowest bits."""
    rows, count = values.shape
    if bits == 8:
        return values.to(torch.uint8)
    per, size = (8, 3) if bits == 3 else (8 // bits, 1)  # integers and bytes of one unit of the stream
    units = -(-count // per)
    padded = torch.zeros(rows, units * per, dtype=torch.int32, device=values.device)
    padded[:, :count] = values
    shifts = torch.arange(per, device=values.device, dtype=torch.int32) * bits
    word = (padded.view(rows, units, per) << shifts).sum(dim=-1, dtype=torch.int32)
    octets = torch.arange(size, device=values.device, dtype=torch.int32) * 8
    return (word[..., None] >> octets & 0xFF).to(torch.uint8).view(rows, units * size)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: [R, bytes] uint8 -> [R, count] uint8."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if bits == 3:
        octets = packed.view(packed.shape[0], -1, 3).to(torch.int32)
        word = octets[..., 0] | octets[..., 1] << 8 | octets[..., 2] << 16
        shifts = torch.arange(8, device=packed.device, dtype=torch.int32) * 3
        return (word[..., None] >> shifts & mask).to(torch.uint8).flatten(1)[:, :count]
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return (packed[..., None] >> shifts & mask).flatten(1)[:, :count]
