"""Strategies: which recipes to run next. All have one interface, `ask(seen) -> recipes`, and keep no state of a study.

What a strategy answers depends on what was seen, on its context and seed alone, so a study that was killed goes on
where it was. Costs are known without running, so no strategy asks for what breaks a counted limit as long as anything
fits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from foveate.optimize.budget import Budget, Cost
from foveate.optimize.search import Trial, closest, improbable, prune, pruned
from foveate.optimize.space import Space, name_of
from foveate.optimize.surrogate import Part, Surrogate, gains, hypervolume
from foveate.registry import METHODS, Registry

if TYPE_CHECKING:
    from foveate.optimize.run import Workbench

POOL = 1500
"""Recipes that are weighed against each other without running; a larger space is sampled."""
BATCH = 8
SHOWN = 60
"""Recipes that break a limit which the report shows."""

STRATEGIES = Registry(
    "strategy",
    {
        "surrogate": "foveate.optimize.strategies:SurrogateStrategy",
        "halving": "foveate.optimize.strategies:HalvingStrategy",
        "random": "foveate.optimize.strategies:RandomStrategy",
        "genetic": "foveate.optimize.evolution:GeneticStrategy",
        "tpe": "foveate.optimize.sampler:TpeStrategy",
        "nsga2": "foveate.optimize.sampler:Nsga2Strategy",
        "milp": "foveate.optimize.layers:MilpStrategy",
        "p_sigmoid": "foveate.optimize.schedules:PSigmoidStrategy",
        "g_search": "foveate.optimize.schedules:GSearchStrategy",
    },
)
"""Strategies by the name that --strategy takes."""


@dataclass
class Context:
    """What a strategy knows. front: find the whole trade-off of cost and quality, not the best within the budget.

    samples: questions on which a recipe is tried. weighed: recipes whose cost was counted; dropped: some of those that
    were then left out; dropped_by: how many were, by the limit that each breaks most.
    """

    bench: Workbench
    space: Space
    budget: Budget
    dense: Cost
    seed: int = 0
    batch: int = BATCH
    front: bool = False
    samples: int = 64
    weighed: int = 0
    dropped: list[Trial] = field(default_factory=list)
    dropped_by: dict[str, int] = field(default_factory=dict)
    _costs: dict[str, Cost] = field(default_factory=dict, repr=False)
    _parts: dict[str, tuple[Part, ...]] = field(default_factory=dict, repr=False)

    def cost(self, recipe: str) -> Cost:
        """The counted cost of a recipe."""
        if recipe not in self._costs:
            self._costs[recipe] = self.bench.cost(recipe)
        return self._costs[recipe]

    def fits(self, recipe: str) -> bool:
        """Whether no counted limit is broken, and none of time improbable."""
        cost = self.cost(recipe)
        return self.front or not (self.budget.broken(cost, self.dense) or self.budget.unlikely(cost, self.dense))

    def relative(self, recipe: str) -> float:
        """Cost against dense, one number."""
        return self.budget.relative_cost(self.cost(recipe), self.dense)

    def trial(self, recipe: str) -> Trial:
        """A fresh trial of a recipe."""
        parts = [part for part in recipe.split(" + ") if part]
        group = " + ".join(name_of(p) if s == "reduce" else p for p, s in zip(parts, self._sockets(recipe)))
        keep = self.cost(recipe).tokens / self.dense.tokens if self.dense.tokens else None
        return Trial(recipe, self.cost(recipe), group, None if keep is not None and keep >= 1 else keep)

    def _sockets(self, recipe: str) -> list[str]:
        genome = self.space.genome(recipe)
        if genome is None:  # found by a strategy that makes its own settings
            return [METHODS.get(name_of(part)).socket for part in recipe.split(" + ")]
        return [self.space.sockets[i] for i, g in enumerate(genome) if self.space.slots[i][g]]

    def parts(self, recipe: str) -> tuple[Part, ...]:
        """The methods of a recipe, with what each saves by itself."""
        if recipe not in self._parts:
            texts = [part for part in recipe.split(" + ") if part]
            self._parts[recipe] = tuple(
                Part(socket, name_of(text), self._saving(text)) for text, socket in zip(texts, self._sockets(recipe))
            )
        return self._parts[recipe]

    def _saving(self, text: str) -> float:
        cost, saved = self.cost(text), 0.0
        for axis in ("flops", "bytes", "tokens", "nonzeros"):
            before, after = self.dense.get(axis), cost.get(axis)
            if before and after:
                saved += float(np.log(before / after))
        return max(0.05, saved)

    def surrogate(self, seen: Sequence[Trial], pool: Sequence[str]) -> Surrogate:
        """The posterior after what was seen, ready for the recipes of `pool`."""
        run = [trial for trial in seen if trial.delta]
        found = Surrogate({recipe: self.parts(recipe) for recipe in {*pool, *(trial.recipe for trial in run)}})
        found.fit([t.recipe for t in run], [-t.delta.mean for t in run], [t.delta.error for t in run])
        return found


class Strategy(Protocol):
    """seen: every trial so far, those pruned without running among them. Returns the next recipes, none when done."""

    def ask(self, seen: Sequence[Trial]) -> list[str]: ...


@dataclass
class _Pooled:
    context: Context

    @cached_property
    def pool(self) -> list[str]:
        """Recipes of the space; those that fit, or when none does those that come nearest."""
        context = self.context
        every = [r for r in context.space.recipes(POOL, random.Random(context.seed)) if r]
        if context.front:
            return every
        budget, dense, trials = context.budget, context.dense, [Trial(recipe, context.cost(recipe)) for recipe in every]
        broken = [trial for trial in trials if pruned(trial, budget, dense)]
        fitting = [trial for trial in trials if trial.status == "alive"]
        slow = [trial for trial in fitting if improbable(trial, budget, dense)]
        if slow and len(slow) == len(fitting):  # an estimate alone is no reason to say that there is none
            slow.sort(key=lambda t: (max(budget.unlikely(t.cost, dense).values()), t.recipe))
            for trial in slow[: 2 * BATCH]:
                trial.status, trial.reason = "alive", ""
            slow = slow[2 * BATCH :]
        chosen = [trial.recipe for trial in fitting if trial.status == "alive"]
        # The examples are those that come nearest: what the report can say about a limit hangs on them.
        broken.sort(key=lambda t: max(budget.overruns(t.cost, dense).values()))
        slow.sort(key=lambda t: max(budget.unlikely(t.cost, dense).values()))
        context.weighed = len(trials)
        context.dropped = [*broken[: SHOWN - min(len(slow), SHOWN // 2)], *slow[: SHOWN // 2]]
        for trial in (*broken, *slow):
            axis = trial.reason.split()[0]
            context.dropped_by[axis] = context.dropped_by.get(axis, 0) + 1
        if chosen or not broken:
            return chosen
        near = closest([context.trial(t.recipe) for t in broken], budget, dense, 2 * BATCH)
        chosen = [trial.recipe for trial in near]
        context.dropped = [trial for trial in context.dropped if trial.recipe not in chosen]
        return chosen

    def fresh(self, seen: Sequence[Trial]) -> list[str]:
        """The pool without what was seen."""
        known = {trial.recipe for trial in seen}
        return [recipe for recipe in self.pool if recipe not in known]


class RandomStrategy(_Pooled):
    """Recipes of the pool in random order: the baseline of every search."""

    def ask(self, seen: Sequence[Trial]) -> list[str]:
        order = self.fresh(())
        random.Random(self.context.seed + 1).shuffle(order)
        known = {trial.recipe for trial in seen}
        return [recipe for recipe in order if recipe not in known][: self.context.batch]


class HalvingStrategy(_Pooled):
    """Every recipe of a small space that fits, the mildest two of those that differ only in how many tokens stay."""

    def ask(self, seen: Sequence[Trial]) -> list[str]:
        if any(trial.delta for trial in seen):
            return []
        trials = [self.context.trial(recipe) for recipe in self.pool]
        return [trial.recipe for trial in prune(trials, self.context.budget, self.context.dense)]


class SurrogateStrategy(_Pooled):
    """First each method by itself, as strong as the budget asks; then what the surrogate believes in.

    Within a budget: the recipes with the best chance to lose least. For a front: those that may enlarge its hypervolume
    most. Upper confidence bound and batches by believed values: Srinivas et al., arXiv 0912.3995; Ginsbourger et al.
    2010.
    """

    optimism = 1.0
    reference = (1.05, 0.5)
    """Cost and loss beyond which a recipe is worth nothing to a front."""

    def ask(self, seen: Sequence[Trial]) -> list[str]:
        known = {trial.recipe for trial in seen}
        first = [recipe for recipe in self._first if recipe not in known]
        if first:
            return first[: self.context.batch]
        fresh = self.fresh(seen)
        if not fresh:
            return []
        return self._for_front(seen, fresh) if self.context.front else self._for_budget(seen, fresh)

    @cached_property
    def _first(self) -> list[str]:
        """For each method and each combination of other sockets' mildest partners, its mildest setting that fits."""
        context = self.context
        by_method: dict[tuple[str, ...], list[str]] = {}
        for recipe in self.pool:
            by_method.setdefault(tuple(sorted(part.name for part in context.parts(recipe))), []).append(recipe)
        found: dict[str, None] = {}
        covered: set[str] = set()
        for names in sorted(by_method, key=lambda names: (len(names), names)):
            if set(names) <= covered:
                continue  # each method is seen once, in the smallest company in which the budget can be met
            covered |= set(names)
            members = sorted(by_method[names], key=lambda r: (sum(p.saving for p in context.parts(r)), r))
            # the mildest of those that fit is the method's best chance; for a front its middle says more
            found[members[len(members) // 2 if context.front else 0]] = None
        return list(found)

    def _for_budget(self, seen: Sequence[Trial], fresh: list[str]) -> list[str]:
        context = self.context
        mean, spread = context.surrogate(seen, fresh).predict(fresh)
        relative = np.array([context.relative(recipe) for recipe in fresh])
        hope = mean - self.optimism * spread + 1e-3 * relative
        batch: list[str] = []
        groups: dict[str, int] = {}
        for index in np.argsort(hope, kind="stable"):
            group = context.trial(fresh[index]).group
            if groups.get(group, 0) < 2:  # neighbours teach little
                groups[group] = groups.get(group, 0) + 1
                batch.append(fresh[index])
            if len(batch) == context.batch:
                break
        return batch

    def _for_front(self, seen: Sequence[Trial], fresh: list[str]) -> list[str]:
        context = self.context
        run = [trial.recipe for trial in seen if trial.delta]
        surrogate = context.surrogate(seen, fresh)
        believed = surrogate.predict(run)[0] if run else np.zeros(0)
        points = [(context.relative(r), float(max(0.0, loss))) for r, loss in zip(run, believed)] + [(1.0, 0.0)]
        mean, spread = surrogate.predict(fresh)
        hoped = np.maximum(0.0, mean - self.optimism * spread)
        rows = np.array([(context.relative(recipe), loss) for recipe, loss in zip(fresh, hoped)])
        batch: list[int] = []
        for _ in range(min(context.batch, len(fresh))):
            gain = gains(np.array(points), rows, self.reference)
            gain[batch] = -1.0
            best = int(np.argmax(gain + 1e-9 * spread))
            batch.append(best)
            points.append((rows[best][0], float(max(0.0, mean[best]))))  # as if it had come out as believed
        return [fresh[index] for index in batch]


def area(trials: Sequence[Trial], context: Context, reference: tuple[float, float] = (1.05, 0.5)) -> float:
    """Hypervolume of the measured (relative cost, loss) points, the dense model among them."""
    points = [(context.relative(t.recipe), max(0.0, -t.delta.mean)) for t in trials if t.delta]
    return hypervolume([*points, (1.0, 0.0)], reference)
