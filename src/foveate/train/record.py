"""run.json: what a run was, where it ran and how far it came; one entry for each time it was started."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.machine import machine
from foveate.train.checkpoint import write_text

if TYPE_CHECKING:
    from foveate.train.config import TrainRecipe

FILE = "run.json"


class RunRecord:
    """The file of one run. `update` replaces what the present start of it has to say."""

    def __init__(self, folder: Path, recipe: TrainRecipe, step: int) -> None:
        device, versions = machine()
        self._path = folder / FILE
        self._data: dict[str, Any] = {"recipe": recipe.name, "recipe_hash": recipe.hash(), "steps": recipe.total_steps}
        self._before = _starts(self._path)
        self._now: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "from_step": step,
            "device": device,
            "versions": versions,
            "commit": _commit(),
        }
        self.update(step=step)

    def update(self, **values: Any) -> None:
        """Set values (JSON types) of this start: step, seconds, skipped, reasons, ..."""
        self._now |= values
        data = self._data | {"starts": [*self._before, self._now]}
        write_text(self._path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _starts(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the first start, or a file of somebody else


def _commit() -> str | None:
    """The commit of the checkout that this package is run from, "+" behind it when files differ; None elsewhere."""
    here = Path(__file__).parent
    root = next((folder for folder in here.parents if (folder / ".git").exists()), None)
    if root is None or not (root / "src" / "foveate").is_dir():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
