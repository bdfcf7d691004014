"""`milp`: bits, sparsity and visual tokens of each decoder layer, by mixed-integer programming.

Each alternative of each layer is measured alone: the divergence of the next-token distribution from that of the dense
model (Kullback-Leibler, mean over questions) with this one change. A programme then picks one alternative a layer, so
that the sum of divergences is least and the counted limits hold. Source: Puzzle, arXiv 2411.19146 (blockwise scores
and a mixed-integer programme); solver: HiGHS through scipy.optimize.milp. That changes of single layers add up is an
assumption, so what comes out is measured like any recipe. A limit on bytes asks for bits, one on FLOPs or tokens for
tokens, one on weights that are not zero for sparsity: its layers are scored by magnitude, and the shares are then tried
with magnitude and with Wanda.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foveate.errors import FoveateError, UnsupportedError
from foveate.optimize.search import Trial
from foveate.optimize.strategies import Context, _Pooled
from foveate.recipe_text import parse_recipe

BITS = (0, 8, 4, 3)
RATES = (1.0, 0.75, 0.5, 0.25)
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8)
PRUNERS = ("magnitude", "wanda")
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7)
"""Parts of each limit that programmes are solved for: sums of divergences are guesses, so several are measured."""


def allocate(
    scores: np.ndarray, costs: Sequence[np.ndarray], limits: Sequence[float], *, falling: bool = False
) -> list[int] | None:
    """One alternative for each layer: indices [L] of least total score within all limits, None when there are none.

    scores: [L, A], lower is better. costs: for each limit [L, A]; the sum over the chosen ones may not exceed it.
    falling: the index may not fall from a layer to the next (alternatives sorted from mild to strong).
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise UnsupportedError("the strategy milp needs scipy: pip install scipy") from None
    layers, options = scores.shape
    one_each = np.kron(np.eye(layers), np.ones(options))
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [LinearConstraint(cost.reshape(1, -1), -np.inf, limit) for cost, limit in zip(costs, limits)]
    if falling:
        place = np.arange(options, dtype=float)
        rows = np.zeros((layers - 1, layers * options))
        for layer in range(layers - 1):
            rows[layer, layer * options : (layer + 1) * options] = -place
            rows[layer, (layer + 1) * options : (layer + 2) * options] = place
        constraints.append(LinearConstraint(rows, 0, np.inf))
    found = milp(scores.reshape(-1), integrality=np.ones(scores.size), bounds=Bounds(0, 1), constraints=constraints)
    if found.x is None:
        return None
    return [int(i) for i in found.x.reshape(layers, options).argmax(axis=1)]


@dataclass
class MilpStrategy(_Pooled):
    """All programmes at once: for each share of the limits one recipe of bits, one of tokens, two of sparsity, and what
    is limited together."""

    context: Context

    def ask(self, seen: Sequence[Trial]) -> list[str]:
        known = {trial.recipe for trial in seen}
        return [recipe for recipe in self.recipes if recipe not in known]

    @cached_property
    def recipes(self) -> list[str]:
        """The solved recipes, those that fit first."""
        found: dict[str, None] = {}
        for share in SHARES:
            bits, rates, ratios = self._bits(share), self._rates(share), self._ratios(share)
            pruned = [f"layered(shares=[{ratios}], pruner={pruner})" for pruner in PRUNERS] if ratios else [""]
            for parts in ([bits], [rates], *([p] for p in pruned), *([rates, p, bits] for p in pruned)):
                texts = [part for part in parts if part]
                if texts:
                    found[" + ".join(method.text() for text in texts for method in parse_recipe(text))] = None
        every = list(found)
        fitting = [recipe for recipe in every if self.context.fits(recipe)]
        return fitting or every

    def _scores(self, recipes: Sequence[Sequence[str]]) -> np.ndarray:
        """[L, A] divergence of each alternative; one that the model refuses is as bad as can be."""
        rows = []
        for options in recipes:
            row = []
            for recipe in options:
                try:
                    row.append(self.context.bench.divergence(recipe, self.context.samples) if recipe else 0.0)
                except FoveateError:
                    row.append(1e3)
            rows.append(row)
        return np.array(rows)

    @cached_property
    def _bit_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Divergence and bytes of each (layer, bits)."""
        layers = self.context.bench.layers()
        texts = [[_one_layer(layers, layer, bits) for bits in BITS] for layer in range(layers)]
        dense = self.context.dense.size or self.context.dense.bytes
        saved = [[dense - (self._size(text) if text else dense) for text in row] for row in texts]
        return self._scores(texts), -np.array(saved)

    def _size(self, recipe: str) -> float:
        cost = self.context.cost(recipe)
        return cost.size or cost.bytes

    def _bits(self, share: float) -> str:
        limits = [limit for limit in self.context.budget.limits if limit.axis in ("bytes", "size", "memory")]
        if not limits:
            return ""
        scores, change = self._bit_scores
        room = []
        for limit in limits:
            bound, base = limit.bound(self.context.dense), self.context.dense.get(limit.axis)
            if bound is not None and base is not None:
                room.append(share * bound - base)
        chosen = allocate(scores, [change] * len(room), room)
        if chosen is None:  # not even the smallest layers are small enough: as small as they come
            chosen = [len(BITS) - 1] * len(scores)
        return f"mixed(bits=[{', '.join(str(BITS[i]) for i in chosen)}])"

    @cached_property
    def _ratio_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Divergence and weights left of each (layer, ratio), the weights against dense."""
        layers, dense = self.context.bench.layers(), self.context.dense.nonzeros or 0.0
        texts = [[_one_pruned(layers, layer, ratio) for ratio in RATIOS] for layer in range(layers)]
        left = [[(self.context.cost(text).nonzeros or 0.0) if text else dense for text in row] for row in texts]
        return self._scores(texts), np.array(left) - dense

    def _ratios(self, share: float) -> str:
        """The share of zeros of each layer; "" where no limit asks for zeros."""
        dense = self.context.dense
        limit = next((limit for limit in self.context.budget.limits if limit.axis == "nonzeros"), None)
        bound = limit.bound(dense) if limit else None
        if bound is None or dense.nonzeros is None:
            return ""
        scores, change = self._ratio_scores
        chosen = allocate(scores, [change], [share * bound - dense.nonzeros])
        if chosen is None:  # not even the emptiest layers are few enough weights: as few as there are
            chosen = [len(RATIOS) - 1] * len(scores)
        return ", ".join(str(RATIOS[i]) for i in chosen)

    @cached_property
    def _rate_scores(self) -> np.ndarray:
        layers = self.context.bench.layers()
        texts = [[_one_drop(layers, layer, rate) for rate in RATES] for layer in range(1, layers)]
        # Tokens that left before a layer are missed there too: what a layer adds is beyond what the next one costs.
        scores = self._scores(texts)
        return np.maximum(0.0, scores - np.vstack([scores[1:], np.zeros((1, len(RATES)))]))

    def _rates(self, share: float) -> str:
        limits = [limit for limit in self.context.budget.limits if limit.axis in ("flops", "tokens")]
        layers = self.context.bench.layers()
        if not limits or layers < 2:
            return ""
        dense = self.context.dense
        full = self.context.cost(_one_drop(layers, 1, RATES[-1]))
        costs, room = [], []
        for limit in limits:
            bound, base, low = limit.bound(dense), dense.get(limit.axis), full.get(limit.axis)
            if bound is None or base is None or low is None:
                continue
            slope = (base - low) / ((layers - 1) * (1 - RATES[-1]))  # of one whole layer's visual tokens
            costs.append(np.tile(-(1 - np.asarray(RATES)) * slope, (layers - 1, 1)))
            room.append(share * bound - base)
        chosen = allocate(self._rate_scores, costs, room, falling=True)
        if chosen is None:
            chosen = [len(RATES) - 1] * (layers - 1)
        return f"schedule(keep=1.0, rates=[1.0, {', '.join(str(RATES[i]) for i in chosen)}])"


def _one_layer(layers: int, layer: int, bits: int) -> str:
    if not bits:
        return ""
    numbers = ", ".join(str(bits if i == layer else 0) for i in range(layers))
    return f"mixed(bits=[{numbers}])"


def _one_pruned(layers: int, layer: int, ratio: float) -> str:
    if not ratio:
        return ""
    return f"layered(shares=[{', '.join(str(ratio if i == layer else 0.0) for i in range(layers))}], pruner=magnitude)"


def _one_drop(layers: int, layer: int, rate: float) -> str:
    """Tokens leave at this layer, for it and all that follow."""
    if rate == 1:
        return ""
    return f"schedule(keep=1.0, rates=[{', '.join(str(1.0 if i < layer else rate) for i in range(layers))}])"
