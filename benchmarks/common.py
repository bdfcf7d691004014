"""What every benchmark writes beside its rows: device, versions, date."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.tasks.evaluate import Record


def run_header() -> dict[str, Any]:
    """Device, threads, versions and date of this run."""
    import numpy
    import torch
    import transformers

    import foveate

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {
            "foveate": foveate.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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
