"""`p_sigmoid` and `g_search`: curves of kept tokens over the depth, found on the questions (arXiv 2412.00556)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foveate.optimize.search import Trial
from foveate.optimize.strategies import POOL, Context, _Pooled
from foveate.recipe_text import parse_recipe
from foveate.reduce.schedule import g_search

STEEP = tuple(round(1.45**i, 2) for i in range(12))
"""Values of the steepness, 1 to about 60."""
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
LENGTH = 0.7
"""Correlation length of the Gaussian process, in the logarithm of the steepness."""
STEPS = 8
"""g_search looks for kept fractions in eighths: the questions could not tell finer ones apart."""


@dataclass
class _Curves(_Pooled):
    context: Context

    @cached_property
    def partner(self) -> str:
        """The mildest methods of other sockets with which some curve fits the budget; "" when none are needed."""
        context = self.context
        every = context.space.recipes(POOL, random.Random(context.seed))
        others = ["", *(r for r in every if r and all(part.socket != "reduce" for part in context.parts(r)))]
        others.sort(key=lambda r: (sum(part.saving for part in context.parts(r)), r))
        lowest = KEEPS[-1]
        return next((r for r in others if context.fits(_join(f"schedule(keep={lowest})", r))), others[0])


def _join(*parts: str) -> str:
    """The recipe of several texts, in the canonical text of each method."""
    return " + ".join(method.text() for part in parts if part for method in parse_recipe(part))


class PSigmoidStrategy(_Curves):
    """The largest mean that fits the budget, and its steepness by Bayesian optimisation (a Gaussian process over the
    logarithm of the steepness, upper confidence bound)."""

    def ask(self, seen: Sequence[Trial]) -> list[str]:
        keep = next((k for k in KEEPS if self.context.fits(self._recipe(k, STEEP[5]))), KEEPS[-1])
        recipes = [self._recipe(keep, steep) for steep in STEEP]
        known = {trial.recipe: trial for trial in seen if trial.delta}
        fresh = [recipe for recipe in recipes if recipe not in known]
        if not fresh:
            return []
        if not known:
            return [recipes[i] for i in (0, len(STEEP) // 2, len(STEEP) - 1)]
        x = np.log(np.asarray(STEEP))
        done = [i for i, recipe in enumerate(recipes) if recipe in known]
        deltas = [known[recipes[i]].delta for i in done]
        mean, spread = _process(x[done], [d.mean for d in deltas], [d.error for d in deltas], x)  # type: ignore[union-attr]
        hope = mean + spread
        return [recipes[max((i for i in range(len(recipes)) if i not in done), key=lambda i: hope[i])]]

    def _recipe(self, keep: float, steepness: float) -> str:
        return _join(f"schedule(keep={keep}, steepness={steepness})", self.partner)


def _process(
    x: np.ndarray, values: Sequence[float], errors: Sequence[float], at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior (mean, standard deviation) at `at` of a Gaussian process with a constant mean."""
    y, noise = np.asarray(values, float), np.square(errors) + 1e-8
    centre, scale = float(y.mean()), max(float(y.var()), 1e-4)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return scale * np.exp(-0.5 * ((a[:, None] - b[None]) / LENGTH) ** 2)

    inverse = np.linalg.inv(kernel(x, x) + np.diag(noise))
    cross = kernel(at, x)
    variance = scale - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    return centre + cross @ inverse @ (y - centre), np.sqrt(np.maximum(variance, 1e-12))


class _Needed(Exception):
    """A recipe whose quality the search has to know before it can go on."""


class GSearchStrategy(_Curves):
    """Scenario I: from shallow to deep the least tokens of each layer with which the loss stays within the allowed one.

    The search is replayed on what was seen until it needs a recipe that was not, which is what it asks for.
    """

    def ask(self, seen: Sequence[Trial]) -> list[str]:
        known = {trial.recipe: trial for trial in seen if trial.delta}
        layers = self.context.bench.layers()

        def quality(counts: Sequence[int]) -> float:
            recipe = self._recipe(counts)
            if recipe not in known:
                raise _Needed(recipe)
            delta = known[recipe].delta
            assert delta is not None
            return delta.mean

        try:
            last = self._recipe(g_search(quality, layers, STEPS, -self.context.budget.max_loss - 1e-9))
        except _Needed as needed:
            return [str(needed)]
        return [] if last in known else [last]

    def _recipe(self, counts: Sequence[int]) -> str:
        rates = [1.0] + [count / counts[0] for count in counts[1:]]
        return _join(f"schedule(keep=1.0, rates=[{', '.join(map(str, rates))}])", self.partner)
