"""Progress on standard error: a live bar on a terminal, a plain line now and then when piped; results go to stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Progress:
    """A counted task. `update(done, **fields)` shows `done/total`, time left and the given fields.

    done: how much was done before this run, for instance by the one that is resumed.
    """

    def __init__(
        self, title: str, total: int | None, *, done: int = 0, every: float = 10.0, quiet: bool = False
    ) -> None:
        self.title, self.total, self.every, self.quiet = title, total, every, quiet
        self.done = self._first = done  # what an earlier run had done says nothing about the speed of this one
        self._start = self._last = time.monotonic()
        self._tty = sys.stderr.isatty()

    def advance(self, by: int = 1, **fields: Any) -> None:
        self.update(self.done + by, **fields)

    def update(self, done: int, **fields: Any) -> None:
        self.done = done
        now = time.monotonic()
        due = now - self._last >= (0.2 if self._tty else self.every)
        if not self.quiet and due:
            self._last = now
            self._show(now, fields)

    def close(self) -> None:
        if not self.quiet and self._tty and self._last > self._start:
            sys.stderr.write("\r\x1b[K")

    def _show(self, now: float, fields: dict[str, Any]) -> None:
        spent = now - self._start
        text = f"{self.title} {self.done}" + (f"/{self.total}" if self.total else "")
        if self.total and self.done > self._first:
            text += f" · {spent / (self.done - self._first) * (self.total - self.done):.0f} s left"
        text += "".join(f" · {key} {value}" for key, value in fields.items())
        sys.stderr.write(f"\r\x1b[K{text[:160]}" if self._tty else f"{text}\n")
        sys.stderr.flush()


def track(items: Iterable[T], title: str, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """Yield from `items` while showing progress."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress(title, total, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def progress(title: str, total: int | None = None, quiet: bool = False) -> Iterator[Progress]:
    """A `Progress` that is cleared from the terminal when the block ends."""
    bar = Progress(title, total, quiet=quiet)
    try:
        yield bar
    finally:
        bar.close()
