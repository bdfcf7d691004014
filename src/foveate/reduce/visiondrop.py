"""`visiondrop`: visual tokens compete among themselves, after the encoder and in three stages of the language model.

Source: VisionDrop, AAAI 2026, arXiv 2506.22283 (code read: Ruixxxx/VisionDrop @ f7a9444). Stage 0 is VisionZip in each
encoded view. Before each of three layers of the language model the tokens with the largest attention from all visual
tokens (the layer's own projections, causal, mean over heads and queries) stay as dominant ones, in their order; of the
rest, tokens at equal steps become contextual, and each other token joins the one whose key (after the rotary embedding,
mean over heads) is most like its own: its mean is added, as VisionZip's code does. Positions are renumbered.

The paper publishes one setting, 32 tokens of 576 as the mean over the layers; here its counts are scaled to `keep`.
Departures: grouped queries are served; a tower without CLS takes received attention in stage 0; a model with three
positions a token (M-RoPE) keeps the original ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Reducer, Reduction, Step, distinct, layer_index, top_k
from foveate.reduce.merge import one_hot
from foveate.reduce.visionzip import VisionZip, gather

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape

MEAN, BLEND = 32, 2 / 3
PUBLISHED = ((42, 6), (30, 5), (22, 4), (16, 3))
"""(dominant, contextual) tokens of each stage for a mean of 32 over the layers."""


@dataclass(frozen=True)
class VisionDrop(Reducer):
    """Four stages that need no text.

    keep: tokens as the mean over the layers of the language model, as a fraction of all or as a number for each view.
    Up to two thirds the published counts are scaled; beyond, they are blended with keeping all. layers: where the
    stages after it begin. schedule: dominant and contextual tokens of each of these, in turn, instead of the scaled
    ones.
    """

    layers: tuple[float | int, ...] = (8 / 32, 16 / 32, 24 / 32)
    schedule: tuple[int, ...] | None = None

    name: ClassVar[str] = "visiondrop"
    sites: ClassVar[tuple[str, ...]] = ("post_encoder", "post_projector", "llm")
    signals: ClassVar[tuple[str, ...]] = (*VisionZip.signals, "next_visual_attention", "next_keys", "entered")
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "visual tokens compete among themselves after the encoder and in three stages"

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.layers)
        if self.schedule is None and stages != len(PUBLISHED) - 1:
            raise RecipeError(
                f"{self.name}: layers is {list(self.layers)}; the published schedule has three stages, give another "
                f"one in schedule"
            )
        if self.schedule is not None and (not stages or len(self.schedule) != 2 * stages or min(self.schedule) < 0):
            raise RecipeError(
                f"{self.name}: schedule is {list(self.schedule)}; give dominant and contextual tokens for each of the "
                f"{stages} layers"
            )

    def ratio(self, stage: int) -> float:
        """Tokens of a stage as a fraction of all; meaningless for a `keep` that is a number of tokens."""
        scaled = sum(PUBLISHED[stage]) / MEAN * min(self.keep, BLEND)
        return scaled + (1 - scaled) * max(0.0, self.keep - BLEND) / (1 - BLEND)

    def zipped(self) -> VisionZip:
        """Stage 0."""
        whole = sum(PUBLISHED[0])
        keep = max(1, round(self.keep * whole / MEAN)) if isinstance(self.keep, int) else min(1.0, self.ratio(0))
        return VisionZip(keep=keep, contextual=PUBLISHED[0][1] / whole)

    def left(self, stage: int, n: int, total: int) -> tuple[int, int]:
        """(dominant, contextual) tokens that stay of n in a stage from 1 on; `total` entered the language model."""
        if self.schedule is not None:
            dominant, contextual = self.schedule[2 * stage - 2 : 2 * stage]
        else:
            share, whole = PUBLISHED[stage], sum(PUBLISHED[stage])
            falls = whole / sum(PUBLISHED[0]) if isinstance(self.keep, int) else self.ratio(stage) / self.ratio(0)
            count = min(n, int(total * falls + 0.5))
            contextual = 0 if count == n else int(count * share[1] / whole + 0.5)
            dominant = count - contextual
        dominant = min(n, max(1, dominant))
        return dominant, min(contextual, n - dominant)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout, stage: int = 3) -> Reduction:
        """The stages inside the language model, counted from 1."""
        n = len(layout)
        dominant, contextual = self.left(stage, n, int(signals["entered"]))
        if dominant == n:
            return Reduction(torch.arange(n))
        best = top_k(signals["next_visual_attention"].mean(dim=0).cpu(), dominant)
        targets, weights = gather(signals["next_keys"].mean(dim=1).cpu(), best, contextual)
        return Reduction(torch.cat([best, targets]), torch.cat([one_hot(best, n), weights]))

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        inside = [self._stage(shape, stage + 1) for stage in range(len(self.layers))]
        return (*self.zipped().steps(shape), *distinct(inside))

    def _stage(self, shape: Shape, stage: int) -> Step:
        layer = layer_index(self.layers[stage - 1], shape.layers, self.name, "layers")

        def count(n: int, total: int) -> int:
            return sum(self.left(stage, n, total))

        return self.step(
            "llm",
            partial(self.select, stage=stage),
            layer=layer,
            count=count,
            scope="request",
            signals=self.signals[len(VisionZip.signals) :],
        )
