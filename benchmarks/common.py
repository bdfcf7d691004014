"""What every benchmark writes beside its rows: device, versions, date."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.tasks.evaluate import Record


def run_header() -> dict[str, Any]:
    """Device, threads, versions and date of this run."""
    from foveate.machine import machine

    device, versions = machine()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device["gpu"] or device["cpu"],
        "threads": device["threads"],
        "cores": device["cores"],
        "versions": versions,
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` to `path` at once (a temporary file, then a rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
    print(f"wrote {path}")


def compare(first: list[Record], second: list[Record]) -> dict[str, Any]:
    """Mean difference first - second over tasks, of records of the same questions in the same order."""
    from foveate.tasks.stats import paired_bootstrap

    if [(r.task, r.id) for r in first] != [(r.task, r.id) for r in second]:
        raise ValueError("the two runs did not answer the same questions")
    a, b = [r.correct for r in first], [r.correct for r in second]
    return paired_bootstrap(a, b, groups=[r.task for r in first])._asdict()
