"""`Clock`: where the time of a request goes, stage by stage, however deep the code that spends it lies.

Code far below the runtime says what its time is for: `with charge("select"): ...`. Where no clock runs, that costs
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

STAGES = ("preprocess", "encode", "select", "prefill", "decode")
"""Stages of a request. "encode" is tower and connector; "select" holds what methods cost: their signals, in the tower
and in the language model, and their choice."""
OPENING = "decode_image"
"""Making pixels of a file's bytes; a part of "preprocess" unless a clock is asked for it."""

_RUNNING: ContextVar[Clock | None] = ContextVar("clock", default=None)


class Clock:
    """Milliseconds per stage, with the device's queue drained at each boundary. A stage inside another one counts for
    itself only, not for the outer one.

    device: a torch device, or anything without `type` "cuda" for what runs on the CPU. extra: stages beside STAGES.
    parts: milliseconds of what has a name of its own within a stage, such as a signal; they count for the stage too.
    """

    def __init__(self, device: Any, extra: tuple[str, ...] = ()) -> None:
        self._device = device
        self._open: list[str] = []
        self.ms = dict.fromkeys((*extra, *STAGES), 0.0)
        self.parts: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, part: str | None = None) -> Iterator[None]:
        if self._open:
            self._drain()
        self._open.append(name)
        token = _RUNNING.set(self)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._drain()
            spent = (time.perf_counter() - start) * 1e3
            _RUNNING.reset(token)
            self.ms[name] += spent
            if part is not None:
                self.parts[part] = self.parts.get(part, 0.0) + spent
            self._open.pop()
            if self._open:
                self.ms[self._open[-1]] -= spent

    def _drain(self) -> None:
        if getattr(self._device, "type", None) == "cuda":
            import torch

            torch.cuda.synchronize(self._device)


@contextmanager
def charge(name: str, part: str | None = None) -> Iterator[None]:
    """Count the block as stage `name` on the clock that runs in this thread, if one runs and knows that stage.

    part: also under this name in the clock's `parts`.
    """
    clock = _RUNNING.get()
    if clock is None or name not in clock.ms:
        yield
    else:
        with clock.stage(name, part):
            yield
