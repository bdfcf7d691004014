"""`visionzip`: the tokens that the encoder attends to most, and a few that gather the others by likeness of keys.

Source: VisionZip, arXiv 2412.04467 (CVPR 2025; code read: dvlab-research/VisionZip @ 3151f6d). In every encoded view
the dominant tokens are the top ones by CLS attention, heads summed; of the rest, taken in raster order, tokens at equal
steps become contextual: each other token joins the one whose key (mean over heads) is most like its own. Dominant
tokens come first in raster order, contextual ones last, renumbered, without newlines.

Where paper and code differ: the paper averages a contextual token with its members; the code adds the members' mean to
it, which about doubles its length. `strict="paper"` averages. The CLS token, which the code keeps as one of the
dominant, is no patch and is not among the tokens here. A tower without CLS scores by received attention, as HoliTom's
port for SigLIP does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from foveate.errors import BudgetError, RecipeError
from foveate.reduce.base import Reducer, Reduction, top_k
from foveate.reduce.grid import blocks
from foveate.reduce.merge import Part, one_hot, reduction
from foveate.reduce.select import cosines, rest, strided, strongest
from foveate.reduce.signals import given, head_mean, split_heads

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class VisionZip(Reducer):
    """Dominant tokens of each view, and contextual ones that the rest is merged into.

    contextual: share of the kept tokens that gather others (10 of 64 in the paper). strict: a contextual token is the
    mean of all that it gathers (paper), or itself plus the mean of the others (code).
    """

    contextual: float = 10 / 64
    strict: Literal["paper", "code"] = "code"

    name: ClassVar[str] = "visionzip"
    sites: ClassVar[tuple[str, ...]] = ("post_encoder", "post_projector")
    signals: ClassVar[tuple[str, ...]] = (
        "cls_attention@-1|received_attention@-1|received_attention",
        "keys@-1|features",
    )
    scope: ClassVar[str] = "view"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "tokens that the encoder attends to most, and a few that gather the rest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise RecipeError(f"{self.name}: contextual is {self.contextual}; it is a share from 0 to below 1")

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        score, keys = head_mean(signals, self.signals[0]), given(signals, self.signals[1])
        heads = given(signals, self.signals[0])
        metric = split_heads(keys, heads.shape[1] if heads.dim() > 1 else 1).mean(dim=1)
        parts = []
        for view in layout.groups("view"):
            count = self.count(len(view))
            if count == len(view):
                parts.append(Part(view, torch.arange(len(view))))
                continue
            gathering = int(count * self.contextual)
            dominant = top_k(score[view], count - gathering)
            targets, weights = gather(metric[view], dominant, gathering, self.strict == "paper")
            weights = torch.cat([one_hot(dominant, len(view)), weights])
            parts.append(Part(view, torch.cat([dominant, targets]), weights if gathering else None, late=gathering))
        return reduction(parts, blocks(layout))


def gather(metric: Tensor, dominant: Tensor, count: int, average: bool = False) -> tuple[Tensor, Tensor]:
    """Contextual tokens of one view: their places [count] int64 and their weights [count, N] over its tokens.

    metric: [N, D] keys. dominant: [n] places that are taken. A token's weight is 1 and its members share another 1;
    average: all have the same weight, with sum 1. Raises BudgetError when fewer than `count` tokens are left.
    """
    left = rest(len(metric), dominant)
    if count > len(left):
        raise BudgetError(
            f"visionzip: {count} contextual tokens are asked for, and {len(left)} of {len(metric)} tokens are not "
            f"dominant; keep fewer of either"
        )
    chosen = strided(len(left), count)
    targets, others = left[chosen], left[rest(len(left), chosen)]
    weights = one_hot(targets, len(metric))
    if count:
        weights[cosines(metric[others], metric[targets]).argmax(dim=1), others] = 1.0
        members = (weights.sum(dim=1, keepdim=True) - 1).clamp_min(1)
        if average:
            weights /= weights.sum(dim=1, keepdim=True)
        else:
            weights = torch.where(one_hot(targets, len(metric)) > 0, weights, weights / members)
    return targets, weights


def zip_tokens(attention: Tensor, hidden: Tensor, metric: Tensor, dominant: int, count: int) -> tuple[Tensor, Tensor]:
    """The released code on raw tensors: dominant rows [B, 1 + n] in score order, and the tokens [B, 1 + n + C, D].

    attention: [B, H, 1 + N] of CLS; hidden: [B, 1 + N, D]; metric: [B, 1 + N, d] head-mean keys; row 0 is CLS, which
    stays in front. dominant, count: patches kept by attention, and contextual tokens.
    """
    best = strongest(attention.sum(dim=1)[:, 1:], dominant) + 1
    out = []
    for chosen, states, keys in zip(best, hidden, metric):
        _, weights = gather(keys[1:], chosen - 1, count)
        out.append(torch.cat([states[:1], states[chosen.sort().values], weights @ states[1:]]))
    return torch.cat([torch.zeros_like(best[:, :1]), best], dim=1), torch.stack(out)
