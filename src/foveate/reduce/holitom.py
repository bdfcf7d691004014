"""`holitom`: a clip is cut into windows so that most places stand still, which are then kept once.

Source: HoliTom, arXiv 2505.21334 (NeurIPS 2025; code read: cokeshao/HoliTom @ e9b2972). A place is static in a window
when its cosine to the next frame is above `threshold` throughout; dynamic programming finds the windows that save most.
Static places become their mean over the window and are clustered (DPC-kNN, centre weighted `beta`); the other places of
each frame keep those that the encoder attends to most (received attention). Both at the ratio that meets `keep` after
the static savings. Static tokens stand in the window's first frame, before its others; positions are closed up.

`inner` below 1 merges once more inside the language model, at layer `layer`: tokens that the last prompt token attends
to least join the most similar kept one, each in turn by halves.

Departures: a picture is a clip of one frame; towers with CLS offer received attention as well. `contextual` above 0
crashes in the released code; here it clusters that share of a frame's tokens, as the paper says. Density ties are
broken by order instead of noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Reducer, Reduction, Step, layer_index, top_k
from foveate.reduce.cluster import density_peaks
from foveate.reduce.frames import at, budgets, likeness
from foveate.reduce.grid import blocks
from foveate.reduce.merge import Part, one_hot, reduction
from foveate.reduce.select import cosines, rest
from foveate.reduce.signals import given, head_mean

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape

Window = tuple[int, int]
"""First and last frame, both inside."""


@dataclass(frozen=True)
class HoliTom(Reducer):
    """Static places of a clip once per window, the most attended of the others; `keep` of all tokens, about.

    threshold: cosine above which a place stands still (the authors use 0.65 at keep 0.1, else 0.8). beta: weight of a
    cluster's centre. neighbours: k of the clustering. window: longest window in frames. contextual: share of a frame's
    dynamic tokens that are clustered instead of chosen. inner, layer: fraction of what entered the language model that
    the merge inside it leaves, and the layer before which it happens (an index, or a fraction of the depth).
    """

    threshold: float = 0.8
    beta: float = 0.6
    neighbours: int = 7
    window: int = 1024
    contextual: float = 0.0
    inner: float = 1.0
    layer: float | int = 18 / 28

    name: ClassVar[str] = "holitom"
    sites: ClassVar[tuple[str, ...]] = ("post_projector",)
    signals: ClassVar[tuple[str, ...]] = ("features", "received_attention")
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "row"
    exact: ClassVar[bool] = False
    summary: ClassVar[str] = "what stands still in a clip is kept once, of the rest what is attended to"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.neighbours < 1:
            raise RecipeError(f"{self.name}: window is {self.window}, neighbours {self.neighbours}; both at least 1")
        if not 0 < self.inner <= 1:
            raise RecipeError(f"{self.name}: inner is {self.inner}; a kept fraction lies above 0 and at most at 1")
        for name in ("beta", "contextual"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; it lies between 0 and 1")

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        outer = super().steps(shape)
        if self.inner == 1:
            return outer
        inside = self.step(
            "llm",
            self.select_inside,
            layer=layer_index(self.layer, shape.layers, self.name),
            signals=("last_attention", "hidden"),
            scope="request",
            position="keep",
            newline="keep",
            count=lambda n, total: self.count_inside(n),
        )
        return (*outer, inside)

    def count_inside(self, n: int) -> int:
        """Tokens that the inner merge leaves of n: rounded half to even, as the released code does."""
        return max(round(n * self.inner), 1)

    def select_inside(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        """The merge inside the language model."""
        score = signals["last_attention"].mean(dim=0).cpu()
        return Reduction(*halving(signals["hidden"], score, self.count_inside(len(layout))))

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        features, attention = given(signals, "features"), head_mean(signals, "received_attention")
        parts = []
        for table, count in budgets(layout, self.count):
            n = int((table >= 0).sum())
            if count == n:
                parts += [Part(frame[frame >= 0], torch.arange(int((frame >= 0).sum()))) for frame in table]
                continue
            x = at(features, table)
            static = (likeness(x) > self.threshold) & (table[:-1] >= 0) & (table[1:] >= 0)
            windows, saved = segment(static, self.window)
            ratio = effective_ratio(count / n, n, saved)
            for window in windows:
                for part in self.window_parts(x, at(attention, table), static, window, ratio, table >= 0):
                    late = None if len(table) > 1 else 0  # a picture's tiles read as one map
                    parts.append(Part(table.flatten()[part.source], part.keep, part.weights, late))
        return reduction(parts, blocks(layout))

    def window_parts(
        self, x: Tensor, attention: Tensor, static: Tensor, window: Window, ratio: float, present: Tensor
    ) -> list[Part]:
        """What becomes of one window: the static tokens, then the dynamic ones of each frame.

        x: [F, P, D]; attention, present: [F, P]; static: [F - 1, P], places that stand still until the next frame.
        Sources are frame * P + place.
        """
        first, last = window
        places = x.shape[1]
        still = static[first:last].all(dim=0) if last > first else torch.zeros(places, dtype=torch.bool)
        frames = torch.arange(first, last + 1)
        column = still.nonzero().flatten()
        parts = []
        if clusters := round(len(column) * ratio):
            mean = x[first : last + 1, column].float().mean(dim=0)
            centres, weights = self.clustered(mean, clusters, min(self.neighbours, clusters))
            source = (frames[:, None] * places + column).flatten()
            parts.append(Part(source, centres, weights.repeat(1, len(frames)) / len(frames)))
        for frame in frames.tolist():
            moving = (~still & present[frame]).nonzero().flatten()
            parts.append(self.dynamic(x[frame, moving], attention[frame, moving], frame * places + moving, ratio))
        return parts

    def dynamic(self, x: Tensor, attention: Tensor, source: Tensor, ratio: float) -> Part:
        """The dynamic tokens [n, D] of one frame: the most attended ceil(n * ratio) but for the clustered share."""
        count = math.ceil(len(x) * ratio)
        chosen = top_k(attention, round(count * (1 - self.contextual)))
        if count == len(chosen):
            return Part(source, chosen)
        left = rest(len(x), chosen)
        centres, weights = self.clustered(x[left], count - len(chosen), self.neighbours)
        spread = torch.zeros(len(centres), len(x))
        spread[:, left] = weights
        return Part(source, torch.cat([chosen, left[centres]]), torch.cat([one_hot(chosen, len(x)), spread]))

    def clustered(self, x: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor]:
        """Centres [c] ascending and weights [c, n]: beta for the centre, the rest shared by the cluster's others."""
        centres, member = density_peaks(x, clusters, neighbours)
        weights = one_hot(member, clusters).T.contiguous()
        others = weights.sum(dim=1, keepdim=True) - 1
        centre = one_hot(centres, len(x))
        mixed = self.beta * centre + (1 - self.beta) * (weights - centre) / others.clamp_min(1)
        order = centres.argsort()
        return centres[order], torch.where(others > 0, mixed, centre)[order]


def segment(static: Tensor, longest: int) -> tuple[list[Window], int]:
    """The windows of F frames that save most tokens, in order, and how many they save.

    static: [F - 1, P] bool, place p stands still from frame f to the next. A window of w frames in which c places stand
    still throughout saves c * (w - 1) tokens; at most `longest` frames each. Shorter windows win ties.
    """
    frames, run = static.shape[0] + 1, torch.zeros(static.shape[1], dtype=torch.int64)
    saved, start = [0] * (frames + 1), [0] * (frames + 1)
    for end in range(1, frames + 1):
        saved[end], start[end] = saved[end - 1], end - 1
        if end == 1:
            continue
        run = (run + 1) * static[end - 2]  # for how many steps each place has stood still
        at_least = torch.bincount(run, minlength=end).flip(0).cumsum(0).flip(0).tolist()
        for width in range(2, min(longest, end) + 1):
            gain = saved[end - width] + at_least[width - 1] * (width - 1)
            if gain > saved[end]:
                saved[end], start[end] = gain, end - width
    windows, end = [], frames
    while end:
        windows.append((start[end], end - 1))
        end = start[end]
    return windows[::-1], saved[frames]


def effective_ratio(keep: float, total: int, saved: int) -> float:
    """The kept fraction, at most 1, of what is left of `total` tokens without `saved` that makes `keep` of all."""
    return min(keep / ((total - saved) / total), 1.0)


def halving(hidden: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The merge inside the language model: kept places [K] ascending, and weights [K, N].

    hidden: [N, D] states that enter the layer; score: [N] attention of the last prompt token. The `keep` highest scores
    stay; each other token, in order, is averaged into the kept one it is most like, so later ones weigh more.
    """
    kept = top_k(score, keep)
    dropped = rest(len(score), kept)
    weights = one_hot(kept, len(score))
    if len(dropped):
        into = cosines(hidden[dropped], hidden[kept]).argmax(dim=1)
        joins = one_hot(into, keep)
        later = joins.flip(0).cumsum(0).flip(0)[torch.arange(len(dropped)), into]  # itself and those that follow
        weights[into, dropped] = 0.5**later
        weights[torch.arange(keep), kept] = 0.5 ** joins.sum(dim=0)
    return kept, weights
