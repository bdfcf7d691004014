"""`dycoke`: in windows of four frames, later frames keep only what differs most from the frame before.

Source: DyCoke, arXiv 2411.15024 (CVPR 2025; code read: KD-TAO/DyCoke @ dd74634). In every pair of frames the second
keeps the places least similar (cosine) to the first; then, in windows of four, the third is compared with the first
the same way. So one frame in four stays whole. What the paper calls merging drops tokens.

`decode` below 1 is the second stage: while answering, layers from `layer` on attend to that share of the visual tokens
that the layer before attends to most, chosen anew whenever that attention has moved (cosine below `similarity`).

Where paper and code differ: the code leaves the third frame of the last whole window uncut, loses an odd last frame,
fails below five frames, and hands a cut frame's tokens over by rising similarity; `strict="code"` does the same, save
that short clips work. "paper" treats every window alike and keeps the raster. `keep` is the fraction of all tokens: the
other three frames of a window share what the whole one leaves; below a quarter the whole frames are cut as well, down
to their tokens least like their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.allocate import largest_remainder
from foveate.reduce.base import Reducer, Reduction, Step, layer_index, top_k
from foveate.reduce.frames import at, budgets
from foveate.reduce.grid import blocks
from foveate.reduce.merge import Part, reduction
from foveate.reduce.select import unit
from foveate.reduce.signals import given

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape


@dataclass(frozen=True)
class DyCoke(Reducer):
    """One frame of four whole, of the others what differs most from the frame that they are compared with.

    decode, layer, similarity: the second stage. While answering, layers from `layer` on (an index, or a fraction of the
    depth) attend to that share of the visual tokens only, chosen anew when attention has moved (cosine below
    `similarity`). strict: which frames are cut, and the order of their tokens, as the paper or as its code has it.
    """

    decode: float = 1.0
    layer: float | int = 3 / 28
    similarity: float = 0.9
    strict: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "dycoke"
    signals: ClassVar[tuple[str, ...]] = ("features",)
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "keep"
    summary: ClassVar[str] = "of each four frames of a clip one whole, of the others what changed"

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether the budget is met to the token: the released code leaves some frames whole, whatever it is."""
        return self.strict == "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decode <= 1:
            raise RecipeError(f"{self.name}: decode is {self.decode}; a kept fraction lies above 0 and at most at 1")

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        first = super().steps(shape)
        if self.decode == 1:
            return first
        seen: list[Tensor] = []  # of this request: the attention of the step before, and the choice that holds

        def attend(signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
            n = len(layout)
            attention = signals["last_attention"].mean(dim=0)
            kept = attended(attention, seen[0] if seen else None, self.count_decoding(n), self.similarity)
            if kept is None:  # alike: the code lets everything be seen in this step, the paper stays with its choice
                kept = torch.arange(n) if self.strict == "code" else seen[1]
            seen[:] = [attention, kept]
            return Reduction(kept)

        inside = self.step(
            "cache",
            attend,
            layer=layer_index(self.layer, shape.layers, self.name),
            signals=("last_attention",),
            scope="request",
            newline="keep",
            count=lambda n, total: self.count_decoding(n),
        )
        return (*first, inside)

    def count_decoding(self, n: int) -> int:
        """Visual tokens of n that are attended to while decoding."""
        return max(int(n * self.decode), 1)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        features, parts = given(signals, "features"), []
        for table, total in budgets(layout, self.count):
            x, sizes = at(unit(features), table), (table >= 0).sum(dim=1).tolist()
            counts = self._counts(sizes, total)
            for frame, count in enumerate(counts):
                source = table[frame][table[frame] >= 0]
                before = compared_with(frame)
                other = x[before] if before is not None else unit(x[frame].mean(dim=0)).expand_as(x[frame])
                same = (x[frame] * other).sum(dim=-1).cpu()[table[frame] >= 0]
                order = torch.sort(same, stable=True).indices[:count]
                whole = count == len(source)
                ordered = self.strict == "code" and not whole
                parts.append(Part(source, order if ordered else order.sort().values, late=None if ordered else 0))
        return reduction(parts, blocks(layout))

    def _counts(self, sizes: list[int], total: int) -> list[int]:
        if self.strict == "code" and len(sizes) > 4:
            fraction = max(4 * total / sum(sizes) - 1, 0) / 3
            cut = cut_frames(len(sizes))
            counts = [int(fraction * size) if frame in cut else size for frame, size in enumerate(sizes)]
            return counts if total == sum(sizes) or len(sizes) % 2 == 0 else [*counts[:-1], 0]
        lead = [frame for frame in range(len(sizes)) if compared_with(frame) is None]
        rest = [frame for frame in range(len(sizes)) if compared_with(frame) is not None]
        counts = [0] * len(sizes)
        own = min(total, sum(sizes[frame] for frame in lead))
        for group, budget in ((lead, own), (rest, total - own)):
            caps = [sizes[frame] for frame in group]
            for frame, count in zip(group, largest_remainder(torch.tensor(caps), budget, caps)):
                counts[frame] = count
        return counts


def compared_with(frame: int) -> int | None:
    """The frame that this one is compared with, or None for the first of a window of four."""
    return (None, frame - 1, frame - 2, frame - 1)[frame % 4]


def cut_frames(frames: int) -> set[int]:
    """The frames that the released code cuts: every second, and each third of a window but for the last ones."""
    return {*range(1, frames, 2), *range(2, frames - 2, 4)}


def kept(x: Tensor, frames: int, drop: float) -> Tensor:
    """The released code's first stage: rows of x [F * P, D] that stay, in the order it emits them. Returns int64.

    A cut frame keeps int((1 - drop) * P) rows, the least similar first. An odd last frame is lost.
    """
    u = unit(x).view(frames, -1, x.shape[-1])
    places = u.shape[1]
    count, cut = int((1 - drop) * places), cut_frames(frames)
    out = []
    for frame in range(frames - frames % 2):
        order = torch.arange(places)
        if frame in cut:
            order = torch.sort((u[compared_with(frame)] * u[frame]).sum(dim=-1), stable=True).indices[:count]
        out.append(frame * places + order)
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.int64)


def attended(attention: Tensor, before: Tensor | None, keep: int, similarity: float) -> Tensor | None:
    """The released code's second stage in one decode step: the visual tokens attended to, or None for all of them.

    attention: [N] of the new token to the visual tokens, mean over heads; before: the same of the step before, None in
    the first. Where the two are alike (cosine at least `similarity`) the code restricts nothing in this step.
    """
    if before is not None and float(F.cosine_similarity(attention, before, dim=0)) >= similarity:
        return None
    return top_k(attention.cpu(), keep)
