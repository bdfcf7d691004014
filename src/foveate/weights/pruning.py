"""Which weights a pruning method drops: masks of one matrix, pure functions. True is dropped.

Sources: Wanda, arXiv 2306.11695 (locuslab/wanda @ 8e8fc87); OWL, arXiv 2310.05175 (luuyin/OWL @ dddb7a4). Departure:
ties go to the earlier weight everywhere (the code leaves those of N:M to `topk`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.weights.solve import smallest


def wanda_score(weight: Tensor, norm: Tensor) -> Tensor:
    """[O, I] |W| * sqrt(s): weight [O, I], norm [I] the squared norm of each input (`Statistics.norm`)."""
    return weight.float().abs() * norm.float().sqrt()


def rows_mask(score: Tensor, sparsity: float) -> Tensor:
    """[O, I] bool: the int(I * sparsity) lowest scores of each row."""
    count = int(score.shape[1] * sparsity)
    order = score.sort(dim=1, stable=True).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :count], True)


def pattern_mask(score: Tensor, drop: int, of: int) -> Tensor:
    """[O, I] bool: the `drop` lowest scores of every `of` aligned columns of each row; a shorter last group stays."""
    whole = score.shape[1] // of * of
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[:, :whole] = smallest(score[:, :whole], drop, of)
    return mask


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """[O, I] bool: |W| at or below the value at index int(numel * sparsity) of the sorted layer."""
    size = weight.float().abs()
    if sparsity <= 0:
        return torch.zeros_like(size, dtype=torch.bool)
    ordered = size.flatten().sort().values
    return size <= ordered[min(int(ordered.numel() * sparsity), ordered.numel() - 1)]


def variant_mask(score: Tensor, sparsity: float, tolerance: float = 1e-3) -> Tensor:
    """Wanda's appendix: each row loses its lowest scores up to a share alpha of the row's sum; rows differ.

    alpha is found by bisection in [0, 0.8] from 0.4 until the sparsity is within `tolerance`, or the bracket that
    narrow.
    """
    ordered, order = score.sort(dim=1, stable=True)
    running, total = ordered.cumsum(dim=1), score.sum(dim=1, keepdim=True)
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, running <= alpha * total)
        found = float(mask.float().mean())
        if abs(found - sparsity) <= tolerance or high - low < tolerance:
            return mask
        if found > sparsity:
            high, alpha = alpha, (alpha + low) / 2
        else:
            low, alpha = alpha, (alpha + high) / 2


def outlier_percentage(scores: Sequence[Tensor], multiple: float) -> float:
    """Percentage of a block's scores that are above `multiple` times their mean (OWL's D)."""
    flat = torch.cat([score.flatten() for score in scores])
    return float((flat > multiple * flat.mean()).double().mean()) * 100


def owl_sparsities(outliers: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """Dropped share of each block: blocks with more outliers keep more.

    Kept shares span 2 * spread and average 1 - sparsity (blocks count equally). Equal outliers: all get `sparsity`; a
    share that is not above 0 becomes 0.01, one above 1 becomes 1.
    """
    found = torch.tensor(outliers, dtype=torch.float64)
    width = found.max() - found.min()
    kept = (found - found.min()) / width * (2 * spread) if width > 0 else torch.zeros_like(found)
    kept = kept - kept.mean() + (1 - sparsity)
    dropped = 1 - kept
    return [0.01 if share <= 0 else min(share, 1.0) for share in dropped.tolist()]


def owl_pattern(outliers: Sequence[float], drop: int, of: int, spread: float) -> list[int]:
    """Weights that each block drops of every `of`, around `drop`: blocks with more outliers drop fewer."""
    found = torch.tensor(outliers, dtype=torch.float64)
    width = found.max() - found.min()
    shift = (found - found.min()) / width * spread if width > 0 else torch.zeros_like(found)
    steps = (shift - shift.mean()).round()
    return [int(min(max(drop - step, 0), of - 1)) for step in steps.tolist()]
