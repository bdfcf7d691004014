"""`tpe` and `nsga2`: Optuna's multi-objective samplers over the slots of a recipe.

The objectives are the loss and the cost against dense; broken limits are constraints. Source: Optuna, arXiv 1907.10902;
TPE for several objectives, Ozaki et al. 2020; NSGA-II, Deb et al. 2002. The study lives in memory and is told again
what was seen, so nothing but the log of the search has to survive a kill.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.errors import UnsupportedError
from foveate.optimize.search import Trial
from foveate.optimize.space import Genome, name_of
from foveate.optimize.strategies import Context, _Pooled

TRIES = 8
"""Suggestions for each recipe that is asked for; most repeat what was seen or break a limit."""


@dataclass
class _OptunaStrategy(_Pooled, ABC):
    context: Context

    @abstractmethod
    def sampler(self, optuna: Any, seed: int) -> Any:
        """The sampler of Optuna, seeded."""

    def ask(self, seen: Sequence[Trial]) -> list[str]:
        try:
            import optuna
        except ImportError:
            raise UnsupportedError("this strategy needs optuna: pip install optuna") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = {trial.recipe for trial in seen}
        batch: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental options of Optuna
            sampler = self.sampler(optuna, 1009 * self.context.seed + len(seen))
            study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
            for trial in seen:
                self._tell(optuna, study, trial)
            for _ in range(TRIES * self.context.batch):
                asked = study.ask()
                recipe = self.context.space.text(self._genome(asked))
                if recipe and recipe not in known and self.context.fits(recipe):
                    batch.append(recipe)
                    known.add(recipe)
                    if len(batch) == self.context.batch:
                        break
                else:
                    study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return batch or self.fresh(seen)[: self.context.batch]

    def _genome(self, asked: Any) -> Genome:
        """A suggestion: for each slot a method, then the place of a setting among those of the method."""
        genome = []
        for slot, names in enumerate(self._names()):
            name = asked.suggest_categorical(f"slot {slot}", names)
            places = self._places(slot, name)
            which = asked.suggest_int(f"slot {slot} {name}", 0, len(places) - 1) if len(places) > 1 else 0
            genome.append(places[which])
        return tuple(genome)

    def _names(self) -> list[list[str]]:
        return [list(dict.fromkeys(name_of(option) for option in slot)) for slot in self.context.space.slots]

    def _places(self, slot: int, name: str) -> list[int]:
        return [i for i, option in enumerate(self.context.space.slots[slot]) if name_of(option) == name]

    def _tell(self, optuna: Any, study: Any, trial: Trial) -> None:
        genome = self.context.space.genome(trial.recipe)
        if genome is None or trial.delta is None:
            return
        params: dict[str, Any] = {}
        ranges: dict[str, Any] = {}
        for slot, (gene, names) in enumerate(zip(genome, self._names())):
            name = name_of(self.context.space.slots[slot][gene])
            params[f"slot {slot}"] = name
            ranges[f"slot {slot}"] = optuna.distributions.CategoricalDistribution(names)
            places = self._places(slot, name)
            if len(places) > 1:
                params[f"slot {slot} {name}"] = places.index(gene)
                ranges[f"slot {slot} {name}"] = optuna.distributions.IntDistribution(0, len(places) - 1)
        overrun = max(self.context.budget.overruns(trial.cost, self.context.dense).values(), default=0.0) - 1
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=ranges,
                values=[-trial.delta.mean, self.context.relative(trial.recipe)],
                user_attrs={"overrun": overrun},
                system_attrs={"constraints": (overrun,)},
            )
        )


class TpeStrategy(_OptunaStrategy):
    """Tree-structured Parzen estimator for several objectives, grouped by methods."""

    def sampler(self, optuna: Any, seed: int) -> Any:
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=max(8, self.context.batch),
            multivariate=True,
            group=True,
            constant_liar=True,
            constraints_func=lambda trial: (trial.user_attrs.get("overrun", 0.0),),
        )


class Nsga2Strategy(_OptunaStrategy):
    """Optuna's NSGA-II."""

    def sampler(self, optuna: Any, seed: int) -> Any:
        return optuna.samplers.NSGAIISampler(
            seed=seed, population_size=16, constraints_func=lambda trial: (trial.user_attrs.get("overrun", 0.0),)
        )
