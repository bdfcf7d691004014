"""`sparsegpt`: weights go one column at a time, and what is left of their row makes up for them.

Source: SparseGPT, arXiv 2301.00774, read in IST-DASLab/sparsegpt @ 147d215; the loop is `foveate.weights.solve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from foveate.errors import RecipeError
from foveate.weights.base import Pruner, with_weight
from foveate.weights.solve import sparsegpt

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """`sparsity` of every `block` columns, chosen over all rows by w^2 / d^2; or a pattern in each row.

    damp: what is added to the Hessian's diagonal, as a share of its mean. block: columns between lazy updates.
    """

    damp: float = 0.01
    block: int = 128

    name: ClassVar[str] = "sparsegpt"
    kinds: ClassVar[tuple[str, ...]] = ("hessian",)
    summary: ClassVar[str] = "second-order pruning that adjusts what stays; size only, not speed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.damp < 0:
            raise RecipeError(f"{self.name}: block is {self.block}, damp {self.damp}; need block >= 1 and damp >= 0")

    def compress_(self, block: Block) -> None:
        drop, of = self.drop_of
        for name, linear in block.linears(self).items():
            found = block.statistics.get(name)
            weight = linear.weight.detach()
            hessian = torch.eye(weight.shape[1], device=weight.device) if found is None else found.hessian
            made = sparsegpt(
                weight,
                hessian,
                self.sparsity,
                drop,
                of,
                damp=self.damp,
                block=self.block,
                name=block.full_name(name),
            )
            block.replace(name, with_weight(linear, made))
