"""The model behind the search: exact costs, cached answers, interleaved times, pictures.

Answers are made from cached visual features: tower and connector run once for each question, and every recipe that
leaves them alone starts from there. What a recipe is judged by is therefore exactly what `VLM.answer` gives (tested),
for a fraction of the work.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import foveate
from foveate.adapters.shape import steps_of
from foveate.bench import cost as costs
from foveate.effect import cache_bytes_per_token
from foveate.errors import FoveateError, InputError
from foveate.optimize.budget import Cost
from foveate.optimize.estimate import Estimator
from foveate.optimize.report import Picture
from foveate.optimize.samples import Question, Split
from foveate.optimize.space import Space, build_space, fitting, name_of, settled, upgrades
from foveate.optimize.study import Study
from foveate.progress import Progress
from foveate.recipe import Recipe
from foveate.runtime import Clock, check_context, encode, generate, open_batch, select, stop_of
from foveate.tasks.scores import judge
from foveate.vlm import VLM, Request
from foveate.weights.base import module_bytes

if TYPE_CHECKING:
    from foveate.adapters.base import Encoded
    from foveate.bench.timing import Row, Timed
    from foveate.data.plan import Plan

CACHE_BYTES = 2 << 30
"""Visual features kept in memory; beyond that they are computed again."""
PICTURES = 5
PAIRS = 20
UNIT_SECONDS = 0.1
"""Least length of a timed unit; a request that is shorter is repeated inside."""
MOST_MODELS = 16
TIMED_TOKENS = 8
THROUGHPUT_BATCH = 8
THROUGHPUT_REQUESTS = 32


class ModelWorkbench:
    """`foveate.optimize.run.Workbench` around a loaded dense model.

    choose, prove: the questions; those that cannot be planned or read are dropped, with the reason in `skipped`.
    methods: names of the methods to search, default all that are registered. pin, forbid, add: as `build_space`.
    time_on: an architecture preset on which times are measured, with random weights. hints: estimate times as well.
    study: the log, whose scores are not asked for again. Raises InputError if no question is left.
    """

    def __init__(
        self,
        vlm: VLM,
        choose: Split,
        prove: Split,
        *,
        data: str,
        methods: Sequence[str] | None = None,
        pin: Sequence[str] = (),
        forbid: Sequence[str] = (),
        add: Sequence[str] = (),
        time_on: str | None = None,
        hints: bool = False,
        study: Study | None = None,
        batch_size: int = 64,
        quiet: bool = False,
    ) -> None:
        self.vlm, self.name, self.data = vlm, vlm.name, data
        self.methods, self.refused = fitting(vlm, methods)
        self._only = methods is not None
        self._choices = {"pin": pin, "forbid": forbid, "add": add}
        self._space: Space | None = None
        self._timed, self._timing = time_on, None
        self._hints: Estimator | None = None
        self._wants_hints = hints
        self._study = study or Study(None)
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
        self._scores: dict[tuple[str, str], dict[int, float]] = self._study.scores()
        self._work: dict[str, dict[str, float]] = {}
        self._features: dict[tuple[str, str, int], tuple[frozenset[str], Encoded, int]] = {}
        self._readers: dict[str, dict[str, tuple[Any, ...]]] = {}
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

    def space(self) -> tuple[Space, dict[str, str]]:
        if self._space is None:
            space = build_space(self.vlm, self.methods, **self._choices)
            asked = {*self._choices["pin"], *self._choices["add"]}
            dense = self.cost("")
            useless: dict[str, str] = {}
            for slot, options in enumerate(space.slots):
                if "" in options:
                    space.slots[slot] = [t for t in options if not t or self._saves(t, dense, asked, useless)]
            left = {name_of(text) for options in space.slots for text in options}
            self.refused |= {name: reason for name, reason in useless.items() if name not in left}
            self._space = space
        return self._space, self.refused

    def recall(self, key: str, value: int | None = None) -> int | None:
        if value is not None:
            self._study.add_cost("", key, {"value": value})
        logged = self._study.cost("", key)
        return None if logged is None else int(logged["value"])

    def upgrades(self, recipe: str, most: int) -> list[str]:
        if self._choices["pin"] or self._only:
            return []
        banned = set(self._choices["forbid"])
        found = upgrades(self.vlm, recipe, most + len(banned))
        return [text for text in found if not banned & {m.name for m in parse(text)}][:most]

    def _saves(self, text: str, dense: Cost, asked: set[str], useless: dict[str, str]) -> bool:
        """Whether a setting makes anything cheaper that is counted; if not the reason is in `useless`, unless the user
        asked for it. Zeros among dense weights, for example, cost as much as other weights."""
        if text in asked or name_of(text) in asked or name_of(text) == "random":
            return True
        try:
            cost = self.cost(text)
        except FoveateError as error:
            useless[name_of(text)] = str(error)
            return False
        saves = any((cost.get(a) or 0) < 0.999 * (dense.get(a) or 0) for a in ("flops", "bytes", "tokens", "memory"))
        if not saves:
            useless.setdefault(name_of(text), f"{text} makes nothing cheaper that is counted; --add it to try it")
        return saves

    def cost(self, recipe: str) -> Cost:
        """Mean over the questions chosen on: FLOPs to the end of the answer, weights and cache held, tokens kept, peak.

        Made of what each socket costs by itself, each counted once, so that thousands of recipes cost nothing.
        """
        parsed = parse(recipe)
        work = self._of_reducers(Recipe(parsed.of("reduce")).text())
        weights, per_token = self._weights(parsed), self._per_token(parsed)
        stages = {stage: work[stage] for stage in costs.STAGES}
        cache = per_token * work["cached"]
        parts = {**stages, "weights": weights, "cache": cache}
        return Cost(
            sum(stages.values()),
            weights + cache,
            work["tokens"],
            size=float(weights),
            memory=weights + cache + work["activations"],
            parts=parts,
            hints=self._estimator().ratios(recipe) if self._wants_hints else {},
        )

    def _estimator(self) -> Estimator:
        """Estimates of time for the question of middling length, on the model that is timed."""
        if self._hints is None:
            plans, timed = self._plans["choose"], self._for_times()
            middle = sorted(range(len(plans)), key=lambda i: plans[i].num_tokens)[len(plans) // 2]
            plan = timed.plan(self.choose.questions[middle].item.messages)
            shape = costs.ModelShape.from_config(timed.model.config, timed.spec)
            self._hints = Estimator(shape, costs.Request.from_plan(plan, shape, new=2), timed)
        return self._hints

    def _of_reducers(self, recipe: str) -> dict[str, float]:
        """Means over the requests under the reducers of a recipe: FLOPs by stage, "cached" and visual "tokens",
        "activations"."""
        if recipe not in self._work:
            effect = costs.Effect.of(parse(recipe))
            total = dict.fromkeys((*costs.STAGES, "cached", "tokens", "activations"), 0.0)
            for request, share in self._requests().items():
                small = effect.apply(request, self._shape)
                flops = costs.flops(self._shape, small, selection=effect.selection_flops(self._shape, small))
                flops["decode"] *= small.new - 1  # the prompt gives the first token
                found = {
                    **flops,
                    "cached": small.cached + small.new - 1,
                    "tokens": small.cached - small.text,
                    "activations": costs.activation_bytes(self._shape, small, str(self.vlm.dtype)),
                }
                for key, value in found.items():
                    total[key] += share * value
            self._work[recipe] = total
        return self._work[recipe]

    def _requests(self) -> dict[costs.Request, float]:
        """The different requests of the choice in counts, each with its share of all questions."""
        if not self._counts:
            for plan, question in zip(self._plans["choose"], self.choose.questions):
                answer = self.vlm.tokenizer(question.item.answers[0], add_special_tokens=False)["input_ids"]
                request = costs.Request.from_plan(plan, self._shape, new=len(answer) + 1)  # and the end of the turn
                self._counts[request] = self._counts.get(request, 0.0) + 1 / len(self.choose)
        return self._counts

    def _weights(self, recipe: Recipe) -> int:
        """Bytes of all tensors under the weight methods of a recipe, counted on a model without values."""
        methods = Recipe(recipe.of("weights"))
        key = methods.text()
        if key not in self._weight_bytes:
            if key:
                model = hollow(self.vlm.model)
                methods.prepare_(self.vlm.adapter.with_model(model).parts())
                self._weight_bytes[key] = module_bytes(model)
            else:
                self._weight_bytes[key] = module_bytes(self.vlm.model)
        return self._weight_bytes[key]

    def _per_token(self, recipe: Recipe) -> float:
        """Bytes of the cache for one token."""
        methods = recipe.of("cache")
        key = methods[0].text() if methods else ""
        if key not in self._kv_bytes:
            self._kv_bytes[key] = cache_bytes_per_token(apply(key, self.vlm))
        return self._kv_bytes[key]

    def _model(self, weights: str) -> VLM:
        """The model with only the weight methods of a recipe applied; the dense one and the last few stay."""
        if weights not in self._models:
            others = [name for name in self._models if name]
            while others and (len(others) >= MOST_MODELS or self._weight_bytes.get("", 0) * len(others) > CACHE_BYTES):
                del self._models[others.pop(0)]
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

    # ---- time, naive choices, pictures, output

    def time(self, recipe: str) -> dict[str, Any]:
        logged = self._study.cost(recipe, "time")
        if logged:
            return logged
        from foveate.bench.timing import compare

        dense = self._for_times()
        small = apply(recipe, dense)
        some = [q.item.messages for q in self.choose.questions[:16]]
        rows, about = compare(
            answer_times(small, some), answer_times(dense, some), pairs=PAIRS, warmup=3, min_seconds=UNIT_SECONDS
        )
        by_stage = {row.stage: row for row in rows}
        found = {**ratio_of(by_stage["ttft"]), "tpot": ratio_of(by_stage["decode"]), **about}
        self._study.add_cost(recipe, "time", found)
        return found

    def _for_times(self) -> VLM:
        """The model that is timed: this one, or a preset of published shape with random weights."""
        if self._timed is None:
            return self.vlm
        if self._timing is None:
            dtype, device = str(self.vlm.dtype).removeprefix("torch."), str(self.vlm.device)
            self._timing = foveate.load(self._timed, random_weights=True, dtype=dtype, device=device)
        return self._timing

    def measure(self, recipe: str, axis: str) -> dict[str, float]:
        logged = self._study.cost(recipe, axis)
        if logged:
            return logged
        dense = self._for_times()
        small = apply(recipe, dense)
        if axis == "throughput":
            requests = [Request(messages=q.item.messages) for q in self.choose.questions[:THROUGHPUT_REQUESTS]]
            found = throughputs(small, dense, requests)
        else:
            from foveate.bench.memory import peaks

            one = self.choose.questions[0].item.messages
            found = peaks(small, dense, one)
        self._study.add_cost(recipe, axis, found)
        return found

    def naive(self, recipe: str) -> dict[str, str]:
        parsed = parse(recipe)
        found = {}
        reducers = parsed.of("reduce")
        if reducers and reducers[0].name != "random":
            rest = [method.text() for method in parsed if method.socket != "reduce"]
            keep = getattr(reducers[0], "keep", None)
            if len(reducers) > 1 or keep is None or reducers[0].sites != ("post_projector",):
                # Tokens that leave in several places, or inside the language model: the same mean number of tokens.
                keep = max(0.001, min(1.0, round(self.cost(recipe).tokens / max(1e-9, self.cost("").tokens), 3)))
            found["random tokens"] = parse(" + ".join([f"random(keep={keep})", *rest])).text()
        int4 = settled(parse("rtn(bits=4, parts=[llm, vision_tower, mm_projector])").methods[0], self.vlm)
        if int4 and int4.text() != recipe:
            found["uniform int4"] = int4.text()
        return found

    def pictures(self, recipe: str) -> list[Picture]:
        from foveate.show import kept_picture, png

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


def hollow(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model whose tensors have shapes and types but no values."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = torch.nn.Parameter(empty, False) if isinstance(tensor, torch.nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def answer_times(vlm: VLM, messages: Sequence[list[dict[str, Any]]]) -> Timed:
    """A function that answers dialogue i with `TIMED_TOKENS` tokens and returns milliseconds by stage."""

    def run(index: int) -> dict[str, float]:
        answer = vlm.respond(Request(messages=messages[index % len(messages)]), max_new_tokens=TIMED_TOKENS)
        ms = dict(answer.ms)
        decode = ms.pop("decode")
        # An answer may end early, at the same place or another; a token's time is what is compared.
        return {"ttft": sum(ms.values()), **ms, "decode": decode / max(1, len(answer.ids))}

    return run


def ratio_of(row: Row) -> dict[str, Any]:
    """One stage of a comparison in the form of `Workbench.time`."""
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
    }


def throughputs(small: VLM, dense: VLM, requests: Sequence[Request]) -> dict[str, float]:
    """{"value", "dense"}: requests a second in batches of `THROUGHPUT_BATCH`, in turns, the median of five rounds."""

    def once(vlm: VLM) -> float:
        start = time.perf_counter()
        vlm.answer(requests, max_new_tokens=TIMED_TOKENS, batch_size=THROUGHPUT_BATCH)
        return len(requests) / (time.perf_counter() - start)

    for vlm in (small, dense):
        once(vlm)
    rounds = [(once(small), once(dense)) for _ in range(5)]
    base = float(np.median([b for _, b in rounds]))
    return {"value": base * float(np.median([a / b for a, b in rounds])), "dense": base}


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
