"""`divprune`: tokens that lie as far from each other as possible, whatever they show.

Source: DivPrune, arXiv 2503.02175 (CVPR 2025), from its description alone. Greedy max-min diversity under cosine
distance over all visual tokens of a request, on the features that the language model would see: first the token whose
nearest other is farthest, then always the one farthest from what is chosen. Kept in sequence order and renumbered.

Departures: separators are not among the candidates (the released code pools newline tokens of tiled pictures too), and
a chosen token cannot be chosen again where many tokens are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from foveate.reduce.base import Reducer, Reduction
from foveate.reduce.select import cosines, max_min
from foveate.reduce.signals import given

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class DivPrune(Reducer):
    """The most diverse tokens of the whole request; a fraction is rounded half to even, as the paper's code does."""

    name: ClassVar[str] = "divprune"
    sites: ClassVar[tuple[str, ...]] = ("post_projector",)
    signals: ClassVar[tuple[str, ...]] = ("features",)
    scope: ClassVar[str] = "request"
    position: ClassVar[str] = "renumber"
    summary: ClassVar[str] = "tokens whose features lie farthest from each other; needs no attention"

    def count(self, n: int) -> int:
        return min(n, max(1, round(self.keep * n))) if isinstance(self.keep, float) else super().count(n)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        return Reduction(diverse(given(signals, "features"), self.count(len(layout))).sort().values)


def diverse(features: Tensor, count: int) -> Tensor:
    """`count` rows of [N, D] picked by max-min cosine distance, in the order they were picked. Returns int64."""
    return max_min(1 - cosines(features), count)
