"""NVILA's tensors in and out: names of every layout to ours, and back."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.files import Stored, fill, stored_dtype, stored_tensors, write_tensors
from foveate.nvila.layouts import PARTS
from foveate.nvila.modeling import NvilaForConditionalGeneration

EMBEDDING = "llm.model.embed_tokens.weight"


def index_tensors(folder: Path, layout: str) -> dict[str, Stored]:
    """Our tensor names -> where they are stored. Raises CheckpointError for missing or unsafe weight files."""
    found: dict[str, Stored] = {}
    if layout == "three-folder":
        for part in PARTS:
            for stored in stored_tensors(folder / part):
                found[canonical(stored.key, part)] = stored
        return found
    for stored in stored_tensors(folder):
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
    tied = ("llm.lm_head.weight",) if model.config.text_config.tie_word_embeddings else ()
    fill(model, tensors, dtype, device, source, tied=tied, ignored=("llm.lm_head.weight", ".head."), family="NVILA")


def checkpoint_dtype(tensors: dict[str, Stored]) -> torch.dtype:
    """The dtype of the stored language model, which stands for the whole checkpoint."""
    return stored_dtype(tensors, EMBEDDING)


def save_weights(model: NvilaForConditionalGeneration, folder: Path, layout: str) -> None:
    """Write the weights of one layout as safetensors, in shards of at most `SHARD_BYTES` with an index."""
    state = dict(model.state_dict())
    if model.config.text_config.tie_word_embeddings:
        state.pop("llm.lm_head.weight", None)
    if layout == "foveate":
        write_tensors(folder, state)
        return
    published = {_published(name): value for name, value in state.items()}
    if layout == "flat":
        write_tensors(folder, published)
        return
    for part in PARTS:
        prefix = part + "."
        write_tensors(folder / part, {k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)})


def _published(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{part}.vision_model.{rest}" if part == "vision_tower" else name
