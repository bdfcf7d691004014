"""`quota`: frames that matter to the question keep more tokens, by resizing each frame's map to its quota.

Source: QuoTA, arXiv 2503.08689 (code read: MAC-AutoML/QuoTA @ ec194d7). A scorer says how probable it is that a frame
helps to answer; a frame's weight is (100 p)^2 over the sum, its quota the budget times that, truncated; a frame without
quota goes. The map of a frame is then resized to its quota: v1 bilinear, v2 adaptive average, v3 an even pick, v4
repeated ToMe merges, v5 such merges along rows, then along columns.

`scores` are the probabilities, one for each frame (`score_frames` asks the model itself, frame by frame, as the authors
ask a second one). Without them a frame's score is the cosine of its mean token to the prompt's mean word, scaled so
that the best frame has 1 and the worst 0.1: free, and a stand-in only.

Departures: a frame never grows beyond its own tokens (the code may enlarge small quotas' maps); what that leaves over
goes to other frames. Maps that are no rectangle use v3. The question is not taken apart by a first call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError, RecipeError
from foveate.reduce.allocate import largest_remainder
from foveate.reduce.base import Reducer, Reduction, evenly
from foveate.reduce.frames import budgets
from foveate.reduce.grid import blocks
from foveate.reduce.merge import Part, bipartite, reduction
from foveate.reduce.select import unit
from foveate.reduce.signals import given

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.vlm import VLM

Version = Literal["v1", "v2", "v3", "v4", "v5"]
PROMPT = (
    "Does this picture hold information that helps to answer the question below? "
    "A. yes B. no. Reply with the letter only.\nQuestion: {question}"
)


@dataclass(frozen=True)
class Quota(Reducer):
    """Each clip's budget, `keep` of its tokens, shared by its frames by (100 * score)^2; their maps shrink to it.

    scores: of the frames of the request, from 0 to 1, in order; none: by likeness to the prompt's words.
    """

    scores: tuple[float, ...] = ()
    version: Version = "v1"

    name: ClassVar[str] = "quota"
    signals: ClassVar[tuple[str, ...]] = ("features", "text_embeddings")
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "row"
    exact: ClassVar[bool] = False
    status: ClassVar[str] = "experimental"  # without given scores it compares frames with words, a weak stand-in
    summary: ClassVar[str] = "frames of a clip that matter to the question keep a larger map"

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 <= score <= 1 for score in self.scores):
            raise RecipeError(f"{self.name}: scores are probabilities from 0 to 1, not {list(self.scores)}")

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        features, words = given(signals, "features"), given(signals, "text_embeddings")
        tables = budgets(layout, self.count)
        frames = [table[frame] for table, _ in tables for frame in range(len(table))]
        if self.scores and len(self.scores) != len(frames):
            raise InputError(f"{self.name}: {len(self.scores)} scores for {len(frames)} frames; give one a frame")
        means = torch.stack([features[frame[frame >= 0]].float().mean(dim=0) for frame in frames])
        scores = torch.tensor(self.scores) if self.scores else likeness_to_words(means, words)
        parts, seen = [], 0
        for table, total in tables:
            sources = [frame[frame >= 0] for frame in table]
            sizes = [len(source) for source in sources]
            weights = frame_weights(scores[seen : seen + len(table)])
            seen += len(table)
            counts = largest_remainder(weights, total, sizes)
            for source, count in zip(sources, counts):
                parts.append(self._part(layout, source, features[source], count))
        return reduction(parts, blocks(layout))

    def _part(self, layout: VisualLayout, source: Tensor, x: Tensor, count: int) -> Part:
        n = len(source)
        if count in (0, n):
            return Part(source, torch.arange(count))
        rows, cols = int(layout.row[source].max()) + 1, int(layout.col[source].max()) + 1
        filled = torch.equal(layout.row[source] * cols + layout.col[source], torch.arange(rows * cols))
        weights, _ = compressing(x, (rows, cols), count, self.version if filled else "v3", enlarge=False)
        return Part(source, evenly(len(weights), n), weights)


def frame_weights(probability: Tensor) -> Tensor:
    """Each frame's share of the budget: (100 p)^2 over the sum. probability: [F]; frames without any share equally."""
    weights = (100 * probability.double()) ** 2
    return weights / weights.sum() if float(weights.sum()) > 0 else torch.full_like(weights, 1 / len(weights))


def quotas(probability: Tensor, total: int, places: int, version: Version = "v1") -> list[int]:
    """Tokens of each frame as the released code counts them: int(total * weight).

    Versions other than v1 first cut a weight to `places` / total, the tokens that a frame has, and share what this
    frees among the frames below that by their weights, in one pass over the frames.
    """
    weights = frame_weights(probability)
    if version != "v1":
        limit = places / total
        for frame in range(len(weights)):
            over = float(weights[frame]) - limit
            below = weights < limit
            if over > 0:
                weights[frame] = limit
                if below.any():
                    weights = weights + over * torch.where(below, weights, 0) / weights[below].sum()
    return [int(total * weight) for weight in weights.tolist()]


def likeness_to_words(frames: Tensor, words: Tensor) -> Tensor:
    """Scores [F] from 0.1 to 1 by the cosine of each frame's mean token [F, D] to the mean word [T, D]."""
    if len(frames) < 2 or not len(words):
        return torch.ones(len(frames))
    cosine = (unit(frames) @ unit(unit(words).mean(dim=0))).cpu()
    return 0.1 + 0.9 * (cosine - cosine.min()) / (cosine.max() - cosine.min()).clamp_min(1e-12)


def compressing(
    x: Tensor, size: tuple[int, int], quota: int, version: Version, enlarge: bool = True
) -> tuple[Tensor, tuple[int, ...]]:
    """Weights [n, N] that shrink a frame's rows x cols tokens x [N, D] to about `quota`, and the shape of the result.

    The map becomes h x w with h = w = int(sqrt(quota)), h one more if that fits, else w one more if that does. The
    shape is (h, w), or (n,) for versions v3 and v4. enlarge: False holds h and w within the map.
    """
    rows, cols = size
    high, wide = map_size(quota)
    if not enlarge:
        high, wide = min(high, rows), min(wide, cols)
    if version == "v3":
        picked = torch.linspace(0, len(x) - 1, quota).long()
        return F.one_hot(picked, len(x)).float(), (quota,)
    if version == "v4":
        return shrinking(x[None], quota)[0], (min(quota, len(x)),)
    if version == "v5":
        along = shrinking(x.view(rows, cols, -1), wide)  # [rows, w, cols]
        narrow = along @ x.view(rows, cols, -1).float().cpu()
        down = shrinking(narrow.transpose(0, 1), high)  # [w, h, rows]
        weights = torch.einsum("whr,rwc->hwrc", down, along)
        return weights.reshape(-1, len(x)), tuple(weights.shape[:2])
    maps = torch.eye(len(x)).view(1, len(x), rows, cols)
    if version == "v1":
        resized = F.interpolate(maps, (high, wide), mode="bilinear", align_corners=False)
    else:
        resized = F.adaptive_avg_pool2d(maps, (high, wide))
    return resized[0].flatten(1).T, (high, wide)


def map_size(quota: int) -> tuple[int, int]:
    """Height and width of a map of at most `quota` tokens, as square as can be."""
    side = math.isqrt(quota)
    if (side + 1) * side <= quota:
        return side + 1, side
    return side, side


def shrinking(x: Tensor, count: int) -> Tensor:
    """Weights [B, count, n] of repeated bipartite merges of x [B, n, D], plain means of what each round joins."""
    x = x.float().cpu()
    weights = torch.eye(x.shape[1]).expand(len(x), -1, -1)
    while x.shape[1] > count:
        matching = bipartite(x, x.shape[1] - count)
        step = torch.zeros(len(x), matching.place.shape[1], x.shape[1]).scatter_(1, matching.slot[:, None], 1.0)
        step /= step.sum(dim=2, keepdim=True)
        x, weights = step @ x, step @ weights
    return weights


def score_frames(vlm: VLM, frames: Sequence[object], question: str) -> tuple[float, ...]:
    """How probable it is that each frame helps to answer, asked of `vlm` itself: the probability of the answer "A".

    frames: pictures. One request each, so this costs more than it saves on a short clip.
    """
    from foveate.vlm import Request

    letter = vlm.adapter.tokenizer.encode("A", add_special_tokens=False)[0]
    text = PROMPT.format(question=question)
    return tuple(float(vlm.logits(Request(text, frame)).softmax(dim=-1).flatten()[letter]) for frame in frames)
