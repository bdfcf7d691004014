"""`kvquant`: keys per channel before the rotary embedding, values per token, non-uniform levels, outliers exact.

Source: Hooper et al., KVQuant (arXiv 2401.18079); official code SqueezeAILab/KVQuant @ 57a2383 (quant/), whose bounds,
outlier masks and dequantized values `foveate.cache.nuq` gives for given levels. Departures:
- Keys are taken after the rotary embedding, as transformers hands them over, and turned back; they are turned again
  when read. The angles are held once for all layers (`foveate.cache.rotations`).
- Bounds and levels come from a file (`foveate.cache.kvquant_levels.calibrate`) or, without one, from each request's own
  prompt. The official code knows the first way only.
- k-means runs on a histogram from a start that is found exactly, so chance has no part in it.
- Outliers are stored in the dtype of the cache, the tokens of `exact` as outliers. `cap` bounds the outliers of a
  token's keys by distance, where the official code has fixed numbers for one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from foveate.adapters.attention import Pass, rotate, rotation_of, unrotate
from foveate.cache import nuq
from foveate.cache.base import CacheMethod
from foveate.cache.kivi import pack_last, small_float, unpack_last
from foveate.cache.kvquant_levels import IN_CHECKPOINT, LayerLevels, levels_to_json, read_levels
from foveate.cache.layer import PackedLayer
from foveate.cache.ragged import Ragged
from foveate.cache.rotations import Rotations
from foveate.cache.store import Codec, Part, Store
from foveate.errors import RecipeError
from foveate.weights.normal_float import normal_float

if TYPE_CHECKING:
    from transformers import Cache

    from foveate.adapters.base import Adapter


@dataclass(frozen=True)
class KVQuant(CacheMethod):
    """bits: of each value. outliers: share kept exactly, half above and half below. exact: first tokens kept exactly.

    levels: "nuq" (k-means on calibration data), "nf" (NormalFloat) or "int" (uniform). q_norm: levels are read
    with mean and deviation matched, for 2 bits. cap: most key outliers of a token, 0 for all. file: bounds and levels
    of `calibrate`; a checkpoint that is saved with this method holds them itself.
    """

    bits: Literal[2, 3, 4, 5] = 4
    outliers: float = 0.01
    exact: int = 1
    levels: Literal["nuq", "nf", "int"] = "nuq"
    q_norm: bool = False
    cap: int = 0
    file: str | None = None

    name: ClassVar[str] = "kvquant"
    searched: ClassVar[bool] = False  # levels are fitted anew in each prefill, which makes answers several times slower
    shown: ClassVar[tuple[str, ...]] = ("bits",)
    summary: ClassVar[str] = "keys before the rotary embedding per channel, non-uniform levels, outliers exact"
    space: ClassVar[dict[str, tuple[int, ...]]] = {"bits": (4, 3)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.outliers <= 1:
            raise RecipeError(f"kvquant: outliers is {self.outliers}; it is a share of the values, so give 0 to 1")
        for name in ("exact", "cap"):
            if getattr(self, name) < 0:
                raise RecipeError(f"kvquant: {name} is {getattr(self, name)}; give 0 or more")

    def carried(self) -> tuple[KVQuant, dict[str, dict[str, Any]]]:
        if not self.file:
            return self, {}
        return replace(self, file=IN_CHECKPOINT), {IN_CHECKPOINT: levels_to_json(read_levels(self.file, self.bits))}

    def found_in(self, folder: Path) -> KVQuant:
        return replace(self, file=str(folder / IN_CHECKPOINT)) if self.file == IN_CHECKPOINT else self

    def layer(self, index: int, rotations: Rotations | None = None) -> KVQuantLayer:
        given = read_levels(self.file, self.bits)[index] if self.file else None
        keys, values = KeyCodec(self, given), ValueCodec(self, given)
        return KVQuantLayer(Store(keys), Store(values), rotations or Rotations())

    def layers(self, count: int) -> list[KVQuantLayer]:
        shared = Rotations()
        return [self.layer(index, shared) for index in range(count)]

    def make(self, adapter: Adapter) -> Cache:
        layers = adapter.layers
        if self.file and len(read_levels(self.file, self.bits)) != len(layers):
            found = len(read_levels(self.file, self.bits))
            raise RecipeError(f"kvquant: {self.file} has levels for {found} layers, this model has {len(layers)}")
        cache = super().make(adapter)
        rotation_of(layers[0].self_attn)
        return cache


class KVQuantLayer(PackedLayer):
    """number: [B, columns] int32, the entry in `rotations` by which each column's key is turned."""

    def __init__(self, keys: Store, values: Store, rotations: Rotations) -> None:
        super().__init__(keys, values)
        self.rotations = rotations
        self.number: Tensor | None = None
        self._turn: tuple[Any, Tensor, Tensor] | None = None
        self._module: Any = None

    def see(self, seen: Pass) -> Tensor | None:
        self._module = seen.module
        self._turn = seen.rotation
        return super().see(seen)

    def incoming(self, keys: Tensor) -> Tensor:
        if self._turn is None:
            return keys
        (cos, sin), self._turn = self._turn, None
        number = self.rotations.add(cos, sin).expand(keys.shape[0], -1)
        self.number = number if self.number is None else torch.cat([self.number, number], dim=1)
        return unrotate(self._module, keys, cos, sin).to(keys.dtype)

    def outgoing(self, keys: Tensor) -> Tensor:
        return keys if self.number is None else rotate(self._module, keys, *self.rotations.get(self.number))

    def stand_in(self, keys: Tensor) -> None:
        """Angles for keys [1, H, M, D] as a model would give them, so that their bytes can be measured without one."""
        place = torch.arange(keys.shape[2], dtype=keys.dtype, device=keys.device)
        half = place[:, None].expand(-1, max(1, keys.shape[3] // 2))
        angles = torch.cat([half, half], dim=1)[None]
        self.number = self.rotations.add(angles, angles)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.number is not None:
            self.number = self.number[:, : self.columns].clone()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.number is not None:
            self.number = self.number[indices.to(self.number.device)]

    def reset(self) -> None:
        super().reset()
        self.rotations.reset()
        self.number = None


class _OutlierCodec(Codec):
    """What keys and values share: a page is one token, [B, P, C] with the channels of all heads."""

    def __init__(self, method: KVQuant, given: LayerLevels | None) -> None:
        super().__init__()
        self.method, self.given = method, given
        self.heads = self.channels = 0

    def _flat(self, pages: Tensor) -> Tensor:
        self.heads, self.channels = pages.shape[2], pages.shape[2] * pages.shape[4]
        return pages.squeeze(3).flatten(2).float()

    def _number(self, states: Tensor, first: Sequence[int]) -> Tensor:
        """[B, P, 1] which token of its row each page is."""
        start = torch.tensor(first, device=states.device)[:, None]
        return (start + torch.arange(states.shape[1], device=states.device))[..., None]

    def _fixed_levels(self, states: Tensor) -> None:
        """Levels that need no data: uniform ones are their own codes."""
        kinds = {"nf": normal_float(self.method.bits), "int": torch.arange(2**self.method.bits)}
        level = kinds[self.method.levels].to(states)
        self.state["levels"] = self.state["read"] = level.expand(len(states), -1)

    def _outliers(self, states: Tensor, found: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Ragged:
        """The marked values; filling pages have none."""
        real = torch.arange(states.shape[1], device=states.device) < torch.tensor(counts, device=states.device)[:, None]
        found = found & real[..., None]
        channel = found.nonzero()[:, 2]
        small = torch.int16 if states.shape[2] <= 1 << 15 else torch.int32
        return Ragged(found.sum(-1), value=states[found].to(dtype), channel=channel.to(small))

    def _restore(self, states: Tensor, outliers: Ragged, dtype: torch.dtype) -> Tensor:
        """[B, P, C] with the outliers put back, as [B, P, H, 1, D] in `dtype`."""
        states = states.to(dtype)
        states.flatten(0, 1)[outliers.page, outliers.values["channel"].long()] = outliers.values["value"].to(dtype)
        return states.unflatten(2, (self.heads, -1)).unsqueeze(3)

    def _samples(self, states: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """The tokens [n, C] of each row to calibrate on: those not kept exactly anyway, if there are any."""
        rows = [states[row, :count] for row, count in enumerate(counts)]
        return [row[self.method.exact :] if len(row) > self.method.exact else row for row in rows]


class KeyCodec(_OutlierCodec):
    """codes: [B, P, bytes of C]; outliers. State: upper, lower [B, 1, C] in 16 bits; levels, read [B, 2**bits]."""

    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        keys = self._flat(pages)
        if not self.state:
            self._calibrate(keys, counts, small_float(pages.dtype))
        upper, lower = self.state["upper"], self.state["lower"]
        scale, shift = (part.float() for part in nuq.scale_and_shift(upper, lower))
        found = nuq.key_outliers(keys, upper.float(), lower.float())
        if self.method.cap:
            distance = ((keys - shift) / torch.where(scale == 0, 1, scale)).abs().masked_fill(~found, 0)
            found &= distance >= distance.topk(min(self.method.cap, keys.shape[2]), dim=-1).values[..., -1:]
        found |= self._number(keys, first) < self.method.exact
        if self.method.levels == "int":
            codes = nuq.integer(keys, upper.float(), lower.float(), self.method.bits, whole=False)[0].to(torch.uint8)
        else:
            codes = nuq.encode(keys, found, scale, shift, self.state["levels"])
        return {
            "codes": pack_last(codes, self.method.bits),
            "outliers": self._outliers(keys, found, counts, pages.dtype),
        }

    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        upper, lower = self.state["upper"], self.state["lower"]
        if self.method.levels == "int":
            _, scale, shift = nuq.integer(upper, upper.float(), lower.float(), self.method.bits, whole=False)
        else:
            scale, shift = (part.float() for part in nuq.scale_and_shift(upper, lower))
        codes = unpack_last(parts["codes"], self.method.bits, self.channels)
        return self._restore(nuq.decode(codes, scale, shift, self.state["read"]), parts["outliers"], dtype)

    def _calibrate(self, keys: Tensor, counts: Sequence[int], small: torch.dtype) -> None:
        method, rows = self.method, len(keys)
        if self.given is not None:
            self.given.check_width(keys.shape[2])
            found = [self.given.keys(keys.device)] * rows
        else:
            found = [
                LayerLevels.fit_keys(part, method.bits, method.outliers, method.q_norm)
                for part in self._samples(keys, counts)
            ]
        upper, lower, levels, read = (torch.stack(part) for part in zip(*found))
        self.state = {"upper": upper[:, None].to(small), "lower": lower[:, None].to(small)}
        if method.levels == "nuq":
            self.state |= {"levels": levels, "read": read}
        else:
            self._fixed_levels(keys)


class ValueCodec(_OutlierCodec):
    """codes: [B, P, bytes of C]; scale, shift: [B, P, 1] in 16 bits; outliers: Ragged. State: levels, read."""

    def encode(self, pages: Tensor, first: Sequence[int], counts: Sequence[int]) -> dict[str, Part]:
        values, small = self._flat(pages), small_float(pages.dtype)
        if not self.state:
            self._calibrate(values, counts)
        found, upper, lower = nuq.value_range(values, self.method.outliers)
        found |= self._number(values, first) < self.method.exact
        if self.method.levels == "int":
            codes, scale, shift = nuq.integer(values, upper, lower, self.method.bits, whole=True)
            codes, scale, shift = codes.to(torch.uint8), scale.to(small), shift.to(small)
        else:
            scale, shift = (part.to(small) for part in nuq.scale_and_shift(upper, lower))
            codes = nuq.encode(values, found, scale.float(), shift.float(), self.state["levels"])
        return {
            "codes": pack_last(codes, self.method.bits),
            "scale": scale,
            "shift": shift,
            "outliers": self._outliers(values, found, counts, pages.dtype),
        }

    def decode(self, parts: dict[str, Part], dtype: torch.dtype) -> Tensor:
        codes = unpack_last(parts["codes"], self.method.bits, self.channels)
        scale, shift = parts["scale"].float(), parts["shift"].float()
        return self._restore(nuq.decode(codes, scale, shift, self.state["read"]), parts["outliers"], dtype)

    def _calibrate(self, values: Tensor, counts: Sequence[int]) -> None:
        method, rows = self.method, len(values)
        if method.levels != "nuq":
            self._fixed_levels(values)
            return
        if self.given is not None:
            found = [self.given.values(values.device)] * rows
        else:
            found = [
                LayerLevels.fit_values(part, method.bits, method.outliers, method.q_norm)
                for part in self._samples(values, counts)
            ]
        levels, read = (torch.stack(part) for part in zip(*found))
        self.state = {"levels": levels, "read": read}
