"""`layered`: pruning with its own share of zeros in each decoder layer.

The shares are found by `foveate optimize --strategy milp`, as the bits of `mixed` are: a mixed-integer programme over
measured scores of single layers, the idea of Puzzle (arXiv 2411.19146).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from foveate.errors import RecipeError
from foveate.weights.base import Pruner
from foveate.weights.mixed import decoder_layer
from foveate.weights.owl import PRUNERS

if TYPE_CHECKING:
    from foveate.vlm import VLM
    from foveate.weights.calibrate import Block


@dataclass(frozen=True)
class Layered(Pruner):
    """shares: what goes of each decoder layer's weights, from 0 to below 1. pruner: what chooses the weights; magnitude
    needs no data."""

    shares: tuple[float, ...] = ()
    pruner: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"

    name: ClassVar[str] = "layered"
    status: ClassVar[str] = "experimental"
    shown: ClassVar[tuple[str, ...]] = ("shares", "pruner")
    searched: ClassVar[bool] = False  # its space is a number for each layer: the strategy milp fills it
    summary: ClassVar[str] = "pruning with a share of its own in each decoder layer; size only, not speed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts != ("llm",):
            raise RecipeError("layered: parts must be [llm], whose layers the shares are for")
        if self.pattern:
            raise RecipeError("layered: a pattern is the same in all layers, and shares are not; drop one of them")
        wrong = next((share for share in self.shares if not 0 <= share < 1), None)
        if wrong is not None or not self.shares:
            raise RecipeError(f"layered: shares holds {wrong}; give a number from 0 to below 1 for each layer")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.pruner != "magnitude"

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return PRUNERS[self.pruner].kinds if self.pruner == "sparsegpt" else ("norm",) if self.needs_data else ()

    def share(self, name: str) -> float:
        layer = decoder_layer(name)
        return self.shares[layer] if layer is not None and layer < len(self.shares) else 0.0

    def check(self, vlm: VLM) -> None:
        depth = vlm.adapter.shape.layers
        if len(self.shares) != depth:
            raise RecipeError(f"layered: shares has {len(self.shares)} numbers, this model has {depth} decoder layers")
        super().check(vlm)

    def compress_(self, block: Block) -> None:
        share = self.share(block.full_name(""))
        if share:
            PRUNERS[self.pruner](parts=self.parts, sparsity=share).compress_(block)
