"""`yopo`: all visual tokens stay, but the language model computes less for them.

Source: "Treat visual tokens as text? But your MLLM only needs fewer efforts to see", arXiv 2410.06169 (code read:
ZhangAIPI/YOPO_MLLM_Pruning). Four static rules: a visual token attends, among visual ones, only to its neighbours in
the picture (in both directions; this replaces causality inside a view); in dropped heads visual keys get no attention
(set to zero after the softmax, not renormalised) and the output at visual tokens is zero; from some layer on no head
sees visual keys; at visual tokens the MLP uses its first channels only.

The paper trains LLaVA under these masks; here they are applied as they are, so light settings are the ones that make
sense without training. As in the released code the rules are masks: they show what the saving would cost in quality,
and save little time by themselves. Which heads to drop is found by `head_votes` on calibration samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Compute, Reducer, Reduction, Step, layer_index

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape


@dataclass(frozen=True)
class YOPO(Reducer):
    """Less computation for visual tokens.

    keep: the share of the MLP's inner channels that visual tokens use; 1.0 turns the whole method off. window: side of
    the square of neighbours, odd; none: all earlier tokens. cut: the first layer in which nobody attends to visual
    tokens, an index or a fraction of the depth; none: no layer. dropped: heads, each as layer x heads + head.
    """

    window: int | None = 7
    cut: float | int | None = None
    dropped: tuple[int, ...] = ()

    name: ClassVar[str] = "yopo"
    sites: ClassVar[tuple[str, ...]] = ("compute",)
    scope: ClassVar[str] = "request"
    position: ClassVar[str] = "keep"
    status: ClassVar[str] = "experimental"
    summary: ClassVar[str] = "all visual tokens stay, and layers compute less for them (masks)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, int):
            raise RecipeError(f"{self.name}: keep is {self.keep}; give the share of the MLP's channels, such as 0.5")
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise RecipeError(f"{self.name}: window is {self.window}; give an odd number such as 7, or none")

    def count(self, n: int) -> int:
        return n

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        """All tokens."""
        return Reduction(torch.arange(len(layout)))

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        if self.keep == 1.0:
            return ()
        cut = shape.layers if self.cut is None else layer_index(self.cut, shape.layers, self.name, "cut")
        wrong = [head for head in self.dropped if not 0 <= head < shape.layers * shape.text_heads]
        if wrong:
            raise RecipeError(
                f"{self.name}: dropped names head {wrong[0]}; this model has {shape.layers} layers of "
                f"{shape.text_heads} heads"
            )
        seen: list[tuple[VisualLayout, Tensor]] = []  # the layers of a request share their windows
        return tuple(
            self.step(
                "compute", partial(self.leave, layer=layer, cut=cut, heads=shape.text_heads, seen=seen), layer=layer
            )
            for layer in range(shape.layers)
        )

    def leave(
        self,
        signals: dict[str, Tensor],
        layout: VisualLayout,
        *,
        layer: int,
        cut: int,
        heads: int,
        seen: list[tuple[VisualLayout, Tensor]],
    ) -> Compute:
        """What one layer leaves out. seen: the windows of layouts that other layers of this request made."""
        window = next((known for of, known in seen if of is layout), None)
        if window is None and self.window is not None:
            window = neighbours(layout, self.window)
            seen.append((layout, window))
        kept = torch.ones(heads, dtype=torch.bool)
        kept[[head % heads for head in self.dropped if head // heads == layer]] = False
        heard = torch.zeros_like(kept) if layer >= cut else kept
        return Compute(
            window,
            None if bool(heard.all()) else heard,
            None if bool(kept.all()) else kept,
            float(self.keep),
        )


def neighbours(layout: VisualLayout, window: int) -> Tensor:
    """[N, N] bool: tokens of one view whose rows and columns differ by at most (window - 1) / 2."""
    reach = (window - 1) // 2
    same = (layout.media[:, None] == layout.media) & (layout.view[:, None] == layout.view)
    rows = (layout.row[:, None] - layout.row).abs() <= reach
    return same & rows & ((layout.col[:, None] - layout.col).abs() <= reach)


def head_votes(ratios: Tensor, threshold: float, share: float = 0.4) -> Tensor:
    """[layers, H] bool, heads that stay: those above `threshold` in more than `share` of the samples, and the first two
    layers whole.

    ratios: [samples, layers, H] attention to visual keys over attention to text keys (`dominance.head_ratios`).
    """
    stays = (ratios > threshold).float().mean(dim=0) > share
    stays[:2] = True
    return stays
