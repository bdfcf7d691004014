"""Where golden vectors lie: `tests/goldens`, or the folder that FOVEATE_GOLDENS names (same form, other values)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np


def goldens_dir(family: str = "") -> Path:
    """The folder of one family ("nvila", "tokens", ...), or of all."""
    return Path(os.environ.get("FOVEATE_GOLDENS") or Path(__file__).parent / "goldens") / family


def read_json(*parts: str | Path) -> Any:
    """A JSON file."""
    return json.loads(Path(*parts).read_text(encoding="utf-8"))


def read_npz(*parts: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file."""
    with np.load(Path(*parts)) as arrays:
        return {key: arrays[key] for key in arrays.files}
