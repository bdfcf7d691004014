"""What a vision tower tells reductions: attention, keys, values and states of one block, for every patch.

Attention kernels do not return their map, so queries and keys are caught as the projections give them, and only the
rows that a signal needs are computed. SDPA or flash attention stays on, and no layer runs twice.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.clock import charge
from foveate.errors import UnsupportedError

PATCH_SIGNALS = ("received_attention", "mean_query_attention", "keys", "values", "hidden")
"""Signals of any tower of attention blocks."""
CLS_SIGNALS = ("cls_attention", "cls_logits", "cls_query", "cls_key", "cls_value")
"""Signals of a tower with a CLS token, whose first token it is."""
PER_VIEW = ("cls_query", "cls_key", "cls_value")
"""Signals of CLS itself: one row for each encoded view instead of one for each token."""
OF_PATCHES = {"keys": "key", "values": "value", "hidden": "hidden"}
"""Signals that are states as they are, and their names in `States`."""
HELD = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Attention entries that are held at a time, by kind of device."""
AVERAGED = ("received_attention", "mean_query_attention", "cls_attention")
"""Signals whose heads are averaged when no block is named."""
SAFE = 100.0
"""Largest magnitude of a base-2 logit whose power, and the sum of whose powers, float32 holds without a shift."""


@dataclass(frozen=True)
class Attention:
    """How one block of a tower attends.

    q, k, v: modules whose outputs are the projected states [..., T, heads * d], norms of queries and keys included; one
    and the same module where a single projection gives all three, side by side. out: the projection after attention.
    scale: what the logits are multiplied by.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    heads: int
    scale: float


class Asked(NamedTuple):
    """One signal that a method asks for: its name as asked, what it is, its block, and whether heads are averaged."""

    name: str
    kind: str
    block: int
    averaged: bool


class States(NamedTuple):
    """What was caught of one block, T tokens of n sequences (CLS first where there is one).

    query, key, value: [n, T, heads * d]. hidden: [n, T, C], the block's output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor


def asked(names: Collection[str], offered: Collection[str], num_blocks: int) -> list[Asked]:
    """The tower's signals among `names`: "keys@-2" is of the last block but one that is used, "keys" of the last.

    AVERAGED ones without a block are averaged over heads. Raises UnsupportedError for a
    block that there is not.
    """
    found = []
    for name in names:
        kind, _, block = name.partition("@")
        if kind not in offered or kind not in (*PATCH_SIGNALS, *CLS_SIGNALS):
            continue
        index = int(block) if block else -1
        if not -num_blocks <= index < num_blocks:
            raise UnsupportedError(
                f"signal {name!r} asks for encoder block {index}, the tower uses {num_blocks}: give 0 to "
                f"{num_blocks - 1}, or -1 for the last"
            )
        found.append(Asked(name, kind, index % num_blocks, not block and kind in AVERAGED))
    return found


def measure(kind: str, states: States, heads: int, scale: float, cls: bool) -> Tensor:
    """A signal of one block, float32: [n, P, ...] for patches, [n, heads * d] for those of CLS itself.

    cls_attention, cls_logits, mean_query_attention, received_attention: [n, P, heads]. cls_attention is softmaxed over
    CLS and patches, as the tower does, and CLS itself is left out then; mean_query_attention is the same for the mean
    of the patches' queries; received_attention is the mean over all queries, CLS among them.
    """
    first = 1 if cls else 0
    if kind in OF_PATCHES:
        return getattr(states, OF_PATCHES[kind])[:, first:].float()
    if kind in PER_VIEW:
        return getattr(states, kind.removeprefix("cls_"))[:, 0].float()
    if kind == "received_attention":
        return received(states.query, states.key, heads, scale)[:, first:]
    if kind == "mean_query_attention":
        return mean_query_attention(states.query[:, first:], states.key, heads, scale)[:, first:]
    logits = row_logits(states.query[:, :1], states.key, heads, scale)
    return (logits.softmax(dim=1) if kind == "cls_attention" else logits)[:, 1:]


def mean_query_attention(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Attention [n, T, heads] float32 that the mean of the queries [n, P, heads * d] pays the keys [n, T, ...]."""
    mean = query.mean(dim=1, keepdim=True, dtype=torch.float32).to(key.dtype)
    return row_logits(mean, key, heads, scale).softmax(dim=1)


def row_logits(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Logits [n, T, heads] float32 of one query [n, 1, heads * d] a sequence over its keys [n, T, heads * d]."""
    query, key = (x.unflatten(-1, (heads, -1)) for x in (query, key))
    # one sequence after the other, in place: for a single row the product and its sum are faster than a matrix product
    found = [own.to(torch.float32, copy=True).mul_(row.float()).sum(dim=-1) for row, own in zip(query, key)]
    return torch.stack(found) * scale


def received(query: Tensor, key: Tensor, heads: int, scale: float, limit: int | None = None) -> Tensor:
    """How much attention each token receives in each head: mean over queries of softmax(q k^T * scale).

    query, key: [n, T, heads * d]. Returns [n, T, heads] float32; each head of a sequence sums to 1.
    limit: attention entries held at a time (None: as many as suit the device), which bounds the memory; a CPU is five
    times faster when they fit its caches. Powers of two are taken, which a CPU has twice as fast as those of e, and
    rows are shifted by their largest logit only where norms do not rule out an overflow.
    """
    n, tokens, _ = query.shape
    limit = limit or HELD.get(query.device.type, HELD["cuda"])
    query = query * (scale * math.log2(math.e))
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for x in (query, key))  # [n * heads, T, d]
    shifted = bool(q.norm(dim=-1).amax() * k.norm(dim=-1).amax() > SAFE) if tokens else False
    total = torch.zeros(n * heads, tokens, device=query.device)
    rows = max(1, min(tokens, limit // max(1, tokens)))
    step = max(1, limit // max(1, tokens * rows))
    held = torch.empty(step * rows * tokens, device=query.device)
    for start in range(0, n * heads, step):
        keys = k[start : start + step].transpose(-1, -2)
        for row in range(0, tokens, rows):
            some = q[start : start + step, row : row + rows]
            logits = held[: some.shape[0] * some.shape[1] * tokens].view(*some.shape[:2], tokens).copy_(some @ keys)
            if shifted:
                logits -= logits.amax(dim=-1, keepdim=True)
            powers = torch.exp2(logits, out=logits)
            shares = powers.sum(dim=-1).reciprocal_()
            total[start : start + step] += (shares[:, None] @ powers)[:, 0]
    return (total / tokens).view(n, heads, tokens).transpose(1, 2)


def run_blocks(
    blocks: Sequence[nn.Module],
    hidden: Tensor,
    run: Callable[[nn.Module, Tensor], Tensor],
    wanted: Sequence[Asked],
    attention_of: Callable[[nn.Module], Attention],
    cls: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The states [n, T, C] after the last block, and the wanted signals by the names they were asked under."""
    found: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        here = [ask for ask in wanted if ask.block == index]
        if not here:
            hidden = run(block, hidden)
            continue
        facts = attention_of(block)
        with capture({"q": facts.q, "k": facts.k, "v": facts.v}) as seen:
            hidden = run(block, hidden)
        states = States(seen["q"][0], seen["k"][0], seen["v"][0], hidden)
        for ask in here:
            with charge("select", ask.name):
                value = measure(ask.kind, states, facts.heads, facts.scale, cls)
                found[ask.name] = value.mean(dim=-1) if ask.averaged else value
    return hidden, found


@contextmanager
def capture(modules: dict[str, nn.Module], with_inputs: bool = False) -> Iterator[dict[str, list[Any]]]:
    """Collect the outputs of `modules` in this thread while the block runs: name -> one entry per call.

    with_inputs: entries are (keyword arguments, output). Other threads' requests pass through untouched, and the hooks
    go whatever happens.
    """
    owner, found = threading.get_ident(), {name: [] for name in modules}

    def hook(name: str) -> Any:
        def collect(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() == owner:
                found[name].append((kwargs, output) if with_inputs else output)

        return collect

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
