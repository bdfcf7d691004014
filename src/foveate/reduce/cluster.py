"""Density peaks clustering over nearest neighbours (DPC-kNN), which several video reducers share."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(x: Tensor, clusters: int, neighbours: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Centres [c] int64, the most central first, and for each of N points the rank [N] of its centre.

    x: [N, D]. Distances are divided by sqrt(D). A point's density is exp(-mean squared distance to its `neighbours`
    nearest, itself among them); its prominence the distance to the nearest denser point (the densest: the largest
    distance of all). The c points of largest density * prominence are centres, the earlier first among equals; every
    other point goes to its nearest centre. Points of equal density count as less dense than the earlier of them: the
    released codes break such ties with random noise below 1e-6, which this rule makes repeatable. It decides much where
    one or two neighbours count: with one all points tie, with two each pair of nearest ones. noise: [N], to be added to
    the densities.
    Source: DPC-kNN as used by HoliTom (arXiv 2505.21334) and PruneVid (arXiv 2412.16117).
    """
    n, width = x.shape
    clusters = min(clusters, n)
    x = x.float()
    distance = (torch.cdist(x, x) / width**0.5).cpu()  # taken where the points are
    nearest = distance.topk(min(neighbours, n), dim=1, largest=False).values
    density = (-nearest.square().mean(dim=1)).exp()
    density = density if noise is None else density + noise
    rank = torch.empty(n, dtype=torch.int64)
    rank[torch.sort(density, descending=True, stable=True).indices] = torch.arange(n)
    denser = rank[None, :] < rank[:, None]
    prominence = torch.where(denser, distance, distance.max()).amin(dim=1)
    score = density * prominence
    centres = torch.sort(score, descending=True, stable=True).indices[:clusters]
    member = distance[:, centres].argmin(dim=1)
    member[centres] = torch.arange(clusters)
    return centres, member
