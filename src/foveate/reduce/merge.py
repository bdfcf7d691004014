"""Mergers shared by reducers: who is merged into whom, and the weights that this means. Pure functions over tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.reduce.base import Reduction
from foveate.reduce.select import strongest, unit


@dataclass(frozen=True)
class Matching:
    """The outcome of matching N tokens into M slots.

    slot: [B, N] int64, the output slot that each token goes to. place: [B, M] int64, the token that stands for the slot
    (the one that was merged into).
    """

    slot: Tensor
    place: Tensor

    def merge(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Size-weighted means [B, M, D] of x [B, N, D], and the sizes [B, M, 1] that went into them.

        size: [B, N, 1] original tokens that each token already stands for; None: one each.
        """
        size = x.new_ones(*x.shape[:2], 1) if size is None else size
        slots = self.place.shape[1]
        total = x.new_zeros(x.shape[0], slots, 1).scatter_add_(1, self.slot[..., None], size)
        index = self.slot[..., None].expand_as(x)
        summed = x.new_zeros(x.shape[0], slots, x.shape[-1]).scatter_add_(1, index, x * size)
        return summed / total, total

    def into(self) -> Tensor:
        """[B, N] the token at whose place each token is then."""
        return self.place.gather(1, self.slot)

    def follow(self, slot: Tensor) -> Tensor:
        """Where tokens that an earlier matching sent to `slot` [B, N0] are now: [B, N0]."""
        return self.slot.gather(1, slot)


def bipartite(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False, split: Tensor | None = None
) -> Matching:
    """ToMe's bipartite soft matching: the r tokens of one half that are most like one of the other half join it.

    metric: [B, N, D]. r is cut to half the tokens that are not protected. class_token, distill_token: rows 0 and 1 take
    no part as sources (0) or targets (1). split: [B, N] int64, the order whose even and odd ranks are the halves; None:
    the order of the tokens. Slots: what stays of the even half (most similar first, in token order with a class token),
    then the odd half; with a distillation token the two protected rows lead.
    Source: ToMe, arXiv 2210.09461, section 3; ties in similarity go to the earlier token.
    """
    batch, n, _ = metric.shape
    r = min(r, (n - class_token - distill_token) // 2)
    order = torch.arange(n).expand(batch, n) if split is None else split
    even, odd = order[:, ::2], order[:, 1::2]
    if r <= 0:
        return Matching(torch.arange(n).expand(batch, n), torch.arange(n).expand(batch, n))
    u = unit(metric)
    a, b = u[:, ::2], u[:, 1::2]
    if split is not None:
        a, b = (u.gather(1, half[..., None].expand(-1, -1, u.shape[-1])) for half in (even, odd))
    scores = a @ b.transpose(1, 2)
    if class_token:
        scores[:, 0] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    best, target = scores.max(dim=-1)
    ranked = strongest(best, best.shape[1])
    gone, stays = ranked[:, :r], ranked[:, r:]
    if class_token:
        stays = stays.sort(dim=1).values
    place = torch.cat([even.gather(1, stays), odd], dim=1)
    if distill_token:
        kept = stays.shape[1]
        lead = torch.tensor([0, kept])
        others = torch.ones(place.shape[1], dtype=torch.bool)
        others[lead] = False
        place = torch.cat([place[:, lead], place[:, others]], dim=1)
    into = odd.gather(1, target.gather(1, gone))
    return joined(place, even.gather(1, gone), into, n)


def joined(place: Tensor, gone: Tensor, into: Tensor, n: int) -> Matching:
    """The matching of n tokens in which `place` [B, M] stay, in this order, and `gone` [B, r] join tokens `into`."""
    rank = torch.empty(place.shape[0], n, dtype=torch.int64)
    rank.scatter_(1, place, torch.arange(place.shape[1]).expand_as(place))
    rank.scatter_(1, gone, rank.gather(1, into))
    return Matching(rank, place)


def rounds(metric: Tensor, size: Tensor, count: int, match: Callable[[Tensor, int], Matching]) -> Matching:
    """The matching of [B, N, D] tokens into `count` slots, by as many rounds of `match` as it takes.

    size: [B, N] original tokens that each stands for. match(metric [B, n, D], r) merges at most r of the n tokens, and
    at least one; the metric of a merged token is the size-weighted mean.
    """
    batch, left, _ = metric.shape
    x, size = metric.float(), size.float()[..., None]
    whole = Matching(*[torch.arange(left).expand(batch, left)] * 2)
    while left > count:
        matching = match(x, left - count)
        whole = Matching(matching.follow(whole.slot), whole.place.gather(1, matching.place))
        left = matching.place.shape[1]
        if left > count:
            x, size = matching.merge(x, size)
    return whole


def merging(into: Tensor, size: Tensor) -> Reduction:
    """The reduction in which token i of N goes into token `into[i]` [N], which goes into itself; in sequence order.

    size: [N] original tokens that each stands for.
    """
    stands = into == torch.arange(len(into))
    keep = stands.nonzero()[:, 0]
    if len(keep) == len(into):
        return Reduction(keep)
    return Reduction(keep, membership((stands.cumsum(0) - 1)[into], len(keep), size))


@dataclass(frozen=True)
class Part:
    """What becomes of the tokens of one view (or frame, or segment) of a request.

    source: [n] the tokens' indices in the request. keep: [K] those that stay, as places in `source`, in new order.
    weights: [K, n], or None where nothing merges. late: the last `late` of them come after all other tokens of their
    block (`grid.blocks`), in this order; the others fall in with the block's raster. None: this part's order holds.
    """

    source: Tensor
    keep: Tensor
    weights: Tensor | None = None
    late: int | None = 0


def as_part(source: Tensor, matching: Matching, size: Tensor) -> Part:
    """What a matching (batch of 1) means for the tokens `source` [n] of one view, in sequence order. size: [n]."""
    merged = merging(matching.into()[0], size)
    return Part(source, merged.keep, merged.weights)


def reduction(parts: list[Part], block: Tensor) -> Reduction:
    """One reduction of N tokens from the parts of its views. block: [N], see `grid.blocks`.

    Where no part merges the result only prunes, so that keeping all in order changes no bit.
    """
    if not parts:
        return Reduction(torch.zeros(0, dtype=torch.int64))
    keep = torch.cat([part.source[part.keep] for part in parts])
    stage, rank = [], []
    for number, part in enumerate(parts):
        count = len(part.keep)
        late = count if part.late is None else part.late
        stage.append(torch.arange(count) >= count - late)
        rank.append(number * len(block) + torch.arange(count))
    late, rank = torch.cat(stage), torch.cat(rank)
    order = torch.where(late, rank + len(block), keep).argsort(stable=True)  # early ones by place, late ones by rank
    order = order[block[keep[order]].argsort(stable=True)]
    if all(part.weights is None for part in parts):
        return Reduction(keep[order])
    row, column, value, start = [], [], [], 0
    for part in parts:
        weights = part.weights if part.weights is not None else one_hot(part.keep, len(part.source))
        sparse = weights.to_sparse().coalesce()
        row.append(sparse.indices()[0] + start)
        column.append(part.source[sparse.indices()[1]])
        value.append(sparse.values())
        start += len(part.keep)
    index = torch.stack([order.argsort()[torch.cat(row)], torch.cat(column)])
    size = (start, len(block))
    weights = torch.sparse_coo_tensor(index, torch.cat(value).float(), size, check_invariants=False).coalesce()
    return Reduction(keep[order], weights)


def one_hot(places: Tensor, n: int) -> Tensor:
    """[K, n] float32 with a 1 in each row at its place."""
    weights = torch.zeros(len(places), n)
    weights[torch.arange(len(places)), places] = 1.0
    return weights


def membership(slot: Tensor, slots: int, size: Tensor | None = None) -> Tensor:
    """Sparse weights [slots, N] of the size-weighted mean of the tokens in each slot, none of them empty. slot: [N]
    int64; size: [N], or None where all count alike."""
    size = torch.ones(len(slot)) if size is None else size.float()
    share = size / size.new_zeros(slots).index_add_(0, slot, size)[slot]
    column = slot.argsort(stable=True)
    index = torch.stack([slot[column], column])
    return torch.sparse_coo_tensor(index, share[column], (slots, len(slot)), check_invariants=False, is_coalesced=True)
