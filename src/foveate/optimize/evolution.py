"""`genetic`: a population of recipes that recombines and mutates, its children chosen by a predictor.

Source: LLaMA-NAS, arXiv 2405.18377, which searches sub-networks by NSGA-II with a learned predictor (LINAS): many
children are bred, the predictor picks those worth measuring. Non-dominated sorting and crowding: NSGA-II, Deb et al.
2002. Here a gene is one slot of a recipe, a mutation another setting of its method, or another method.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foveate.optimize.search import Trial
from foveate.optimize.space import Genome, name_of
from foveate.optimize.strategies import Context, _Pooled

POPULATION = 16
CHILDREN = 6
"""Children bred for each that is measured."""


@dataclass
class GeneticStrategy(_Pooled):
    """NSGA-II over slots with a surrogate as predictor."""

    context: Context

    def ask(self, seen: Sequence[Trial]) -> list[str]:
        context = self.context
        rng = random.Random(1000003 * context.seed + len(seen))
        run = [trial for trial in seen if trial.delta]
        if len(run) < POPULATION:
            fresh = self.fresh(seen)
            random.Random(context.seed).shuffle(fresh)
            return fresh[: min(context.batch, POPULATION - len(run))]
        rows = np.array([(context.relative(t.recipe), -t.delta.mean) for t in run])  # type: ignore[union-attr]
        parents = [run[i] for i in best_by_rank(rows, POPULATION)]
        known = {trial.recipe for trial in seen}
        bred: dict[str, None] = {}
        for _ in range(20 * CHILDREN * context.batch):
            child = self._child(self._pick(parents, rng), self._pick(parents, rng), rng)
            if child and child not in known and context.fits(child):
                bred[child] = None
            if len(bred) >= CHILDREN * context.batch:
                break
        if not bred:
            return self.fresh(seen)[: context.batch]
        children = list(bred)
        loss, spread = context.surrogate(seen, children).predict(children)
        hoped = np.array([(context.relative(r), m - s) for r, m, s in zip(children, loss, spread)])
        return [children[i] for i in best_by_rank(hoped, context.batch)]

    def _pick(self, parents: Sequence[Trial], rng: random.Random) -> Genome:
        """The better of two, parents being sorted."""
        trial = parents[min(rng.randrange(len(parents)), rng.randrange(len(parents)))]
        genome = self.context.space.genome(trial.recipe)
        assert genome is not None  # everything that is run comes from the space
        return genome

    def _child(self, first: Genome, second: Genome, rng: random.Random) -> str | None:
        genome = [rng.choice(pair) for pair in zip(first, second)]
        for slot, options in enumerate(self.context.space.slots):
            if rng.random() < 1 / len(genome):
                genome[slot] = self._mutated(options, genome[slot], rng)
        return self.context.space.text(tuple(genome))

    @staticmethod
    def _mutated(options: Sequence[str], gene: int, rng: random.Random) -> int:
        same = [i for i, option in enumerate(options) if option and name_of(option) == name_of(options[gene])]
        if len(same) > 1 and rng.random() < 0.5:  # the neighbouring setting of the same method
            place = same.index(gene) + rng.choice((-1, 1))
            return same[max(0, min(len(same) - 1, place))]
        return rng.randrange(len(options))


def best_by_rank(rows: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` best of [N, K] (smaller is better), by front and then by crowding distance."""
    found: list[int] = []
    left = list(range(len(rows)))
    while left and len(found) < count:
        layer = [i for i in left if not any(_dominates(rows[j], rows[i]) for j in left if j != i)]
        distance = _crowding(rows, layer)
        found += sorted(layer, key=lambda i: -distance[i])
        left = [i for i in left if i not in layer]
    return found[:count]


def _dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def _crowding(rows: np.ndarray, layer: Sequence[int]) -> dict[int, float]:
    distance = dict.fromkeys(layer, 0.0)
    for axis in range(rows.shape[1]):
        order = sorted(layer, key=lambda i: rows[i, axis])
        span = max(rows[order[-1], axis] - rows[order[0], axis], 1e-12)
        distance[order[0]] = distance[order[-1]] = float("inf")
        for before, here, after in zip(order, order[1:], order[2:]):
            distance[here] += (rows[after, axis] - rows[before, axis]) / span
    return distance
