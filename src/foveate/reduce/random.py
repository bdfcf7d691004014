"""`random`: tokens drawn without regard to content, the honest baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.reduce.base import Reducer, Reduction, in_order

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class Random(Reducer):
    """A random choice in each picture or clip, the same whenever the same request is asked with the same `seed`.

    The generator is seeded with `seed` and the signal "request_key" (a checksum of prompt and pixels), so two requests
    draw differently, and a request draws the same alone, in a batch and in another process.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    signals: ClassVar[tuple[str, ...]] = ("request_key",)
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "keep"
    summary: ClassVar[str] = "random visual tokens: the baseline that a method must beat"

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + int(signals["request_key"])) % 2**63)
        groups = layout.groups(self.scope)
        kept = [group[torch.randperm(len(group), generator=generator)[: self.count(len(group))]] for group in groups]
        return Reduction(in_order(kept))
