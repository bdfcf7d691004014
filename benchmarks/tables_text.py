"""What the tables of all figures share: reading results, numbers with intervals, rows of Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def load(name: str, results: Path = RESULTS) -> Row | None:
    """The content of results/NAME.json, or None when it was not taken yet."""
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def missing(name: str) -> str:
    return f"*Not taken yet: `benchmarks/results/{name}.json` is missing.*"


def conditions(report: Row) -> str:
    """The line that a number never travels without."""
    versions = report.get("versions", {})
    shown = ", ".join(f"{name} {versions[name]}" for name in ("foveate", "torch", "transformers") if name in versions)
    threads = f", {report['threads']} of {report['cores']} threads" if "threads" in report else ""
    seed = f", seed {report['seed']}" if "seed" in report else ""
    return f"*{report.get('device', 'unknown device')}{threads}; {shown}; {report.get('date', 'no date')}{seed}.*"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)]), *map(" | ".join, rows)]
    return "\n".join(f"| {line} |" for line in lines)


def accuracy(row: Row) -> str:
    return f"{row['accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def with_interval(delta: Row | None) -> str:
    """A paired difference {"value", "low", "high"}, or nothing."""
    return f"{signed(delta['value'])} [{signed(delta['low'])}, {signed(delta['high'])}]" if delta else ""
