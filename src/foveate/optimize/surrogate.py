"""What a recipe probably loses, from what others lost: a Gaussian process over its methods.

The loss of a recipe is taken as the sum of what its methods lose, each growing with how much it saves; methods of one
socket resemble each other, settings of one method more so. Costs are known exactly, so quality is all that is guessed.
Source: Gaussian process regression, Rasmussen & Williams 2006, chapters 2 and 5 (hyperparameters by marginal
likelihood); additive kernels, Duvenaud et al., arXiv 1112.4394.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SCALES = (0.01, 0.03, 0.1, 0.3)
"""Loss of a method that saves a factor of e, one standard deviation."""
LENGTHS = (0.7, 2.0)
"""Distance in saved cost over which a method's loss changes."""
OTHER_METHOD = 0.5
"""Correlation of two methods of one socket."""
NUGGET = 1e-6


@dataclass(frozen=True)
class Part:
    """One method of a recipe: its socket, its name, and how much it saves by itself (the logarithm of a cost ratio)."""

    socket: str
    name: str
    saving: float


class Surrogate:
    """The posterior of losses. parts: {recipe: its methods} of everything that may be asked for."""

    def __init__(self, parts: Mapping[str, Sequence[Part]]) -> None:
        self._parts = parts
        self._seen: list[str] = []
        self._weights = np.zeros(0)
        self._factor = np.zeros((0, 0))
        self._scale, self._length = 0.1, 1.0

    def fit(self, recipes: Sequence[str], losses: Sequence[float], errors: Sequence[float]) -> None:
        """losses: mean loss against dense of each recipe (0.01 = one point); errors: their standard errors."""
        self._seen = list(recipes)
        if not self._seen:
            return
        y, noise = np.asarray(losses, float), np.square(np.asarray(errors, float)) + NUGGET
        best = -np.inf
        for scale, length in itertools.product(SCALES, LENGTHS):
            self._scale, self._length = scale, length
            factor = np.linalg.cholesky(self._kernel(self._seen, self._seen) + np.diag(noise))
            weights = np.linalg.solve(factor.T, np.linalg.solve(factor, y))
            evidence = -0.5 * y @ weights - np.log(np.diag(factor)).sum()
            if evidence > best:
                best, chosen = evidence, (scale, length, factor, weights)
        self._scale, self._length, self._factor, self._weights = chosen

    def predict(self, recipes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of the loss of each recipe."""
        prior = np.array([self._own(recipe) for recipe in recipes])
        if not self._seen:
            return np.zeros(len(recipes)), np.sqrt(prior)
        cross = self._kernel(recipes, self._seen)
        half = np.linalg.solve(self._factor, cross.T)
        return cross @ self._weights, np.sqrt(np.maximum(prior - np.square(half).sum(axis=0), 1e-12))

    def _own(self, recipe: str) -> float:
        return float(self._kernel([recipe], [recipe])[0, 0])

    def _kernel(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        a, b = self._flat(first), self._flat(second)
        same = np.where(a["name"][:, None] == b["name"][None], 1.0, OTHER_METHOD)
        near = np.exp(-0.5 * ((a["saving"][:, None] - b["saving"][None]) / self._length) ** 2)
        size = self._scale**2 * a["saving"][:, None] * b["saving"][None]
        pairs = np.where(a["socket"][:, None] == b["socket"][None], same * near * size, 0.0)
        rows = np.zeros((len(first), pairs.shape[1]))
        np.add.at(rows, a["row"], pairs)
        out = np.zeros((len(first), len(second)))
        np.add.at(out.T, b["row"], rows.T)
        return out

    def _flat(self, recipes: Sequence[str]) -> dict[str, np.ndarray]:
        """All methods of all recipes in one row each."""
        found = [(row, part) for row, recipe in enumerate(recipes) for part in self._parts[recipe]]
        return {
            "row": np.array([row for row, _ in found], dtype=int),
            "socket": np.array([part.socket for _, part in found], dtype=str),
            "name": np.array([part.name for _, part in found], dtype=str),
            "saving": np.array([part.saving for _, part in found], dtype=float),
        }


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area that (cost, loss) points dominate below the reference: both are better when smaller."""
    area, lowest = 0.0, reference[1]
    for cost, loss in sorted(points):
        if cost < reference[0] and loss < lowest:
            area += (reference[0] - cost) * (lowest - loss)
            lowest = loss
    return area


def gains(points: np.ndarray, candidates: np.ndarray, reference: tuple[float, float]) -> np.ndarray:
    """By how much each of candidates [M, 2] alone would enlarge the hypervolume of points [N, 2]. Returns [M]."""
    base = [tuple(point) for point in points]
    whole = hypervolume(base, reference)
    return np.array([hypervolume([*base, tuple(one)], reference) - whole for one in candidates])
