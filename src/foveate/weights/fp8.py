"""`fp8_weights`: weights, and inputs as they come, in 8-bit floats (e4m3).

Source: FP8 formats (arXiv 2209.05433), with one scale per output and per token as `compressed-tensors` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from foveate.weights.base import WeightMethod
from foveate.weights.linear import Fp8Linear


@dataclass(frozen=True)
class Fp8Weights(WeightMethod):
    """inputs: round the inputs to fp8 as well, one scale per token; false: the weights alone."""

    inputs: bool = True

    name: ClassVar[str] = "fp8_weights"
    summary: ClassVar[str] = "weights and inputs as 8-bit floats; size only, not speed"
    status: ClassVar[str] = "experimental"

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        return None  # a scale per output fits any layer

    def convert(self, linear: nn.Linear) -> nn.Module:
        return Fp8Linear.of(linear, self.inputs)

    def empty(self, linear: nn.Linear) -> nn.Module:
        shape = linear.in_features, linear.out_features
        return Fp8Linear(*shape, linear.bias is not None, self.inputs, linear.weight.device)
