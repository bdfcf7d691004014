"""Decoder layers of the Llama kind (Llama, Mistral, Qwen2, Qwen3 and what is built on them), seen from outside.

What the runtime needs to run them one by one with rows of tokens that differ in length: the projections of chosen
rows, rotary embedding, masks in the form that each attention backend takes, and a cache that shows a layer's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import UnsupportedError

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine [..., L, d] of the rotary embedding."""


def attention_kinds(config: Any) -> set[str]:
    """What the decoder layers of a text config attend to: {"full_attention"} where every token sees all before it."""
    known = getattr(config, "layer_types", None)
    if known:
        return set(known)
    return {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}


def check_layers(layers: nn.ModuleList, config: Any, method: str) -> None:
    """Raise UnsupportedError when tokens cannot leave between these layers."""
    kinds = attention_kinds(config)
    if kinds != {"full_attention"}:
        raise UnsupportedError(
            f"{method} drops tokens inside the language model, which needs full attention in every layer; this one has "
            f"{', '.join(sorted(kinds - {'full_attention'}))}. Use a method at site 'post_projector', such as "
            f"'uniform' or 'divprune'"
        )
    for name in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        module: Any = layers[0]
        for part in name.split("."):
            module = getattr(module, part, None)
        if module is None:
            raise UnsupportedError(
                f"{method} acts inside the language model, whose layers have no {name}; use a method at site "
                f"'post_projector', such as 'uniform' or 'divprune'"
            )


def project(layer: nn.Module, kind: str, states: Tensor, rotary: Rotary | None) -> Tensor:
    """Queries, keys or values ("q", "k", "v") of a layer for the states that enter it. [R, D] -> [heads, R, d].

    rotary: of these rows; queries and keys come out after it. States go through the layer's own first norm.
    """
    attention: Any = layer.self_attn
    out = getattr(attention, f"{kind}_proj")(layer.input_layernorm(states))
    out = out.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{kind}_norm", None)
    if norm is not None:  # Qwen3 normalises each head
        out = norm(out)
    out = out.transpose(-2, -3)
    return out if rotary is None else rotate(out, rotary)


def rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """[heads, R, d] with the rotary embedding of rows [R, d] applied, halves paired as in Llama."""
    cos, sin = rotary
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return states * cos + turned * sin


def scale_of(layer: nn.Module) -> float:
    """What attention logits of a layer are multiplied by."""
    attention: Any = layer.self_attn
    return float(getattr(attention, "scaling", attention.head_dim**-0.5))


def attention_mask(real: Tensor | None, new: int, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The mask that a decoder layer takes: the last `new` of T columns attend, causally, to the real ones.

    real: [B, T] bool, False where a column is padding; None: all are real. The form follows the attention backend:
    None or bool for SDPA, additive for eager attention, the padding mask itself for flash attention.
    """
    kind = getattr(config, "_attn_implementation", None) or "eager"
    if kind == "sdpa" and real is None:
        return None  # the kernel masks causally by itself
    if kind.startswith(("flash", "kernels")):
        return None if real is None else real.long()
    if kind not in ("sdpa", "eager"):
        raise UnsupportedError(f"attention {kind!r} cannot run rows of unequal length; load the model with attn='sdpa'")
    if real is None:
        if new > 1:
            allowed = torch.ones(new, new, dtype=torch.bool, device=device).tril()[None, None]
        else:
            return None
    else:
        total = real.shape[1]
        rows = torch.arange(total - new, total, device=device)
        allowed = (torch.arange(total, device=device) <= rows[:, None]) & real[:, None, None, :]
    if kind == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)


def thinned(
    layer: nn.Module,
    hidden: Tensor,
    real: Tensor | None,
    rotary: Rotary,
    cache: Any,
    index: int,
    thin: Sequence[Any],
    columns: Sequence[Tensor],
) -> Tensor:
    """A decoder layer in which some rows leave parts out. Returns the new states [B, L, D].

    thin: for each row a `reduce.base.Compute`, or None. columns: for each row the cached columns of its visual tokens;
    while L = 1 they lie before the new token. real: as `attention_mask`.
    """
    attention: Any = layer.self_attn
    normed = layer.input_layernorm(hidden)

    def heads(kind: str) -> Tensor:
        states = getattr(attention, f"{kind}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{kind}_norm", None)
        return (states if norm is None else norm(states)).transpose(1, 2)

    around = (rotary[0][:, None], rotary[1][:, None])
    query = rotate(heads("q"), around)
    keys, values = cache.update(rotate(heads("k"), around), heads("v"), index)
    new, total = hidden.shape[1], keys.shape[2]
    prompt = new == total
    causal = torch.ones(new, total, dtype=torch.bool, device=hidden.device).tril(total - new)
    allowed = causal.expand(len(hidden), 1, new, total)
    if real is not None:
        allowed = allowed & real[:, None, None, :]
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    allowed = allowed.clone()
    for b, part in enumerate(thin):
        if part is None:
            continue
        visual = columns[b].to(hidden.device)
        if part.window is not None and prompt:
            allowed[b, 0, visual[:, None], visual] = part.window.to(hidden.device)
        if part.seen is not None:
            gone = (~part.seen).nonzero().flatten().to(hidden.device)
            values[b, gone[:, None], visual] = 0
    out = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, scale=scale_of(layer))
    for b, part in enumerate(thin):
        if part is not None and part.written is not None and prompt:
            gone = (~part.written).nonzero().flatten().to(hidden.device)
            out[b, gone[:, None], columns[b].to(hidden.device)] = 0
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
    normed = layer.post_attention_layernorm(hidden)
    narrow = [part is not None and part.channels < 1 and prompt for part in thin]
    if not any(narrow):
        return hidden + layer.mlp(normed)
    inner = torch.empty_like(hidden)
    for b, part in enumerate(thin):
        if not narrow[b]:
            inner[b] = layer.mlp(normed[b])
            continue
        whole = torch.ones(new, dtype=torch.bool, device=hidden.device)
        whole[columns[b].to(hidden.device)] = False
        inner[b, whole] = layer.mlp(normed[b, whole])
        inner[b, ~whole] = _narrow_mlp(layer.mlp, normed[b, ~whole], part.channels)
    return hidden + inner


def _narrow_mlp(mlp: Any, states: Tensor, share: float) -> Tensor:
    """A gated MLP with the first `share` of its inner channels. [N, D] -> [N, D]. Plain layers compute no others."""
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if all(type(one) is nn.Linear for one in layers):
        gate, up, down = layers
        kept = max(1, int(gate.out_features * share))
        gated, raised = (
            nn.functional.linear(states, one.weight[:kept], None if one.bias is None else one.bias[:kept])
            for one in (gate, up)
        )
        return nn.functional.linear(mlp.act_fn(gated) * raised, down.weight[:, :kept], down.bias)
    inner = mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states)
    inner[:, max(1, int(inner.shape[1] * share)) :] = 0
    return mlp.down_proj(inner)


class Recorder:
    """Stands in for a cache, and keeps what the attention of each watched layer saw: index -> (keys, values)."""

    def __init__(self, cache: Any, watched: set[int]) -> None:
        self._cache, self._watched = cache, watched
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As Cache.update; [B, heads, T, d] each."""
        full = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        if layer_idx in self._watched:
            self.seen[layer_idx] = full
        return full

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
