"""`HfAdapter`: what the families of transformers share - checkpoint folders, parts, prompts, the language model.

Models are loaded by the class that this package names for a family, never by one that a config names, from safetensors
only. A saved folder is a plain transformers checkpoint with two more files: `preprocess.json` and `recipe.json`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedTokenizerFast

from foveate.adapters.base import COMMON_SIGNALS, Adapter
from foveate.adapters.layouts import layout
from foveate.adapters.sizes import Sizes
from foveate.adapters.tower import PATCH_SIGNALS
from foveate.data.spec import PreprocessSpec
from foveate.errors import CheckpointError
from foveate.files import (
    CONFIG_ERRORS,
    Stored,
    fill,
    read_json,
    replacing,
    stored_dtype,
    stored_tensors,
    to_dtype,
    write_json,
    write_tensors,
)
from foveate.nvila.initialise import empty

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.data.plan import Plan

PATCHES_PER_PASS = {"cpu": 1 << 14, "cuda": 1 << 17}
"""Patches that go through the tower at once: on a CPU few enough for the caches, on a GPU enough to fill it."""
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files that a saved checkpoint takes over from the one it was loaded from, byte for byte."""


class HfAdapter(Adapter):
    """A model class of transformers. A family says:

    architecture: the name of its class. renames: (prefix in older checkpoints, prefix of the class), the first that
    fits is taken. embedding: our name of the input embedding.
    """

    architecture: ClassVar[str]
    renames: ClassVar[tuple[tuple[str, str], ...]] = (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("image_newline", "model.image_newline"),
    )
    embedding: ClassVar[str] = "model.language_model.embed_tokens.weight"

    def __init__(
        self, model: nn.Module, tokenizer: Any, spec: PreprocessSpec, files: dict[str, bytes] | None = None
    ) -> None:
        super().__init__(model, tokenizer, spec)
        self.files = files or {}

    # ---- the model

    @classmethod
    def model_class(cls) -> type[transformers.PreTrainedModel]:
        """The class of transformers."""
        return getattr(transformers, cls.architecture)

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Raise CheckpointError for a variant of the family that this adapter does not cover."""

    @classmethod
    @abstractmethod
    def sizes(cls, config: Any) -> Sizes:
        """What the tower and the connector of a model with this config cost."""

    @classmethod
    def describe(cls, path: Path) -> tuple[Any, PreprocessSpec]:
        """Config and preprocessing of a checkpoint folder, without its weights."""
        return cls._config(path), cls.read_spec(path)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str | torch.dtype,
        device: torch.device,
        attn: str | None,
        prepare: Callable[[dict[str, nn.Module]], None] | None = None,
    ) -> HfAdapter:
        config, spec = cls.describe(path)
        tokenizer = _tokenizer(path)
        cls.check_config(config)
        cls.check_tokens(tokenizer, spec, config, path)
        tensors = dict(_ours(cls.canonical(stored.key), stored) for stored in stored_tensors(path))
        model = empty(cls.model_class(), config, attn)
        if prepare is not None:
            prepare(cls.parts_of(model))
        tied = cls._tied(model)
        wanted = stored_dtype(tensors, cls.embedding) if dtype == "auto" else to_dtype(dtype)
        fill(
            model,
            _without(tensors, tied),
            wanted,
            device,
            path,
            tied=tied,
            ignored=(".head.", ".weight_shape"),
            family=cls.architecture,
        )
        model.config.dtype = wanted
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        files = {name: (path / name).read_bytes() for name in SIDE_FILES if (path / name).is_file()}
        return cls(model, tokenizer, spec, files)

    @classmethod
    def canonical(cls, key: str) -> str:
        """Our name of a stored tensor."""
        for old, new in cls.renames:
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        return key.replace("model.vision_tower.vision_model.", "model.vision_tower.")

    @classmethod
    def read_spec(cls, path: Path) -> PreprocessSpec:
        """The preprocessing of a checkpoint: ours, or that of transformers."""
        if (path / "preprocess.json").is_file():
            return PreprocessSpec.from_dict(read_json(path / "preprocess.json"))
        from foveate.data.hf import spec_from_hf

        return spec_from_hf(path)

    @classmethod
    def check_tokens(cls, tokenizer: Any, spec: PreprocessSpec, config: Any, path: Path) -> None:
        """Raise CheckpointError unless tokenizer, preprocessing and model mean the same by a placeholder."""
        rows = config.get_text_config().vocab_size
        if len(tokenizer) > rows:
            raise CheckpointError(f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows in {path}")
        found = tokenizer.convert_tokens_to_ids(spec.image_token)
        if found != config.image_token_id:
            raise CheckpointError(
                f"{spec.image_token!r} is token {found} of the tokenizer, but image_token_id is "
                f"{config.image_token_id} in {path}/config.json"
            )

    @classmethod
    def _config(cls, path: Path) -> Any:
        data = read_json(path / "config.json")
        kind = (data.get("quantization_config") or {}).get("quant_method")
        ours = kind == "compressed-tensors" and (path / "recipe.json").is_file()
        if data.get("quantization_config") and not ours:
            kind = kind or "an unknown method"
            raise CheckpointError(f"{path} is quantized with {kind}; give the folder of the unquantized checkpoint")
        try:
            config = cls.model_class().config_class.from_pretrained(path, local_files_only=True)
            if ours:  # our layers say themselves what they hold
                del config.quantization_config
            return config
        except CONFIG_ERRORS as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"{path}/config.json cannot be read as {cls.family}: {text}") from error

    @staticmethod
    def _tied(model: Any) -> tuple[str, ...]:
        """Names that share the input embedding and are stored once."""
        shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return ("lm_head.weight",) if shared else ()

    def save(
        self,
        path: Path,
        extra: dict[str, dict[str, Any]],
        *,
        tensors: dict[str, Tensor] | None = None,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        """As `Adapter.save`. tensors: in place of the model's state; quantization: what config.json says of them."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [self.architecture]
        if quantization is not None:
            config.quantization_config = quantization
        state = _without(dict(self.model.state_dict()) if tensors is None else tensors, self._tied(self.model))
        with replacing(path) as folder:
            config.save_pretrained(folder)
            write_tensors(folder, state)
            if self.model.generation_config is not None:
                self.model.generation_config.save_pretrained(folder)
            if "tokenizer.json" not in self.files:
                self.tokenizer.save_pretrained(folder)
            for name, content in self.files.items():
                (folder / name).write_bytes(content)
            self.write_spec(folder)
            for name, value in extra.items():
                write_json(folder / name, value)

    def write_spec(self, folder: Path) -> None:
        """Write the preprocessing into a checkpoint folder."""
        write_json(folder / "preprocess.json", self.spec.to_dict() | {"hash": self.spec.hash()})

    def with_model(self, model: nn.Module) -> HfAdapter:
        return type(self)(model, self.tokenizer, self.spec, self.files)

    def with_spec(self, spec: PreprocessSpec) -> HfAdapter:
        return type(self)(self.model, self.tokenizer, spec, self.files)

    @classmethod
    def parts_of(cls, model: Any) -> dict[str, nn.Module]:
        """See `Adapter.parts`. The output head is not among them, nor is it in "llm"."""
        inner = model.model
        return {
            "vision_tower": inner.vision_tower,
            "mm_projector": inner.multi_modal_projector,
            "llm": inner.language_model,
        }

    def parts(self) -> dict[str, nn.Module]:
        return self.parts_of(self.model)

    @property
    def signals(self) -> tuple[str, ...]:
        return (*COMMON_SIGNALS, *PATCH_SIGNALS)

    @property
    def placeholders(self) -> tuple[int, ...]:
        config = self.model.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        return tuple(index for index in ids if index is not None)

    # ---- one request

    def layout(self, plan: Plan) -> VisualLayout:
        return layout(plan)

    @property
    def newline(self) -> Tensor | None:
        """[D]: what stands at the placeholders of separators, in families that have such a vector."""
        return None

    def embed(
        self, input_ids: Tensor, features: Tensor, *, deep: Sequence[Tensor] = (), newlines: Tensor | None = None
    ) -> dict[str, Any]:
        embeds = self.model.get_input_embeddings()(input_ids)
        slots = torch.isin(input_ids, torch.tensor(self.placeholders, device=input_ids.device))
        if newlines is not None and self.newline is not None:
            slots = slots & ~newlines
            embeds = torch.where(newlines[..., None], self.newline.to(embeds), embeds)
        if features.shape[0]:
            where = slots.flatten().nonzero().squeeze(1)
            embeds = embeds.flatten(0, 1).index_copy(0, where, features.to(embeds)).view_as(embeds)
        return {"inputs_embeds": embeds}

    def forward(self, *, past_key_values: Cache, position_ids: Tensor, **inputs: Any) -> Tensor:
        # The decoder is called directly: the model around it would look for pictures, and keeps M-RoPE state on itself.
        out = self.text_model(past_key_values=past_key_values, position_ids=position_ids, use_cache=True, **inputs)
        return self.model.get_output_embeddings()(out.last_hidden_state[:, -1]).float()


def _without(tensors: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name not in names}


def _ours(name: str, stored: Stored) -> tuple[str, Stored]:
    """Our name of a tensor that is stored as compressed-tensors has it."""
    if name.endswith(".weight_packed"):
        return name.removesuffix(".weight_packed") + ".packed", replace(stored, octets=True)
    return name.removesuffix(".weight_scale") + ".scale" if name.endswith(".weight_scale") else name, stored


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path} has no tokenizer.json; copy the tokenizer files of the checkpoint there")
    try:
        # Not by the class that the config names: tokenizer.json says all there is to say.
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tokenizer in {path} cannot be loaded: {' '.join(str(error).split())}") from error
