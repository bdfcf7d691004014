"""`pitome`: tokens that have many alike ones are merged, tokens that stand alone are protected.

Source: PiToMe, arXiv 2405.16148 (NeurIPS 2024), from its description alone. A token's energy is the mean over all
tokens of ELU(cosine of keys - margin): high where it has many alike ones. Of T tokens, with r to go, the 2 r of highest
energy are ranked; each of even rank joins the most similar one of odd rank, as a mean weighted by size. The margin
falls from block to block, from 0.9 to 0 in the paper.

Departures: r follows from `keep`; the rounds stand where those of `tome` stand, with the same notes. A round can halve
the tokens at most, so a small `keep` takes several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.errors import BudgetError, RecipeError
from foveate.reduce.merge import Matching, bipartite, joined
from foveate.reduce.select import strongest, unit
from foveate.reduce.tome import ToMe

Mode = Literal["pitome", "pitome_bsm", "bsm", "text"]


@dataclass(frozen=True)
class PiToMe(ToMe):
    """Tokens of highest energy merge until `keep` of each view is left.

    margin: the cosine from which two are alike, in the middle of the encoder; it falls from twice that to 0.
    """

    margin: float = 0.45

    name: ClassVar[str] = "pitome"
    summary: ClassVar[str] = "tokens with many alike ones merge, tokens that stand alone are protected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.margin <= 0.5:
            raise RecipeError(
                f"{self.name}: margin is {self.margin}; it lies between 0 and 0.5, for it starts at twice that"
            )

    def match(self, metric: Tensor, r: int, depth: float) -> Matching:
        return energy_matching(metric, min(r, metric.shape[1] // 2), 2 * self.margin * (1 - depth))


def energy(metric: Tensor, margin: float, text: bool = False) -> Tensor:
    """Energy [B, T] of tokens [B, T, D]: mean over all T, itself among them, of ELU(cosine - margin).

    text: the mean of a Gaussian kernel of the cosine distance, of width 1 - margin, instead.
    """
    u = unit(metric)
    cosine = u @ u.transpose(1, 2)
    if text:
        width = 1 - margin
        kernel = (-(((1 - cosine) / width) ** 2) / 2).exp()
        return (kernel / (width * math.sqrt(2 * math.pi))).mean(dim=-1)
    return torch.nn.functional.elu(cosine - margin).mean(dim=-1)


def energy_matching(metric: Tensor, r: int, margin: float, mode: Mode = "pitome") -> Matching:
    """The matching of [B, T, D] tokens in which r of them join others.

    mode "pitome": of the 2 r of highest energy, even ranks join odd ones; slots: protected tokens, then odd ranks, by
    falling energy. "text": the first r ranks join the next r. "pitome_bsm": all tokens, split by rank, in ToMe's
    matching. Raises BudgetError when 2 r exceeds T in the first two.
    """
    n = metric.shape[1]
    order = strongest(energy(metric, margin, mode == "text"), n)
    if mode == "pitome_bsm":
        return bipartite(metric, r, split=order)
    if 2 * r > n:
        raise BudgetError(f"pitome: {r} of {n} tokens are to join others in one round; at most {n // 2} can")
    first, second = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
    if mode == "text":
        first, second = order[:, :r], order[:, r : 2 * r]
    if not r:
        return joined(order, first, second, n)
    a, b = (unit(metric.gather(1, half[..., None].expand(-1, -1, metric.shape[-1]))) for half in (first, second))
    into = second.gather(1, (a @ b.transpose(1, 2)).argmax(dim=-1))
    return joined(torch.cat([order[:, 2 * r :], second], dim=1), first, into, n)


def merge_ratio(metric: Tensor, ratio: float, margin: float, class_token: bool, mode: Mode = "pitome") -> Matching:
    """The method of the paper's interface: keep about `ratio` of [B, T, D] tokens, row 0 apart when it is CLS.

    floor(T - T * ratio) tokens join others; T counts CLS in mode "bsm" only, which is plain ToMe. ratio >= 1 keeps all.
    """
    batch, n, _ = metric.shape
    if ratio >= 1:
        everything = torch.arange(n).expand(batch, n)
        return Matching(everything, everything)
    if mode == "bsm":
        return bipartite(metric, math.floor(n - n * ratio), class_token)
    first = int(class_token)
    patches = n - first
    inner = energy_matching(metric[:, first:], math.floor(patches - patches * ratio), margin, mode)
    if not class_token:
        return inner
    lead = torch.zeros(batch, 1, dtype=torch.int64)
    return Matching(torch.cat([lead, inner.slot + 1], dim=1), torch.cat([lead, inner.place + 1], dim=1))
