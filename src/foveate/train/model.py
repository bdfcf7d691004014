"""The model and tokenizer a run starts from, and the model folder it leaves behind."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from foveate.disk import plain_errors
from foveate.errors import InputError, RecipeError
from foveate.nvila import PRESETS, build
from foveate.nvila.checkpoint import load, save
from foveate.train.checkpoint import PARTIAL, WAY_OUT, flush_to_disk
from foveate.train.config import TrainRecipe
from foveate.train.family import Family, load_family
from foveate.train.metrics import read_metrics
from foveate.train.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from foveate.train.step import Trainable

MAX_LOG_ROWS = 200
CHANGEABLE = ("num_frames", "fps", "repeat_frames", "video_pool", "min_tiles", "max_tiles", "max_pixels", "max_aspect")
"""Fields of the preprocessing spec that no weight depends on."""
FAMILY_CHANGEABLE = ("num_frames", "fps", "min_frames", "max_pixels", "max_aspect")
CHANGEABLE_BY_MODE = {
    "dynamic": ("min_tiles", "max_tiles"),
    "native": ("min_area", "max_area", "video_min_area", "video_max_area"),
    "split": ("edge", "video_edge"),
}
"""The same for families of transformers, of all and by `spec.mode`."""


def load_trainable(
    recipe: TrainRecipe, run_folder: Path, data_dir: str | Path | None = None
) -> tuple[Trainable, PreTrainedTokenizerBase]:
    """(model in float32, tokenizer) of a recipe: fresh weights for a preset's name, else those of a checkpoint folder.

    The tokenizer is kept in `run_folder`/tokenizer, so a resumed run has the same one. Raises RecipeError when the
    model is neither, or when a large preset is given without a tokenizer.
    """
    kept = run_folder / "tokenizer"
    if recipe.model in PRESETS:
        if (kept / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(kept)
        elif recipe.tokenizer:
            tokenizer = _read_tokenizer(recipe.tokenizer)
        elif PRESETS.get(recipe.model).trains_from_scratch:
            tokenizer = build_tokenizer(data_dir)
        else:
            raise RecipeError(f"model {recipe.model!r} starts from fresh weights and has no tokenizer; set tokenizer")
        model = build(recipe.model, tokenizer=tokenizer, seed=recipe.seed)
    elif Path(recipe.model).is_dir():
        family = load_family(Path(recipe.model))
        if family is not None:
            for stage in recipe.stages:
                family.check_stage(stage)
            model, tokenizer = family, family.adapter.tokenizer
        else:
            loaded = load(recipe.model, dtype=torch.float32)
            model, tokenizer = loaded.model, loaded.tokenizer
        if recipe.tokenizer:
            raise RecipeError(f"model {recipe.model} brings its own tokenizer; remove tokenizer {recipe.tokenizer!r}")
    else:
        names = ", ".join(PRESETS.names())
        raise RecipeError(f"model {recipe.model!r} is neither a preset ({names}) nor a folder that exists")
    if recipe.preprocess:
        _change_spec(model, recipe.preprocess)
    _keep_tokenizer(tokenizer, kept)
    return model.float(), tokenizer


def save_released(
    model: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainRecipe,
    target: Path,
    run_folder: Path,
) -> None:
    """Write the finished model to `target`, with the recipe and a thinned log of the run in training.json."""
    rows = read_metrics(run_folder / "metrics.jsonl")
    stride = -(-len(rows) // MAX_LOG_ROWS) or 1
    log = rows[:-1:stride] + rows[-1:]
    told = {key: value for key, value in recipe.to_dict().items() if key != "output"}  # no folder of this machine
    extra = {"training.json": {"recipe": told, "log": log}}
    with plain_errors(target, target.parent, WAY_OUT):
        if isinstance(model, Family):
            model.eval().adapter.save(target, extra)
        else:
            save(model.eval(), tokenizer, None, target, extra=extra)


def _keep_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Path) -> None:
    """Save the tokenizer of a run, whole or not at all, unless it is there already."""
    if kept.is_dir():
        return
    partial = kept.with_name(f"{PARTIAL}{kept.name}")
    with plain_errors(kept, kept.parent, WAY_OUT):
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            flush_to_disk(file)
        partial.rename(kept)


def _read_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    if not Path(folder).is_dir():
        raise RecipeError(f"tokenizer {folder!r} is not a folder")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _change_spec(model: Trainable, changes: dict[str, Any]) -> None:
    allowed = CHANGEABLE
    if isinstance(model, Family):
        allowed = FAMILY_CHANGEABLE + CHANGEABLE_BY_MODE.get(model.spec.mode, ())
    if unknown := [k for k in changes if k not in allowed]:
        known = ", ".join(allowed)
        raise RecipeError(f"recipe: preprocess cannot change {unknown[0]!r} of a model; it can change {known}")
    try:
        spec = dataclasses.replace(model.spec, **changes)
    except (InputError, TypeError) as error:
        raise RecipeError(f"recipe: preprocess: {error}") from None
    if isinstance(model, Family):
        model.adapter = model.adapter.with_spec(spec)
        return
    model.spec = spec
    model.config.preprocess = spec.to_dict()
    model.config.video_pool_sizes = [list(level) for level in spec.video_pool]
