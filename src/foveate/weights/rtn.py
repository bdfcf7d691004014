"""`rtn`: round to nearest. No calibration: each group of weights gets a scale from its own extremes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from foveate.errors import RecipeError
from foveate.weights.base import WeightMethod
from foveate.weights.linear import QuantizedLinear, check_group, empty_quantized


@dataclass(frozen=True)
class RTN(WeightMethod):
    """Weights in `bits` bits with one scale per `group` inputs of each output (group 0: one scale per output).

    symmetric=False (default): codes 0 .. 2**bits - 1, scale (max - min) / (2**bits - 1) with a zero point, both of a
    range that includes 0. symmetric=True: codes -top .. top with top = 2**(bits - 1) - 1, scale max |w| / top. Scales
    are float16, rounded up so that nothing is clipped: symmetric errors are at most half a scale, asymmetric ones at
    most one (half of it for rounding the zero point). Size only: the layers are dequantized in each call.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group: int = 32
    symmetric: bool = False

    name: ClassVar[str] = "rtn"
    shown: ClassVar[tuple[str, ...]] = ("bits", "group")
    summary: ClassVar[str] = "weights rounded to 2, 3, 4 or 8 bits in groups; size only, not speed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 0:
            raise RecipeError(f"rtn: group is {self.group}; give a number of inputs, or 0 for one scale per output")

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        check_group("rtn", name, linear, self.group)

    def convert(self, linear: nn.Linear) -> nn.Module:
        codes, scale, zero = quantize(linear.weight.detach(), self.bits, self._group(linear), self.symmetric)
        return QuantizedLinear.of(linear, codes, scale, zero, self.bits)

    def empty(self, linear: nn.Linear) -> nn.Module:
        return empty_quantized(linear, self.bits, self.group, self.symmetric)

    def _group(self, linear: nn.Linear) -> int:
        return self.group or linear.in_features


def quantize(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [O, I] int32 in 0 .. 2**bits - 1, scale [O, I / group] float16, zero like it int32 (None: symmetric).

    weight: [O, I] of any float dtype; group divides I. The weight is (codes - zero) * scale; symmetric: zero is
    2**(bits - 1). A group of zeros gets the smallest scale.
    """
    grouped = weight.float().unflatten(1, (-1, group))
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = _round_up(grouped.abs().amax(dim=-1) / top)
        codes = (grouped / scale[..., None].float()).round().clamp(-top, top) + 2 ** (bits - 1)
        return codes.flatten(1).int(), scale, None
    top = 2**bits - 1
    low, high = grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)
    scale = _round_up((high - low) / top)
    zero = (-low / scale.float()).round().clamp(0, top)
    codes = ((grouped / scale[..., None].float()).round() + zero[..., None]).clamp(0, top)
    return codes.flatten(1).int(), scale, zero.int()


def _round_up(scale: Tensor) -> Tensor:
    """float16 that is not below `scale`: a step of its relative and of its smallest absolute precision on top."""
    return (scale * (1 + 2**-10) + 2**-24).to(torch.float16)
