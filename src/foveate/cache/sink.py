"""`sink`: the first tokens of a request and its most recent ones stay in the cache, what lies between is forgotten.

Source: Xiao et al., StreamingLLM (arXiv 2309.17453). Departures: positions stay as they are (StreamingLLM numbers the
tokens of its cache anew, which matters beyond the trained context only); a prompt attends to itself in full; the first
tokens are a row's first real ones, whatever padding stands before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.cache.base import CacheMethod
from foveate.cache.evict import EvictingLayer
from foveate.errors import RecipeError


@dataclass(frozen=True)
class Sink(CacheMethod):
    """first: tokens at the start that stay. window: recent tokens that stay. Size is bounded by their sum."""

    first: int = 4
    window: int = 1020

    name: ClassVar[str] = "sink"
    shown: ClassVar[tuple[str, ...]] = ("window",)
    summary: ClassVar[str] = "the first and the most recent tokens stay in the cache, others are forgotten"
    status: ClassVar[str] = "experimental"
    searched: ClassVar[bool] = False
    evicts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 0:
            raise RecipeError(f"sink: first is {self.first}; give 0 or more tokens")
        if self.window < 1:
            raise RecipeError(f"sink: window is {self.window}; at least the last token has to stay, so give 1 or more")

    def layer(self, index: int) -> CacheLayerMixin:
        return SinkLayer(self.first, self.window)


class SinkLayer(EvictingLayer):
    """See `Sink`."""

    def __init__(self, first: int, window: int) -> None:
        super().__init__()
        self.first, self.window = first, window

    def choose(self) -> Tensor | None:
        held = self.held
        if held <= self.first + self.window:
            return None
        valid = self.valid
        if valid is None:
            valid = torch.ones(len(self.keys), held, dtype=torch.bool, device=self.keys.device)
        return ends(valid, self.first, self.window)


def ends(valid: Tensor, first: int, last: int) -> Tensor:
    """The first and the last tokens of each row: [..., P] bool of tokens that are `valid`."""
    rank = valid.cumsum(-1) - 1
    return valid & ((rank < first) | (rank >= valid.sum(-1, keepdim=True) - last))
