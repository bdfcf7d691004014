"""Safetensors in and out, one tensor at a time: names of every layout to ours, shapes checked before any is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveate.errors import CheckpointError
from foveate.nvila.layouts import PARTS, read_json, write_json
from foveate.nvila.modeling import NvilaForConditionalGeneration

_log = logging.getLogger("foveate")
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_BYTES = 4_500_000_000


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: file and name in it."""

    path: Path
    key: str


def index_tensors(folder: Path, layout: str) -> dict[str, Stored]:
    """Our tensor names -> where they are stored. Raises CheckpointError for missing or unsafe weight files."""
    found: dict[str, Stored] = {}
    if layout == "three-folder":
        for part in PARTS:
            for stored in _stored(folder / part):
                found[canonical(stored.key, part)] = stored
        return found
    for stored in _stored(folder):
        part = next((p for p in PARTS if stored.key.startswith(p + ".")), None)
        found[canonical(stored.key, part) if part else stored.key] = stored
    return found


def canonical(key: str, part: str) -> str:
    """Our name of a tensor of one part, whatever wrappers its file names ("vision_model.", repeated part names)."""
    rest = key.rsplit(part + ".", 1)[-1]
    return f"{part}.{rest.removeprefix('vision_model.') if part == 'vision_tower' else rest}"


def load_into(
    model: NvilaForConditionalGeneration,
    tensors: dict[str, Stored],
    dtype: torch.dtype | None,
    device: str | torch.device,
    source: Path,
) -> None:
    """Give an empty (meta) model its weights, in `dtype` (None: as stored). Extra tensors are ignored, said once.

    Raises CheckpointError naming the first tensor that is missing or of another shape, with both shapes.
    """
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if model.config.text_config.tie_word_embeddings:
        expected.pop("llm.lm_head.weight", None)
    handles = {path: _open(path) for path in {s.path for s in tensors.values()}}
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing from {source}: expected shape {shape}, found none")
        stored = tensors[name]
        actual = tuple(handles[stored.path].get_slice(stored.key).get_shape())
        if actual != shape:
            raise CheckpointError(
                f"tensor {name!r} ({stored.key!r} in {stored.path}) has shape {actual}, the config expects {shape}"
            )
    extra = [n for n in tensors if n not in expected and n != "llm.lm_head.weight" and ".head." not in n]
    if extra:
        _log.warning("%s: %d tensors are not part of NVILA and were ignored, e.g. %s", source, len(extra), extra[0])
    state = {}
    parameters = {name for name, _ in model.named_parameters()}
    for name in expected:
        stored = tensors[name]
        value = handles[stored.path].get_tensor(stored.key)
        # packed integers and their scales are buffers: they stay as stored
        wanted = dtype if dtype is not None and name in parameters else value.dtype
        state[name] = value.to(device=device, dtype=wanted)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for buffers in (model.llm.model.rotary_emb, model.vision_tower.embeddings):
        for name, buffer in list(buffers.named_buffers(recurse=False)):
            setattr(buffers, name, buffer.to(device))


def stored_dtype(tensors: dict[str, Stored]) -> torch.dtype:
    """The dtype of the language model's embedding, which stands for the whole checkpoint."""
    stored = tensors.get("llm.model.embed_tokens.weight")
    return torch.float32 if stored is None else _open(stored.path).get_tensor(stored.key)[:1].dtype


def save_weights(model: NvilaForConditionalGeneration, folder: Path, layout: str) -> None:
    """Write the weights of one layout as safetensors, in shards of at most `SHARD_BYTES` with an index."""
    state = dict(model.state_dict())
    if model.config.text_config.tie_word_embeddings:
        state.pop("llm.lm_head.weight", None)
    if layout == "foveate":
        _write(folder, state)
        return
    published = {_published(name): value for name, value in state.items()}
    if layout == "flat":
        _write(folder, published)
        return
    for part in PARTS:
        prefix = part + "."
        _write(folder / part, {k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)})


def _published(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{part}.vision_model.{rest}" if part == "vision_tower" else name


def _write(folder: Path, state: dict[str, Tensor]) -> None:
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
        held = {key: value.detach().cpu().contiguous() for key, value in shard.items()}
        save_file(held, folder / name, metadata={"format": "pt"})


def _stored(folder: Path) -> Iterator[Stored]:
    for path in _weight_files(folder):
        with _open(path) as handle:
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                yield Stored(path, key)


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


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
