"""`wanda`: weights go by their size times the size of what flows into them; the rest stays as it is.

Source: Wanda, arXiv 2306.11695, read in locuslab/wanda @ 8e8fc87. Departures: padding never counts; inputs of all parts
of a model, not only of its language model; `tokens` weighs vision against text, which the paper does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.weights.base import Pruner, with_weight
from foveate.weights.pruning import pattern_mask, rows_mask, variant_mask, wanda_score
from foveate.weights.solve import sparsegpt

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block


@dataclass(frozen=True)
class Wanda(Pruner):
    """The int(inputs * sparsity) lowest |W| * ||x|| of each output row become 0; with a pattern, of each M in a row.

    variant: rows may differ: each loses the lowest scores up to one share of its sum (the paper's appendix). update:
    adjust the weights that stay, as SparseGPT does, under this mask (the paper's ablation).
    """

    variant: bool = False
    update: bool = False

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "weights of least size times input norm become zero; size only, not speed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant and self.pattern:
            raise RecipeError("wanda: variant chooses by rows, so it cannot keep a pattern; drop one of them")

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("hessian",) if self.update else ("norm",)

    def compress_(self, block: Block) -> None:
        drop, of = self.drop_of
        for name, linear in block.linears(self).items():
            found = block.statistics.get(name)
            weight = linear.weight.detach()
            norm = torch.ones(weight.shape[1], device=weight.device) if found is None else found.norm
            score = wanda_score(weight, norm)
            mask = choose(score, self.sparsity, drop, of, self.variant)
            made = weight.masked_fill(mask, 0)
            if self.update and found is not None:
                made = sparsegpt(weight, found.hessian, mask=mask, name=block.full_name(name))
            block.replace(name, with_weight(linear, made))


def choose(score: Tensor, sparsity: float, drop: int = 0, of: int = 0, variant: bool = False) -> Tensor:
    """[O, I] bool, what goes: `drop` of every `of`, or a share of each row, or of all rows by one sum (variant)."""
    if of:
        return pattern_mask(score, drop, of)
    return variant_mask(score, sparsity) if variant else rows_mask(score, sparsity)
