"""The model behind the search: exact costs, cached answers, interleaved times, pictures.

Answers are made from cached visual features: tower and connector run once for each question, and every recipe that
leaves them alone starts from there. What a recipe is judged by is therefore exactly what `VLM.answer` gives (tested),
for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.adapters.shape import steps_of
from foveate.bench import cost as costs
from foveate.effect import cache_bytes_per_token
from foveate.errors import FoveateError, InputError
from foveate.optimize.budget import Cost
from foveate.optimize.report import Picture
from foveate.optimize.samples import Question, Split
from foveate.optimize.search import Trial
from foveate.optimize.space import candidates, fitting
from foveate.progress import Progress
from foveate.recipe import Recipe
from foveate.runtime import Clock, check_context, encode, generate, select, stop_of
from foveate.tasks.scores import judge
from foveate.weights.base import module_bytes

if TYPE_CHECKING:
    from foveate.adapters.base import Encoded
    from foveate.data.plan import Plan
    from foveate.vlm import VLM

CACHE_BYTES = 2 << 30
"""Visual features kept in memory; beyond that they are computed again."""
PICTURES = 5
PAIRS = 20
UNIT_SECONDS = 0.1
"""Least length of a timed unit; a request that is shorter is repeated inside."""


class ModelWorkbench:
    """`foveate.optimize.run.Workbench` around a loaded dense model.

    choose, prove: the questions; those that cannot be planned or read are dropped, with the reason in `skipped`.
    methods: names of the methods to search, default all that are registered. Raises InputError if no question is left.
    """

    def __init__(
        self,
        vlm: VLM,
        choose: Split,
        prove: Split,
        *,
        data: str,
        methods: Sequence[str] | None = None,
        batch_size: int = 64,
        quiet: bool = False,
    ) -> None:
        self.vlm, self.name, self.data = vlm, vlm.name, data
        self.methods, self.refused = fitting(vlm, methods)
        self.batch_size, self.quiet = batch_size, quiet
        self._bar: Progress | None = None
        self._plans: dict[str, list[Plan]] = {}
        self.choose, self.prove = self._usable("choose", choose), self._usable("prove", prove)
        if not len(self.choose):
            reason = next(iter(self.choose.skipped.values()), "there is none")
            raise InputError(f"no usable question to choose a recipe on: {reason}")
        self._shape = costs.ModelShape.from_config(vlm.model.config, vlm.spec)
        self._models: dict[str, VLM] = {"": vlm}
        self._weight_bytes: dict[str, int] = {}
        self._kv_bytes: dict[str, float] = {}
        self._scores: dict[tuple[str, str], dict[int, float]] = {}
        self._features: dict[tuple[str, str, int], Encoded] = {}
        self._held = 0
        self._counts: dict[costs.Request, float] = {}

    # ---- questions

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

    # ---- costs

    def trials(self) -> tuple[list[Trial], dict[str, str]]:
        found = candidates(self.methods)
        for trial in found:
            trial.cost = self.cost(trial.recipe)
        return found, self.refused

    def cost(self, recipe: str) -> Cost:
        """Mean over the questions chosen on: FLOPs to the end of the answer, weights and cache held, tokens kept."""
        parsed = parse(recipe)
        effect = costs.Effect.of(parsed)
        weights, per_token = self._weights(parsed), self._per_token(parsed)
        total = dict.fromkeys(costs.STAGES, 0.0)
        cache = tokens = 0.0
        for request, share in self._requests().items():
            small = effect.apply(request, self._shape)
            flops = costs.flops(self._shape, small, selection=effect.selection_flops(self._shape, small))
            flops["decode"] *= small.new - 1  # the prompt gives the first token
            for stage, value in flops.items():
                total[stage] += share * value
            cache += share * per_token * (small.cached + small.new - 1)
            tokens += share * small.kept
        return Cost(sum(total.values()), weights + cache, tokens, parts={**total, "weights": weights, "cache": cache})

    def _requests(self) -> dict[costs.Request, float]:
        """The different requests of the choice in counts, each with its share of all questions."""
        if not self._counts:
            for plan, question in zip(self._plans["choose"], self.choose.questions):
                answer = self.vlm.tokenizer(question.item.answers[0], add_special_tokens=False)["input_ids"]
                request = costs.Request.from_plan(plan, self._shape, new=len(answer) + 1)  # and the end of the turn
                self._counts[request] = self._counts.get(request, 0.0) + 1 / len(self.choose)
        return self._counts

    def _weights(self, recipe: Recipe) -> int:
        key = Recipe(recipe.of("weights")).text()
        if key not in self._weight_bytes:
            self._weight_bytes[key] = module_bytes(self._model(key).model)
        return self._weight_bytes[key]

    def _per_token(self, recipe: Recipe) -> float:
        """Bytes of the cache for one token."""
        methods = recipe.of("cache")
        key = methods[0].text() if methods else ""
        if key not in self._kv_bytes:
            self._kv_bytes[key] = cache_bytes_per_token(apply(key, self.vlm))
        return self._kv_bytes[key]

    def _model(self, weights: str) -> VLM:
        """The model with only the weight methods of a recipe applied; the dense one and the last three stay."""
        if weights not in self._models:
            for name in [name for name in self._models if name][:-2]:
                del self._models[name]
            self._models[weights] = apply(weights, self.vlm)
        return self._models[weights]

    # ---- answers

    def scores(self, recipe: str, split: str, n: int) -> np.ndarray:
        done = self._scores.setdefault((recipe, split), {})
        missing = [i for i in range(n) if i not in done]
        lengths = [self._plans[split][i].num_tokens for i in missing]
        order = [missing[i] for i in np.argsort(lengths, kind="stable")]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, text in zip(batch, self.answers(recipe, split, batch)):
                question = self._split(split).questions[index]
                done[index] = judge(question.scorer, text, question.item.answers, question.item.choices)
            if self._bar:
                self._bar.advance(len(batch), recipe=recipe or "dense")
        return np.array([done[i] for i in range(n)])

    def answers(self, recipe: str, split: str, indices: Sequence[int]) -> list[str]:
        """Greedy answers to the questions at `indices`, as `VLM.answer` gives them."""
        found = self.answer_ids(recipe, split, indices)
        return [self.vlm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]

    @torch.inference_mode()
    def answer_ids(self, recipe: str, split: str, indices: Sequence[int]) -> list[list[int]]:
        """The token ids of `answers`."""
        parsed = parse(recipe)
        weights = Recipe(parsed.of("weights")).text()
        vlm = self._model(weights)
        reducers, caches = parsed.of("reduce"), parsed.of("cache")
        questions = [self._split(split).questions[i] for i in indices]
        plans = [self._plans[split][i] for i in indices]
        encoded = self.encoded(recipe, split, indices)
        shape = vlm.adapter.shape
        rows = [select(vlm.adapter, plan, part, steps_of(reducers, shape)) for plan, part in zip(plans, encoded)]
        limit = max(question.max_new_tokens for question in questions)
        check_context(rows, vlm.adapter, limit)
        cache = caches[0].make(vlm.adapter) if caches else vlm.adapter.new_cache()
        clock = Clock(vlm.device)
        new = generate(vlm.adapter, rows, cache, max_new_tokens=limit, stop=vlm.stop_ids, clock=clock)
        return [ids[: question.max_new_tokens] for ids, question in zip(new, questions)]

    def _encoder_key(self, weights: str) -> str:
        """Empty when tower and connector are those of the dense model, else the weight methods that change them."""
        changed = {part for method in parse(weights) for part in getattr(method, "parts", ("vision_tower",))}
        return weights if changed & {"vision_tower", "mm_projector"} else ""

    def encoded(self, recipe: str, split: str, indices: Sequence[int]) -> list[Encoded]:
        """Visual features of the questions under the recipe's weights, with the signals of all methods searched."""
        parsed = parse(recipe)
        weights = Recipe(parsed.of("weights")).text()
        vlm, key = self._model(weights), self._encoder_key(weights)
        own = steps_of(parsed.of("reduce"), vlm.adapter.shape)
        # What leaves inside the encoder changes the features themselves; later steps of all methods share them.
        stop = stop_of(own)
        key += f" to {Recipe(parsed.of('reduce')).text() if stop == 'encoder' else stop}"
        missing = [i for i in indices if (key, split, i) not in self._features]
        fresh: dict[int, Encoded] = {}
        if missing:
            plans = [self._plans[split][i] for i in missing]
            inputs = [self.vlm.prepare(plan) for plan in plans]
            # With the signals of every reducer that is searched and reads the same features: one pass serves them all.
            methods = [m.from_params({"keep": 1.0}) for m in self.methods if m.socket == "reduce"]
            found = [steps_of([method], vlm.adapter.shape) for method in methods]
            every = [*own, *(step for steps in found if stop_of(steps) == stop != "encoder" for step in steps)]
            for index, part in zip(missing, encode(vlm.adapter, plans, inputs, [every] * len(plans))):
                fresh[index] = part
                size = part.features.nbytes + sum(signal.nbytes for signal in part.signals.values())
                if self._held + size <= CACHE_BYTES:
                    self._held += size
                    # A batch's features are views of one tensor, which would otherwise stay as a whole.
                    part.features = part.features.clone()
                    self._features[key, split, index] = part
        return [fresh.get(i) or self._features[key, split, i] for i in indices]

    # ---- time, naive choices, pictures, output

    def time(self, recipe: str) -> dict[str, Any]:
        from foveate.bench.timing import compare
        from foveate.vlm import Request

        small = apply(recipe, self.vlm)
        some = [q.item.messages for q in self.choose.questions[:16]]

        def timed(vlm: VLM) -> Any:
            def run(index: int) -> dict[str, float]:
                answer = vlm.respond(Request(messages=some[index % len(some)]), max_new_tokens=1)
                return {"ttft": sum(answer.ms.values()), **answer.ms}

            return run

        rows, about = compare(timed(small), timed(self.vlm), pairs=PAIRS, warmup=3, min_seconds=UNIT_SECONDS)
        row = next(row for row in rows if row.stage == "ttft")
        ratio = row.ratio or 1.0
        return {
            "ms": row.a_ms,
            "dense_ms": row.b_ms,
            "ratio": ratio,
            "low": row.low or ratio,
            "high": row.high or ratio,
            "aa_low": row.aa_low,
            "aa_high": row.aa_high,
            "real": row.real,
            **about,
        }

    def naive(self, recipe: str) -> dict[str, str]:
        parsed = parse(recipe)
        found = {}
        reducer = next(iter(parsed.of("reduce")), None)
        known = {method.name for method in self.methods}
        if reducer and reducer.name != "random" and "random" in known:
            rest = [method.text() for method in parsed if method.socket != "reduce"]
            found["random tokens"] = parse(" + ".join([f"random(keep={reducer.keep})", *rest])).text()
        int4 = parse("rtn(bits=4, parts=[llm, vision_tower, mm_projector])").text() if "rtn" in known else recipe
        if int4 != recipe:
            found["uniform int4"] = int4
        return found

    def pictures(self, recipe: str) -> list[Picture]:
        from foveate.show import kept_picture, png
        from foveate.vlm import Request

        small = apply(recipe, self.vlm)
        split, name = (self.prove, "prove") if len(self.prove) else (self.choose, "choose")
        found = []
        for index in _varied(split, self._plans[name], PICTURES):
            question, plan = split.questions[index], self._plans[name][index]
            request = Request(messages=question.item.messages)
            answer = small.respond(request, max_new_tokens=question.max_new_tokens)
            dense = self.vlm.respond(request, max_new_tokens=question.max_new_tokens)
            picture = kept_picture(plan, self.vlm.spec, self.vlm.adapter.layout(plan), answer.kept)
            caption = (
                f"{question.skill}: {_last_text(question)} → dense: {dense.text or '(nothing)'}; this recipe: "
                f"{answer.text or '(nothing)'}; true: {question.item.answers[0]} "
                f"({answer.tokens['kept']} of {answer.tokens['visual']} tokens)"
            )
            found.append(Picture(png(picture), caption))
        return found

    def save(self, recipe: str, folder: Path) -> None:
        apply(recipe, self.vlm).save(folder)


def parse(recipe: str) -> Recipe:
    """The recipe of a text; "" is the empty one."""
    return Recipe.parse(recipe) if recipe else Recipe()


def apply(recipe: str, vlm: VLM) -> VLM:
    """The model with the recipe applied, without a word about it."""
    return parse(recipe).apply(vlm, quiet=True) if recipe else vlm


def _varied(split: Split, plans: Sequence[Plan], count: int) -> list[int]:
    """Indices of questions with media, one of each of `count` skills spread over all skills."""
    first: dict[str, int] = {}
    for index, (question, plan) in enumerate(zip(split.questions, plans)):
        if plan.media:
            first.setdefault(question.skill, index)
    found = list(first.values())
    if len(found) > count:
        found = [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)]
    elif found:
        more = [i for i, plan in enumerate(plans) if plan.media and i not in found]
        found += more[: count - len(found)]
    return found


def _last_text(question: Question) -> str:
    content = question.item.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")
