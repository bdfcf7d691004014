"""Selectors shared by reducers: which of N tokens stay. Pure functions over tensors; ties go to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def strongest(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest of [..., N], largest first; among equals the earlier one. Returns [..., k] int64."""
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :k]


def above_threshold(score: Tensor, k: int) -> Tensor:
    """Indices of the scores at or above the smallest threshold that at most k of [N] reach, ascending.

    The same as the k largest where no two scores are equal. Tokens that tie at the threshold all fall, so fewer stay.
    """
    if k >= score.numel():
        return torch.arange(score.numel())
    following = torch.sort(score, descending=True).values[k]  # the largest score that must not stay
    return (score > following).nonzero().flatten()


def strided(n: int, count: int) -> Tensor:
    """`count` of n places at equal whole steps from place 0: 0, s, 2s, ... with s = n // count. Returns int64."""
    return torch.arange(count) * (n // max(count, 1))


def rest(n: int, taken: Tensor) -> Tensor:
    """The places of range(n) that are not in `taken`, ascending int64."""
    free = torch.ones(n, dtype=torch.bool)
    free[taken] = False
    return free.nonzero().flatten()


def unit(x: Tensor) -> Tensor:
    """Rows of [..., D] scaled to length 1 in float32; rows of zeros stay zero."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def cosines(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Cosine of every row of a [N, D] to every row of b [M, D] (None: of a): [N, M] float32 on the CPU.

    The product is taken where the rows are, so that it costs next to nothing on a GPU; rows of zeros give 0.
    """
    u = unit(a)
    return (u @ (u if b is None else unit(b)).T).cpu()


def max_min(distance: Tensor, count: int) -> Tensor:
    """`count` of N places that lie far apart, in the order they were picked. Returns int64.

    distance: [N, N] symmetric. The first place is the one whose nearest other is farthest; each next one is farthest
    from its nearest chosen place. O(count * N) after the distances.
    """
    n = distance.shape[0]
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(dim=1)
    order = torch.empty(min(count, n), dtype=torch.int64)
    for step in range(len(order)):
        pick = order[step] = nearest.argmax()
        nearest = distance[pick].clone() if step == 0 else torch.minimum(nearest, distance[pick])
        nearest[pick] = -torch.inf  # and stays so, as a minimum
    return order


def coverage(gains: Tensor, count: int, excluded: Tensor | None = None, chunk: int = 32) -> Tensor:
    """`count` columns of [R, N] that greedily maximise sum over rows of the largest chosen entry, in pick order.

    excluded: [N] bool, columns that may not be picked. The sum is monotone and submodular, so the result reaches at
    least 1 - 1/e of the best possible. Lazy: what a column gained earlier bounds what it gains now (rounding keeps the
    order), so each step looks again only at the columns whose bound reaches the best, `chunk` at a time. Returns int64,
    at most as many as there are columns to pick.
    """
    columns = gains.T.contiguous()  # [N, R]: one candidate a row
    covered = torch.zeros(columns.shape[1], dtype=columns.dtype)
    bound = columns.sum(dim=1)
    if excluded is not None:
        bound[excluded] = -torch.inf
    order = torch.empty(min(count, int((bound > -torch.inf).sum())), dtype=torch.int64)
    for step in range(len(order)):
        waiting, fresh = bound.clone(), torch.full_like(bound, -torch.inf)
        while True:
            tried = waiting.topk(min(chunk, len(waiting))).indices
            fresh[tried] = (columns[tried] - covered).clamp_min_(0).sum(dim=1)
            bound[tried] = torch.minimum(bound[tried], fresh[tried])
            waiting[tried] = -torch.inf
            if waiting.max() < fresh.max():
                break
        fresh[bound == -torch.inf] = -torch.inf
        pick = order[step] = fresh.argmax()
        bound[pick] = -torch.inf
        covered = torch.maximum(covered, columns[pick])
    return order
