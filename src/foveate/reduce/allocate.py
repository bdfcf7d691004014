"""Allocators shared by reducers: how many tokens each view, frame or segment keeps. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def truncated(shares: Tensor, total: int, caps: Sequence[int]) -> list[int]:
    """Whole parts of shares * total, none above its cap; what truncation and caps leave over is not given out.

    shares: [G] non-negative, in any unit (a sum of 0 gives equal shares).
    """
    shares = shares if float(shares.sum()) > 0 else torch.ones_like(shares)
    return [min(int(part), cap) for part, cap in zip((shares / shares.sum() * total).tolist(), caps)]


def largest_remainder(shares: Tensor, total: int, caps: Sequence[int]) -> list[int]:
    """Whole numbers as near to shares * total as possible that sum to min(total, sum of caps), each within its cap.

    shares: [G] non-negative, in any unit. What a cap cuts off goes to the others by their shares; then one each to the
    largest fractions, the earlier first.
    """
    caps = list(caps)
    given = [0] * len(caps)
    total = min(total, sum(caps))
    weights = shares.double().clamp_min(0).tolist()
    while (left := total - sum(given)) > 0:
        open_ = [i for i, cap in enumerate(caps) if given[i] < cap]
        weight = {i: weights[i] for i in open_}
        if sum(weight.values()) <= 0:
            weight = dict.fromkeys(open_, 1.0)
        exact = {i: weight[i] / sum(weight.values()) * left for i in open_}
        whole = {i: min(int(exact[i] + 1e-9), caps[i] - given[i]) for i in open_}
        for i in open_:
            given[i] += whole[i]
        if not any(whole.values()):
            by_fraction = sorted(open_, key=lambda i: (-round(exact[i] - whole[i], 9), i))
            for i in by_fraction[:left]:
                given[i] += 1
    return given
