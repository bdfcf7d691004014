"""Files of a checkpoint: JSON and safetensors in and out, shapes checked before values are read, folders whole or not.

What every family of models shares. Names of tensors are the family's business: it maps them before it calls `fill`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.disk import read_json, umask
from foveate.errors import CheckpointError

_log = logging.getLogger("foveate")
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_BYTES = 4_500_000_000
CONFIG_ERRORS = (OSError, KeyError, TypeError, ValueError, AttributeError, StrictDataclassError)
"""What the config classes of transformers raise for values that they cannot take."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: file and name in it. octets: it is words of 32 bits and is read as bytes."""

    path: Path
    key: str
    octets: bool = False


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, keys sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def to_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name; None stays None. Raises CheckpointError for an unknown name."""
    if isinstance(value, str):
        if value not in DTYPES:
            raise CheckpointError(f"unknown dtype {value!r}; use auto, {', '.join(DTYPES)}")
        return DTYPES[value]
    return value


# ---- reading


def stored_tensors(folder: Path) -> Iterator[Stored]:
    """Every tensor of a folder's safetensors. Raises CheckpointError for missing, damaged or unsafe weight files."""
    for path in _weight_files(folder):
        with open_tensors(path) as handle:
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                yield Stored(path, key)


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, opened. Raises CheckpointError when it is not one."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def stored_dtype(tensors: dict[str, Stored], embedding: str) -> torch.dtype:
    """The dtype of the language model's embedding, which stands for the whole checkpoint."""
    stored = tensors.get(embedding)
    return torch.float32 if stored is None else open_tensors(stored.path).get_tensor(stored.key)[:1].dtype


def fill(
    model: nn.Module,
    tensors: dict[str, Stored],
    dtype: torch.dtype | None,
    device: str | torch.device,
    source: Path,
    *,
    tied: Collection[str] = (),
    ignored: Collection[str] = (),
    family: str = "the model",
) -> None:
    """Give an empty (meta) model its weights, in `dtype` (None: as stored), and put its buffers on `device`.

    tensors: our names -> where they lie. tied: names that share another tensor and need none. ignored: parts of names
    that are known to be of no use here; other tensors without a place are ignored too, said once.
    Raises CheckpointError naming the first tensor that is missing or of another shape, with both shapes.
    """
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}
    handles = {path: open_tensors(path) for path in {s.path for s in tensors.values()}}
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing from {source}: expected shape {shape}, found none")
        stored = tensors[name]
        actual = tuple(handles[stored.path].get_slice(stored.key).get_shape())
        if stored.octets:
            actual = (*actual[:-1], 4 * actual[-1])
        if actual != shape:
            raise CheckpointError(
                f"tensor {name!r} ({stored.key!r} in {stored.path}) has shape {actual}, the config expects {shape}"
            )
    known = expected.keys() | set(tied)
    extra = [name for name in tensors if name not in known and not any(part in name for part in ignored)]
    if extra:
        text = "%s: %d tensors are not part of %s and were ignored, e.g. %s"
        _log.warning(text, source, len(extra), family, extra[0])
    state = {}
    parameters = {name for name, _ in model.named_parameters()}
    for name in expected:
        stored = tensors[name]
        value = handles[stored.path].get_tensor(stored.key)
        value = value.view(torch.uint8) if stored.octets else value
        # packed integers and their scales are buffers: they stay as stored
        wanted = dtype if dtype is not None and name in parameters else value.dtype
        state[name] = value.to(device=device, dtype=wanted)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device != torch.device(device):
                setattr(module, name, buffer.to(device))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        names = sorted(set(read_json(folder / _INDEX).get("weight_map", {}).values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{folder / _INDEX} names {name!r}; shards must lie beside their index")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing, but {_INDEX} names it; fetch the checkpoint again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = next((p for pattern in _PICKLED for p in sorted(folder.glob(pattern))), None)
    if pickled is not None:
        raise CheckpointError(f"{pickled} is a pickle, which can run code; convert the checkpoint to safetensors")
    raise CheckpointError(f"{folder} holds no *.safetensors files")


# ---- writing


def write_tensors(folder: Path, state: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, in shards of at most `SHARD_BYTES` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        if size and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(value.nbytes for value in state.values())
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, shard in zip(names, shards):
        # one shard at a time on the CPU; a copy of its own for views, which safetensors refuses
        save_tensors(folder / name, {key: value.detach().cpu().contiguous() for key, value in shard.items()})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all: an older file stays until the new one is complete.

    tensors: on the CPU, contiguous, none a view of another. metadata: strings; by default {"format": "pt"}.
    Raises what the disk raises; call it inside `foveate.disk.plain_errors`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
        temporary.chmod(0o666 & ~umask())  # safetensors lets nobody else read its files
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh sibling folder that takes the place of `target` when the block ends well, and vanishes when not.

    Raises CheckpointError when `target` holds something that is not a checkpoint.
    """
    if target.exists() and not (target / "config.json").is_file() and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is no checkpoint; give a new folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
