"""The search for scales and clips that AWQ and MBQ share: which power of the mean activation hurts the output least.

Source: AWQ, arXiv 2306.00978, read in mit-han-lab/llm-awq @ d6e797a. Departures: samples of unequal length are summed
and divided by all their elements; fewer than 512 tokens work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.weights.base import with_weight
from foveate.weights.grids import awq_grid, grouped
from foveate.weights.structure import Group, module_of

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block

GRID = 20
Record = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@dataclass(frozen=True)
class Found:
    """scale: [I] the best one; ratio: its power; losses: of all powers tried."""

    scale: Tensor
    ratio: float
    losses: tuple[float, ...]


def fake(weight: Tensor, bits: int, group: int, symmetric: bool = False) -> Tensor:
    """`weight` [O, I] rounded on AWQ's grid of each group (group <= 0: a row)."""
    parts = grouped(weight.float(), group)
    return awq_grid(parts, bits, symmetric).round(parts).flatten(1)


def scale_for(mean: Tensor, ratio: float) -> Tensor:
    """[I] mean**ratio, at least 1e-4, divided by the geometric mean of its extremes."""
    scale = mean.float().pow(ratio).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def search(mean: Tensor, loss: Callable[[Tensor], float], grid: int = GRID) -> Found:
    """The scale of least loss among mean**(i / grid); the first of equals. mean: [I] mean |x| of each input."""
    losses = [loss(scale_for(mean, step / grid)) for step in range(grid)]
    best = min(range(grid), key=lambda step: losses[step])
    return Found(scale_for(mean, best / grid), best / grid, tuple(losses))


def output_loss(
    block: Block,
    group: Group,
    records: list[Record],
    quantize: Callable[[Tensor], Tensor],
    measure: Callable[[list[Tensor], list[Tensor]], float],
    act: Callable[[Tensor], Tensor] | None = None,
    targets: list[Tensor] | None = None,
) -> Callable[[Tensor], float]:
    """What a scale costs: the inspected module with Q(W s) / s in its layers, measured against its dense output.

    quantize: fake quantization of a weight. act: fake quantization of the layers' inputs, after division by the scale.
    targets: other outputs to measure against.
    """
    layers = {name: module_of(block, name) for name in group.layers}
    targets = [record[2] for record in records] if targets is None else targets

    def loss(scale: Tensor) -> float:
        handles = []
        for name, linear in layers.items():
            weight = quantize(linear.weight.detach().float() * scale)
            made = with_weight(linear, weight if act is not None else weight / scale)
            if act is not None:
                divide = scale.to(linear.weight)
                handles.append(made.register_forward_pre_hook(lambda m, args, d=divide: (act(args[0] / d), *args[1:])))
            block.replace(name, made)
        try:
            # looked up now: the inspected module may be one of the layers that were just replaced
            module = module_of(block, group.inspect)
            outputs = [module(*args, **kwargs) for args, kwargs, _ in records]
        finally:
            for name, linear in layers.items():
                block.replace(name, linear)
        return measure(targets, [out[0] if isinstance(out, tuple) else out for out in outputs])

    return loss


def mean_square(targets: list[Tensor], outputs: list[Tensor]) -> float:
    """Mean squared difference over all elements."""
    total = sum(float((y.float() - z.float()).square().sum()) for y, z in zip(targets, outputs))
    return total / sum(y.numel() for y in targets)


@torch.no_grad()
def search_clip(weight: Tensor, inputs: Tensor, bits: int, group: int, symmetric: bool = False) -> Tensor:
    """[O, groups, 1] the largest magnitude that each group of each row should keep.

    weight: [O, I], already scaled; inputs: [T, I] what it meets, divided by the scale. Ten shares of the group's
    maximum, 1 down to 0.55, are tried on the partial products of about 512 tokens.
    """
    tokens = inputs[:: max(1, len(inputs) // 512)].float()
    x = tokens.unflatten(1, (-1, group if group > 0 else weight.shape[1]))  # [T, G, g]
    out = []
    rows = max(1, 2**25 // max(1, x.shape[0] * x.shape[1]))
    for part in grouped(weight.float(), group).split(rows):
        dense = torch.einsum("tgi,ogi->otg", x, part)
        top = part.abs().amax(dim=-1, keepdim=True)
        best, least = top.clone(), torch.full_like(top, float("inf"))
        for step in range(10):
            limit = top * (1 - step / 20)
            trial = part.clamp(-limit, limit)
            product = torch.einsum("tgi,ogi->otg", x, awq_grid(trial, bits, symmetric).round(trial))
            error = (product - dense).square().mean(dim=1)[..., None]  # [O, G, 1]
            best, least = torch.where(error < least, limit, best), torch.minimum(error, least)
        out.append(best)
    return torch.cat(out)


def clip(weight: Tensor, limit: Tensor) -> Tensor:
    """`weight` [O, I] held within `limit` [O, groups, 1]."""
    return weight.unflatten(1, (limit.shape[1], -1)).clamp(-limit, limit).flatten(1)
