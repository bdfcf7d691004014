"""How a batch of requests runs: encode, select, pack, prefill, decode. No method and no model family is named here.

All state of a request lives in the objects of this module and in its cache, never on a module of the model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.adapters.shape import INSIDE
from foveate.clock import Clock, charge
from foveate.encoder_site import encode_reduced
from foveate.errors import BudgetError, CheckpointError
from foveate.method import signal_for
from foveate.ragged import Ragged
from foveate.rows import Row, narrowed, pad, show_prompt

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter, Encoded
    from foveate.data.execute import Inputs
    from foveate.data.plan import Plan
    from foveate.reduce.base import Step


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; else sample from the smallest set of tokens whose probability reaches top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def request_key(inputs: Inputs) -> int:
    """A checksum of a request's prompt and pixels: the same alone, in a batch, and in another process."""
    key = zlib.crc32(inputs.input_ids.numpy().tobytes())
    for item in sorted(inputs.media, key=lambda item: item.kind):  # pictures before clips
        key = zlib.crc32(item.pixels.tobytes(), key)
    return key


def encode(
    adapter: Adapter, plans: Sequence[Plan], inputs: Sequence[Inputs], steps: Sequence[Sequence[Step]]
) -> list[Encoded]:
    """Visual features of each request, with the signals that its own steps need.

    A request with a step after the encoder gets the features that the connector would take; `select` connects them.
    """
    out: list[Any] = [None] * len(plans)
    wanted = [_wanted(adapter, own) for own in steps]
    for stop in ("post_projector", "post_encoder"):
        mine = [i for i, own in enumerate(steps) if stop_of(own) == stop]
        if mine:
            names = set().union(*(wanted[i] for i in mine))
            parts = adapter.encode([inputs[i] for i in mine], [plans[i] for i in mine], names, stop=stop)
            out = [parts[mine.index(i)] if i in mine else part for i, part in enumerate(out)]
    for i, own in enumerate(steps):
        if stop_of(own) == "encoder":
            inside = [step for step in own if step.site == "encoder"]
            out[i] = encode_reduced(adapter, inputs[i], plans[i], inside, wanted[i])
        if "features" in wanted[i]:
            out[i].signals.setdefault("features", out[i].features)
        named = {name for step in own for name in step.signals}
        if "request_key" in named:
            out[i].signals["request_key"] = torch.tensor(request_key(inputs[i]))
        if "text_embeddings" in named:
            out[i].signals["text_embeddings"] = text_embeddings(adapter, plans[i])
    return out


def _wanted(adapter: Adapter, steps: Sequence[Step]) -> set[str]:
    """Signals that the steps between encoder and language model need, by the names under which they are delivered."""
    after = [step for step in steps if step.site not in (*INSIDE, "encoder")]
    return {name for step in after for need in step.signals if (name := signal_for(need, adapter.offers))}


def text_embeddings(adapter: Adapter, plan: Plan) -> Tensor:
    """[T, D] embeddings of the prompt's tokens that are neither features nor separators."""
    ids = torch.as_tensor(plan.input_ids)
    text = torch.ones(len(ids), dtype=torch.bool)
    text[adapter.layout(plan).position] = False
    return adapter.model.get_input_embeddings()(ids[text].to(adapter.model.device))


def stop_of(steps: Sequence[Step]) -> str:
    """Where the encoder hands over the features of a request: the first site of its steps, or "post_projector"."""
    sites = {step.site for step in steps}
    return next((site for site in ("encoder", "post_encoder") if site in sites), "post_projector")


def select(adapter: Adapter, plan: Plan, encoded: Encoded, steps: Sequence[Step]) -> Row:
    """The prompt of one request after its steps outside the language model: tokens dropped or merged, positions set."""
    row = Row.open(adapter, plan, encoded.features, encoded.deep)
    connected = stop_of(steps) == "post_projector" or not row.visual
    signals = {name: value.to(adapter.model.device) for name, value in encoded.signals.items()}
    if encoded.layout is not None:
        row.narrow(encoded.layout, [step for step in steps if step.site == "encoder"][-1])
    for step in (step for step in steps if step.site not in (*INSIDE, "encoder") and row.visual):
        if step.site == "post_projector" and not connected:
            _connect(adapter, row)
            connected = True
            if "features" in signals:
                signals["features"] = row.features
        reduction = step.select(signals, row.layout)
        row.cut(reduction, step)
        signals = narrowed(signals, reduction)
    if not connected:
        _connect(adapter, row)
    row.key = encoded.signals.get("request_key")
    row.steps = tuple(step for step in steps if step.site in INSIDE) if row.kept else ()
    row.touched = row.touched or bool(row.steps)
    return row


def _connect(adapter: Adapter, row: Row) -> None:
    with charge("encode"):  # it is no part of selecting, though only what was selected passes
        row.features = adapter.connect(row.features)


def check_context(rows: Sequence[Row], adapter: Adapter, max_new_tokens: int) -> None:
    """Raise BudgetError when a prompt and its answer do not fit the language model."""
    limit = adapter.max_context
    longest = max(rows, key=len)
    length = len(longest)
    if length + max_new_tokens > limit:
        raise BudgetError(
            f"the prompt has {length} tokens ({longest.kept} visual) and {max_new_tokens} new ones are asked for, the "
            f"model takes {limit}; use fewer pictures or frames, a smaller --max-new-tokens, or --reduce"
        )


class Level:
    """A batch in which every layer sees the same tokens, through the adapter's own forward pass. As `Ragged`."""

    def __init__(self, adapter: Adapter, rows: Sequence[Row], cache: Any) -> None:
        self.adapter, self.cache, self.rows = adapter, cache, list(rows)
        self.alive = list(range(len(rows)))
        self._mask: Tensor | None = None  # [B, cached], or None when nothing is padded
        self._position = torch.zeros(0)  # of the next token, [B, 1] or [3, B, 1]

    def prefill(self) -> Tensor:
        """Next-token logits [B, V] float32."""
        adapter, rows, device = self.adapter, self.rows, self.adapter.model.device
        ids, mask, positions, newlines = pad(rows, adapter)
        self._mask = None if mask is None else mask.to(device)
        features = torch.cat([row.features for row in rows if row.kept] or [rows[0].features[:0]])
        levels = max(len(row.deep) for row in rows)
        deep = [torch.cat([row.deep[i] for row in rows if row.kept]) for i in range(levels)]
        where = None if newlines is None else newlines.to(device)
        prompt = adapter.embed(ids.to(device), features, deep=deep, newlines=where)
        show_prompt(self.cache, rows, prompt["inputs_embeds"])
        following = torch.tensor([row.next_position for row in rows], device=device)[:, None]
        self._position = following.expand(*positions.shape[:-1], 1)
        for row in rows:
            row.per_layer = [row.kept] * len(adapter.layers)
        return self._forward(prompt, positions.to(device))

    def decode(self, token: Tensor) -> Tensor:
        """Logits [B, V] after one more token in each row, [B]."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], dim=1)
        logits = self._forward({"input_ids": token[:, None]}, self._position)
        self._position = self._position + 1
        return logits

    def shrink(self, going: list[int]) -> None:
        """Only these rows go on."""
        index = torch.tensor(going, device=self._position.device)
        self.cache.batch_select_indices(index)
        self.alive = [self.alive[i] for i in going]
        self._mask = None if self._mask is None else self._mask[index]
        self._position = self._position[..., index, :]

    def _forward(self, inputs: dict[str, Any], positions: Tensor) -> Tensor:
        return self.adapter.forward(
            **inputs, attention_mask=self._mask, position_ids=positions, past_key_values=self.cache
        )


def open_batch(adapter: Adapter, rows: Sequence[Row], cache: Any, clock: Clock) -> Level | Ragged:
    """The batch that these rows need."""
    return Ragged(adapter, rows, cache, clock) if any(row.steps for row in rows) else Level(adapter, rows, cache)


def generate(
    adapter: Adapter,
    rows: Sequence[Row],
    cache: Any,
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    clock: Clock,
    sampling: Sampling | None = None,
    on_token: Callable[[int], None] | None = None,
    strict: bool = False,
) -> list[list[int]]:
    """New token ids of each row, without the stop token. Rows are padded on the left; a finished row leaves the batch.

    on_token: called with each token of the first row as it comes. strict: raise CheckpointError when the prompt's
    logits are not numbers, instead of answering with whatever their largest is.
    """
    stops = set(stop)
    out: list[list[int]] = [[] for _ in rows]
    draw = _sampler(sampling)
    batch = open_batch(adapter, rows, cache, clock)
    with clock.stage("prefill"):
        logits = batch.prefill()
        if strict and bool(logits.isnan().any()):
            raise CheckpointError(
                f"the logits are not numbers in {str(adapter.model.dtype).removeprefix('torch.')}: weights or what a "
                "recipe made of them are damaged or too large; try --dtype float32, or another checkpoint or recipe"
            )
        token = draw(logits)
        found = token.tolist()
    with clock.stage("decode"):
        while True:
            going = []
            for index, (request, value) in enumerate(zip(batch.alive, found)):
                if value in stops:
                    continue
                out[request].append(value)
                if on_token is not None and request == 0:
                    on_token(value)
                if len(out[request]) < max_new_tokens:
                    going.append(index)
            if not going:
                return out
            if len(going) < len(batch.alive):
                batch.shrink(going)
                token = token[torch.tensor(going, device=token.device)]
            token = draw(batch.decode(token))
            found = token.tolist()


def _sampler(sampling: Sampling | None) -> Callable[[Tensor], Tensor]:
    """logits [B, V] -> token ids [B]."""
    if sampling is None or sampling.temperature <= 0:
        return lambda logits: logits.argmax(dim=-1)
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(logits: Tensor) -> Tensor:
        probabilities = (logits.float() / sampling.temperature).softmax(dim=-1).cpu()
        sorted_p, order = probabilities.sort(dim=-1, descending=True)
        outside = sorted_p.cumsum(dim=-1) - sorted_p >= sampling.top_p  # the first token always stays
        pick = torch.multinomial(sorted_p.masked_fill(outside, 0.0), 1, generator=generator)
        return order.gather(-1, pick)[:, 0].to(logits.device)

    return draw


class TextStream:
    """Turns token ids into text as they come, holding back bytes that do not make a character yet."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        self._tokenizer, self._emit = tokenizer, emit
        self._ids: list[int] = []
        self._start = self._read = 0

    def __call__(self, token: int) -> None:
        self._ids.append(token)
        # Decode a window that starts one emitted piece earlier: tokenizers join tokens in ways that depend on the last.
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            self._emit(after[len(before) :])
            self._start, self._read = self._read, len(self._ids)

    def close(self) -> None:
        """Hand over what is still held back, when no more tokens come."""
        before, after = (self._decode(ids) for ids in (self._ids[self._start : self._read], self._ids[self._start :]))
        if len(after) > len(before):
            self._emit(after[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
