"""Grids of integers for groups of weights: how a scale and a zero point are chosen, and fake quantization on them.

All functions take and return float32; a code c stands for (c - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """scale, zero: [..., 1], one for each group in the last dimension of what is quantized; codes are 0 .. top."""

    scale: Tensor
    zero: Tensor
    top: int

    def codes(self, x: Tensor) -> Tensor:
        """Nearest codes of x, float32 whole numbers."""
        return ((x / self.scale).round() + self.zero).clamp(0, self.top)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return (codes - self.zero) * self.scale

    def round(self, x: Tensor) -> Tensor:
        """x on the grid."""
        return self.values(self.codes(x))

    def rounded_scale(self, dtype: torch.dtype) -> Grid:
        """The grid with scales that `dtype` can hold: the one that is stored. Never 0."""
        tiny = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
        return self._replace(scale=self.scale.clamp(min=tiny).to(dtype).float())


def grouped(weight: Tensor, group: int) -> Tensor:
    """[O, I] -> [O, I / group, group]; group <= 0: one group a row."""
    return weight.unflatten(1, (-1, group if group > 0 else weight.shape[1]))


def gptq_grid(x: Tensor, bits: int, symmetric: bool = False, mse: bool = False) -> Grid:
    """The grid of GPTQ (arXiv 2210.17323): from the extremes of a range that includes 0.

    mse: shrink the range in 80 steps of 1 % and keep the one with the least sum of |error|^2.4. symmetric: zero is in
    the middle, (top + 1) / 2. A group of zeros gets the range [-1, 1].
    """
    top = 2**bits - 1
    low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)

    def made(lo: Tensor, hi: Tensor) -> Grid:
        scale = (hi - lo) / top
        zero = torch.full_like(scale, (top + 1) / 2) if symmetric else (-lo / scale).round()
        return Grid(scale, zero, top)

    best = made(low, high)
    if not mse:
        return best
    least = torch.full_like(low, float("inf"))
    for step in range(80):
        share = 1 - step / 100
        trial = made(share * low, share * high)
        error = (trial.round(x) - x).abs().pow(2.4).sum(dim=-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(torch.where(better, trial.scale, best.scale), torch.where(better, trial.zero, best.zero), top)
    return best


def awq_grid(x: Tensor, bits: int, symmetric: bool = False) -> Grid:
    """The grid of AWQ (arXiv 2306.00978) and MBQ: from the extremes alone, 0 need not be inside.

    symmetric: codes -2**(b - 1) .. 2**(b - 1) - 1, scale absmax / (2**(b - 1) - 1).
    """
    top = 2**bits - 1
    if symmetric:
        middle = 2 ** (bits - 1)
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / (middle - 1)
        return Grid(scale, torch.full_like(scale, middle), top)
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / top
    return Grid(scale, (-low / scale).round().clamp(0, top), top)


def absmax_round(x: Tensor, bits: int = 8, per: str = "row") -> Tensor:
    """x rounded to signed integers of `bits` bits with scale absmax / top, per "row" (last dimension) or "tensor".

    SmoothQuant's fake quantization (arXiv 2211.10438) of weights (a row is an output) and activations (a token).
    """
    scale = absmax_scale(x, bits, per)
    return (x / scale).round() * scale


def absmax_scale(x: Tensor, bits: int = 8, per: str = "row") -> Tensor:
    """max(|x|, 1e-5) / (2**(bits - 1) - 1): [..., 1], or a scalar for per="tensor"."""
    top = x.abs().amax() if per == "tensor" else x.abs().amax(dim=-1, keepdim=True)
    return top.clamp(min=1e-5) / (2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: codes [O, I] int32, scale and zero [O, groups] float32 (zero None: symmetric)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    @property
    def weight(self) -> Tensor:
        """[O, I] float32."""
        middle = 2 ** (self.bits - 1) if self.zero is None else self.zero[..., None]
        return ((self.codes.unflatten(1, (self.scale.shape[1], -1)) - middle) * self.scale[..., None]).flatten(1)


def quantize_groups(
    weight: Tensor, bits: int, group: int, symmetric: bool, make: Callable[..., Grid], dtype: torch.dtype | None = None
) -> Quantized:
    """Round to nearest on the grids that `make` chooses for each group. dtype: what scales are stored in."""
    parts = grouped(weight.float(), group)
    grid = make(parts, bits, symmetric)
    grid = grid if dtype is None else grid.rounded_scale(dtype)
    zero = None if symmetric else grid.zero[..., 0]
    return Quantized(grid.codes(parts).flatten(1).int(), grid.scale[..., 0], zero, bits)
