"""`fastv`: after a few layers of the language model, keep the visual tokens that the last prompt token attends to.

Source: FastV, ECCV 2024, arXiv 2403.06764 (code read: pkunlp-icler/FastV @ d165972). Score of a visual token: the
attention that the last prompt token pays it in layer k-1, averaged over heads; tokens leave at the input of layer k and
keep their positions. The number that stays is rounded half to even.

Where paper and code differ: the paper averages the attention that a token receives from all others; the code reads the
last row only. `strict="paper"` averages the rows of the visual tokens and of the text that follows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from foveate.reduce.base import Scorer, Step, layer_index

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape

ALL_ROWS = ("visual_attention", "mean_text_attention", "text_hidden")
"""What the mean over all rows is made of; the states say how many text rows there are."""


@dataclass(frozen=True)
class FastV(Scorer):
    """Top tokens of the whole request by the last prompt token's attention.

    layer: the first layer that sees fewer tokens; an index (1 or more), or a fraction of the depth. The default is
    the paper's layer 2 of 32. strict: by the mean over all rows (paper), or by the last row (code).
    """

    layer: float | int = 2 / 32
    strict: Literal["paper", "code"] = "code"

    name: ClassVar[str] = "fastv"
    sites: ClassVar[tuple[str, ...]] = ("llm",)
    signals: ClassVar[tuple[str, ...]] = ("last_attention",)
    scope: ClassVar[str] = "request"
    position: ClassVar[str] = "keep"
    summary: ClassVar[str] = "the visual tokens that the prompt's last token attends to in an early layer"
    space: ClassVar[dict[str, tuple[float, ...]]] = {"keep": (0.75, 0.5, 0.25)}

    def count(self, n: int) -> int:
        return min(self.keep, n) if isinstance(self.keep, int) else max(1, round(n * self.keep))

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        layer = layer_index(self.layer, shape.layers, self.name)
        signals = ALL_ROWS if self.strict == "paper" else self.signals
        return (self.step("llm", self.select, layer=layer, signals=signals),)

    def score(self, signals: dict[str, Tensor], layout: VisualLayout) -> Tensor:
        if self.strict == "code":
            return signals["last_attention"].mean(dim=0)
        seen, words = len(layout), len(signals["text_hidden"])
        by_seen, by_words = (signals[name].mean(dim=0) for name in ALL_ROWS[:2])
        return (seen * by_seen + words * by_words) / (seen + words)
