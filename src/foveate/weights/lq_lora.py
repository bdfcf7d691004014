"""`lq_lora`: each weight becomes a NormalFloat matrix and a low-rank one; a budget of bits is spent where it helps
most.

Source: Guo et al., LQ-LoRA (arXiv 2311.12023), read in HanGuo97/lq-lora @ c2424b3. Departures:
- The alternation stops when the error rises and keeps the best pair it has met; the code returns the one after it.
- Decompositions are exact (the code draws random projections).
- Of the squared gradients of a weight only the means of its rows and columns are kept (`by=gradients`). They weigh
  the decomposition as in the paper; the error that ends the alternation is weighted by their product. `by=inputs`
  takes the mean squares of a layer's inputs instead, which needs no backward pass.
- The allocation is solved by dynamic programming on a grid of bits, exact up to that grid, instead of by Gurobi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from foveate.errors import BudgetError, RecipeError, UnsupportedError
from foveate.method import nearest
from foveate.weights.base import CalibratedMethod
from foveate.weights.gradients import gradients
from foveate.weights.lowrank import LowRankLinear, empty_low_rank, svd_low_rank
from foveate.weights.normal_float import NormalFloatLinear, bits_per_weight, rounded

if TYPE_CHECKING:
    from foveate.vlm import VLM
    from foveate.weights.calibrate import Block, Stream

CHOICES = tuple((bits, block) for bits in (2, 3, 4, 8) for block in (16, 32, 64))
"""(bits, values a scale) that a budget is spent on."""
OUTER = 256
GRID = 4096
"""Steps that a budget of bits is divided into."""


def decompose(
    weight: Tensor,
    rank: int,
    bits: int,
    *,
    block: int = 64,
    outer: int = OUTER,
    fisher: Tensor | None = None,
    rounds: int = 100,
    scale_bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(Q [O, I], L1 [O, r], L2 [r, I], rounds used) with weight about Q + L1 L2, Q readable from NormalFloat.

    fisher: [O, I] importance of each weight; rows and columns are weighted by its means for the decomposition, and the
    error by its root.
    """
    weight = weight.float()
    error_weight: Tensor | float = 1.0
    rows: Tensor | float = 1.0
    columns: Tensor | float = 1.0
    if fisher is not None:
        error_weight = fisher.float().sqrt()
        rows, columns = (fisher.float().mean(dim=d, keepdim=True).sqrt().clamp(min=1e-12) for d in (1, 0))
    quantized = torch.zeros_like(weight)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = float("inf")
    used = 0
    while used < rounds:
        used += 1
        left, right = svd_low_rank(rows * (weight - quantized) * columns, rank)
        left, right = left / rows, right / columns
        quantized = rounded(weight - left @ right, bits, block, outer, scale_bits)
        error = float((error_weight * (weight - left @ right - quantized)).norm())
        if error >= least:
            break
        best, least = (quantized, left, right), error
    assert best is not None
    return *best, used


def fisher_means(stream: Stream) -> list[dict[str, list[list[float]]]]:
    """For each block and layer the means over rows [O] and columns [I] of the squared gradients of its weight, summed
    over samples; each divided by its mean. Layers whose gradient is 0 are left out."""
    sums: list[dict[str, list[Tensor]]] = [{} for _ in stream.calls[0].arguments]
    for found in gradients(stream, weights=lambda _, module: type(module) is nn.Linear):
        for name, gradient in found.weights.items():
            if gradient is not None:
                square = gradient.float().square()
                means = [square.mean(dim=d).double() for d in (1, 0)]
                old = sums[found.index].get(name)
                sums[found.index][name] = means if old is None else [a + b for a, b in zip(old, means)]
    if not any(sums):
        raise UnsupportedError("lq_lora: no calibration sample has an answer; give calib= such data, or by=inputs")
    return [
        {
            name: [(part / part.mean()).tolist() for part in means]
            for name, means in each.items()
            if bool(means[0].any())
        }
        for each in sums
    ]


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The choice for each layer with the least total cost whose sizes fit the budget.

    costs, sizes: [layers][choices]. Sizes are rounded up to a GRID-th of the budget. Raises BudgetError when the
    smallest choices do not fit.
    """
    step = budget / GRID
    units = [np.ceil(np.asarray(row) / step - 1e-9).astype(int) for row in sizes]
    if sum(float(min(row)) for row in sizes) > budget or sum(int(row.min()) for row in units) > GRID:
        least = sum(float(min(row)) for row in sizes)
        raise BudgetError(f"lq_lora: the smallest choices take {least:.0f} bits, the budget is {budget:.0f}")
    total = np.zeros(GRID + 1)
    picks = []
    for cost, unit in zip(costs, units):
        options = np.full((len(unit), GRID + 1), np.inf)
        for index, (price, size) in enumerate(zip(cost, unit)):
            if size <= GRID:
                options[index, size:] = total[: GRID + 1 - size] + price
        pick = options.argmin(axis=0)
        total = np.take_along_axis(options, pick[None], axis=0)[0]
        picks.append(pick)
    place, chosen = GRID, []
    for pick, unit in zip(reversed(picks), reversed(units)):
        chosen.append(int(pick[place]))
        place -= int(unit[chosen[-1]])
    return chosen[::-1]


@dataclass(frozen=True)
class LQLoRA(CalibratedMethod):
    """rank: of the low-rank part. bits: of the other part, in blocks of `block` values that share a scale. rounds: of
    the alternation. plan: other bits and blocks for layers of some names, "down_proj=2/32"; `with_budget` makes one.

    weighted: errors count by the squared gradients of the loss on the answers (by=gradients) or by the mean squares of
    a layer's inputs (by=inputs); false: all alike, and no data is needed. Gradients exist in the language model only.
    """

    rank: int = 64
    bits: Literal[2, 3, 4, 8] = 3
    block: int = 64
    rounds: int = 100
    weighted: bool = True
    by: Literal["gradients", "inputs"] = "gradients"
    plan: tuple[str, ...] = ()

    name: ClassVar[str] = "lq_lora"
    shown: ClassVar[tuple[str, ...]] = ("rank", "bits")
    summary: ClassVar[str] = "weights as NormalFloat plus a low-rank part; size only, not speed"
    status: ClassVar[str] = "experimental"
    searched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "block", "rounds"):
            if getattr(self, name) < 1:
                raise RecipeError(f"lq_lora: {name} is {getattr(self, name)}; give 1 or more")
        _parsed(self.plan)
        if self.weighted and self.by == "gradients" and self.parts != ("llm",):
            raise RecipeError("lq_lora: gradients are taken in llm only; give by=inputs or weighted=false")

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("norm",) if self.weighted and self.by == "inputs" else ()

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.weighted

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        names = {attribute for _, _, attribute in self.targets(vlm.adapter.parts())}
        for name in _parsed(self.plan):
            if name not in names:
                raise RecipeError(f"lq_lora: plan names {name!r}, no layer of this model{nearest(name, names)}")

    def survey(self, stream: Stream) -> Any:
        """For each block the `fisher_means` of the layers."""
        if not self.weighted or self.by != "gradients":
            return None
        return fisher_means(stream)

    def choice(self, name: str) -> tuple[int, int]:
        """(bits, values a scale) of the layer `name`."""
        return _parsed(self.plan).get(name.rpartition(".")[2], (self.bits, self.block))

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        most = min(linear.in_features, linear.out_features)
        if self.rank > most:
            raise RecipeError(
                f"lq_lora: layer {name} is {linear.out_features} x {linear.in_features}, so rank={self.rank} is more "
                f"than it has; use rank={max(1, most // 2)} or less"
            )

    def empty(self, linear: nn.Module) -> nn.Module:
        return self.empty_for("", linear)

    def empty_for(self, name: str, linear: Any) -> nn.Module:
        bits, block = self.choice(name)
        shape, device = (linear.in_features, linear.out_features), linear.weight.device
        base = NormalFloatLinear(*shape, bits, block, OUTER, linear.bias is not None, device)
        return empty_low_rank(base, self.rank, linear.weight.dtype)

    def compress_(self, block: Block) -> None:
        for name, linear in block.linears(self).items():
            bits, size = self.choice(name)
            dense = linear.weight.detach()
            fisher = self._importance(block, name, linear)
            _, left, right, _ = decompose(dense, self.rank, bits, block=size, fisher=fisher, rounds=self.rounds)
            left, right = left.to(dense.dtype), right.to(dense.dtype)
            rest = dense.float() - left.float() @ right.float()
            base = NormalFloatLinear.of(linear, rest, bits, size, OUTER)
            block.replace(name, LowRankLinear(base, right, left))

    def _importance(self, block: Block, name: str, linear: nn.Linear) -> Tensor | None:
        """[O, I] of mean about 1; None for a layer of which nothing is known."""
        if not self.weighted:
            return None
        if self.by == "inputs":
            found = block.statistics.get(name)
            return None if found is None else (found.norm / found.norm.mean()).expand(linear.out_features, -1)
        surveyed = block.survey_of(self)
        means = surveyed[block.index].get(name) if block.index < len(surveyed) else None
        if means is None:
            return None
        rows, columns = (torch.tensor(part, device=linear.weight.device) for part in means)
        return rows[:, None] * columns

    def with_budget(self, vlm: VLM, bits: float) -> LQLoRA:
        """This method with a plan: so many bits a weight, scales included, where they lower the error most.

        Layers of one name share a choice, over all blocks. Weights alone decide. Raises BudgetError below what the
        smallest choice takes.
        """
        costs: dict[str, list[float]] = {}
        sizes: dict[str, float] = {}
        for name, owner, attribute in self.targets(vlm.adapter.parts()):
            self.check_layer(name, getattr(owner, attribute))
            dense = getattr(owner, attribute).weight.detach().float()
            left, right = svd_low_rank(dense, self.rank)
            rest = dense - left @ right
            errors = [float((rest - rounded(rest, *choice)).square().sum()) for choice in CHOICES]
            costs[attribute] = [a + b for a, b in zip(errors, costs.get(attribute, [0.0] * len(CHOICES)))]
            sizes[attribute] = sizes.get(attribute, 0.0) + dense.numel()
        per_weight = [bits_per_weight(*choice, OUTER) for choice in CHOICES]
        taken = [[each * count for each in per_weight] for count in sizes.values()]
        chosen = allocate(list(costs.values()), taken, bits * sum(sizes.values()))
        plan = tuple(f"{name}={CHOICES[i][0]}/{CHOICES[i][1]}" for name, i in zip(costs, chosen))
        return replace(self, plan=plan)


def _parsed(plan: Sequence[str]) -> dict[str, tuple[int, int]]:
    """name -> (bits, block). Raises RecipeError."""
    found = {}
    for entry in plan:
        name, _, choice = entry.partition("=")
        bits, _, block = choice.partition("/")
        if not name or not block.isdigit() or bits not in ("2", "3", "4", "8") or int(block) < 1:
            raise RecipeError(
                f"lq_lora: plan has {entry!r}; write the name of layers, bits and block: 'down_proj=2/32'"
            )
        found[name] = int(bits), int(block)
    return found
