"""Published sizes of the families of transformers, for costs with random weights; the builder makes tiny ones too.

Sizes are those of the published config files; a preset's tokenizer is one of bytes, its vocabulary size the published
one, so that the head costs what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from foveate.adapters import ADAPTERS
from foveate.adapters.vocabulary import byte_tokenizer
from foveate.data.families import family_spec, family_template, family_tokens
from foveate.nvila.initialise import empty, randomise
from foveate.registry import Registry

if TYPE_CHECKING:
    from foveate.adapters.hf import HfAdapter
    from foveate.data.spec import PreprocessSpec

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_QWEN25_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_QWEN2_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_QWEN2_7B = _QWEN2_05B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_MROPE = {
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
_LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class HfPreset:
    """One named size. family: an adapter's. vision, text, options: fields of its configs. spec: of its preprocessing,
    where they differ from the family's defaults."""

    family: str
    vision: dict[str, Any]
    text: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)


PRESETS = Registry("preset")
for _name, _preset in {
    "llava-1.5-7b": HfPreset("llava", _CLIP, _LLAMA_7B),
    "llava-next-7b": HfPreset(  # llava-v1.6-mistral-7b
        "llava_next",
        _CLIP,
        _LLAMA_7B
        | {
            "model_type": "mistral",
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "llava-onevision-0.5b": HfPreset(
        "llava_onevision", _SIGLIP_384, _QWEN2_05B | {"vocab_size": 151936, "tie_word_embeddings": True}
    ),
    "llava-onevision-7b": HfPreset("llava_onevision", _SIGLIP_384, _QWEN2_7B | {"vocab_size": 152064}),
    "qwen2.5-vl-3b": HfPreset(
        "qwen2_5_vl",
        _QWEN25_VISION | {"out_hidden_size": 2048},
        _MROPE
        | {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
        },
        {"tie_word_embeddings": True},
        {"max_area": 12_845_056},
    ),
    "qwen2.5-vl-7b": HfPreset(
        "qwen2_5_vl",
        _QWEN25_VISION | {"out_hidden_size": 3584},
        {name: value for name, value in _QWEN2_7B.items() if name != "model_type"} | _MROPE | {"vocab_size": 152064},
        spec={"max_area": 12_845_056},
    ),
    "internvl2.5-1b": HfPreset(
        "internvl",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "attention_bias": True,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        _QWEN2_05B | {"vocab_size": 151674},
        {"tie_word_embeddings": False},
    ),
    "smolvlm-256m": HfPreset(
        "smolvlm",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        {
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        },
        {"scale_factor": 4},
    ),
}.items():
    PRESETS.register(_name, _preset)


def config_of(preset: HfPreset, spec: PreprocessSpec, tokenizer: Any) -> Any:
    """The config of transformers; ids of special tokens come from `tokenizer`."""
    architecture = ADAPTERS.get(preset.family).model_class()
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids(spec.image_token)}
    if spec.video_token:
        ids["video_token_id"] = tokenizer.convert_tokens_to_ids(spec.video_token)
    known = architecture.config_class().to_dict()
    names = {name: known_name for name in ids if (known_name := _field(name, known))}
    text = preset.text | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return architecture.config_class(
        vision_config=dict(preset.vision),
        text_config=text
        | ({"pad_token_id": tokenizer.pad_token_id} if preset.family in ("smolvlm", "idefics3") else {}),
        **{names[name]: value for name, value in ids.items() if name in names},
        **preset.options,
    )


def _field(name: str, known: dict[str, Any]) -> str | None:
    """The family's own name of a config field: LLaVA says `image_token_index`."""
    return next((n for n in (name, name.replace("_id", "_index")) if n in known), None)


def describe(name: str) -> tuple[type[HfAdapter], Any, PreprocessSpec]:
    """(adapter class, config, preprocessing) of a preset, without a model."""
    preset = PRESETS.get(name)
    spec = family_spec(preset.family, **preset.spec)
    return ADAPTERS.get(preset.family), config_of(preset, spec, _tokenizer(spec)), spec


def _tokenizer(spec: PreprocessSpec) -> Any:
    tokenizer = byte_tokenizer(family_tokens(spec))
    tokenizer.chat_template = family_template(spec)
    return tokenizer


def build(
    preset: HfPreset,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    attn: str | None = None,
) -> HfAdapter:
    """The adapter around a model of random weights, with a tokenizer of bytes."""
    kind = ADAPTERS.get(preset.family)
    spec = family_spec(preset.family, **preset.spec)
    tokenizer = _tokenizer(spec)
    config = config_of(preset, spec, tokenizer)
    kind.check_config(config)
    return kind(randomise(empty(kind.model_class(), config, attn), dtype, device, seed), tokenizer, spec)
