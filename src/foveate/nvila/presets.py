"""Named sizes: the published NVILA models, and `nano`, the embedded model that learns in minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from foveate.data.spec import PreprocessSpec
from foveate.nvila.configuration import NvilaConfig
from foveate.nvila.initialise import init_weights_for_training, random_model
from foveate.nvila.modeling import NvilaForConditionalGeneration
from foveate.registry import Registry

# SigLIP so400m/14 at 448 px, without its pooling head
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
# Qwen2.5-Instruct; 151651 rows = Qwen's 151643 + end of text, two turn marks, [BOS], [PAD], sentinel, image, video
_QWEN = {
    "vocab_size": 151651,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_QWEN_1_5B = _QWEN | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_QWEN_7B = _QWEN | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_QWEN_14B = _QWEN | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}
_NANO_VISION = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 8,
    "hidden_act": "gelu",  # the exact GELU: half the time of the tanh form on a CPU
}
_NANO_TEXT = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


@dataclass(frozen=True)
class Preset:
    """One named model: config and preprocessing together. `trains_from_scratch` picks nano's initial values."""

    name: str
    text: dict[str, Any]
    spec: PreprocessSpec
    vision: dict[str, Any] = field(default_factory=lambda: _SIGLIP)
    options: dict[str, Any] = field(default_factory=dict)
    trains_from_scratch: bool = False

    def config(self, tokenizer: Any = None, **overrides: Any) -> NvilaConfig:
        """A fresh `NvilaConfig`; vocabulary and token ids come from `tokenizer` when it is given."""
        text = dict(self.text)
        options = self.options | overrides
        if tokenizer is not None:
            from foveate.nvila.checkpoint import media_token_ids

            text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
            text["bos_token_id"] = tokenizer.bos_token_id
            image, video = media_token_ids(tokenizer)
            options |= {"image_token_id": image, "video_token_id": video}
        return NvilaConfig(
            vision_config=SiglipVisionConfig(**self.vision),
            text_config=Qwen2Config(**text),
            preprocess=self.spec.to_dict(),
            **options,
        )


_S2 = PreprocessSpec()
_TILES = PreprocessSpec(mode="dynamic", scales=(), downsample=3)
_CLIPS = PreprocessSpec(mode="resize", scales=(), num_frames=256, video_pool=((8, 1, 1),))
_NANO = PreprocessSpec(
    mode="dynamic_s2",
    tile_size=64,
    patch_size=8,
    scales=(64, 128),
    downsample=2,
    min_tiles=1,
    max_tiles=6,
    num_frames=32,
    repeat_frames=False,
    video_pool=((2, 1, 1),),
)
_LITE = {"projector_type": "mlp_downsample_3x3_fix"}

PRESETS = Registry("preset")
for _preset in (
    Preset("nvila-8b", _QWEN_7B, _S2),
    Preset("nvila-15b", _QWEN_14B, _S2),
    Preset("nvila-lite-2b", _QWEN_1_5B, _TILES, options=_LITE),
    Preset("nvila-lite-8b", _QWEN_7B, _TILES, options=_LITE),
    Preset("nvila-8b-video", _QWEN_7B, _CLIPS, options={"projector_type": "mlp_downsample_2x2_fix"}),
    Preset(
        "nano",
        _NANO_TEXT,
        _NANO,
        vision=_NANO_VISION,
        options={
            "vision_feature_layer": -1,
            "projector_output_norm": True,
            "visual_position_embedding": (8, 8, 16),
            "image_token_id": 1022,
            "video_token_id": 1023,
        },
        trains_from_scratch=True,
    ),
):
    PRESETS.register(_preset.name, _preset)


def build(
    preset: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    *,
    tokenizer: Any = None,
    attn: str | None = None,
    **overrides: Any,
) -> NvilaForConditionalGeneration:
    """A model of random weights in the size of `preset`: for training from scratch, cost measurements and tests.

    tokenizer: gives vocabulary size and token ids. overrides: fields of `NvilaConfig`. `model.spec` is its
    preprocessing. Raises UnknownNameError for an unknown preset.
    """
    chosen: Preset = PRESETS.get(preset)
    model = random_model(chosen.config(tokenizer, **overrides), dtype, device, seed, attn)
    if chosen.trains_from_scratch:
        init_weights_for_training(model, seed)
    return model
