"""Times of recipes beside dense: measured in interleaved pairs within a bounded time, and estimated beforehand.

They are those of the model itself, or of a preset of published shape with random weights. A large shape takes seconds
to minutes for one answer on a small machine, so the number of pairs follows from the first answers: what is measured
then is the request of middling length, in two pairs at least.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import foveate
from foveate.adapters.presets import PRESETS as OTHERS
from foveate.bench import cost as costs
from foveate.errors import FoveateError, InputError, UnknownNameError
from foveate.method import nearest
from foveate.nvila.presets import PRESETS as NVILA
from foveate.optimize.answers import apply, parse
from foveate.optimize.estimate import Estimator
from foveate.vlm import VLM, Request

if TYPE_CHECKING:
    from foveate.bench.timing import Row, Timed

SECONDS = 40.0
"""About what timing one recipe may take; a shape whose two least pairs take longer takes longer."""
PAIRS = 20
LEAST_PAIRS = 2
AA_PAIRS = 5
"""From so many pairs on, dense is also timed against itself."""
UNIT_SECONDS = 0.1
"""Least length of a timed unit; a request that is shorter is repeated inside."""
QUESTIONS = 16
TIMED_TOKENS = 8
THROUGHPUT_BATCH = 8
THROUGHPUT_REQUESTS = 32
THROUGHPUT_ROUNDS = 5
OF_STAGES = {"ttft_ms": "ttft", "tpot_ms": "decode"}

Message = list[dict[str, Any]]


class Times:
    """vlm: the dense model. dialogues: messages of the questions. preset: an architecture that is timed in its place.

    Raises UnknownNameError (no such preset), and when a time is first asked for InputError (the preset can be asked
    none of the questions).
    """

    def __init__(self, vlm: VLM, dialogues: Sequence[Message], preset: str | None = None) -> None:
        self._vlm, self._preset, self._dialogues = vlm, preset, dialogues[:QUESTIONS]
        known = [*NVILA.names(), *OTHERS.names()]
        if preset is not None and preset not in known:  # said now, not after the search
            raise UnknownNameError(f"--time-on {preset}: there is no such preset{nearest(preset, known)}")

    @cached_property
    def dense(self) -> VLM:
        """The model that is timed; a preset in bfloat16, as such models are served."""
        if self._preset is None:
            return self._vlm
        return foveate.load(self._preset, random_weights=True, dtype="bfloat16", device=str(self._vlm.device))

    @cached_property
    def sample(self) -> list[Message]:
        """The dialogues that can be timed, those of middling length first."""
        found, reason = [], ""
        for messages in self._dialogues:
            try:
                found.append((self.dense.plan(messages).num_tokens, messages))
            except FoveateError as error:
                reason = str(error)
        if not found:
            raise InputError(f"--time-on {self._preset}: it can be asked none of the questions: {reason}")
        middle = sorted(tokens for tokens, _ in found)[len(found) // 2]
        return [messages for _, messages in sorted(found, key=lambda pair: abs(pair[0] - middle))]

    def hints(self, recipe: str) -> dict[str, float]:
        """Times against dense as a roofline estimates them, by axis."""
        return self._estimator.ratios(recipe)

    @cached_property
    def _estimator(self) -> Estimator:
        timed = self.dense
        shape = costs.ModelShape.from_config(timed.model.config, timed.spec)
        request = costs.Request.from_plan(timed.plan(self.sample[0]), shape, new=TIMED_TOKENS)
        return Estimator(shape, request, timed)

    def model(self, recipe: str) -> VLM:
        """The timed model under a recipe. On random weights a calibration has nothing to learn: its layers get their
        form, and any values."""
        dense = self.dense
        if self._preset is None or not any(getattr(method, "needs_data", False) for method in parse(recipe)):
            return apply(recipe, dense)
        parsed = parse(recipe)
        parsed.check(dense)
        shared = [*dense.model.parameters(), *dense.model.buffers()]
        model = copy.deepcopy(dense.model, {id(tensor): tensor for tensor in shared})
        small = VLM(dense.adapter.with_model(model), dense.name, parsed)
        parsed.prepare_(small.adapter.parts())
        known = {id(tensor) for tensor in shared}
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if id(tensor) in known:
                    continue
                if isinstance(tensor, torch.nn.Parameter):  # a bias; a checkpoint is read into its own dtype
                    tensor.data = tensor.data.to(dense.dtype)
                # no answer may hang on what lay in memory
                tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
        model.to(dense.device)
        return small

    def compare(self, recipe: str, on_plan: Callable[[int], Any], on_pair: Callable[[], None]) -> dict[str, Any]:
        """The row of `Workbench.time`. on_plan receives the number of pairs that will be timed."""
        from foveate.bench.timing import compare

        small, dense = (answer_times(vlm, self.sample) for vlm in (self.model(recipe), self.dense))
        start = time.perf_counter()
        dense(0)  # the first answers pay for imports and memory
        small(0)
        each = [_seconds(small), _seconds(dense)] if time.perf_counter() - start < SECONDS / 10 else None
        spent = time.perf_counter() - start
        pairs, aa = affordable(*(each or (spent / 2, spent / 2)), SECONDS - spent)
        on_plan(pairs * (2 if aa else 1))
        unit = UNIT_SECONDS if each else 0.0
        rows, about = compare(small, dense, pairs=pairs, warmup=0, min_seconds=unit, aa=aa, on_pair=on_pair)
        by_stage = {row.stage: row for row in rows}
        where = {"on": f"{self._preset} with random weights in bfloat16"} if self._preset else {}
        return {**ratio_of(by_stage["ttft"]), "tpot": ratio_of(by_stage["decode"]), **about, **where}

    def base(self, axes: Sequence[str]) -> dict[str, float]:
        """{"ttft_ms", "tpot_ms", "throughput"} of the dense model, those of `axes`: medians of a few answers."""
        found: dict[str, float] = {}
        if "throughput" in axes:
            found["throughput"] = self.throughputs("")["dense"]
        run, rows, start = answer_times(self.dense, self.sample), [], time.perf_counter()
        run(0)
        while len(rows) < QUESTIONS and (not rows or time.perf_counter() - start < SECONDS / 4):
            rows.append(run(len(rows)))
        for key, stage in OF_STAGES.items():
            if key.removesuffix("_ms") in axes:
                found[key] = float(np.median([row[stage] for row in rows]))
        return found

    def throughputs(self, recipe: str) -> dict[str, float]:
        """{"value", "dense"}: requests a second in batches, in turns, the median of the rounds."""
        requests = [Request(messages=messages) for messages in self.sample]
        requests = [requests[i % len(requests)] for i in range(THROUGHPUT_REQUESTS)]
        small, dense = self.model(recipe), self.dense

        def once(vlm: VLM, count: int) -> float:
            start = time.perf_counter()
            vlm.answer(requests[:count], max_new_tokens=TIMED_TOKENS, batch_size=THROUGHPUT_BATCH)
            return count / (time.perf_counter() - start)

        rate = once(dense, 1)
        once(small, 1)
        count = max(1, min(len(requests), int(SECONDS * rate / (2 * THROUGHPUT_ROUNDS))))
        rounds = THROUGHPUT_ROUNDS if count > 1 else LEAST_PAIRS
        pairs = [(once(small, count), once(dense, count)) for _ in range(rounds)]
        base = float(np.median([b for _, b in pairs]))
        return {"value": base * float(np.median([a / b for a, b in pairs])), "dense": base}


def affordable(small: float, dense: float, seconds: float) -> tuple[int, bool]:
    """(pairs, whether dense is timed against itself as well) for answers of so many seconds each."""
    both = int(seconds / max(1e-9, small + 3 * dense))
    if both >= AA_PAIRS:
        return min(PAIRS, both), True
    return max(LEAST_PAIRS, min(PAIRS, int(seconds / max(1e-9, small + dense)))), False


def _seconds(run: Timed) -> float:
    start = time.perf_counter()
    run(0)
    return time.perf_counter() - start


def answer_times(vlm: VLM, messages: Sequence[Message]) -> Timed:
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
