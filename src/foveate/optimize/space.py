"""The space that is searched: every registered method that fits the model, with the values its parameters may take.

A method may declare its own ranges with a class attribute `space = {parameter: (values...)}`; otherwise they follow
from its socket: a reduction is tried over kept fractions, a weight method with a `bits` parameter at 8 and at 4 bits,
everything else as it stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError
from foveate.optimize.budget import Cost
from foveate.optimize.search import Trial
from foveate.registry import METHODS

if TYPE_CHECKING:
    from foveate.vlm import VLM

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
BITS = (8, 4)
PARTS = ("llm", "vision_tower", "mm_projector")
ORDER = ("reduce", "weights", "cache")
"""The sockets that are searched, in the order in which a recipe writes them: at most one method of each."""


def ranges(method: type) -> dict[str, tuple[Any, ...]]:
    """The values to try for each parameter of a method class; parameters that are not named keep their defaults."""
    declared = getattr(method, "space", None)
    if declared is not None:
        return dict(declared() if callable(declared) else declared)
    if method.socket == "reduce" and "keep" in method.parameters():
        return {"keep": KEEPS}
    if method.socket == "weights" and "bits" in method.parameters():
        return {"bits": BITS, **({"parts": (PARTS[:1], PARTS)} if "parts" in method.parameters() else {})}
    return {}


def variants(method: type) -> list[Any]:
    """Every instance of a method class within its ranges."""
    values = ranges(method)
    return [method.from_params(dict(zip(values, point))) for point in itertools.product(*values.values())]


def fitting(vlm: VLM, names: Sequence[str] | None = None) -> tuple[list[type], dict[str, str]]:
    """(method classes that work on the model, {name: reason} of the others). names: default all that are registered."""
    found, refused = [], {}
    for name in names or METHODS.names():
        method = METHODS.get(name)
        if method.socket not in ORDER:
            continue
        try:
            options = variants(method)
            options[0].check(vlm)
        except FoveateError as error:
            refused[name] = str(error)
        else:
            found.append(method)
    return found, refused


def candidates(methods: Sequence[type]) -> list[Trial]:
    """All recipes with at most one method of each socket, the empty one left out, as trials without a cost."""
    by_socket = {socket: [None] for socket in ORDER}
    for method in methods:
        by_socket[method.socket] += variants(method)
    trials = []
    for combination in itertools.product(*by_socket.values()):
        parts = [method for method in combination if method is not None]
        if not parts:
            continue
        keep = next((part.keep for part in parts if part.socket == "reduce" and hasattr(part, "keep")), None)
        group = " + ".join(part.name if part.socket == "reduce" else part.text() for part in parts)
        trials.append(Trial(" + ".join(part.text() for part in parts), Cost(0, 0, 0), group, keep))
    return trials
