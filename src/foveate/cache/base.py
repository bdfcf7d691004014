"""The cache socket: a method makes the cache of one batch of requests; nothing of it lives on the model.

The cache is a `Cache` of transformers whose layers are ours, so `generate()` takes it as well. What a layer has to know
beyond keys and values (padding, rotary angles, queries) it is told by `foveate.adapters.attention`. Layers may hold
different numbers of tokens: each reports its own length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from foveate.adapters.attention import observe
from foveate.cache.ragged import Ragged
from foveate.cache.store import Store
from foveate.errors import RecipeError, UnsupportedError
from foveate.method import Method

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter
    from foveate.vlm import VLM

PROBE = 1024
"""Tokens put into a cache to measure its bytes, so many that windows and scales have their share of a long prompt."""


@dataclass(frozen=True)
class CacheMethod(Method):
    """A method that stores keys and values in its own way. evicts: whether it forgets tokens."""

    socket: ClassVar[str] = "cache"
    evicts: ClassVar[bool] = False
    sites: ClassVar[tuple[str, ...]] = ("cache",)

    @abstractmethod
    def layer(self, index: int) -> CacheLayerMixin:
        """A fresh cache layer for decoder layer `index`."""

    def layers(self, count: int) -> list[CacheLayerMixin]:
        """The layers of one cache; a method whose layers share something makes them here."""
        return [self.layer(index) for index in range(count)]

    def check_heads(self, width: int) -> None:
        """Raise RecipeError if heads of `width` channels do not fit the parameters."""

    def make(self, adapter: Adapter) -> Cache:
        """The empty cache of one batch. Raises UnsupportedError for decoders with other than full attention."""
        cache = adapter.new_cache()
        for index, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer:
                raise UnsupportedError(
                    f"{self.name} replaces full attention caches; layer {index} of this model has a "
                    f"{type(layer).__name__}. Leave the cache dense"
                )
        cache.layers = self.layers(len(cache.layers))
        observe(adapter.layers)
        return cache

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        self.check_heads(head_width(vlm.adapter.text_config))
        self.make(vlm.adapter)


def head_width(config: Any) -> int:
    """Channels of one head, from a language model's config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_group(name: str, group: int, width: int) -> None:
    """Raise RecipeError if groups of `group` channels do not fill heads of `width`."""
    if width % group:
        fits = max(g for g in range(1, min(group, width) + 1) if width % g == 0)
        raise RecipeError(f"{name}: group={group} does not divide the {width} channels of a head; use group={fits}")


def cache_bytes(cache: Cache) -> int:
    """Bytes of the memory behind all tensors that the layers of `cache` hold, each piece counted once."""
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors(layer):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bytes_per_token(cache: Cache, heads: int, width: int, dtype: torch.dtype) -> float:
    """Bytes that one token of one request takes, measured on `cache` after PROBE tokens of normal noise went in."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, heads, PROBE, width, generator=generator).to(dtype)
    for layer in cache.layers:
        if hasattr(layer, "stand_in"):  # what the layer would be told by a model
            layer.stand_in(keys)
        layer.update(keys.clone(), values.clone())
    return cache_bytes(cache) / PROBE


def _tensors(holder: Any) -> Iterator[torch.Tensor]:
    """Tensors in attributes, and in the stores, codecs, lists and dicts among them."""
    if isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, Ragged):
        yield from holder.tensors()
    elif isinstance(holder, dict):
        for value in holder.values():
            yield from _tensors(value)
    elif isinstance(holder, (list, tuple)):
        for value in holder:
            yield from _tensors(value)
    elif isinstance(holder, (CacheLayerMixin, Store)) or type(holder).__module__.startswith("foveate.cache."):
        yield from _tensors(vars(holder))
