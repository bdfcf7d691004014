"""`text_dominance`: every token at or above an attention threshold that the kept fraction sets.

Source: the text-dominance paper, arXiv 2508.10552, from its equations; no code was found. The threshold is the smallest
value that at most keep * N tokens of a view reach, and what reaches it stays, in raster order, renumbered. Without ties
that is FasterVLM's choice; tokens that tie at the threshold all fall. A tower without CLS scores by received attention.
The paper's measures of text dominance, MDI and AEI, are not part of this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from foveate.reduce.base import Reducer, Reduction, in_order
from foveate.reduce.select import above_threshold
from foveate.reduce.signals import head_mean

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class TextDominance(Reducer):
    """Tokens of each view whose CLS attention reaches the view's threshold; at most `keep` of them, rounded down."""

    name: ClassVar[str] = "text_dominance"
    signals: ClassVar[tuple[str, ...]] = ("cls_attention|received_attention",)
    scope: ClassVar[str] = "view"
    position: ClassVar[str] = "renumber"
    exact: ClassVar[bool] = False  # ties at the threshold fall
    summary: ClassVar[str] = "every token above an attention threshold, so that tokens that tie fall together"

    def count(self, n: int) -> int:
        return min(n, max(1, int(self.keep * n))) if isinstance(self.keep, float) else super().count(n)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        score = head_mean(signals, self.signals[0])
        kept = []
        for view in layout.groups(self.scope):
            reach = above_threshold(score[view], self.count(len(view)))
            kept.append(view[reach if len(reach) else score[view].argmax()[None]])  # of a blank view, one token
        return Reduction(in_order(kept))
