"""`owl`: blocks with more outliers keep more weights; any pruner then works with its block's share.

Source: OWL, arXiv 2310.05175, read in luuyin/OWL @ dddb7a4. The outliers are those of Wanda's scores in the dense
model, per part (tower and language model are not pooled). Departures: equal outliers in all blocks give equal shares
(the code divides by zero); a share above 1 is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foveate.errors import RecipeError
from foveate.weights.base import Pruner
from foveate.weights.magnitude import Magnitude
from foveate.weights.pruning import outlier_percentage, owl_pattern, owl_sparsities, wanda_score
from foveate.weights.sparsegpt import SparseGPT
from foveate.weights.wanda import Wanda

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block, Stream

PRUNERS: dict[str, type[Pruner]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}


@dataclass(frozen=True)
class OWL(Pruner):
    """Shares per block from the percentage of scores above `multiple` times their mean.

    spread: half the width of the range of kept shares; with a pattern, the width in weights per M. pruner: what prunes.
    """

    pruner: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"
    spread: float = 0.08
    multiple: float = 5.0

    name: ClassVar[str] = "owl"
    shown: ClassVar[tuple[str, ...]] = ("sparsity", "pruner")
    summary: ClassVar[str] = "pruning with a share of its own for each block; size only, not speed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spread < 0 or self.multiple <= 0:
            raise RecipeError(f"owl: spread is {self.spread}, multiple {self.multiple}; need spread >= 0, multiple > 0")

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._inner(self.sparsity).kinds

    def _inner(self, sparsity: float, drop: int = 0) -> Pruner:
        _, of = self.drop_of
        shared = {name: getattr(self, name) for name in ("parts", "calib", "samples", "seqlen", "seed", "tokens")}
        made = PRUNERS[self.pruner](**shared, sequential=self.sequential, sparsity=min(sparsity, 1 - 1e-6))
        return replace(made, pattern=f"{of - drop}:{of}") if of and drop else made

    def survey(self, stream: Stream) -> Any:
        """The outlier percentage of each block."""
        found = []
        for block in stream.dense(("norm",)):
            scores = [
                wanda_score(linear.weight.detach(), statistics.norm)
                for name, linear in block.linears(self).items()
                if (statistics := block.statistics.get(name)) is not None
            ]
            found.append(outlier_percentage(scores, self.multiple) if scores else 0.0)
        return found

    def compress_(self, block: Block) -> None:
        outliers = block.survey_of(self)
        drop, of = self.drop_of
        if block.index >= len(outliers):  # a layer that never runs
            self._inner(self.sparsity, drop).compress_(block)
        elif of:
            own = owl_pattern(outliers, drop, of, self.spread)[block.index]
            self._inner(own / of, own).compress_(block)
        else:
            self._inner(owl_sparsities(outliers, self.sparsity, self.spread)[block.index]).compress_(block)
