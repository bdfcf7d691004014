"""`eora`: a low-rank part beside each compressed layer makes up for its error where its inputs are large.

Source: Liu et al., EoRA (arXiv 2410.21271), from its description alone. Departures: the covariance is the plain mean
of the paper (the code weighs earlier samples less); eigenvalues that are 0 or negative count as the smallest positive
one. After methods that trade scales between layers (awq, mbq, smoothquant) the dense weights and the covariance are
those in the new scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from foveate.errors import RecipeError
from foveate.weights.base import CalibratedMethod
from foveate.weights.linear import Fp8Linear, Int8Linear, QuantizedLinear
from foveate.weights.lowrank import LowRankLinear, eigenspace_low_rank, empty_low_rank, svd_low_rank, weight_of

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block


@dataclass(frozen=True)
class EoRA(CalibratedMethod):
    """rank: of the part beside each layer. space: "eigen" weighs the error by the covariance of the inputs,
    "activation" by their mean size, "plain" not at all (both for comparison)."""

    rank: int = 128
    space: Literal["eigen", "activation", "plain"] = "eigen"

    name: ClassVar[str] = "eora"
    exclusive: ClassVar[str] = "adapter"
    shown: ClassVar[tuple[str, ...]] = ("rank",)
    summary: ClassVar[str] = "a low-rank part beside each compressed layer makes up for its error"
    status: ClassVar[str] = "experimental"
    searched: ClassVar[bool] = False
    takes: ClassVar[tuple[type, ...]] = (nn.Linear, QuantizedLinear, Int8Linear, Fp8Linear)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise RecipeError(f"eora: rank is {self.rank}; give 1 or more")

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return {"eigen": ("hessian",), "activation": ("mean",), "plain": ()}[self.space]

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.space != "plain"

    def check_layer(self, name: str, linear: Any) -> None:
        most = min(linear.in_features, linear.out_features)
        if self.rank > most:
            raise RecipeError(
                f"eora: layer {name} is {linear.out_features} x {linear.in_features}, so rank={self.rank} is more "
                f"than it has; use rank={max(1, most // 2)} or less"
            )

    def empty(self, linear: Any) -> nn.Module:
        dtype = linear.weight.dtype if type(linear) is nn.Linear else torch.float16
        return empty_low_rank(linear, self.rank, dtype)

    def compress_(self, block: Block) -> None:
        if len(block.stream.methods) == 1:
            raise RecipeError("eora mends what another method compressed; write that method first: rtn(bits=3) + eora")
        for name, layer in block.linears(self).items():
            dense = block.original.get(name)
            if dense is None:
                raise RecipeError(
                    f"eora: the dense weight of {block.full_name(name)} is gone; apply both methods in one recipe"
                )
            b, a = self._solve(block, name, dense.weight.detach().float() - weight_of(layer))
            dtype = self.empty(layer).lora_A.dtype
            block.replace(name, LowRankLinear(layer, a.to(dtype), b.to(dtype)))

    def _solve(self, block: Block, name: str, error: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) for the error of one layer; a layer that no sample reaches is cut without weights."""
        found = block.statistics.get(name)
        if found is None or self.space == "plain":
            return svd_low_rank(error, self.rank)
        if self.space == "activation":
            size = found.absmean.clamp(min=1e-8)
            b, a = svd_low_rank(error * size, self.rank)
            return b, a / size
        return eigenspace_low_rank(error, found.hessian, self.rank)
