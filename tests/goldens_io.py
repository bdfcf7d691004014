"""Where golden vectors lie: `tests/goldens`, or the folder that FOVEATE_GOLDENS names (same form, other values)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch


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


class Case(dict[tuple[str, str], Any]):
    """One case of a golden file: (kind, name) -> array, text arrays decoded from JSON."""

    def params(self, *names: str) -> list[Any]:
        """These parameters, in this order."""
        return [self["param", name] for name in names]

    def tensor(self, name: str, kind: str = "in") -> torch.Tensor:
        """An input (or another kind of entry) as a tensor."""
        return torch.from_numpy(self[kind, name])


def golden_cases(family: str, method: str) -> dict[str, Case]:
    """The cases of goldens/<family>/<method>.npz by name, each with the entries under `shared` beneath its own."""
    arrays = read_npz(goldens_dir(family), f"{method}.npz")
    split = {key: key.split("/", 2) for key in arrays}
    names = sorted({case for case, _, _ in split.values()} - {"shared"})
    found = {}
    for name in names:
        case = found[name] = Case()
        for owner in ("shared", name):
            for key, (where, kind, leaf) in split.items():
                if where == owner:
                    value = arrays[key]
                    text = value.shape == () and value.dtype.kind == "U"
                    case[kind, leaf] = json.loads(str(value)) if text else value
    return found


def golden_methods(family: str) -> list[str]:
    """The names of the golden files of a family."""
    return sorted(path.stem for path in goldens_dir(family).glob("*.npz"))
