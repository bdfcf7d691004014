"""`hired`: every tile has a budget by what the first layer sees in the whole picture, and spends it by the last layer.

Source: HiRED, arXiv 2408.10945 (AAAI 2025; code read: hasanar1f/HiRED @ 502d6dd). The whole picture keeps `alpha` of
the budget; its tiles share the rest by the attention that CLS pays their part of the whole picture in the first layer;
in every view the patches with the highest CLS attention of the last used layer stay, in raster order, renumbered,
without newlines.

Where paper and code differ: the paper sums attention over each tile's part of the picture. The code counts how many of
the strongest patches fall into equal runs of the flattened map, which are the tiles only if these lie below each other,
and truncates, so that up to one token a tile is lost. `strict="code"` does as the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.allocate import largest_remainder, truncated
from foveate.reduce.base import Reducer, Reduction, in_order, top_k
from foveate.reduce.grid import overview, seen_by
from foveate.reduce.select import strongest
from foveate.reduce.signals import head_mean

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class HiRED(Reducer):
    """Top tokens by last-layer attention, as many in each tile as the whole picture's first layer gives it.

    alpha: the whole picture's share of the budget. A picture of one view, or whose views do not include the whole
    picture, gives each view its share by size. strict: tiles share by summed attention, to the token (paper), or by
    votes and truncated (code).
    """

    alpha: float = 0.5
    strict: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "hired"
    sites: ClassVar[tuple[str, ...]] = ("post_projector",)
    signals: ClassVar[tuple[str, ...]] = (
        "cls_attention@0|received_attention@0|received_attention",
        "cls_attention@-1|received_attention@-1|received_attention",
    )
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "tokens that the encoder attends to most, more of them in tiles that stand out"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 1:
            raise RecipeError(f"{self.name}: alpha is {self.alpha}; the whole picture's share lies between 0 and 1")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the budget is met to the token: the released code truncates."""
        return self.strict == "paper"

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        first, last = (head_mean(signals, need) for need in self.signals)
        kept = []
        for media in layout.groups("media"):
            whole, tiles = overview(layout, media)
            views = [whole, *tiles] if whole is not None else tiles
            total = self.count(len(media))
            if whole is None:
                counts = largest_remainder(torch.tensor([len(v) for v in views]), total, [len(v) for v in views])
            else:
                counts = self._counts(first[whole], layout, whole, tiles, total)
            kept += [view[top_k(last[view], count)] for view, count in zip(views, counts)]
        return Reduction(in_order(kept))

    def _counts(
        self, first: Tensor, layout: VisualLayout, whole: Tensor, tiles: Sequence[Tensor], total: int
    ) -> list[int]:
        caps = [len(tile) for tile in tiles]
        if total == len(whole) + sum(caps):
            return [len(whole), *caps]
        if self.strict == "code":
            own, *others = budgets(first, caps, total, self.alpha)
            return [own if any(others) else max(own, 1), *others]
        own = max(min(int(total * self.alpha), len(whole)), total - sum(caps))
        shares = torch.stack([first[inside].sum() for inside in seen_by(layout, whole, tiles)])
        return [own, *largest_remainder(shares, total - own, caps)]


def budgets(first: Tensor, tiles: Sequence[int], total: int, alpha: float) -> list[int]:
    """Tokens that the whole picture and each tile keep, as the released code counts them; their sum is at most `total`.

    first: [N] attention of CLS to the whole picture's patches in the first layer (any scale). tiles: patches of each
    tile. The int(N * (1 - alpha)) strongest patches vote; a tile's share is the votes in its equal run of the raster.
    """
    n = len(first)
    own = min(int(total * alpha), n)
    left = min(total - own, sum(tiles))
    if left <= 0 or not tiles:
        return [own, *[0] * len(tiles)]
    runs = strongest(first, int(n * (1 - alpha))) * len(tiles) // n
    votes = torch.bincount(runs, minlength=len(tiles)).float()
    return [own, *truncated(votes, left, tiles)]


def keep_mask(first: Tensor, last: Tensor, rate: float, alpha: float) -> Tensor:
    """The method of the released code on raw attention: mask [V, N] bool, True stays.

    first, last: [V, H, N] post-softmax attention of CLS in the first and in the last used layer; view 0 is the whole
    picture, the others are its tiles. rate: kept fraction of all V * N tokens. V = 1 keeps int(N * rate).
    """
    views, _, n = first.shape
    counts = budgets(first[0].sum(dim=0), [n] * (views - 1), int(views * n * rate), alpha if views > 1 else 1.0)
    score = last.sum(dim=1)
    mask = torch.zeros(views, n, dtype=torch.bool)
    for view, count in enumerate(counts):
        mask[view, top_k(score[view], count)] = True
    return mask
