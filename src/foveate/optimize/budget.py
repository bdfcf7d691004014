"""Budgets: how much a model may cost and how much it may lose.

A limit is relative to the dense model (`0.5x`) or absolute with a unit (`2.5GFLOP`, `8GiB`, `400ms`, `128`). Every cost
is for the mean request of the data that is optimized for; `bytes` is what has to be held: weights and the cache of one
request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from foveate.errors import BudgetError

AXES = {"flops": "FLOPs", "bytes": "bytes", "ttft": "time to first token", "tokens": "visual tokens"}
"""What can be limited, with the words used for it."""

_FACTORS: dict[str, dict[str, float]] = {
    "flops": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15},
    "bytes": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40},
    "ttft": {"ms": 1, "s": 1e3, "us": 1e-3},
    "tokens": {"": 1, "k": 1e3},
}
_SUFFIX = {"flops": r"flops?", "bytes": r"b", "ttft": None, "tokens": r"tokens?"}
_EXAMPLE = {"flops": "0.5x or 2.5GFLOP", "bytes": "0.5x or 8GiB", "ttft": "0.5x or 400ms", "tokens": "0.5x or 128"}


@dataclass(frozen=True)
class Cost:
    """Cost of one mean request under a recipe.

    flops: tower, connector, selection, prefill and decode. bytes: weights and cache held. tokens: visual tokens that
    reach the language model. ttft_ms: median measured time to first token, None until measured. parts: named shares of
    `flops` and `bytes`, for the report.
    """

    flops: float
    bytes: float
    tokens: float
    ttft_ms: float | None = None
    parts: dict[str, float] = field(default_factory=dict, compare=False)

    def get(self, axis: str) -> float | None:
        """The value on one axis of `AXES` (flops, bytes, milliseconds or tokens)."""
        return self.ttft_ms if axis == "ttft" else getattr(self, axis)


@dataclass(frozen=True)
class Limit:
    """One upper limit. `value` is a ratio to dense when `relative`, else FLOPs, bytes, milliseconds or tokens."""

    axis: str
    value: float
    relative: bool

    @classmethod
    def parse(cls, axis: str, text: str) -> Limit:
        """From `0.5x` or a number with a unit. Raises BudgetError that shows the forms accepted."""
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
        value, unit = (float(found[1]), found[2]) if found else (0.0, "?")
        if unit == "x":
            relative, factor = True, 1.0
        else:
            if _SUFFIX[axis]:
                unit = re.sub(rf"{_SUFFIX[axis]}$", "", unit)
            relative, factor = False, _FACTORS[axis].get(unit, 0.0)
        if not 0 < value < float("inf") or factor == 0:
            raise BudgetError(f"--max-{axis} {text}: cannot be read as a limit; write {_EXAMPLE[axis]}")
        return cls(axis, value * factor, relative)

    def bound(self, dense: Cost) -> float | None:
        """The limit in absolute terms; None when it is relative to a time that was not measured yet."""
        if not self.relative:
            return self.value
        base = dense.get(self.axis)
        return None if base is None else self.value * base

    def text(self) -> str:
        """For people: `FLOPs at most 0.5x of dense`."""
        shown = f"{self.value:g}x of dense" if self.relative else amount(self.axis, self.value)
        return f"{AXES[self.axis]} at most {shown}"


@dataclass(frozen=True)
class Budget:
    """Limits on cost, and the largest loss of mean accuracy against dense (0.01 = one point)."""

    limits: tuple[Limit, ...]
    max_loss: float = 0.01

    @classmethod
    def parse(
        cls,
        flops: str | None = None,
        bytes: str | None = None,
        ttft: str | None = None,
        tokens: str | None = None,
        loss: str | float = "1pt",
    ) -> Budget:
        """From the options of the command. With no limit at all: half the FLOPs and half the bytes."""
        given = {"flops": flops, "bytes": bytes, "ttft": ttft, "tokens": tokens}
        limits = tuple(Limit.parse(axis, text) for axis, text in given.items() if text is not None)
        return cls(limits or (Limit("flops", 0.5, True), Limit("bytes", 0.5, True)), parse_loss(loss))

    def overruns(self, cost: Cost, dense: Cost) -> dict[str, float]:
        """Cost divided by limit, for each limit whose cost is known; above 1 means that the limit is broken."""
        ratios = {}
        for limit in self.limits:
            value, bound = cost.get(limit.axis), limit.bound(dense)
            if value is not None and bound:
                ratios[limit.axis] = value / bound
        return ratios

    def broken(self, cost: Cost, dense: Cost) -> list[str]:
        """The axes whose limit `cost` breaks."""
        return [axis for axis, ratio in self.overruns(cost, dense).items() if ratio > 1 + 1e-9]

    def relative_cost(self, cost: Cost, dense: Cost) -> float:
        """One number to break ties: the geometric mean of cost / dense over the limited axes that can be predicted."""
        axes = [limit.axis for limit in self.limits if limit.axis != "ttft"] or ["flops"]
        product = 1.0
        for axis in axes:
            product *= max(float(cost.get(axis) or 0.0), 1e-12) / max(float(dense.get(axis) or 0.0), 1e-12)
        return product ** (1 / len(axes))

    def text(self) -> str:
        """For people: all limits in one line."""
        return "; ".join([limit.text() for limit in self.limits] + [f"loss at most {points(self.max_loss)}"])

    def to_dict(self) -> dict[str, object]:
        """For JSON: `{"flops": "0.5x", ..., "max_loss": 0.01}`; absolute limits are numbers."""
        shown = {limit.axis: f"{limit.value:g}x" if limit.relative else limit.value for limit in self.limits}
        return {**shown, "max_loss": self.max_loss}


def parse_loss(text: str | float) -> float:
    """`1pt`, `1%` or `1` (points of accuracy) as a fraction: 0.01. Raises BudgetError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(pts?|points?|%|)\s*", str(text).lower())
    if not found or float(found[1]) > 100:
        raise BudgetError(f"--max-loss {text}: cannot be read as points of accuracy from 0 to 100; write 1pt")
    return float(found[1]) / 100


def points(fraction: float, signed: bool = False) -> str:
    """A difference of accuracies in points: `-1.2 pt`."""
    value = round(100 * fraction, 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:+.1f} pt" if signed else f"{value:g} pt"


def amount(axis: str, value: float | None) -> str:
    """A cost with its unit: `1.31 GFLOP`, `5.6 MB`, `12.4 ms`, `33`."""
    if value is None:
        return "–"
    if axis == "ttft":
        return f"{value:.1f} ms" if value < 1e4 else f"{value / 1e3:.1f} s"
    if axis == "tokens":
        return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
    unit = "FLOP" if axis == "flops" else "B"
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
