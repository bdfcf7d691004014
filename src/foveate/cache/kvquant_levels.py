"""Bounds and levels of `kvquant`: fitted to keys and values, and kept in a safetensors file.

Official code: SqueezeAILab/KVQuant @ 57a2383, which fits on 16 texts of 2048 tokens with each value weighted by its
squared gradient of the loss on the text. `calibrate` does so with `weighted`, on the text of the prompts; images are
seen, but not predicted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from foveate.adapters.attention import Pass, unrotate
from foveate.cache import nuq
from foveate.cache.base import CacheMethod
from foveate.disk import plain_errors
from foveate.errors import CheckpointError, InputError, RecipeError, UnsupportedError
from foveate.files import save_tensors

if TYPE_CHECKING:
    from transformers import Cache

    from foveate.adapters.base import Adapter
    from foveate.cache.kvquant import KVQuant
    from foveate.vlm import VLM


IN_CHECKPOINT = "kvquant-levels.json"
"""The levels' file in a checkpoint's folder."""


@dataclass(frozen=True)
class LayerLevels:
    """Of one decoder layer. key_upper, key_lower: [C] bounds of the keys' channels, all heads, before the rotary
    embedding. key_levels, value_levels: [2**bits] in -1 .. 1, ascending; *_read: what codes are read as (Q-Norm)."""

    key_upper: Tensor
    key_lower: Tensor
    key_levels: Tensor
    key_read: Tensor
    value_levels: Tensor
    value_read: Tensor

    @staticmethod
    def fit_keys(
        keys: Tensor, bits: int, outliers: float, q_norm: bool = False, weights: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Upper and lower bounds [C], levels and reading levels [2**bits], from keys [T, C] float32."""
        if not len(keys):
            zero, levels = keys.new_zeros(keys.shape[1]), torch.linspace(-1, 1, 2**bits, device=keys.device)
            return zero, zero, levels, levels
        upper, lower = nuq.key_range(keys, outliers)
        levels = read = nuq.fit_levels(keys, upper, lower, bits, weights)
        if q_norm:
            found = nuq.key_outliers(keys, upper, lower)
            read = nuq.match_moments(keys, found, *nuq.scale_and_shift(upper, lower), levels)
        return upper[0], lower[0], levels, read

    @staticmethod
    def fit_values(
        values: Tensor, bits: int, outliers: float, q_norm: bool = False, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Levels and reading levels [2**bits] from values [T, C] float32."""
        upper, lower = (nuq.quantile(values, q) for q in (nuq.tails(outliers), 1 - nuq.tails(outliers)))
        levels = read = nuq.fit_levels(values, upper, lower, bits, weights)
        if q_norm and len(values):
            found, upper, lower = nuq.value_range(values, outliers)
            read = nuq.match_moments(values, found, *nuq.scale_and_shift(upper, lower), levels)
        return levels, read

    def keys(self, device: torch.device) -> tuple[Tensor, ...]:
        """key_upper, key_lower, key_levels, key_read on `device`."""
        return tuple(part.to(device) for part in (self.key_upper, self.key_lower, self.key_levels, self.key_read))

    def values(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """value_levels, value_read on `device`."""
        return self.value_levels.to(device), self.value_read.to(device)

    def check_width(self, channels: int) -> None:
        """Raise RecipeError if these are bounds of another number of channels."""
        if len(self.key_upper) != channels:
            raise RecipeError(
                f"kvquant: the levels' file is for keys of {len(self.key_upper)} channels, this model has {channels}; "
                "calibrate on this model"
            )


def calibrate(
    method: KVQuant, vlm: VLM, requests: Sequence[Any], path: str | Path, *, weighted: bool = False
) -> list[LayerLevels]:
    """Fit bounds and levels to the prompts of `requests`, write them to the safetensors file `path`, and return them.

    Use the file by `kvquant(bits=..., file="...")`. Keys and values of all prompts are held, in float32. weighted: each
    value counts by its squared gradient of the loss on the prompts' text (twice the memory, a backward pass; reductions
    of the recipe are left out). Raises InputError without requests, UnsupportedError for a model without `k_proj`
    (weighted), CheckpointError if the file cannot be written.
    """
    if not requests:
        raise InputError("kvquant: no requests to calibrate on; give some that are like those to come")
    found = []
    for parts in (_weighed if weighted else _plain)(vlm, requests):
        keys, values, *weights = (torch.cat([part[method.exact :] for part in each]) for each in zip(*parts))
        how = method.bits, method.outliers, method.q_norm
        by_key, by_value = weights or (None, None)
        fitted = (*LayerLevels.fit_keys(keys, *how, by_key), *LayerLevels.fit_values(values, *how, by_value))
        found.append(LayerLevels(*fitted))
    tensors = {f"{i}.{f.name}": getattr(layer, f.name).clone() for i, layer in enumerate(found) for f in fields(layer)}
    with plain_errors(path, Path(path).parent, "nothing was changed"):
        save_tensors(Path(path), tensors, {"bits": str(method.bits)})
    return found


def _plain(vlm: VLM, requests: Sequence[Any]) -> list[tuple[tuple[Tensor, ...], ...]]:
    """For each layer and request keys before the rotary embedding, and values: [T, C] float32 each."""
    seen = []
    for request in requests:
        recording = _Recording()
        with recording.attach(vlm):
            vlm.logits(request)
        seen.append([layer.recorded for layer in recording.made[-1].layers])
    return list(zip(*seen))


def _weighed(vlm: VLM, requests: Sequence[Any]) -> list[list[tuple[Tensor, ...]]]:
    """As `_plain`, and for each of both the squared gradients [T, C]."""
    from foveate.weights.calibrate import Stream
    from foveate.weights.gradients import gradients
    from foveate.weights.samples import ANSWER, VISION, Example, modality_of

    attention = vlm.adapter.layers[0].self_attn
    if not hasattr(attention, "k_proj"):
        raise UnsupportedError(f"kvquant: {type(attention).__name__} has no k_proj; calibrate without weighted=True")
    names = ["self_attn.k_norm" if getattr(attention, "k_norm", None) is not None else "self_attn.k_proj"]
    names.append("self_attn.v_proj")
    examples = []
    for number, request in enumerate(requests):
        plan = vlm.plan(request.to_messages(), num_frames=request.num_frames)
        kinds = modality_of(plan, vlm.adapter)
        examples.append(Example(number, plan, torch.where(kinds == VISION, VISION, ANSWER)))
    stream = Stream(vlm, "llm", (), examples, None)
    stream.start()
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in stream.calls[0].arguments]
    for found in gradients(stream, lambda name, _: name in names):
        made, weights = [], []
        for name in names:
            value, gradient = found.made[name].float().flatten(0, 1).flatten(1), found.outputs[name]
            made.append(value)
            weights.append(
                torch.zeros_like(value) if gradient is None else gradient.float().square().reshape(value.shape)
            )
        seen[found.index].append((*made, *weights))
    return seen


def levels_to_json(levels: Sequence[LayerLevels]) -> dict[str, Any]:
    """The content of IN_CHECKPOINT. Exact: a float32 is written with the digits that tell it from its neighbours."""
    return {f"{i}.{f.name}": getattr(layer, f.name).tolist() for i, layer in enumerate(levels) for f in fields(layer)}


def read_levels(path: str, bits: int) -> list[LayerLevels]:
    """The levels in a file that `calibrate` wrote, or in a checkpoint's (.json).

    Raises CheckpointError: no such file, another form, other bits.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"kvquant: {path} is not a file; write it with foveate.cache.kvquant_levels.calibrate")
    return _read(str(file), file.stat().st_mtime_ns, bits)


@lru_cache(maxsize=4)
def _read(path: str, changed: int, bits: int) -> list[LayerLevels]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = [field.name for field in fields(LayerLevels)]
    try:
        if path.endswith(".json"):
            text = Path(path).read_text(encoding="utf-8")
            tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in json.loads(text).items()}
        else:
            tensors = load_file(path)
        count = 1 + max(int(name.split(".")[0]) for name in tensors)
        found = [LayerLevels(*(tensors[f"{index}.{name}"] for name in names)) for index in range(count)]
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"kvquant: {path} does not hold levels: {error}") from None
    if len(found[0].key_levels) != 2**bits:
        raise CheckpointError(f"kvquant: {path} has {len(found[0].key_levels)} levels, bits={bits} takes {2**bits}")
    return found


class _Recording(CacheMethod):
    """Dense caches that keep what went into them. made: all of them, in order."""

    name = "recording"

    def __init__(self) -> None:
        object.__setattr__(self, "made", [])

    def layer(self, index: int) -> DynamicLayer:
        return _Recorder()

    def make(self, adapter: Adapter) -> Cache:
        self.made.append(super().make(adapter))
        return self.made[-1]


class _Recorder(DynamicLayer):
    """A dense layer that keeps the prompt's keys, before the rotary embedding, and values: [T, C] float32."""

    recorded: tuple[Tensor, Tensor]

    def see(self, seen: Pass) -> Tensor | None:
        self._seen = seen
        return seen.mask

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = unrotate(self._seen.module, key_states, *self._seen.rotation)
        self.recorded = tuple(part.float().transpose(1, 2).flatten(2)[0] for part in (keys, value_states))
        return super().update(key_states, value_states, *args, **kwargs)
