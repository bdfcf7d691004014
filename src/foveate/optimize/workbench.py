"""The model behind the search: exact costs, answers, times, naive choices, pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.bench import cost as costs
from foveate.effect import cache_bytes_per_token
from foveate.errors import FoveateError
from foveate.optimize.answers import Answers, apply, parse
from foveate.optimize.budget import HINTED, Budget, Cost
from foveate.optimize.report import Picture
from foveate.optimize.samples import Question, Split
from foveate.optimize.space import Space, build_space, fitting, name_of, settled, upgrades
from foveate.optimize.study import Study
from foveate.optimize.times import Times
from foveate.recipe import Recipe
from foveate.vlm import VLM, Request
from foveate.weights.base import Pruner, module_bytes

if TYPE_CHECKING:
    from foveate.data.plan import Plan

PICTURES = 5


class ModelWorkbench(Answers):
    """`foveate.optimize.run.Workbench` around a loaded dense model.

    choose, prove: the questions; those that cannot be planned or read are dropped, with the reason in `skipped`.
    methods: names of the methods to search, default all that are registered. pin, forbid, add: as `build_space`.
    time_on: an architecture preset on which times are measured, with random weights. budget: what is limited; times are
    estimated only when they are. study: the log, whose scores are not asked for again. Raises InputError if no question
    is left.
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
        budget: Budget | None = None,
        study: Study | None = None,
        batch_size: int = 64,
        quiet: bool = False,
    ) -> None:
        super().__init__(vlm, choose, prove, study or Study(None), batch_size=batch_size, quiet=quiet)
        self.name, self.data = vlm.name, data
        self.methods, self.refused = fitting(vlm, methods)
        self._only = methods is not None
        self._choices = {"pin": pin, "forbid": forbid, "add": add}
        self._space: Space | None = None
        self._limited = budget.axes if budget else []
        self._wants_hints = any(axis in HINTED for axis in self._limited)
        self._on = f" on {time_on}" if time_on else ""
        self._times = Times(vlm, [question.item.messages for question in self.choose.questions], time_on)
        self._shape = costs.ModelShape.from_config(vlm.model.config, vlm.spec)
        self._weight_bytes: dict[str, int] = {}
        self._parameters, self._zeros = 0, {"": 0}
        self._kv_bytes: dict[str, float] = {}
        self._work: dict[str, dict[str, float]] = {}
        self._counts: dict[costs.Request, float] = {}

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
        asked for it. Zeros among dense weights cost as much as other weights, unless the budget limits their number."""
        if text in asked or name_of(text) in asked or name_of(text) == "random":
            return True
        try:
            cost = self.cost(text)
        except FoveateError as error:
            useless[name_of(text)] = str(error)
            return False
        axes = ("flops", "bytes", "tokens", "memory", *(axis for axis in ("nonzeros",) if axis in self._limited))
        saves = any((cost.get(a) or 0) < 0.999 * (dense.get(a) or 0) for a in axes)
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
            nonzeros=float(self._nonzeros(parsed)),
            parts=parts,
            hints=self._times.hints(recipe) if self._wants_hints else {},
        )

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

    def _nonzeros(self, recipe: Recipe) -> int:
        """Weights of the model that its pruners leave."""
        if not self._parameters:
            self._parameters = sum(p.numel() for p in self.vlm.model.parameters())
        pruners = [method for method in recipe.of("weights") if isinstance(method, Pruner)]
        key = Recipe(tuple(pruners)).text()
        if key not in self._zeros:
            parts = self.vlm.adapter.parts()
            self._zeros[key] = sum(pruner.zeros(parts) for pruner in pruners)
        return self._parameters - self._zeros[key]

    def _per_token(self, recipe: Recipe) -> float:
        """Bytes of the cache for one token."""
        methods = recipe.of("cache")
        key = methods[0].text() if methods else ""
        if key not in self._kv_bytes:
            self._kv_bytes[key] = cache_bytes_per_token(apply(key, self.vlm))
        return self._kv_bytes[key]

    # ---- time, naive choices, pictures, output

    def time(self, recipe: str) -> dict[str, Any]:
        def timed() -> dict[str, Any]:
            return self._times.compare(recipe, lambda pairs: self.stage("time", pairs), self._advance)

        return self._logged(recipe, f"time{self._on}", timed)

    def measure(self, recipe: str, axis: str) -> dict[str, float]:
        if axis == "throughput":
            return self._logged(recipe, axis + self._on, lambda: self._times.throughputs(recipe))
        from foveate.bench.memory import peaks

        one = self.choose.questions[0].item.messages
        return self._logged(recipe, axis, lambda: peaks(apply(recipe, self.vlm), self.vlm, one))

    def base(self, axes: Sequence[str]) -> dict[str, float]:
        return self._logged("", f"base {' '.join(axes)}{self._on}", lambda: self._times.base(axes))

    def _logged(self, recipe: str, kind: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the log holds of a measured cost; it is measured when that is nothing."""
        found = self._study.cost(recipe, kind)
        if not found:
            found = measure()
            self._study.add_cost(recipe, kind, found)
        return found

    def _advance(self) -> None:
        if self._bar:
            self._bar.advance(1)

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
