"""What a step inside the language model is told: rows of attention, states, keys and values around one layer.

Attention rows are computed from the queries of the rows that are asked for and all keys, so the model keeps its fast
attention and no layer runs twice. A step at layer k sees layer k-1 as it ran, and layer k by its own projections:

    last_attention         [H, N]     row of the last prompt token in layer k-1, over the visual tokens
    text_attention         [H, Q, N]  rows of the text tokens that follow the first visual one, in layer k-1
    mean_text_attention    [H, N]     mean over the rows of text_attention
    visual_attention       [H, N]     mean over the rows of the visual tokens, in layer k-1
    next_last_attention, next_text_attention, next_visual_attention: the same with the projections of layer k
    last_value_attention   [H, N]     softmax over the visual tokens of v_last . v_visual / sqrt(d), layer k-1
    hidden                 [N, D]     states of the visual tokens that enter layer k
    text_hidden            [Q, D]     states of those text tokens
    keys, values           [N, heads, d]  of layer k-1, keys after the rotary embedding
    next_keys, next_values [N, heads, d]  of layer k
    text_prior             [Q, N]     what the rotary embedding alone makes of a query and a key of ones, / sqrt(d)
    text_input             [Q, D]     embeddings of the text tokens that entered the language model
    visual_input           [N0, D]    features of all visual tokens that entered it
    entered, length        scalars    visual tokens that entered the language model; tokens of the request now
    request_key            scalar     checksum of prompt and pixels

All attention is post-softmax over the whole causal row. Everything is float32 on the model's device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foveate.adapters.decoder import Rotary, project, rotate, scale_of
from foveate.adapters.tower import HELD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass
class LayerView:
    """One request at the input of layer k, without padding: n tokens, N of them visual.

    before, layer: layers k-1 and k. entered, rotary: states [n, D] that entered layer k-1, with their cosine and sine.
    keys, values: [heads, n, d] that its attention saw. hidden: at the input of layer k. visual: [N] places of visual
    tokens; text: [Q] places of the text after the first of them. given: signals known beforehand. While decoding,
    entered and hidden are the one new token's [1, D], and `place` is its place among the n keys.
    """

    before: nn.Module
    layer: nn.Module
    entered: Tensor
    rotary: Rotary
    keys: Tensor
    values: Tensor
    hidden: Tensor
    visual: Tensor
    text: Tensor
    given: dict[str, Tensor] = field(default_factory=dict)
    place: int | None = None

    def signals(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The signals by name; each is made when it is first read, since a step may not need all that it asks for."""
        return _Signals(names, self._signal)

    def _signal(self, name: str) -> Tensor:
        if name in self.given:
            return self.given[name]
        if name == "hidden":
            return self.hidden[self.visual].float()
        if name == "text_hidden":
            return self.hidden[self.text].float()
        if name in ("keys", "values"):
            states = self.keys if name == "keys" else self.values
            return states[:, self.visual].transpose(0, 1).float()
        if name in ("next_keys", "next_values"):
            return self._next(name[5])[:, self.visual].transpose(0, 1).float()
        if name == "last_value_attention":
            values = self.values.float()
            last, seen = values[:, -1:], values[:, self.visual]
            groups = self.before.self_attn.config.num_attention_heads // len(values)
            logits = (last @ seen.transpose(-1, -2))[:, 0] / values.shape[-1] ** 0.5
            return logits.softmax(dim=-1).repeat_interleave(groups, dim=0)
        if name == "length":
            return torch.tensor(len(self.hidden))
        if name == "text_prior":
            ones = torch.ones_like(self.rotary[0])
            turned = rotate(ones, self.rotary).float()
            return turned[self.text] @ turned[self.visual].T / ones.shape[-1] ** 0.5
        following = name.startswith("next_")
        rows = name.removeprefix("next_").removesuffix("_attention")
        if rows in ("visual", "mean_text"):
            return self._mean_attention(self.visual if rows == "visual" else self.text, following)
        found = self._attention(self.text if rows == "text" else self._last(), following)
        return found if rows == "text" else found[:, 0]

    def _last(self) -> Tensor:
        return torch.tensor([len(self.hidden) - 1], device=self.hidden.device)

    def _next(self, kind: str) -> Tensor:
        return project(self.layer, kind, self.hidden, None if kind == "v" else self.rotary)

    def _attention(self, places: Tensor, following: bool) -> Tensor:
        """[H, R, N] of these rows over the visual tokens."""
        layer, states = (self.layer, self.hidden) if following else (self.before, self.entered)
        cos, sin = self.rotary
        keys = self._next("k") if following else self.keys
        query = project(layer, "q", states[places], (cos[places], sin[places])).float()  # [H, R, d]
        at = places if self.place is None else torch.full_like(places, self.place)
        return attention_rows(query, keys.float(), at, scale_of(layer))[..., self.visual]

    def _mean_attention(self, places: Tensor, following: bool) -> Tensor:
        """[H, N] mean over the rows of these places, ascending, of their attention over the visual tokens.

        With many rows their products are what costs: they are made in the model's dtype, as its own attention does.
        """
        layer, states = (self.layer, self.hidden) if following else (self.before, self.entered)
        cos, sin = self.rotary
        keys = self._next("k") if following else self.keys
        query = project(layer, "q", states.index_select(0, places), (cos[places], sin[places]))  # [H, R, d]
        query = query * scale_of(layer)
        size = max(1, HELD.get(query.device.type, HELD["cuda"]) // (len(query) * len(self.hidden)))
        total = torch.zeros(len(query), len(self.hidden), device=query.device)
        for rows, at in zip(query.split(size, dim=1), places.split(size)):
            end = int(at[-1]) + 1  # later keys are masked in all of these rows
            total[:, :end] += attention_rows(rows, keys[:, :end], at, 1.0).sum(dim=1)
        return total[:, self.visual] / len(places)


class _Signals(dict[str, Tensor]):
    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._names, self._make = frozenset(names), make

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __missing__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        value = self[name] = self._make(name)
        return value


def attention_rows(query: Tensor, keys: Tensor, places: Tensor, scale: float) -> Tensor:
    """Causal post-softmax attention [H, R, n] of queries [H, R, d] at `places` [R] over keys [heads, n, d].

    Query heads may be a multiple of key heads (grouped queries): each key head then serves neighbouring query heads.
    """
    heads, count = keys.shape[0], query.shape[1]
    grouped = (query * scale if scale != 1 else query).unflatten(0, (heads, -1)).flatten(1, 2)  # [heads, G * R, d]
    logits = (grouped @ keys.transpose(-1, -2)).float().unflatten(1, (-1, count)).flatten(0, 1)
    first = int(places.min()) + 1  # from here on some row does not see a key
    if first < keys.shape[1]:
        future = torch.arange(first, keys.shape[1], device=keys.device) > places[:, None]
        logits[..., first:].masked_fill_(future, float("-inf"))
    return logits.softmax(dim=-1)
