"""Answers to the questions under any recipe, made from cached visual features.

Tower and connector run once for each question, and every recipe that leaves them alone starts from there. What a recipe
is judged by is therefore exactly what `VLM.answer` gives (tested), for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.adapters.shape import steps_of
from foveate.errors import FoveateError, InputError
from foveate.optimize.samples import Split
from foveate.optimize.study import Study
from foveate.progress import Progress
from foveate.recipe import Recipe
from foveate.runtime import Clock, check_context, encode, generate, open_batch, select, stop_of
from foveate.tasks.scores import judge
from foveate.vlm import VLM
from foveate.weights.base import module_bytes

if TYPE_CHECKING:
    from foveate.adapters.base import Encoded
    from foveate.data.plan import Plan

CACHE_BYTES = 2 << 30
"""Visual features kept in memory; beyond that they are computed again."""
MOST_MODELS = 16


class Answers:
    """Scores and answers of a dense model under recipes, each asked for once.

    choose, prove: the questions; those that cannot be planned or read are dropped, with the reason in `skipped`.
    study: the log, whose scores are not asked for again. Raises InputError if no question is left.
    """

    def __init__(self, vlm: VLM, choose: Split, prove: Split, study: Study, *, batch_size: int, quiet: bool) -> None:
        self.vlm, self._study = vlm, study
        self.batch_size, self.quiet = batch_size, quiet
        self._bar: Progress | None = None
        self._plans: dict[str, list[Plan]] = {}
        self.choose, self.prove = self._usable("choose", choose), self._usable("prove", prove)
        if not len(self.choose):
            reason = next(iter(self.choose.skipped.values()), "there is none")
            raise InputError(f"no usable question to choose a recipe on: {reason}")
        self._models: dict[str, VLM] = {"": vlm}
        self._scores: dict[tuple[str, str], dict[int, float]] = study.scores()
        self._features: dict[tuple[str, str, int], tuple[frozenset[str], Encoded, int]] = {}
        self._readers: dict[str, dict[str, tuple[Any, ...]]] = {}
        self._held, self._dense_bytes = 0, module_bytes(vlm.model)

    def _usable(self, name: str, split: Split) -> Split:
        """The questions of a split that can be planned, and their plans."""
        plans, bad = [], {}
        for index, question in enumerate(split.questions):
            try:
                plans.append(self.vlm.plan(question.item.messages))
            except FoveateError as error:
                bad[index] = str(error)
        self._plans[name] = plans
        return split.drop(bad)

    def _split(self, name: str) -> Split:
        return self.choose if name == "choose" else self.prove

    def stage(self, title: str, questions: int) -> None:
        """Show progress of the next `questions` answers under this title."""
        if self._bar:
            self._bar.close()
        self._bar = Progress(title, questions, quiet=self.quiet)

    def close(self) -> None:
        """Clear the progress line."""
        if self._bar:
            self._bar.close()
            self._bar = None

    def _model(self, weights: str) -> VLM:
        """The model with only the weight methods of a recipe applied; the dense one and the last few stay."""
        if weights not in self._models:
            others = [name for name in self._models if name]
            while others and (len(others) >= MOST_MODELS or self._dense_bytes * len(others) > CACHE_BYTES):
                del self._models[others.pop(0)]
            self._models[weights] = apply(weights, self.vlm)
        return self._models[weights]

    def scores(self, recipe: str, split: str, n: int) -> np.ndarray:
        done = self._scores.setdefault((recipe, split), {})
        missing = [i for i in range(n) if i not in done]
        lengths = [self._plans[split][i].num_tokens for i in missing]
        order = [missing[i] for i in np.argsort(lengths, kind="stable")]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            fresh: dict[int, float] = {}
            for index, text in zip(batch, self.answers(recipe, split, batch)):
                question = self._split(split).questions[index]
                fresh[index] = judge(question.scorer, text, question.item.answers, question.item.choices)
            done.update(fresh)
            self._study.add(recipe, split, fresh)
            if self._bar:
                self._bar.advance(len(batch), recipe=recipe or "dense")
        return np.array([done[i] for i in range(n)])

    def answers(self, recipe: str, split: str, indices: Sequence[int]) -> list[str]:
        """Greedy answers to the questions at `indices`, as `VLM.answer` gives them."""
        found = self.answer_ids(recipe, split, indices)
        return [self.vlm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]

    def answer_ids(self, recipe: str, split: str, indices: Sequence[int]) -> list[list[int]]:
        """The token ids of `answers`."""
        questions = [self._split(split).questions[i] for i in indices]
        self._model(Recipe(parse(recipe).of("weights")).text())  # a method may calibrate with gradients
        with torch.inference_mode():
            rows, cache, vlm = self._rows(recipe, split, indices)
            limit = max(question.max_new_tokens for question in questions)
            check_context(rows, vlm.adapter, limit)
            clock = Clock(vlm.device)
            new = generate(vlm.adapter, rows, cache, max_new_tokens=limit, stop=vlm.stop_ids, clock=clock)
        return [ids[: question.max_new_tokens] for ids, question in zip(new, questions)]

    def _rows(self, recipe: str, split: str, indices: Sequence[int]) -> tuple[list[Any], Any, VLM]:
        """(prompts under a recipe, their empty cache, the model with its weight methods)."""
        parsed = parse(recipe)
        vlm = self._model(Recipe(parsed.of("weights")).text())
        reducers, caches = parsed.of("reduce"), parsed.of("cache")
        plans = [self._plans[split][i] for i in indices]
        encoded, shape = self.encoded(recipe, split, indices), vlm.adapter.shape
        rows = [select(vlm.adapter, plan, part, steps_of(reducers, shape)) for plan, part in zip(plans, encoded)]
        return rows, caches[0].make(vlm.adapter) if caches else vlm.adapter.new_cache(), vlm

    def layers(self) -> int:
        """Decoder layers of the model."""
        return self.vlm.adapter.shape.layers

    def divergence(self, recipe: str, n: int) -> float:
        """Kullback-Leibler divergence of the next token from the dense model's, mean over the first n questions."""
        logged = self._study.cost(recipe, f"divergence {n}")
        if logged is None:
            losses = []
            for start in range(0, n, self.batch_size):
                batch = range(start, min(n, start + self.batch_size))
                dense, other = (self._logits(text, batch).double().log_softmax(dim=-1) for text in ("", recipe))
                losses.append((dense.exp() * (dense - other)).sum(dim=-1))
            logged = {"value": float(torch.cat(losses).mean())}
            self._study.add_cost(recipe, f"divergence {n}", logged)
        return logged["value"]

    def _logits(self, recipe: str, indices: Sequence[int]) -> torch.Tensor:
        """Next-token logits [n, V] of questions of the choice."""
        self._model(Recipe(parse(recipe).of("weights")).text())
        with torch.inference_mode():
            rows, cache, vlm = self._rows(recipe, "choose", indices)
            return open_batch(vlm.adapter, rows, cache, Clock(vlm.device)).prefill()

    def _encoder_key(self, weights: str) -> str:
        """Empty when tower and connector are those of the dense model, else the weight methods that change them."""
        changed = {part for method in parse(weights) for part in getattr(method, "parts", ("vision_tower",))}
        return weights if changed & {"vision_tower", "mm_projector"} else ""

    def encoded(self, recipe: str, split: str, indices: Sequence[int]) -> list[Encoded]:
        """Visual features of the questions under the recipe's weights, with the signals that its steps need.

        They are kept with the signals of every method that was tried so far: one pass serves them all.
        """
        parsed = parse(recipe)
        weights, reducers = Recipe(parsed.of("weights")).text(), parsed.of("reduce")
        vlm = self._model(weights)
        key, readers = self._read(weights, reducers)
        wanted = {reducer.name for reducer in reducers}
        kept = self._features.get
        missing = [i for i in indices if (found := kept((key, split, i))) is None or not wanted <= found[0]]
        fresh: dict[int, Encoded] = {}
        if missing:
            plans = [self._plans[split][i] for i in missing]
            inputs = [self.vlm.prepare(plan) for plan in plans]
            every = [step for own in readers.values() for step in own]
            for index, part in zip(missing, encode(vlm.adapter, plans, inputs, [every] * len(plans))):
                fresh[index] = part
                self._keep((key, split, index), frozenset(readers), part)
        return [fresh.get(i) or self._features[key, split, i][1] for i in indices]

    def expect(self, recipes: Sequence[str]) -> None:
        """One pass of the tower will serve all these recipes that share its weights."""
        for recipe in recipes:
            parsed = parse(recipe)
            self._read(Recipe(parsed.of("weights")).text(), parsed.of("reduce"))

    def _read(self, weights: str, reducers: Sequence[Any]) -> tuple[str, dict[str, tuple[Any, ...]]]:
        """(key of the features that these methods start from, all methods known to read them), these among them."""
        steps = steps_of(reducers, self.vlm.adapter.shape)
        key = f"{self._encoder_key(weights)} to {stop_of(steps)}"
        if any(step.site == "encoder" for step in steps):
            key += f" by {Recipe(reducers).text()}"  # the features themselves hang on the recipe
        readers = self._readers.setdefault(key, {})
        readers.update({reducer.name: steps_of([reducer], self.vlm.adapter.shape) for reducer in reducers})
        return key, readers

    def _keep(self, place: tuple[str, str, int], readers: frozenset[str], part: Encoded) -> None:
        """Remember features and signals while there is room."""
        size = part.features.nbytes + sum(signal.nbytes for signal in part.signals.values())
        before = self._features.pop(place, None)
        self._held -= before[2] if before else 0
        if self._held + size <= CACHE_BYTES:
            self._held += size
            # A batch's features are views of one tensor, which would otherwise stay as a whole.
            part.features = part.features.clone()
            self._features[place] = (readers, part, size)


def parse(recipe: str) -> Recipe:
    """The recipe of a text; "" is the empty one."""
    return Recipe.parse(recipe) if recipe else Recipe()


def apply(recipe: str, vlm: VLM) -> VLM:
    """The model with the recipe applied, without a word about it."""
    return parse(recipe).apply(vlm, quiet=True) if recipe else vlm
