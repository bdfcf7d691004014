"""A plain account of tokens that leave inside the language model: none leaves, its key is masked, nothing is cached."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from foveate.adapters.shape import steps_of
from foveate.rows import pad
from foveate.runtime import Clock, encode, open_batch, select


def rows_of(vlm, requests):
    """The rows of some requests as the language model will see them, before it runs."""
    plans = [vlm.plan(r.to_messages()) for r in requests]
    steps = [steps_of(vlm.reducers(r.reduce), vlm.adapter.shape) for r in requests]
    encoded = encode(vlm.adapter, plans, [vlm.prepare(p) for p in plans], steps)
    return [select(vlm.adapter, *parts) for parts in zip(plans, encoded, steps)]


def decoded(vlm, requests, tokens):
    """(batch, [logits of the prompt, then of each step]): the given tokens [B] are fed in turn."""
    rows = rows_of(vlm, requests)
    batch = open_batch(vlm.adapter, rows, vlm.new_cache(), Clock(vlm.device))
    return batch, [batch.prefill(), *(batch.decode(token) for token in tokens)]


def masked(vlm, request, stages, renumbered, tokens):
    """Logits [V] after the whole prompt of `request` and `tokens`, all computed at once.

    stages: (first layer, original numbers of the visual tokens that are alive) in order. renumbered: whether the gaps
    of each stage are closed. Dropped tokens stay in the sequence, and nobody attends to them.
    """
    adapter = vlm.adapter
    (row,) = rows_of(vlm, [request])
    ids, _, positions, newlines = pad([row], adapter)
    hidden = adapter.embed(ids, row.features, newlines=newlines)["inputs_embeds"]
    if tokens:
        more = adapter.embed(torch.tensor([tokens]), row.features[:0])["inputs_embeds"]
        hidden = torch.cat([hidden, more], dim=1)
        next_positions = row.next_position + torch.arange(len(tokens))
        positions = torch.cat([positions, next_positions.expand(*positions.shape[:-1], -1)], dim=-1)
    n, prompt = hidden.shape[1], len(row)
    place = dict(zip(row.origin.tolist(), row.where.tolist()))
    firsts = [first for first, _ in stages]
    for index, layer in enumerate(adapter.layers):
        stage = max(i for i, first in enumerate(firsts) if first <= index)
        alive = torch.ones(n, dtype=torch.bool)
        gone = set(place) - set(stages[stage][1].tolist())
        alive[[place[number] for number in gone]] = False
        own = positions
        if renumbered and stage > 0 and positions.dim() == 2:
            own = (alive.cumsum(0) - 1).clamp(min=0)[None]
        allowed = torch.ones(n, n, dtype=torch.bool).tril() & alive
        mask = torch.zeros(1, 1, n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
        rotary = adapter.text_model.rotary_emb(hidden, own)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if index < len(row.deep):
            hidden[0, row.where] += row.deep[index]
    assert prompt <= n
    return adapter.head(hidden[:, -1])[0]


def recorded(row):
    """The row with steps that note what they chose: (row, list of (step, reduction))."""
    notes = []

    def noting(step):
        def select(signals, layout):
            notes.append((step, step.select(signals, layout)))
            return notes[-1][1]

        return replace(step, select=select)

    row.steps = tuple(noting(step) for step in row.steps)
    return row, notes


def replayed(vlm, request, notes, tokens):
    """Logits [V] of the prompt and `tokens` in one pass without a cache, every step choosing what it chose before."""
    (row,) = rows_of(vlm, [request])
    more = torch.tensor(tokens, dtype=torch.int64)
    following = row.next_position + torch.arange(len(tokens))
    row.input_ids = torch.cat([row.input_ids, more])
    row.positions = torch.cat([row.positions, following.expand(*row.positions.shape[:-1], -1)], dim=-1)
    row.next_position += len(tokens)
    row.steps = tuple(replace(step, signals=(), select=partial(_again, chosen=chosen)) for step, chosen in notes)
    return open_batch(vlm.adapter, [row], vlm.new_cache(), Clock(vlm.device)).prefill()[0]


def _again(signals, layout, *, chosen):
    return chosen
