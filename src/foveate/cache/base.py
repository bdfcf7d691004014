"""The cache socket: a method makes the cache of one batch of requests; nothing of it lives on the model.

The cache is a `Cache` of transformers whose layers are ours, so `generate()` takes it as well. Layers hold every token
of the padded batch at its column, so left padding and rows of unequal length need nothing beyond the attention mask.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from foveate.errors import UnsupportedError
from foveate.method import Method

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter
    from foveate.vlm import VLM


@dataclass(frozen=True)
class CacheMethod(Method):
    """A method that stores keys and values in its own way."""

    socket: ClassVar[str] = "cache"
    sites: ClassVar[tuple[str, ...]] = ("cache",)

    @abstractmethod
    def layer(self, index: int) -> CacheLayerMixin:
        """A fresh cache layer for decoder layer `index`."""

    def make(self, adapter: Adapter) -> Cache:
        """The empty cache of one batch. Raises UnsupportedError for decoders with other than full attention."""
        cache = adapter.new_cache()
        for index, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer:
                raise UnsupportedError(
                    f"{self.name} replaces full attention caches; layer {index} of this model has a "
                    f"{type(layer).__name__}. Leave the cache dense"
                )
            cache.layers[index] = self.layer(index)
        return cache

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        self.make(vlm.adapter)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that the layers of `cache` hold, measured from the tensors."""
    tensors = {id(t): t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
