"""The machine and the versions that a result came from."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def load_average() -> float:
    """Load average of the last minute per core; 0 where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def machine() -> tuple[dict[str, Any], dict[str, str]]:
    """(device, versions): what a time must never travel without."""
    import numpy as np
    import torch
    import transformers

    import foveate

    device: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(load_average(), 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    versions = {
        "foveate": foveate.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    return device, versions


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
