"""How a batch of requests runs: encode, select, pack, prefill, decode. No method and no model family is named here.

All state of a request lives in the objects of this module and in its cache, never on a module of the model.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.errors import BudgetError
from foveate.method import signal_for

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter, Encoded
    from foveate.adapters.layout import VisualLayout
    from foveate.data.execute import Inputs
    from foveate.data.plan import Plan
    from foveate.reduce.base import Reducer, Reduction

STAGES = ("preprocess", "encode", "select", "prefill", "decode")


class Clock:
    """Milliseconds per stage, with the device's queue drained at each boundary."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ms = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.ms[name] += (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; else sample from the smallest set of tokens whose probability reaches top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Row:
    """One request as the language model will see it, on the CPU but for its features.

    input_ids: [L'] with a placeholder per feature; features: [K, D]; positions: [L'] or [3, L'] position ids;
    next_position: of the first generated token.
    """

    input_ids: Tensor
    features: Tensor
    positions: Tensor
    next_position: int
    visual: int
    kept: int
    reduction: Reduction | None = None
    layout: VisualLayout | None = None

    @property
    def text(self) -> int:
        """Tokens that are not visual features."""
        return len(self.input_ids) - self.kept


def request_key(inputs: Inputs) -> int:
    """A checksum of a request's prompt and pixels: the same alone, in a batch, and in another process."""
    key = zlib.crc32(inputs.input_ids.numpy().tobytes())
    for squares in (inputs.views, inputs.frames):
        if squares is not None:
            key = zlib.crc32(squares.tobytes(), key)
    return key


def encode(
    adapter: Adapter, plans: Sequence[Plan], inputs: Sequence[Inputs], reducers: Sequence[Sequence[Reducer]]
) -> list[Encoded]:
    """Visual features of each request, with the signals that its own reducers need."""
    wanted = {
        name
        for methods in reducers
        for method in methods
        for need in method.signals
        if (name := signal_for(need, adapter.signals))
    }
    encoded = adapter.encode(inputs, plans, wanted)
    for part, source in zip(encoded, inputs):
        if "features" in wanted:
            part.signals["features"] = part.features
        if "request_key" in wanted:
            part.signals["request_key"] = torch.tensor(request_key(source))
    return encoded


def select(adapter: Adapter, plan: Plan, encoded: Encoded, reducers: Sequence[Reducer]) -> Row:
    """Apply the reducers of one request: drop tokens from the prompt, cut or merge the features, set positions."""
    ids = torch.as_tensor(plan.input_ids)
    positions = adapter.positions(plan)
    total = encoded.features.shape[0]
    next_position = int(positions.max()) + 1
    row = Row(ids, encoded.features, positions, next_position, total, total)
    if not reducers or not total:
        return row
    layout = row.layout = adapter.layout(plan).features()
    (reducer,) = reducers  # one reducer a site: Recipe.check and VLM see to it
    reduction = row.reduction = reducer.select(encoded.signals, layout)
    stays = torch.ones(len(ids), dtype=torch.bool)
    stays[layout.position] = False
    stays[layout.position[reduction.keep]] = True
    row.features = reduction.apply(encoded.features)
    row.kept = row.features.shape[0]
    # A method may hand its tokens over in another order: they then fill the kept places in that order, and bring
    # their own positions along.
    order = torch.arange(len(ids))
    order[layout.position[reduction.keep].sort().values] = layout.position[reduction.keep]
    row.input_ids = ids[stays]
    row.positions = positions[..., order[stays]]
    if reducer.position == "renumber":
        if positions.dim() == 1:
            row.positions = torch.arange(len(row.input_ids))
        row.next_position = int(row.positions.max()) + 1
    return row


def check_context(rows: Sequence[Row], adapter: Adapter, max_new_tokens: int) -> None:
    """Raise BudgetError when a prompt and its answer do not fit the language model."""
    limit = adapter.max_context
    longest = max(rows, key=lambda row: len(row.input_ids))
    length = len(longest.input_ids)
    if length + max_new_tokens > limit:
        raise BudgetError(
            f"the prompt has {length} tokens ({longest.kept} visual) and {max_new_tokens} new ones are asked for, the "
            f"model takes {limit}; use fewer pictures or frames, a smaller --max-new-tokens, or --reduce"
        )


@dataclass
class Batch:
    """What grows or shrinks from step to step.

    mask: [B, cached], or None when nothing is padded. position: of the next token, [B, 1] or [3, B, 1]. alive: the
    requests that the rows belong to.
    """

    mask: Tensor | None
    position: Tensor
    alive: list[int]


def prefill(adapter: Adapter, rows: Sequence[Row], cache: Any) -> tuple[Tensor, Batch]:
    """Run the prompts through the language model: next-token logits [B, V] float32, and the batch for `generate`."""
    device = adapter.model.device
    ids, mask, positions = pad(rows, adapter)
    mask = None if mask is None else mask.to(device)
    prompt = adapter.embed(ids.to(device), torch.cat([row.features for row in rows if row.kept] or [rows[0].features]))
    logits = adapter.forward(**prompt, attention_mask=mask, position_ids=positions.to(device), past_key_values=cache)
    following = torch.tensor([row.next_position for row in rows], device=device)[:, None]
    return logits, Batch(mask, following.expand(*positions.shape[:-1], 1), list(range(len(rows))))


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
) -> list[list[int]]:
    """New token ids of each row, without the stop token. Rows are padded on the left; a finished row leaves the batch.

    on_token: called with each token of the first row as it comes.
    """
    stops = set(stop)
    out: list[list[int]] = [[] for _ in rows]
    draw = _sampler(sampling)
    with clock.stage("prefill"):
        logits, batch = prefill(adapter, rows, cache)
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
                token = _shrink(batch, cache, token, going)
            if batch.mask is not None:
                batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(token), 1)], dim=1)
            logits = adapter.forward(
                input_ids=token[:, None], attention_mask=batch.mask, position_ids=batch.position, past_key_values=cache
            )
            batch.position = batch.position + 1
            token = draw(logits)
            found = token.tolist()


def pad(rows: Sequence[Row], adapter: Adapter) -> tuple[Tensor, Tensor | None, Tensor]:
    """Left-padded ids [B, L], mask [B, L] (None when nothing is padded) and position ids [B, L] or [3, B, L]."""
    length = max(len(row.input_ids) for row in rows)
    fill = _padding_id(adapter)
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    lead = rows[0].positions.shape[:-1]
    positions = torch.zeros(*lead, len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        start = length - len(row.input_ids)
        ids[index, start:] = row.input_ids
        mask[index, start:] = 1
        positions[..., index, start:] = row.positions
    return ids, None if bool(mask.all()) else mask, positions


def _padding_id(adapter: Adapter) -> int:
    """An id for padding that is no placeholder."""
    fill = getattr(adapter.tokenizer, "pad_token_id", None)
    return next(i for i in (fill, 0, 1, 2) if i is not None and i not in adapter.placeholders)


def _shrink(batch: Batch, cache: Any, token: Tensor, going: list[int]) -> Tensor:
    index = torch.tensor(going, device=token.device)
    cache.batch_select_indices(index)
    batch.alive = [batch.alive[i] for i in going]
    batch.mask = None if batch.mask is None else batch.mask[index]
    batch.position = batch.position[..., index, :]
    return token[index]


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
