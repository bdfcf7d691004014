"""Tiny random decoders of transformers, and loops that feed them token by token."""

from __future__ import annotations

import functools

import torch
from transformers import AutoModelForCausalLM, GlmConfig, LlamaConfig, Qwen2Config, Qwen3Config

from foveate.recipe import Recipe

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "glm": GlmConfig}
PROMPT = 30


class Host:
    """The part of an adapter that `CacheMethod.make` needs."""

    def __init__(self, model):
        self.layers = model.model.layers
        self._config = model.config

    def new_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self._config)


@functools.cache
def decoder(family="llama", attn="sdpa", dtype=torch.float64):
    """2 layers, 4 heads of 8 channels, 2 of keys; weights large enough for attention that is far from even.

    In float64: codes are discontinuous, and the rounding of a float32 batch turns a few of them over.
    """
    torch.manual_seed(0)
    config = CONFIGS[family](
        vocab_size=48,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.25,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        attn_implementation=attn,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


def method(text):
    (found,) = Recipe.parse(text)
    return found


def cache_of(model, method):
    return method.make(Host(model))


def positions_of(mask):
    """Position ids [B, L] of a padded prompt."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def prompt(pads):
    """Ids and mask [B, PROMPT], row b with pads[b] columns of padding on the left."""
    ids = torch.randint(1, 48, (len(pads), PROMPT), generator=torch.Generator().manual_seed(7))
    mask = (torch.arange(PROMPT) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def steps(model, cache, ids, mask, count=14, grown=False):
    """(logits [B, 1 + count, V] of the prompt's last token and of `count` fixed ones, the cache or the grown mask)."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = positions_of(mask)
    tokens = torch.randint(1, model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(1))
    out = [model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]]
    for index, token in enumerate(tokens):
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        now = positions[:, -1:] + 1 + index
        feed = token.expand(len(ids), 1)
        out.append(model(input_ids=feed, attention_mask=mask, position_ids=now, past_key_values=cache).logits[:, -1])
    return torch.stack(out, dim=1), mask if grown else cache


@torch.no_grad()
def greedy(model, cache, ids, mask, count):
    """New ids [B, count] by the plain loop."""
    positions = positions_of(mask)
    feed, out = ids, []
    for _ in range(count):
        logits = model(input_ids=feed, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        feed = logits[:, -1].argmax(-1, keepdim=True)
        out.append(feed)
        mask, positions = torch.cat([mask, mask.new_ones(len(ids), 1)], 1), positions[:, -1:] + 1
    return torch.cat(out, dim=1)
