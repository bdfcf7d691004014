"""`adatoken3d`: PyramidDrop whose stages follow what each layer was found to take from the visual tokens.

Source: AdaToken-3D, IROS 2025, arXiv 2505.12782 (code read: junkerman2004/Adatoken-3D). A layer's contribution is 0.4
of the attention inside the picture, 0.3 of that between picture and text, and 0.3 of a running sum of the former that
grows by 0.73 of each layer, scaled to 0 .. 1 over the layers. Tokens are ranked and dropped as in `pyramiddrop`.

Departures: the released code measures contributions with rows and columns of the causal map swapped, so that almost
nothing is left to sum, and goes on to prune with PyramidDrop's fixed ratios: no rule leads from one to the other. Here
the sums run over the keys that a query can see, and a stage drops in proportion to how far the contribution has fallen
by then (`falls`). Without `fall` this is `pyramiddrop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import layer_index
from foveate.reduce.pyramiddrop import PyramidDrop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foveate.vlm import VLM, Request

INTRA, INTER, MEMORY, GROWTH = 0.4, 0.3, 0.3, 0.73
FROM_TEXT = 0.3
"""Weight of what text pays the picture within `inter`; the other 0.7 is what the picture pays the text before it."""


@dataclass(frozen=True)
class AdaToken3D(PyramidDrop):
    """Stages by contribution.

    keep, layers, ratios: as in `pyramiddrop`. fall: for each stage how much of the whole fall has happened, rising from
    above 0 to 1; `calibrate` finds it. A stage then keeps keep ** fall of the tokens.
    """

    fall: tuple[float, ...] | None = None

    name: ClassVar[str] = "adatoken3d"
    status: ClassVar[str] = "experimental"
    summary: ClassVar[str] = "stages of tokens dropped as the layers' measured use of the picture falls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fall is None:
            return
        rises = all(a <= b for a, b in pairwise((0.0, *self.fall, 1.0)))
        if len(self.fall) != len(self.layers) or not rises:
            raise RecipeError(
                f"{self.name}: fall is {list(self.fall)}; give one for each of the {len(self.layers)} layers, rising "
                f"from 0 to 1"
            )

    def exponents(self) -> list[float]:
        return super().exponents() if self.fall is None else list(self.fall)


def contributions(inside: Tensor, to_text: Tensor, from_text: Tensor) -> Tensor:
    """[layers] float32 in 0 .. 1 from attention masses [layers]: of visual queries on visual keys, of visual queries on
    text keys, and of text queries on visual keys, each a share of the queries' attention."""
    memory = inside[0] + GROWTH * torch.cat([torch.zeros(1), inside[1:]]).cumsum(0)
    total = INTRA * inside + INTER * ((1 - FROM_TEXT) * to_text + FROM_TEXT * from_text) + MEMORY * memory
    low, high = total.min(), total.max()
    return torch.zeros_like(total) if high == low else (total - low) / (high - low)


def falls(contribution: Tensor, starts: Sequence[int]) -> tuple[float, ...]:
    """How much of the fall from before the first stage to after the last one has happened in each stage.

    contribution: [layers]; starts: first layer of each stage, ascending. Never falls back; equal steps when the
    contribution does not fall at all.
    """
    ends = [*starts[1:], len(contribution)]
    before = float(contribution[: starts[0]].mean())
    means = [float(contribution[a:b].mean()) for a, b in zip(starts, ends)]
    whole = before - means[-1]
    if whole <= 0:
        return tuple((stage + 1) / len(starts) for stage in range(len(starts)))
    found = accumulate((min(1.0, max(0.0, (before - mean) / whole)) for mean in means), max)
    return (*list(found)[:-1], 1.0)


def calibrate(vlm: VLM, requests: Sequence[Request], keep: float | int, **params: Any) -> AdaToken3D:
    """The method with `fall` measured on these requests (pictures and questions like those it will serve)."""
    from foveate.reduce.dominance import masses

    method = AdaToken3D(keep=keep, **params)
    seen = torch.stack([masses(vlm, request) for request in requests]).mean(dim=0)
    starts = [layer_index(layer, vlm.adapter.shape.layers, method.name) for layer in method.layers]
    return AdaToken3D(keep=keep, **{**params, "fall": falls(contributions(*seen.unbind(1)), starts)})
