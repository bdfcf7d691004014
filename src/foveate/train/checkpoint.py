"""Checkpoints of a run: complete or absent, never half written, never a pickle.

    step-000123/model.safetensors      every parameter and buffer of the model and of the training heads, as it is
                optimizer.safetensors  optimizer state by parameter name, and torch's random state
                state.json             counters, recipe hash, data position, versions; written last

A checkpoint is written into a hidden folder, every file is flushed to the disk, and one rename makes it visible, so a
kill at any moment leaves the previous one as the latest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveate.disk import plain_errors
from foveate.errors import CheckpointError, RecipeError
from foveate.files import save_tensors

if TYPE_CHECKING:
    from foveate.train.config import TrainRecipe

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_FOLDER = re.compile(r"step-(\d+)$")
WAY_OUT = "make room, then run again with --resume"
PARTIAL = ".partial-"
"""What is being written starts with this until it is whole."""


@dataclass
class TrainState:
    """Everything a run needs to go on: two flat tensor maps and plain JSON `state` (which holds "step")."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, data: TrainState, keep: int) -> Path:
    """Write `folder`/step-N atomically, then drop all but the newest `keep`. Returns the new folder.

    Raises CheckpointError in one line when the disk is full or not writable; the earlier checkpoints stay.
    """
    step = int(data.state["step"])
    target = folder / f"step-{step:06d}"
    partial = folder / f"{PARTIAL}{target.name}"
    with plain_errors(f"the checkpoint of step {step} in {folder}", folder, WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        partial.mkdir()
        try:
            save_tensors(partial / MODEL, data.model)
            save_tensors(partial / OPTIMIZER, data.optimizer)
            state = {"format": FORMAT, **data.state}
            (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            for file in (MODEL, OPTIMIZER, STATE):
                flush_to_disk(partial / file)
            flush_to_disk(partial)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            flush_to_disk(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _FOLDER.match(p.name) and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def load_checkpoint(path: Path, recipe: TrainRecipe) -> TrainState:
    """Read a checkpoint. Raises RecipeError if it is of another recipe, CheckpointError if files are damaged."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {state.get('format')!r}; this version reads {FORMAT}")
        now = recipe.hash(state["stage"] + 1)
        if state.get("recipe_hash") != now:
            raise RecipeError(
                f"{path} was made by another recipe (hash {state.get('recipe_hash')}, now {now}); "
                "resume with the recipe.yaml of that run, or choose another --output"
            )
        return TrainState(load_file(str(path / MODEL)), load_file(str(path / OPTIMIZER)), state)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read ({reason}); delete it to resume from the one before") from None


def remove_partial(folder: Path) -> None:
    """Delete what a killed run left half written in `folder`."""
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with plain_errors(path, path.parent, WAY_OUT):
        try:
            partial.write_text(text, encoding="utf-8")
            flush_to_disk(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
