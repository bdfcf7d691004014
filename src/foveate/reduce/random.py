"""`random`: tokens drawn without regard to content, the honest baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.reduce.base import Reducer, Reduction, Step, in_order, layer_index

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape


@dataclass(frozen=True)
class Random(Reducer):
    """A random choice in each picture or clip, the same whenever the same request is asked with the same `seed`.

    The generator is seeded with `seed` and the signal "request_key" (a checksum of prompt and pixels), so two requests
    draw differently, and a request draws the same alone, in a batch and in another process.

    layer: where tokens leave inside the language model, an index or a fraction of the depth, to be compared with
    methods that act there; none: before it.
    """

    seed: int = 0
    layer: float | int | None = None

    name: ClassVar[str] = "random"
    signals: ClassVar[tuple[str, ...]] = ("request_key",)
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "keep"
    summary: ClassVar[str] = "random visual tokens: the baseline that a method must beat"

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        if self.layer is None:
            return super().steps(shape)
        return (self.step("llm", self.select, layer=layer_index(self.layer, shape.layers, self.name)),)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + int(signals["request_key"])) % 2**63)
        groups = layout.groups(self.scope)
        kept = [group[torch.randperm(len(group), generator=generator)[: self.count(len(group))]] for group in groups]
        return Reduction(in_order(kept))
