"""`tome`: the most alike tokens are merged in pairs, a few in every block of the encoder.

Source: ToMe, arXiv 2210.09461 (ICLR 2023), from its description alone. In each block, between attention and MLP, tokens
are split into even and odd ones; the r even tokens whose keys (mean over heads) are most like an odd one's join it, as
a mean weighted by the number of patches that each already stands for. CLS is never merged. The matching itself is
`merge.bipartite`.

Departures: r follows from `keep` and the number of used blocks, spread evenly; a block merges in several rounds where
half is not enough. Attention inside the encoder does not weight tokens by their size. Where the connector joins cells
of patches, cells merge, on the mean of their keys; where no token may leave the encoder, all rounds happen on the
finished tokens, on the keys of the last used block. Tokens stay in sequence order: the language model, unlike the
encoder, has positions that follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.reduce.base import Reducer, Reduction, Step
from foveate.reduce.grid import blocks as blocks_of
from foveate.reduce.merge import Matching, as_part, bipartite, merging, reduction, rounds
from foveate.reduce.signals import given, split_heads

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape


@dataclass(frozen=True)
class ToMe(Reducer):
    """Pairs of alike tokens merge until `keep` of each view is left."""

    name: ClassVar[str] = "tome"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "post_encoder", "post_projector")
    signals: ClassVar[tuple[str, ...]] = ("keys@-1|features",)
    scope: ClassVar[str] = "view"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "alike tokens merged in pairs, weighted by their size"

    def match(self, metric: Tensor, r: int, depth: float) -> Matching:
        """One round on [1, n, D]: at most r tokens join others. depth: how far through the encoder, from 0 to 1."""
        return bipartite(metric, r)

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        if "encoder" not in shape.sites or not shape.blocks:
            return super().steps(shape)
        return tuple(
            self.step(
                "encoder",
                partial(self.select_in_block, block=block, blocks=shape.blocks, heads=shape.heads),
                layer=block,
                where="mid",
                signals=("keys",),
                count=partial(self.count_in_block, blocks_left=shape.blocks - block),
            )
            for block in range(shape.blocks)
        )

    def count_in_block(self, n: int, total: int, blocks_left: int) -> int:
        """Tokens of n that a block leaves of a view of `total`: an equal share of what is to go in `blocks_left`."""
        return n - max(0, n - self.count(total)) // blocks_left

    def select_in_block(
        self, signals: dict[str, Tensor], layout: VisualLayout, block: int, blocks: int, heads: int
    ) -> Reduction:
        """The share of one block in the merges of each view; views of one size together."""
        keys = split_heads(signals["keys"].float(), heads).mean(dim=1).cpu()
        views: dict[tuple[int, int], list[Tensor]] = {}
        for view in layout.groups("view"):  # sizes tell how many tokens there were
            views.setdefault((len(view), int(layout.size[view].sum())), []).append(view)
        into = torch.arange(len(layout))
        for (n, total), alike in views.items():
            own = torch.stack(alike)
            count = self.count_in_block(n, total, blocks - block)
            matching = rounds(keys[own], layout.size[own], count, partial(self.match, depth=block / blocks))
            into[own] = own.gather(1, matching.into())
        return merging(into, layout.size)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        keys, parts = given(signals, self.signals[0]), []
        for view in layout.groups("view"):
            size = layout.size[view]
            matching = rounds(keys[view].cpu()[None], size[None], self.count(len(view)), partial(self.match, depth=0.5))
            parts.append(as_part(view, matching, size))
        return reduction(parts, blocks_of(layout))
