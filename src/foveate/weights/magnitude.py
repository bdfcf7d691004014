"""`magnitude`: the smallest weights of each layer go. The baseline that every pruning method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foveate.weights.base import Pruner, with_weight
from foveate.weights.pruning import magnitude_mask, pattern_mask

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Weights at or below a threshold of their layer become 0; with a pattern, the smallest of each M. Needs no data.

    The threshold is the value at index int(numel * sparsity) of the sorted layer, as in the code of Wanda.
    """

    name: ClassVar[str] = "magnitude"
    needs_data: ClassVar[bool] = False
    summary: ClassVar[str] = "the smallest weights of each layer become zero; size only, not speed"

    def compress_(self, block: Block) -> None:
        drop, of = self.drop_of
        for name, linear in block.linears(self).items():
            weight = linear.weight.detach()
            mask = pattern_mask(weight.abs(), drop, of) if of else magnitude_mask(weight, self.sparsity)
            block.replace(name, with_weight(linear, weight.masked_fill(mask, 0)))
