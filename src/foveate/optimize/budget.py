"""Budgets: how much a model may cost and how much it may lose.

A limit is relative to the dense model (`0.5x`) or absolute with a unit (`2.5GFLOP`, `8GiB`, `400ms`, `128`). Every cost
is for the mean request of the data that is optimized for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from foveate.errors import BudgetError

AXES = {
    "flops": "FLOPs",
    "bytes": "bytes",
    "size": "size on disk",
    "memory": "peak memory",
    "tokens": "visual tokens",
    "nonzeros": "weights that are not zero",
    "ttft": "time to first token",
    "tpot": "time per token",
    "throughput": "throughput",
}
"""What can be limited, with the words used for it."""
MEASURED = ("ttft", "tpot", "throughput")
"""Known only after measuring; all other axes are counted before anything runs."""
HINTED = MEASURED
"""Measured for finalists; an estimate says beforehand which recipes are not worth it."""
FLOORS = ("throughput",)
"""More is better: the limit is the least that is asked for."""

_BYTES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_MILLISECONDS = {"ms": 1, "s": 1e3, "us": 1e-3}
_FACTORS: dict[str, dict[str, float]] = {
    "flops": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15},
    **dict.fromkeys(("bytes", "size", "memory"), _BYTES),
    **dict.fromkeys(("ttft", "tpot"), _MILLISECONDS),
    "tokens": {"": 1, "k": 1e3},
    "nonzeros": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9},
    "throughput": {"": 1, "k": 1e3},
}
_SUFFIX = {
    "flops": r"flops?",
    **dict.fromkeys(("bytes", "size", "memory"), r"b"),
    "tokens": r"tokens?",
    "throughput": r"(req|requests?)(/s)?",
}
_EXAMPLE = {
    "flops": "0.5x or 2.5GFLOP",
    **dict.fromkeys(("bytes", "size", "memory"), "0.5x or 8GiB"),
    "tokens": "0.5x or 128",
    "nonzeros": "0.5x or 300M",
    "ttft": "0.5x or 400ms",
    "tpot": "0.8x or 30ms",
    "throughput": "1.5x or 20req/s",
}


@dataclass(frozen=True)
class Cost:
    """Cost of one mean request under a recipe.

    flops: tower, connector, selection, prefill and decode. bytes: weights and cache held. tokens: visual tokens that
    reach the language model. size: bytes of the checkpoint's weights. memory: peak, with activations. nonzeros: weights
    that no method sets to zero. ttft_ms, tpot_ms,
    throughput (requests a second in batches): measured, None until then. hints: times and throughput against dense as a
    roofline estimates them, by axis, where one is limited. parts: named shares of `flops` and `bytes`, for the report.
    """

    flops: float
    bytes: float
    tokens: float
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    throughput: float | None = None
    size: float | None = None
    memory: float | None = None
    nonzeros: float | None = None
    parts: dict[str, float] = field(default_factory=dict, compare=False)
    hints: dict[str, float] = field(default_factory=dict, compare=False)

    def get(self, axis: str) -> float | None:
        """The value on one axis of `AXES` (FLOPs, bytes, tokens, milliseconds or requests a second)."""
        return getattr(self, {"ttft": "ttft_ms", "tpot": "tpot_ms"}.get(axis, axis))


def option(axis: str) -> str:
    """The option of the command that limits an axis."""
    return f"--{'min' if axis in FLOORS else 'max'}-{axis}"


@dataclass(frozen=True)
class Limit:
    """One limit, an upper one but for `FLOORS`. `value` is a ratio to dense when `relative`, else in the axis' unit."""

    axis: str
    value: float
    relative: bool

    @classmethod
    def parse(cls, axis: str, text: str) -> Limit:
        """From `0.5x` or a number with a unit. Raises BudgetError that shows the forms accepted."""
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*(?:/s)?)\s*", str(text).lower())
        value, unit = (float(found[1]), found[2]) if found else (0.0, "?")
        if unit == "x":
            relative, factor = True, 1.0
        else:
            if axis in _SUFFIX:
                unit = re.sub(rf"{_SUFFIX[axis]}$", "", unit)
            relative, factor = False, _FACTORS[axis].get(unit, 0.0)
        if not 0 < value < float("inf") or factor == 0:
            raise BudgetError(f"{option(axis)} {text}: cannot be read as a limit; write {_EXAMPLE[axis]}")
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
        return f"{AXES[self.axis]} at {'least' if self.axis in FLOORS else 'most'} {shown}"


@dataclass(frozen=True)
class Budget:
    """Limits on cost, and the largest loss against dense (0.01 = one point): of mean accuracy, and of any one skill."""

    limits: tuple[Limit, ...]
    max_loss: float = 0.01
    max_skill_loss: float | None = None

    @classmethod
    def parse(cls, *, loss: str | float = "1pt", skill_loss: str | float | None = None, **limits: str | None) -> Budget:
        """From the options of the command: axes of `AXES` by name. Without any limit: half the FLOPs and the bytes."""
        unknown = [axis for axis in limits if axis not in AXES]
        if unknown:
            raise BudgetError(f"there is no limit on {unknown[0]!r}; known: {', '.join(AXES)}")
        given = tuple(Limit.parse(axis, text) for axis, text in limits.items() if text is not None)
        return cls(
            given or (Limit("flops", 0.5, True), Limit("bytes", 0.5, True)),
            parse_loss(loss),
            None if skill_loss is None else parse_loss(skill_loss, "--max-skill-loss"),
        )

    @property
    def axes(self) -> list[str]:
        """The limited axes."""
        return [limit.axis for limit in self.limits]

    def overruns(self, cost: Cost, dense: Cost) -> dict[str, float]:
        """Cost divided by limit, for each limit whose cost is known; above 1 means that the limit is broken."""
        ratios = {}
        for limit in self.limits:
            value, bound = cost.get(limit.axis), limit.bound(dense)
            if value is not None and bound:
                ratios[limit.axis] = bound / max(value, 1e-12) if limit.axis in FLOORS else value / bound
        return ratios

    def broken(self, cost: Cost, dense: Cost) -> list[str]:
        """The axes whose limit `cost` breaks."""
        return [axis for axis, ratio in self.overruns(cost, dense).items() if ratio > 1 + 1e-9]

    def unlikely(self, cost: Cost, dense: Cost) -> dict[str, float]:
        """{axis: predicted time against dense} of the limits on time which an estimate makes improbable: it sees less
        than half of the saving that is asked for. A throughput counts as the time of one request. An absolute limit
        says nothing until dense was timed."""
        found = {}
        for limit in self.limits:
            hint, base = cost.hints.get(limit.axis), dense.get(limit.axis)
            if hint is None or cost.get(limit.axis) is not None or not (limit.relative or base):
                continue
            asked = limit.value if limit.relative else limit.value / float(base or 1.0)
            if limit.axis in FLOORS:
                hint, asked = 1 / hint, 1 / asked
            if hint > (1 + asked) / 2:
                found[limit.axis] = hint
        return found

    def relative_cost(self, cost: Cost, dense: Cost) -> float:
        """One number to break ties: the geometric mean of cost / dense over the limited axes that can be predicted."""
        axes = [axis for axis in self.axes if axis not in MEASURED] or ["flops"]
        product = 1.0
        for axis in axes:
            product *= max(float(cost.get(axis) or 0.0), 1e-12) / max(float(dense.get(axis) or 0.0), 1e-12)
        return product ** (1 / len(axes))

    def text(self) -> str:
        """For people: all limits in one line."""
        said = [limit.text() for limit in self.limits] + [f"loss at most {points(self.max_loss)}"]
        if self.max_skill_loss is not None:
            said.append(f"of any skill {points(self.max_skill_loss)}")
        return "; ".join(said)

    def to_dict(self) -> dict[str, object]:
        """For JSON: `{"flops": "0.5x", ..., "max_loss": 0.01}`; absolute limits are numbers."""
        shown = {limit.axis: f"{limit.value:g}x" if limit.relative else limit.value for limit in self.limits}
        skill = {} if self.max_skill_loss is None else {"max_skill_loss": self.max_skill_loss}
        return {**shown, "max_loss": self.max_loss, **skill}


def parse_loss(text: str | float, name: str = "--max-loss") -> float:
    """`1pt`, `1%` or `1` (points of accuracy) as a fraction: 0.01. Raises BudgetError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(pts?|points?|%|)\s*", str(text).lower())
    if not found or float(found[1]) > 100:
        raise BudgetError(f"{name} {text}: cannot be read as points of accuracy from 0 to 100; write 1pt")
    return float(found[1]) / 100


def points(fraction: float, signed: bool = False) -> str:
    """A difference of accuracies in points: `-1.2 pt`."""
    value = round(100 * fraction, 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:+.1f} pt" if signed else f"{value:g} pt"


def amount(axis: str, value: float | None) -> str:
    """A cost with its unit: `1.31 GFLOP`, `5.6 MB`, `12.4 ms`, `33`."""
    if value is None:
        return "–"
    if axis == "throughput":
        return f"{value:.3g} req/s"
    if axis in ("ttft", "tpot"):
        return f"{value:.1f} ms" if value < 1e4 else f"{value / 1e3:.1f} s"
    if axis == "tokens":
        return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
    unit = "FLOP" if axis == "flops" else "" if axis == "nonzeros" else "B"
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()
