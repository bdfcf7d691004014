"""`pyramiddrop`: fewer and fewer visual tokens in stages of the language model, by the last prompt token's attention.

Source: PyramidDrop, CVPR 2025, arXiv 2410.17247 (code read: Cooperx521/PyramidDrop @ 6444f30). Before each of three
layers, a quarter, a half and three quarters down, the tokens are ranked by the attention that the last prompt token
would pay them in that layer (its own norm, queries and keys on the states that enter it), averaged over heads; counts
are truncated fractions of the tokens that entered. Positions are renumbered after every stage.

Departures: grouped queries are served (the released code needs as many keys as queries); several pictures share the
budget; on a model with three positions a token (M-RoPE) the original positions stay, since renumbering would lose the
place in the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Reducer, Reduction, Step, distinct, layer_index, top_k

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape


@dataclass(frozen=True)
class PyramidDrop(Reducer):
    """Stages with geometrically falling numbers of tokens.

    keep: what is left after the last stage, as a fraction of the tokens that enter the language model, or as a number;
    the paper's three halvings are keep=0.125. layers: where stages begin, indices or fractions of the depth. ratios:
    fractions after each stage, instead of the geometric ones.
    """

    layers: tuple[float | int, ...] = (8 / 32, 16 / 32, 24 / 32)
    ratios: tuple[float, ...] | None = None

    name: ClassVar[str] = "pyramiddrop"
    sites: ClassVar[tuple[str, ...]] = ("llm",)
    signals: ClassVar[tuple[str, ...]] = ("next_last_attention", "entered")
    scope: ClassVar[str] = "request"
    position: ClassVar[str] = "renumber"
    summary: ClassVar[str] = "fewer and fewer visual tokens in stages, by the prompt's last token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise RecipeError(f"{self.name}: layers is empty; give at least one, such as [0.25, 0.5, 0.75]")
        if self.ratios is None:
            return
        falls = all(a >= b for a, b in pairwise((1.0, *self.ratios, 0.0)))
        if len(self.ratios) != len(self.layers) or not falls:
            raise RecipeError(
                f"{self.name}: ratios is {list(self.ratios)}; give one for each of the {len(self.layers)} layers, "
                f"from 1 down to 0 and never rising"
            )

    def exponents(self) -> list[float]:
        """Of `keep` in each stage: equal steps from 0 to 1."""
        return [(stage + 1) / len(self.layers) for stage in range(len(self.layers))]

    def left(self, stage: int, total: int) -> int:
        """Tokens after a stage of those `total` that entered."""
        if self.ratios is not None:
            return max(1, int(total * self.ratios[stage]))
        final = min(1.0, self.keep / max(total, 1)) if isinstance(self.keep, int) else self.keep
        return max(1, int(round(total * final ** self.exponents()[stage], 6)))  # roots may come out a hair too small

    def select(self, signals: dict[str, Tensor], layout: VisualLayout, stage: int = -1) -> Reduction:
        """The tokens after one stage."""
        count = min(len(layout), self.left(stage, int(signals["entered"])))
        return Reduction(top_k(signals["next_last_attention"].mean(dim=0), count))

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        return distinct([self._stage(shape, stage) for stage in range(len(self.layers))])

    def _stage(self, shape: Shape, stage: int) -> Step:
        layer = layer_index(self.layers[stage], shape.layers, self.name, "layers")

        def count(n: int, total: int) -> int:
            return min(n, self.left(stage, total))

        return self.step("llm", partial(self.select, stage=stage), layer=layer, count=count)
