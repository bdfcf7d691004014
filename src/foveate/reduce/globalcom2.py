"""`globalcom2`: the thumbnail decides how much of each crop stays, and helps to choose it.

Source: GlobalCom2, arXiv 2501.05179 (AAAI 2026; code read: xuyang-liu16/GlobalCom2 @ 96b2d00). The thumbnail keeps its
most attended tokens. Each crop's kept fraction is keep * (1 + p - mean p), p the softmax over crops of the thumbnail's
attention logits summed in the crop's part, divided by `temperature`. Inside a crop the score is the sum of its own
logits and of the thumbnail's, resized to the joined map, each scaled to length 1. Renumbered; newlines stay.

Where paper and code differ: the code truncates every count, hands the thumbnail over in score order, and cuts the
thumbnail into equal parts for the crops, whatever of them is padding; `strict="code"` does the same, "paper" keeps the
exact budget in raster order, and a crop's part is where the thumbnail shows it. The code also puts the tokens of a
padded crop at wrong cells of the joined map; here a token stays at its place (`packed` is the released order). The code
reads the last layer of the encoder; here it is the last one that feeds the connector. A tower without CLS scores by
received attention. A picture without a thumbnail beside crops, which the code leaves whole, gives each view its share
by size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.allocate import largest_remainder
from foveate.reduce.base import Reducer, Reduction, top_k
from foveate.reduce.grid import blocks, overview, seen_by, stitched, unpadded
from foveate.reduce.merge import Part, reduction
from foveate.reduce.select import strongest
from foveate.reduce.signals import head_mean

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class GlobalCom2(Reducer):
    """Top tokens of thumbnail and crops, more of the crops that the thumbnail attends to.

    temperature: of the softmax over crops; small values favour few crops. strict: the budget to the token, in raster
    order (paper), or truncated, the thumbnail by score (code).
    """

    temperature: float = 10.0
    strict: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "globalcom2"
    signals: ClassVar[tuple[str, ...]] = ("cls_logits@-1|received_attention@-1|received_attention",)
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "renumber"
    summary: ClassVar[str] = "the thumbnail sets how much of each crop stays and takes part in the choice"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise RecipeError(f"{self.name}: temperature is {self.temperature}; it must be above 0")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the budget is met to the token: the released code truncates."""
        return self.strict == "paper"

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        score = head_mean(signals, self.signals[0])
        parts = []
        for media in layout.groups("media"):
            whole, crops = overview(layout, media)
            total = self.count(len(media))
            if whole is None or total == len(media):
                views = [view for view in (whole, *crops) if view is not None]
                sizes = [len(view) for view in views]
                counts = largest_remainder(torch.tensor(sizes), total, sizes)
                parts += [Part(view, top_k(score[view], count)) for view, count in zip(views, counts)]
                continue
            parts += self._parts(score, layout, whole, crops, total)
        return reduction(parts, blocks(layout))

    def _parts(self, score: Tensor, layout: VisualLayout, whole: Tensor, crops: list[Tensor], total: int) -> list[Part]:
        code = self.strict == "code"
        keep = total / (len(whole) + sum(map(len, crops)))
        if code and isinstance(self.keep, float):
            keep = self.keep  # counts are truncated, so that no rounding may come before
        if code:
            cell, rows, cols = grid_of(layout, crops)
            sums = cell_sums(score[whole], layout.row[whole], layout.col[whole], rows, cols)
            ratios = spread(sums, keep, self.temperature)[cell]
        else:
            sums = torch.stack([score[whole][inside].double().sum() for inside in seen_by(layout, whole, crops)])
            ratios = spread(sums, keep, self.temperature)
        sizes = torch.tensor([len(crop) for crop in crops])
        own = max(int(len(whole) * keep), 1)
        if code:
            counts = [int(size * ratio) for size, ratio in zip(sizes.tolist(), ratios.tolist())]
            parts = [Part(whole, strongest(score[whole], own), late=None)]
        else:
            counts = largest_remainder(sizes * ratios, total - own, sizes.tolist())
            parts = [Part(whole, top_k(score[whole], own))]
        resized = over_tiles(score, layout, whole, crops)
        for crop, count in zip(crops, counts):
            parts.append(Part(crop, top_k(combined(score[crop], resized[crop]), count)))
        return parts


def spread(sums: Tensor, keep: float, temperature: float) -> Tensor:
    """Kept fraction of each crop [crops] float64, at most 1, from the thumbnail's logits summed in its part [crops]."""
    share = ((sums - sums.max()) / temperature).exp()
    share = share / (share.sum() + 1e-8)
    return (keep * (1 + share - share.mean())).clamp_max(1)


def grid_of(layout: VisualLayout, crops: list[Tensor]) -> tuple[Tensor, int, int]:
    """The cell of each crop in the grid of crops [crops] int64, row by row, and the grid's rows and columns.

    Rows and columns of crops that are padding throughout are unknown, and not counted.
    """
    first = torch.stack([crop[0] for crop in crops])
    down, row = torch.unique(layout.global_row[first] - layout.row[first], return_inverse=True)
    across, col = torch.unique(layout.global_col[first] - layout.col[first], return_inverse=True)
    return row * len(across) + col, len(down), len(across)


def cell_sums(score: Tensor, row: Tensor, col: Tensor, rows: int, cols: int) -> Tensor:
    """Scores [N] of a thumbnail summed over rows x cols equal parts of its map [rows * cols] float64, as the code cuts
    it: whatever the crops' padding, and what is left over goes to the last parts. row, col: [N], place in the map."""
    down, across = (
        (place // max((int(place.max()) + 1) // parts, 1)).clamp_max(parts - 1)
        for place, parts in ((row, rows), (col, cols))
    )
    return torch.zeros(rows * cols, dtype=torch.float64).index_add_(0, down * cols + across, score.double())


def crop_ratios(thumbnail: Tensor, rows: int, cols: int, keep: float, temperature: float) -> Tensor:
    """Kept fraction of each of rows x cols crops [crops] float64, from the logits of a square thumbnail [N]."""
    place = torch.arange(len(thumbnail))
    side = int(len(thumbnail) ** 0.5)
    return spread(cell_sums(thumbnail, place // side, place % side, rows, cols), keep, temperature)


def combined(local: Tensor, overall: Tensor) -> Tensor:
    """Score [n] of a crop's tokens: its own logits and the thumbnail's, each scaled to length 1."""
    return F.normalize(local, dim=0) + F.normalize(overall, dim=0)


def over_tiles(score: Tensor, layout: VisualLayout, whole: Tensor, crops: list[Tensor]) -> Tensor:
    """[N] the thumbnail's scores, resized (bilinear) to the joined map of the crops; 0 outside the crops."""
    everything = torch.cat(crops)
    rows, cols = layout.global_row[everything], layout.global_col[everything]
    small = score.new_zeros(int(layout.row[whole].max()) + 1, int(layout.col[whole].max()) + 1)
    small[layout.row[whole], layout.col[whole]] = score[whole]
    size = (int(rows.max()) + 1, int(cols.max()) + 1)
    large = F.interpolate(small[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    resized = torch.zeros_like(score)
    resized[everything] = large[rows, cols]
    return resized


def packed(
    thumbnail: Tensor, crops: Tensor, rows: int, cols: int, picture: tuple[int, int], keep: float, temperature: float
) -> tuple[Tensor, list[int]]:
    """The released code on raw logits: the thumbnail's kept places in score order, and the crops' tokens as emitted.

    thumbnail: [N]; crops: [rows * cols, N], all maps square; picture: (width, height). An emitted token is crop * N +
    patch, -1 a newline after each row of the joined map. As in the code, a kept token stands at its rank among the
    crop's unpadded patches, not at its own cell.
    """
    n = len(thumbnail)
    side = int(n**0.5)
    grid = stitched(rows, cols, side, side)
    down, across = unpadded(*grid.shape, picture)
    shown = grid[down, across]
    large = F.interpolate(thumbnail.view(1, 1, side, side), shown.shape, mode="bilinear", align_corners=False)
    overall = torch.full((rows * cols * n,), torch.nan)
    overall[shown.flatten()] = large.flatten()
    cells = torch.full((rows * cols * n,), -1)
    for crop, ratio in enumerate(crop_ratios(thumbnail, rows, cols, keep, temperature).tolist()):
        place = crop * n + (~overall[crop * n : (crop + 1) * n].isnan()).nonzero().flatten()
        best = top_k(combined(crops.flatten()[place], overall[place]), int(len(place) * ratio))
        cells[crop * n + best] = place[best]
    emitted = torch.cat([cells[grid], torch.full((grid.shape[0], 1), -2)], dim=1).flatten()
    emitted = emitted[emitted != -1]
    return strongest(thumbnail, int(n * keep)), torch.where(emitted == -2, -1, emitted).tolist()
