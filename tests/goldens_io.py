"""Golden vectors: where they lie, and how what we find is compared with them.

They lie in `tests/goldens`, or in the folder that FOVEATE_GOLDENS names (same form, other values).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

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


def equal(found: Any, case: Mapping[tuple[str, str], Any], name: str) -> None:
    """Fails unless these are the numbers of an output."""
    np.testing.assert_array_equal(np.asarray(found), case["out", name], err_msg=name)


def near(found: Any, case: Mapping[tuple[str, str], Any], name: str, atol: float = 1e-5) -> None:
    """Fails unless these are the numbers of an output up to rounding, shape included."""
    found = np.asarray(found)
    assert found.shape == case["out", name].shape, name
    np.testing.assert_allclose(found, case["out", name], rtol=1e-4, atol=atol, err_msg=name)


def cls_attention(case: Case) -> list[torch.Tensor]:
    """The [CLS] attention of the earlier and of the later layer, [V, H, N] each."""
    names = [name for kind, name in case if kind == "in" and name.endswith("_cls_attn")]
    return [case.tensor(name) for name in sorted(names, key=lambda name: int(name[len("layer") : -len("_cls_attn")]))]


@contextmanager
def noise_of(seed: int, module: ModuleType) -> Iterator[None]:
    """Clusterings of a method's module with the noise that the official code drew for its densities, one after another.

    Of one or two neighbours many densities are equal, and the noise alone decides which point is a centre.
    """
    from foveate.reduce.cluster import density_peaks

    generator = torch.Generator().manual_seed(seed)

    def noisy(x: torch.Tensor, clusters: int, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
        return density_peaks(x, clusters, neighbours, 1e-6 * torch.rand(len(x), generator=generator))

    with mock.patch.object(module, "density_peaks", noisy):
        yield
