"""The account of samples that could not be used: counted, named, never replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KEPT = 100_000  # names that are remembered; the count goes on


@dataclass
class SkipReport:
    """Which samples were skipped and why. `count` is exact; the first 100,000 are kept by name."""

    count: int = 0
    total: int = 0
    """Samples seen, good and bad."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each, in order."""

    def add(self, name: str, reason: str) -> None:
        """Count one bad sample."""
        self.count += 1
        if len(self.skipped) < KEPT:
            self.skipped.append((name, reason))

    def reasons(self) -> dict[str, str]:
        """{name: reason}."""
        return dict(self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"skipped": self.count, "total": self.total, "reasons": self.reasons()}

    def __str__(self) -> str:
        if not self.count:
            return f"all {self.total} samples are good"
        shown = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:3])
        return f"{self.count} of {self.total} samples skipped: {shown}{'; …' if self.count > 3 else ''}"
