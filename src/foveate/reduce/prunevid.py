"""`prunevid`: a clip is cut into segments, what stands still in one is averaged, and alike tokens are clustered.

Source: PruneVid, arXiv 2412.16117 (ACL Findings 2025), from its description alone. Frames (mean tokens) are clustered
into `segments` * F groups, made contiguous; a place is static in a segment when the mean cosine between all pairs of
its frames is above `threshold` and becomes its mean over the segment; the static tokens of a segment, and the dynamic
ones of each frame, are clustered (DPC-kNN) and stand as the means of the clusters. A second stage, `text_keep` below 1,
drops what the question does not attend to inside the language model.

Departures: the kept fraction of the clusterings follows from `keep` and from what the static places save (the paper
fixes 0.5, so that the size of the result depends on the clip alone), small sets are clustered too, and a segment of one
frame has no static places. Density ties are broken by order instead of noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.allocate import largest_remainder
from foveate.reduce.base import Reducer, Reduction, Step, layer_index, top_k
from foveate.reduce.cluster import density_peaks
from foveate.reduce.frames import at, budgets
from foveate.reduce.grid import blocks
from foveate.reduce.merge import Part, membership
from foveate.reduce.merge import reduction as merged_parts
from foveate.reduce.select import unit
from foveate.reduce.signals import given

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.adapters.shape import Shape

NEIGHBOURS = 7
SMALL = 14
"""Sets of at most so many tokens are not clustered by the released method."""


@dataclass(frozen=True)
class PruneVid(Reducer):
    """Cluster means of the static places of each segment and of the dynamic ones of each frame, `keep` of all tokens.

    threshold: mean cosine above which a place stands still. segments: segments as a fraction of the frames.
    text_keep, layer: fraction of every set of tokens that the second stage leaves, and the layer before which it acts
    (an index, or a fraction of the depth; the paper's layer 10 of 32 is the last one that sees everything).
    """

    threshold: float = 0.8
    segments: float = 0.25
    text_keep: float = 1.0
    layer: float | int = 11 / 32

    name: ClassVar[str] = "prunevid"
    signals: ClassVar[tuple[str, ...]] = ("features",)
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "keep"
    newline: ClassVar[str] = "row"
    exact: ClassVar[bool] = False
    summary: ClassVar[str] = "static places of each segment of a clip averaged, the rest of each frame clustered"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.text_keep <= 1:
            raise RecipeError(
                f"{self.name}: text_keep is {self.text_keep}; a kept fraction lies above 0 and at most at 1"
            )
        if not 0 < self.segments <= 1:
            raise RecipeError(f"{self.name}: segments is {self.segments}; it is a fraction of the frames, up to 1")

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        if self.text_keep == 1:
            return super().steps(shape)
        sets: list[Tensor] = []  # of this request: the set of each token that the first stage left

        def outside(signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
            parts = self.parts(signals, layout)
            reduction = merged_parts(parts, blocks(layout))
            number = torch.zeros(len(layout), dtype=torch.int64)
            for index, part in enumerate(parts):
                number[part.source[part.keep]] = index
            sets.append(number[reduction.keep])
            return reduction

        def inside(signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
            return Reduction(attended(signals["text_attention"], sets[0], self.text_keep))

        (first,) = super().steps(shape)
        second = self.step(
            "llm",
            inside,
            layer=layer_index(self.layer, shape.layers, self.name),
            signals=("text_attention",),
            scope="request",
            newline="keep",
            count=lambda n, total: max(int(n * self.text_keep), 1),
        )
        return (replace(first, select=outside), second)

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        return merged_parts(self.parts(signals, layout), blocks(layout))

    def parts(self, signals: dict[str, Tensor], layout: VisualLayout) -> list[Part]:
        """What becomes of every set of tokens, in order."""
        features, parts = given(signals, "features"), []
        for table, total in budgets(layout, self.count):
            if total == int((table >= 0).sum()):
                parts += [Part(frame[frame >= 0], torch.arange(int((frame >= 0).sum()))) for frame in table]
                continue
            sets = self.sets(at(features, table), table)
            sizes = [source.shape[1] for source in sets]
            counts = largest_remainder(torch.tensor(sizes), total, sizes)
            for source, count in zip(sets, counts):
                if count:
                    parts.append(clustered(features, source, count, None if len(table) > 1 else 0))
        return parts

    def sets(self, x: Tensor, table: Tensor) -> list[Tensor]:
        """What is clustered together, in order: [frames, n] token indices, the frames of a set averaged first."""
        present = table >= 0
        means = x.float().sum(dim=1) / present.sum(dim=1, keepdim=True).to(x.device)
        out = []
        for first, end in cut(means, self.segments):
            still = static_places(x[first:end], self.threshold) & present[first:end].all(dim=0)
            out.append(table[first:end, still])
            out += [table[frame, ~still & present[frame]][None] for frame in range(first, end)]
        return [source for source in out if source.shape[1]]


def clustered(features: Tensor, source: Tensor, count: int, late: int | None) -> Part:
    """One set [frames, n] of tokens as `count` cluster means, each at the first frame's place of its centre."""
    mean = features[source].float().mean(dim=0)
    n = len(mean)
    if count >= n and len(source) == 1:
        return Part(source[0], torch.arange(n), late=late)
    centres, member = density_peaks(mean, count, NEIGHBOURS) if count < n else (torch.arange(n), torch.arange(n))
    weights = membership(member.repeat(len(source)), len(centres))
    return Part(source.flatten(), centres, weights, late=late)


def cut(frames: Tensor, segments: float) -> list[tuple[int, int]]:
    """Contiguous segments [first, end) of F frames [F, D]: clusters of their vectors, refined."""
    _, member = density_peaks(frames, max(int(len(frames) * segments), 1), NEIGHBOURS)
    return [(first, end) for first, end, _ in runs(refine(member))]


def runs(labels: Tensor) -> list[tuple[int, int, int]]:
    """Runs of equal labels as (first, end, label), end outside."""
    values, lengths = torch.unique_consecutive(labels, return_counts=True)
    ends = lengths.cumsum(0).tolist()
    return [(end - length, end, value) for end, length, value in zip(ends, lengths.tolist(), values.tolist())]


def refine(labels: Tensor) -> Tensor:
    """Labels [F] in which each cluster holds only its longest runs, of two frames at least.

    Any other run takes the label of the longer of the two nearest runs that stay (the left one if equal), or 0.
    """
    parts, longest = runs(labels), {}
    for first, end, label in parts:
        longest[label] = max(longest.get(label, 1), end - first)
    stays = [longest[label] > 1 and end - first == longest[label] for first, end, label in parts]
    refined = labels.clone()
    for number, (first, end, _) in enumerate(parts):
        if stays[number]:
            continue
        left = next((parts[i] for i in range(number - 1, -1, -1) if stays[i]), (0, 0, 0))
        right = next((parts[i] for i in range(number + 1, len(parts)) if stays[i]), (0, 0, 0))
        refined[first:end] = left[2] if left[1] - left[0] >= right[1] - right[0] else right[2]
    return refined


def static_places(x: Tensor, threshold: float) -> Tensor:
    """[P] bool: places of one segment [W, P, D] whose mean cosine over all pairs of frames is above the threshold."""
    frames = len(x)
    if frames < 2:
        return torch.zeros(x.shape[1], dtype=torch.bool)
    total = unit(x).sum(dim=0)
    mean = ((total * total).sum(dim=-1) - frames) / (frames * (frames - 1))
    return mean.cpu() > threshold


def shrunk(x: Tensor, ratio: float) -> Tensor:
    """The released spatial merge of a set [n, D]: int(n * ratio) cluster means, the most central first.

    Sets of at most 14 tokens stay.
    """
    if len(x) <= SMALL:
        return x
    _, member = density_peaks(x, int(len(x) * ratio), NEIGHBOURS)
    return membership(member, int(member.max()) + 1) @ x


def merge_clip(x: Tensor, threshold: float, segments: float, ratio: float) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The released first stage on frames [F, P, D]: tokens [T, D], and of each segment its static tokens, its dynamic
    tokens in all frames together, and its frames.

    Tokens of a segment: static first, then those of each frame.
    """
    out, sizes = [], []
    for first, end in cut(x.mean(dim=1), segments):
        still = static_places(x[first:end], threshold)
        static = shrunk(x[first:end, still].mean(dim=0), ratio)
        dynamic = [shrunk(x[frame, ~still], ratio) for frame in range(first, end)]
        out += [static, *dynamic]
        sizes.append((len(static), sum(map(len, dynamic)), end - first))
    return torch.cat(out), sizes


def attended(attention: Tensor, sets: Tensor, keep: float) -> Tensor:
    """The second stage: places [K] ascending of the tokens that the text attends to.

    attention: [H, Q, T] of the text after the clip; the largest over heads and queries counts. sets: [T] the set of
    each token; int(size * keep) of each stay, and one token if that leaves none.
    """
    score = attention.amax(dim=(0, 1)).cpu()
    kept = []
    for number in sets.unique():
        own = (sets == number).nonzero().flatten()
        kept.append(own[top_k(score[own], int(len(own) * keep))])
    places = torch.cat(kept).sort().values
    return places if len(places) else score.argmax()[None]
