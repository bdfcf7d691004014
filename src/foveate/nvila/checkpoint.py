"""Load, save and convert NVILA checkpoints of any published layout. Safetensors and JSON only; nothing is executed."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from foveate.data.spec import PreprocessSpec
from foveate.errors import CheckpointError
from foveate.files import read_json, replacing, to_dtype, write_json
from foveate.nvila.configuration import NvilaConfig
from foveate.nvila.initialise import empty_model
from foveate.nvila.layouts import LAYOUTS, detect, read_config, write_configs
from foveate.nvila.modeling import NvilaForConditionalGeneration
from foveate.nvila.weights import checkpoint_dtype, index_tensors, load_into, save_weights

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


class Loaded(NamedTuple):
    """A checkpoint in memory."""

    model: NvilaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    spec: PreprocessSpec


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | torch.device = "cpu",
    attn: str | None = None,
    prepare: Callable[[NvilaForConditionalGeneration], None] | None = None,
) -> Loaded:
    """Model, tokenizer and preprocessing from a folder in any layout of `foveate.nvila.layouts`.

    dtype: "auto" is the dtype of the stored language model, for all parts; a name or a torch dtype; None keeps each
    tensor as stored. attn: attention backend, SDPA when None. prepare: changes the still empty model before its
    tensors are read (a recipe puts quantized layers in place). The model is in evaluation mode and stops at the
    tokenizer's stop tokens. Raises CheckpointError naming what is missing, of another shape, or not safetensors.
    """
    folder = Path(path)
    layout = detect(folder)
    tokenizer = load_tokenizer(folder, layout)
    config = read_config(folder, layout, media_token_ids(tokenizer))
    tensors = index_tensors(folder, layout)
    wanted = checkpoint_dtype(tensors) if dtype == "auto" else to_dtype(dtype)
    model = empty_model(config, attn)
    if prepare is not None:
        prepare(model)
    load_into(model, tensors, wanted, device, folder)
    model.config.dtype = wanted or checkpoint_dtype(tensors)
    if len(tokenizer) > config.text_config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding {config.text_config.vocab_size} rows in {folder}"
        )
    model.generation_config = generation_config(tokenizer)
    return Loaded(model, tokenizer, config.spec)


def load_config(path: str | os.PathLike[str]) -> tuple[NvilaConfig, PreprocessSpec]:
    """Config and preprocessing of a checkpoint in any layout, without its weights."""
    folder = Path(path)
    layout = detect(folder)
    config = read_config(folder, layout, media_token_ids(load_tokenizer(folder, layout)))
    return config, config.spec


def save(
    model: NvilaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    spec: PreprocessSpec | None,
    path: str | os.PathLike[str],
    *,
    layout: str = "foveate",
    extra: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all; an older checkpoint at `path` is replaced.

    spec: None takes the model's own. extra: further JSON files by name (recipe, training notes). Returns the folder.
    Raises CheckpointError if `path` holds something that is not a checkpoint, or for an unknown layout.
    """
    target = Path(path)
    if layout not in LAYOUTS:
        raise CheckpointError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    config = copy.deepcopy(model.config)
    if spec is not None and spec != config.spec:
        config.preprocess = spec.to_dict()
        config.video_pool_sizes = [list(level) for level in spec.video_pool]
    with replacing(target) as folder:
        _write_model(model, config, folder, layout)
        tokenizer.save_pretrained(_tokenizer_folder(folder, layout))
        generation_config(tokenizer).save_pretrained(_tokenizer_folder(folder, layout))
        for name, value in (extra or {}).items():
            write_json(folder / name, value)
    return target


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], layout: str = "foveate") -> Path:
    """Write the checkpoint at `src` in another layout; tensors and tokenizer files stay the same, bit for bit.

    Raises CheckpointError as `load` and `save` do, and for quantized weights.
    """
    source = Path(src)
    if layout not in LAYOUTS:
        raise CheckpointError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    try:
        model, tokenizer, _ = load(source, dtype=None)
    except CheckpointError as error:
        if not (source / "recipe.json").is_file():
            raise
        recipe = read_json(source / "recipe.json").get("recipe")
        raise CheckpointError(
            f"{source} holds weights that {recipe!r} has changed, which other layouts have no place for; convert the "
            f"model it was made from ({error})"
        ) from None
    tokenizer_folder = _tokenizer_folder(source, detect(source))
    with replacing(Path(dst)) as folder:
        _write_model(model, model.config, folder, layout)
        goal = _tokenizer_folder(folder, layout)
        goal.mkdir(parents=True, exist_ok=True)
        generation_config(tokenizer).save_pretrained(goal)
        for name in _TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, goal / name)
        if (source / "recipe.json").is_file():
            shutil.copyfile(source / "recipe.json", folder / "recipe.json")
    return Path(dst)


def load_tokenizer(folder: Path, layout: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, from local files, without remote code."""
    where = _tokenizer_folder(folder, layout)
    if not any((where / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{where} has no tokenizer.json; copy the tokenizer files of the checkpoint there")
    try:
        if (where / "tokenizer.json").is_file() and _tokenizer_class(where) in _GENERIC_TOKENIZERS:
            # Not by model type: the class of Qwen2 would add an end token of its own.
            return PreTrainedTokenizerFast.from_pretrained(where, local_files_only=True)
        # a config of ours keeps transformers from reading the checkpoint's, whose model_type it may not know
        return AutoTokenizer.from_pretrained(
            where, config=Qwen2Config(), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tokenizer in {where} cannot be loaded: {' '.join(str(error).split())}") from error


def _tokenizer_class(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    return read_json(path).get("tokenizer_class") if path.is_file() else None


def media_token_ids(tokenizer: Any) -> tuple[int, int]:
    """Ids of `<image>` and `<vila/video>`; raises CheckpointError if the tokenizer lacks them."""
    ids = []
    for token in ("<image>", "<vila/video>"):
        found = tokenizer.get_vocab().get(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no {token!r} token; add it and resize the embeddings")
        ids.append(found)
    return ids[0], ids[1]


def generation_config(tokenizer: Any) -> GenerationConfig:
    """Greedy decoding that ends at the tokenizer's stop tokens."""
    from foveate.data.chat import stop_token_ids

    stops = stop_token_ids(tokenizer)
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else (stops[0] if stops else None),
    )


def _write_model(model: NvilaForConditionalGeneration, config: NvilaConfig, folder: Path, layout: str) -> None:
    write_configs(config, folder, layout)
    save_weights(model, folder, layout)


def _tokenizer_folder(folder: Path, layout: str) -> Path:
    return folder / "llm" if layout == "three-folder" else folder
