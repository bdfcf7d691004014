"""Machines and what they reach: a table of data sheets, and this machine as `foveate plan --calibrate` measured it."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.bench.roofline import Kinds

HERE = "this-machine"
"""Name of the machine that was calibrated."""


@dataclass(frozen=True)
class Device:
    """A machine's rates: FLOP/s and bytes/s by dtype, and the fraction of them that real kernels reach.

    A calibrated machine knows more, {} elsewhere. By dtype: gemm: [[FLOPs of a product, FLOP/s], ...]; reading: [[bytes
    of a matrix, bytes/s], ...] of products of one row; attention (causal), attention_full and attention_one (a single
    query): [[tokens, FLOP/s], ...], all ascending; stream: bytes/s of operations on single values that come from
    memory; activation: values/s of an MLP's activation function. By kind of `roofline.layer_kind` and dtype,
    "QuantizedLinear 4 float32": unpacking, weights/s that are made in each call. By kind of `roofline.cache_kind` and
    dtype: caching, [values/s read, values/s written]. By stage and dtype, "tower float32" (tower, select, choose,
    prefill, decode): block_ms, what one block takes however small it is, and call_ms, what the stage takes once; with a
    kind between them, what blocks of that kind take more. process: bytes that Python and its libraries hold; 0 where
    that was not measured.
    """

    name: str
    label: str
    flops: dict[str, float]
    bandwidth: dict[str, float]
    reach: dict[str, float]
    source: str
    gemm: dict[str, list[list[float]]] = field(default_factory=dict)
    reading: dict[str, list[list[float]]] = field(default_factory=dict)
    attention: dict[str, list[list[float]]] = field(default_factory=dict)
    attention_full: dict[str, list[list[float]]] = field(default_factory=dict)
    attention_one: dict[str, list[list[float]]] = field(default_factory=dict)
    stream: dict[str, float] = field(default_factory=dict)
    activation: dict[str, float] = field(default_factory=dict)
    block_ms: dict[str, float] = field(default_factory=dict)
    call_ms: dict[str, float] = field(default_factory=dict)
    unpacking: dict[str, float] = field(default_factory=dict)
    caching: dict[str, list[float]] = field(default_factory=dict)
    process: float = 0.0

    def ms(self, flop: float, moved: float, dtype: str) -> float:
        """Roofline time in milliseconds: the slower of computing and reading."""
        return max(self.compute_ms(flop, dtype), self.read_ms(moved, dtype))

    def compute_ms(self, flop: float, dtype: str) -> float:
        """Milliseconds of computing at the ceiling."""
        return 1000 * flop / (self._rate(self.flops, dtype) * self.reach["flops"])

    def read_ms(self, moved: float, dtype: str) -> float:
        """Milliseconds of reading so many bytes of weights or cache."""
        rate = self.bandwidth.get(dtype) or self.bandwidth.get("") or self._rate(self.bandwidth, dtype)
        return 1000 * moved / (rate * self.reach["bandwidth"])

    def curve_ms(self, kind: str, amount: float, dtype: str, at: float | None = None) -> float:
        """Milliseconds of one operation of so many FLOPs or bytes at the rate that operations of its size reach. at:
        the size, where it is not the amount."""
        return 1000 * amount / interpolated(self._rate(getattr(self, kind), dtype), amount if at is None else at)

    def stream_ms(self, moved: float, dtype: str) -> float:
        """Milliseconds of reading and writing so many bytes of activations; 0 on machines that were not measured."""
        return 1000 * moved / self.stream[dtype] if dtype in self.stream else 0.0

    def activation_ms(self, values: float, dtype: str) -> float:
        """Milliseconds of the activation function of so many values; 0 on machines that were not measured."""
        return 1000 * values / self.activation[dtype] if dtype in self.activation else 0.0

    def unpacking_ms(self, kind: str, weights: float, dtype: str) -> float:
        """Milliseconds of making so many weights from what is stored; 0 for kinds that were not measured."""
        rate = self.unpacking.get(f"{kind} {dtype}")
        return 1000 * weights / rate if rate else 0.0

    def knows_cache(self, kind: str, dtype: str) -> bool:
        """Whether the rates of this kind of cache were measured."""
        return f"{kind} {dtype}" in self.caching

    def caching_ms(self, kind: str, dtype: str, *, read: float = 0, written: float = 0) -> float:
        """Milliseconds of reading or writing so many values; 0 for kinds that were not measured."""
        if not self.knows_cache(kind, dtype):
            return 0.0
        reading, writing = self.caching[f"{kind} {dtype}"]
        return 1000 * (read / reading + written / writing)

    def unmeasured(self, kinds: Kinds, dtype: str) -> list[str]:
        """Kinds whose rates this machine does not know; [] for a data sheet, which counts bytes alone."""
        if not self.gemm:
            return []
        layers = {kind for kind in kinds.weights.values() if kind and f"{kind} {dtype}" not in self.unpacking}
        cache = {kinds.cache} if kinds.cache and not self.knows_cache(kinds.cache, dtype) else set()
        return sorted(layers | cache)

    def overhead_ms(self, stage: str, dtype: str, kinds: Collection[str] = ()) -> tuple[float, float]:
        """Milliseconds that a block of a stage takes however small it is, and the stage takes once. kinds: of its
        weights and its cache."""
        block = sum(self.block_ms.get(f"{stage} {kind} {dtype}", 0.0) for kind in kinds if kind)
        return block + self.block_ms.get(f"{stage} {dtype}", 0.0), self.call_ms.get(f"{stage} {dtype}", 0.0)

    def _rate(self, table: dict[str, Any], dtype: str) -> Any:
        if dtype not in table:
            raise InputError(f"{self.label}: {dtype} was not measured; known: {', '.join(table)}")
        return table[dtype]


def interpolated(points: list[list[float]], x: float) -> float:
    """The value at x of [[x, y], ...], ascending in x: between two points straight in the logarithm of x, outside the
    nearest end."""
    at = bisect_left([point[0] for point in points], x)
    if at == 0 or at == len(points):
        return points[min(at, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)


def devices() -> dict[str, Device]:
    """The table of machines shipped as data, and this machine when it was calibrated."""
    text = resources.files("foveate.bench").joinpath("devices.json").read_text(encoding="utf-8")
    rows: dict[str, Any] = json.loads(text)
    file = calibration_file()
    if file.is_file():
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
            if Device(HERE, **row).gemm and not row.get("reading"):
                raise ValueError("made by an older version")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file} cannot be read ({error}); run foveate plan --calibrate again") from None
        rows[HERE] = row
    return {name: Device(name, **row) for name, row in rows.items()}


def calibration_file() -> Path:
    """Where the measured rates of this machine are kept: in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "foveate" / f"{HERE}.json"


def chosen(name: str, machines: dict[str, Device]) -> Device | None:
    """The machine that --device means: "here" is this one, "auto" this one if it was calibrated, else an H200; None
    when there is none of that name. Raises InputError for "here" without a calibration."""
    if name == "here" and HERE not in machines:
        raise InputError("this machine was not measured yet; run foveate plan --calibrate, which takes under a minute")
    if name == "auto":
        name = HERE if HERE in machines else "h200"
    return machines.get(HERE if name == "here" else name)
