"""Machines and what they reach: a table of data sheets, and this machine as `foveate plan --calibrate` measured it."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from foveate.errors import InputError

HERE = "this-machine"
"""Name of the machine that was calibrated."""


@dataclass(frozen=True)
class Device:
    """A machine's rates: FLOP/s and bytes/s by dtype, and the fraction of them that real kernels reach.

    A calibrated machine knows more, by dtype: gemm, attention (causal) and attention_full: [[FLOPs of one product or
    attention, FLOP/s], ...], ascending; stream: bytes/s of operations on single values that come from memory;
    activation: values/s of an MLP's activation function. block_ms: what one block of a tower or language model takes
    however small it is, and call_ms what one pass does, "tower float32" and so on. {} elsewhere.
    """

    name: str
    label: str
    flops: dict[str, float]
    bandwidth: dict[str, float]
    reach: dict[str, float]
    source: str
    gemm: dict[str, list[list[float]]] = field(default_factory=dict)
    attention: dict[str, list[list[float]]] = field(default_factory=dict)
    attention_full: dict[str, list[list[float]]] = field(default_factory=dict)
    stream: dict[str, float] = field(default_factory=dict)
    activation: dict[str, float] = field(default_factory=dict)
    block_ms: dict[str, float] = field(default_factory=dict)
    call_ms: dict[str, float] = field(default_factory=dict)

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

    def curve_ms(self, kind: str, flop: float, dtype: str) -> float:
        """Milliseconds of one operation of so many FLOPs at the rate that operations of its size reach."""
        points = getattr(self, kind).get(dtype)
        return 1000 * flop / interpolated(points, flop) if points else self.compute_ms(flop, dtype)

    def stream_ms(self, moved: float, dtype: str) -> float:
        """Milliseconds of reading and writing so many bytes of activations; 0 on machines that were not measured."""
        return 1000 * moved / self.stream[dtype] if dtype in self.stream else 0.0

    def activation_ms(self, values: float, dtype: str) -> float:
        """Milliseconds of the activation function of so many values; 0 on machines that were not measured."""
        return 1000 * values / self.activation[dtype] if dtype in self.activation else 0.0

    def overhead_ms(self, part: str, dtype: str) -> tuple[float, float]:
        """Milliseconds that a block of a part ("tower", "llm") takes however small it is, and a whole pass does."""
        return self._rate(self.block_ms, f"{part} {dtype}"), self._rate(self.call_ms, f"{part} {dtype}")

    def _rate(self, table: dict[str, float], dtype: str) -> float:
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
            Device(HERE, **row)
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
        raise InputError("this machine was not measured yet; run foveate plan --calibrate, which takes some seconds")
    if name == "auto":
        name = HERE if HERE in machines else "h200"
    return machines.get(HERE if name == "here" else name)
