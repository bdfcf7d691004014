"""`smoothquant`: 8-bit weights and inputs, after moving the outliers of the inputs into the weights.

Source: SmoothQuant, arXiv 2211.10438, read in mit-han-lab/smoothquant @ c61476d. Departures: norms and the layers that
read them are found by running the block, so vision towers work too; outputs are not quantized, and matrix products of
the attention itself stay in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from foveate.errors import RecipeError
from foveate.weights.base import CalibratedMethod
from foveate.weights.linear import Int8Linear
from foveate.weights.structure import find_groups, module_of, scale_

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block


def smooth_scale(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """[I] a^alpha / w^(1 - alpha), at least 1e-5: absmax [I] of the inputs, w the largest |weight| of each input.

    weights: [O, I] of all layers that read these inputs.
    """
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0).clamp(min=1e-5)
    return (absmax.float().pow(alpha) / columns.pow(1 - alpha)).clamp(min=1e-5)


@dataclass(frozen=True)
class SmoothQuant(CalibratedMethod):
    """int8 weights (one scale per output) and int8 inputs (one per token, as they come).

    alpha: how much of the difficulty moves from inputs to weights, 0 to 1; smooth=false leaves it where it is.
    """

    alpha: float = 0.5
    smooth: bool = True
    sequential: bool = False

    name: ClassVar[str] = "smoothquant"
    kinds: ClassVar[tuple[str, ...]] = ("max",)
    shown: ClassVar[tuple[str, ...]] = ("alpha",)
    summary: ClassVar[str] = "8-bit weights and inputs with smoothed outliers; integer products where torch has them"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"smoothquant: alpha is {self.alpha}; it must be between 0 and 1")

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        return None  # a scale per output fits any layer

    def empty(self, linear: nn.Linear) -> nn.Module:
        has_bias = linear.bias is not None
        return Int8Linear(linear.in_features, linear.out_features, has_bias, linear.weight.device)

    def compress_(self, block: Block) -> None:
        if self.smooth and any(found is not None for found in block.statistics.values()):
            for group in find_groups(block):
                found = block.statistics.get(group.layers[0])
                if found is None or isinstance(module_of(block, group.before), nn.Linear):
                    continue  # only a norm takes the outliers in; o_proj and down_proj are rounded as they are
                weights = [module_of(block, name).weight.detach() for name in group.layers]
                scale_(block, group, smooth_scale(found.absmax, weights, self.alpha))
        for name, linear in block.linears(self).items():
            block.replace(name, Int8Linear.of(linear))
