"""Non-uniform quantization with outliers, the mathematics of KVQuant as pure functions over tensors.

Matrices are [..., T, C]: tokens and the channels of all heads. Source and departures: `foveate.cache.kvquant`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 4096
"""Bins of the histogram that k-means runs on."""
COARSE = 256
"""Bins of the histogram that its start is found on."""


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile over the last axis, which stays with size 1; between two values linear interpolation."""
    ordered = values.sort(dim=-1).values
    place = q * (values.shape[-1] - 1)
    low = min(int(place), values.shape[-1] - 1)
    high = min(low + 1, values.shape[-1] - 1)
    return torch.lerp(ordered[..., low : low + 1], ordered[..., high : high + 1], place - low)


def tails(outliers: float) -> float:
    """The upper quantile outside which `outliers` of the values lie, half of them above it: 0.995 for 0.01."""
    return 1 - outliers / 2


def key_range(keys: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """Upper and lower bound of each channel, [..., 1, C], of keys [..., T, C]."""
    columns = keys.transpose(-1, -2)
    bounds = (quantile(columns, tails(outliers)), quantile(columns, 1 - tails(outliers)))
    return tuple(bound.transpose(-1, -2) for bound in bounds)


def key_outliers(keys: Tensor, upper: Tensor, lower: Tensor, exact: int = 0) -> Tensor:
    """[..., T, C] bool: values outside their channel's bounds, and all values of the first `exact` tokens."""
    found = (keys > upper) | (keys < lower)
    found[..., :exact, :] = True
    return found


def value_range(values: Tensor, outliers: float) -> tuple[Tensor, Tensor, Tensor]:
    """Outliers [..., T, C] bool, and upper and lower bound [..., T, 1] of what is left of each token.

    Outliers lie at or beyond the token's own quantiles; they count as the token's median for the bounds. Without
    (outliers = 0) none is marked.
    """
    if outliers == 0:
        found = torch.zeros_like(values, dtype=torch.bool)
    else:
        found = (values >= quantile(values, tails(outliers))) | (values <= quantile(values, 1 - tails(outliers)))
    inner = torch.where(found, values.median(dim=-1, keepdim=True).values, values)
    return found, inner.amax(dim=-1, keepdim=True), inner.amin(dim=-1, keepdim=True)


def scale_and_shift(upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Half the range and its middle, in the dtype of the bounds."""
    return (upper - lower) / 2, (upper + lower) / 2


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Numbers [..., N] uint8 of the nearest of the ascending levels [K], or [..., K] for each row its own."""
    middle = ((levels[..., 1:].double() + levels[..., :-1].double()) / 2).to(values.dtype)
    if middle.dim() == 1:
        return torch.bucketize(values, middle).to(torch.uint8)
    return torch.searchsorted(middle.contiguous(), values.contiguous()).to(torch.uint8)


def encode(states: Tensor, outliers: Tensor, scale: Tensor, shift: Tensor, levels: Tensor) -> Tensor:
    """Codes [..., T, C]; outliers get that of 0. levels: [K], or [B, K] for states [B, T, C]."""
    divisor = torch.where(scale == 0, 1, scale)
    inner = torch.where(outliers, 0, states - shift) / divisor
    if levels.dim() == 1:
        return nearest(inner, levels)
    return nearest(inner.flatten(1), levels).view(states.shape)


def decode(codes: Tensor, scale: Tensor, shift: Tensor, levels: Tensor) -> Tensor:
    """The states [..., T, C] that codes stand for. levels: [K], or [B, K] for codes [B, T, C]."""
    if levels.dim() == 1:
        inner = levels[codes.long()]
    else:
        inner = levels.gather(1, codes.flatten(1).long()).view(codes.shape)
    return inner * scale + shift


def integer(states: Tensor, upper: Tensor, lower: Tensor, bits: int, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform levels: codes [..., T, C], scale and shift such that code * scale + shift is near the state.

    whole: the zero point is rounded to an integer, and codes stay in 0 .. 2**bits - 1 even if the bounds are narrower.
    """
    top = 2**bits - 1
    rate = top / torch.where(upper == lower, top, upper - lower)
    offset = lower * rate
    offset = offset.round() if whole else offset
    codes = (states * rate - offset).round().clamp(0, top)
    return codes, 1 / rate, offset / rate


def fit_levels(states: Tensor, upper: Tensor, lower: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """The 2**bits levels in -1 .. 1, ascending, for states within their bounds: k-means, weighted by `weights`."""
    scale, shift = scale_and_shift(upper, lower)
    inner = (states - shift) / torch.where(scale == 0, 1, scale)
    inside = inner.abs() <= 1
    return kmeans(inner[inside], 2**bits, None if weights is None else weights[inside])


def match_moments(states: Tensor, outliers: Tensor, scale: Tensor, shift: Tensor, levels: Tensor) -> Tensor:
    """Levels to read codes with (Q-Norm): what is read has mean and deviation of the states, outliers apart."""
    codes = encode(states, outliers, scale, shift, levels)
    inner = ((states - shift) / torch.where(scale == 0, 1, scale))[~outliers]
    read = levels[codes.long()][~outliers]
    if inner.numel() < 2 or float(read.std()) == 0:
        return levels
    factor = inner.std() / read.std()
    return levels * factor + (inner.mean() - read.mean() * factor)


def kmeans(values: Tensor, count: int, weights: Tensor | None = None, rounds: int = 100) -> Tensor:
    """`count` centres [count], ascending, of values [N] in one dimension.

    Lloyd's rounds on a fine histogram, from the best centres on a coarse one, which are found exactly. Without values:
    evenly spaced centres in -1 .. 1.
    """
    if not values.numel():
        return torch.linspace(-1, 1, count, dtype=values.dtype, device=values.device)
    low, high = values.amin(), values.amax()
    if low == high:
        return low + torch.zeros(count, dtype=values.dtype, device=values.device)
    place = ((values - low) / (high - low) * BINS).long().clamp(max=BINS - 1)
    weights = torch.ones_like(values) if weights is None else weights
    zeros = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    mass = zeros.index_add(0, place, weights.double())
    moment = zeros.index_add(0, place, (weights * values).double())
    if not bool(mass.any()):
        return kmeans(values, count)
    centres = _coarse_centres(mass, moment, float(low), float(high), count)
    seen = mass > 0
    mass, moment = mass[seen], moment[seen]
    middle = moment / mass
    for _ in range(rounds):
        near = torch.bucketize(middle, (centres[1:] + centres[:-1]) / 2)
        total = torch.zeros_like(centres).index_add(0, near, mass)
        summed = torch.zeros_like(centres).index_add(0, near, moment)
        moved = torch.where(total > 0, summed / total.clamp(min=1e-300), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.sort().values.to(values.dtype)


def _coarse_centres(mass: Tensor, moment: Tensor, low: float, high: float, count: int) -> Tensor:
    """The best `count` centres [count] float64 when whole coarse bins share one, by dynamic programming over their
    edges. A bin's own spread is that of its fine bins."""
    width = (high - low) / BINS
    middle = torch.where(mass > 0, moment / mass.clamp(min=1e-300), low + width * (torch.arange(BINS).to(mass) + 0.5))
    sums = [x.view(COARSE, -1).sum(dim=1).cumsum(0) for x in (mass, moment, mass * middle**2)]
    m, s, q = (torch.cat([x.new_zeros(1), x]) for x in sums)
    weight, first, second = (x[None] - x[:, None] for x in (m, s, q))  # [from, to] over coarse edges
    cost = torch.where(weight > 0, second - first**2 / weight.clamp(min=1e-300), 0.0)
    edge = torch.arange(COARSE + 1, device=mass.device)
    cost = cost.masked_fill(edge[None] < edge[:, None], math.inf)
    best, cuts = cost[0], []
    for _ in range(count - 1):
        best, cut = (best[:, None] + cost).min(dim=0)
        cuts.append(cut)
    edges = [COARSE]
    for cut in reversed(cuts):
        edges.append(int(cut[edges[-1]]))
    edges.append(0)
    out = []
    for start, end in zip(reversed(edges[1:]), reversed(edges[:-1])):
        inside = float(weight[start, end])
        out.append(float(first[start, end]) / inside if inside > 0 else low + (high - low) * (start + end) / 2 / COARSE)
    return torch.tensor(out, dtype=torch.float64, device=mass.device)
