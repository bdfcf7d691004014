"""The state of a running compression on disk: blocks that are done, hidden states in front of the next one.

A run that was killed goes on at the block where it was. Everything is written beside its place and renamed, so a file
is whole or not there; a state that belongs to another model, recipe or data set is thrown away, said once.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate.disk import plain_errors
from foveate.errors import CheckpointError
from foveate.files import save_tensors

_log = logging.getLogger("foveate")
_WAY_OUT = "make room and run the same command again, it resumes where it stopped"


class State:
    """A folder: key.json, and for each part next.json, surveys.json, block-N.safetensors and hidden-N/CALL.safetensors.

    key: what must be equal for the state to be taken up again. Raises CheckpointError when the disk refuses.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any]) -> None:
        self.folder = Path(folder)
        key = json.loads(json.dumps(key))
        stored = _read(self.folder / "key.json")
        if stored is not None and stored != key:
            changed = next((name for name in key if key[name] != stored.get(name)), "form")
            _log.warning("%s is the state of another run (its %s differs); starting anew", self.folder, changed)
        if stored != key:
            self.clear()
            self._write_json(self.folder / "key.json", key)
        self._next: dict[str, int] = {}

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def next_block(self, part: str) -> int:
        """The first block of `part` that is not done yet."""
        if part not in self._next:
            self._next[part] = int((_read(self.folder / part / "next.json") or {"block": 0})["block"])
        return self._next[part]

    def advance(self, part: str, block: int) -> None:
        """From now on `block` is next; hidden states in front of others go."""
        self._write_json(self.folder / part / "next.json", {"block": block})
        self._next[part] = block
        for old in (self.folder / part).glob("hidden-*"):
            if old.name != f"hidden-{block:04d}":
                shutil.rmtree(old, ignore_errors=True)

    def surveys(self, part: str) -> dict[int, Any]:
        """What `put_surveys` stored, or nothing."""
        return {int(k): v for k, v in (_read(self.folder / part / "surveys.json") or {}).items()}

    def put_surveys(self, part: str, found: dict[int, Any]) -> None:
        self._write_json(self.folder / part / "surveys.json", {str(k): v for k, v in found.items()})

    def put_hidden(self, part: str, block: int, call: int, hidden: Tensor) -> None:
        """Keep the input of `block` for one call."""
        self._write(self._hidden(part, block, call), {"hidden": hidden})

    def hidden(self, part: str, call: int) -> Tensor:
        """The input of the next block for one call, on the CPU."""
        return self._read(self._hidden(part, self.next_block(part), call))["hidden"]

    def put_block(self, part: str, index: int, module: nn.Module) -> None:
        """Keep a block that is done."""
        self._write(self.folder / part / f"block-{index:04d}.safetensors", module.state_dict())

    def load_block(self, part: str, index: int, module: nn.Module) -> None:
        """Give a block of the right form its tensors back."""
        tensors = self._read(self.folder / part / f"block-{index:04d}.safetensors")
        like = module.state_dict()
        for name in like.keys() & tensors.keys():
            tensors[name] = tensors[name].to(like[name].device)
        try:
            module.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{self.folder} cannot be resumed; remove it: {error}") from None
        module.requires_grad_(False)

    def _hidden(self, part: str, block: int, call: int) -> Path:
        return self.folder / part / f"hidden-{block:04d}" / f"{call:06d}.safetensors"

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        with plain_errors(path, self.folder, _WAY_OUT):
            save_tensors(path, held)

    def _write_json(self, path: Path, value: Any) -> None:
        temporary = path.with_suffix(".part")
        with plain_errors(path, self.folder, _WAY_OUT):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(value), encoding="utf-8")
            temporary.replace(path)

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read, so the run cannot be resumed: {error}") from None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
