"""`tome`: the most alike tokens are merged in pairs, a few in every block of the encoder.

Source: ToMe, arXiv 2210.09461 (ICLR 2023), from its description alone. In each block, between attention and MLP, tokens
are split into even and odd ones; the r even tokens whose keys (mean over heads) are most like an odd one's join it, as
a mean weighted by the number of patches that each already stands for. CLS is never merged. The matching itself is
`merge.bipartite`.

Departures: r follows from `keep` and the number of blocks, spread evenly. Attention inside the encoder does not weight
tokens by their size. Where the connector merges patches of a square, so that none may leave the encoder, the same
matching is repeated on the finished tokens, on the keys of the last used block, until `keep` is reached. Tokens stay in
sequence order: the language model, unlike the encoder, has positions that follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from foveate.reduce.base import Reducer, Reduction
from foveate.reduce.grid import blocks
from foveate.reduce.merge import Matching, as_part, bipartite, reduction, rounds
from foveate.reduce.signals import given

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class ToMe(Reducer):
    """Pairs of alike tokens merge until `keep` of each view is left."""

    name: ClassVar[str] = "tome"
    sites: ClassVar[tuple[str, ...]] = ("post_encoder", "post_projector")
    signals: ClassVar[tuple[str, ...]] = ("keys@-1|features",)
    scope: ClassVar[str] = "view"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "alike tokens merged in pairs, weighted by their size"

    def match(self, metric: Tensor, r: int) -> Matching:
        """One round on [1, n, D]: at most r tokens join others."""
        return bipartite(metric, r)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        keys, parts = given(signals, self.signals[0]), []
        for view in layout.groups("view"):
            size = layout.size[view]
            parts.append(as_part(view, rounds(keys[view].cpu(), size, self.count(len(view)), self.match), size))
        return reduction(parts, blocks(layout))


def spread_evenly(n: int, count: int, blocks: int) -> list[int]:
    """Tokens left after each block when n shrink to `count` by about equal numbers, and by at most half at once."""
    left, out = n, []
    for block in range(1, blocks + 1):
        left = max(n - (n - count) * block // blocks, left - left // 2)
        out.append(left)
    return out
