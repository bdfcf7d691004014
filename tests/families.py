"""A tiny model of random weights of every family, for tests that must hold for all of them.

    from families import FAMILIES, picture, tiny

`tiny(family)` is made once a session and shared: do not change it. Its weights are large enough that pictures,
positions and attention decide the logits.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image

import foveate
from foveate.adapters.presets import HfPreset, build
from foveate.data.sample import VideoSource
from foveate.vlm import VLM

_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_SQUARE = {**_VISION, "image_size": 32, "patch_size": 8}
_CLIP = {**_SQUARE, "model_type": "clip_vision_model", "projection_dim": 16}
_SIGLIP = {**_SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False}
_QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
}
_TEXT = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_LLAMA, _QWEN2 = {**_TEXT, "model_type": "llama"}, {**_TEXT, "model_type": "qwen2"}
_MROPE = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_TILES = {"tile_size": 32, "patch_size": 8}
_PINPOINTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
_NATIVE = {
    "patch_size": 4,
    "min_area": 16 * 16,
    "max_area": 48 * 48,
    "video_min_area": 16 * 16,
    "video_max_area": 32 * 32,
    "num_frames": 8,
}

PRESETS = {
    "llava": HfPreset("llava", _CLIP, _LLAMA, spec={**_TILES, "edge": 32}),
    "llava_next": HfPreset(
        "llava_next",
        _CLIP,
        {**_TEXT, "model_type": "mistral", "sliding_window": None},
        {"image_grid_pinpoints": [list(p) for p in _PINPOINTS]},
        {**_TILES, "pinpoints": _PINPOINTS},
    ),
    "llava_onevision": HfPreset(
        "llava_onevision",
        _SIGLIP,
        _QWEN2,
        {"image_grid_pinpoints": [list(p) for p in _PINPOINTS], "vision_aspect_ratio": "anyres_max_2"},
        {**_TILES, "pinpoints": _PINPOINTS, "max_anyres": 2, "num_frames": 4},
    ),
    "qwen2_vl": HfPreset(
        "qwen2_vl",
        {"depth": 3, "embed_dim": 32, "num_heads": 4, "patch_size": 4, "hidden_size": 32, "mlp_ratio": 2},
        _MROPE,
        spec=_NATIVE,
    ),
    "qwen2_5_vl": HfPreset(
        "qwen2_5_vl", {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}, _MROPE, spec=_NATIVE
    ),
    "qwen3_vl": HfPreset(
        "qwen3_vl",
        {**_QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        {**_MROPE, "head_dim": 8},
        spec={**_NATIVE, "video_max_area": 8 * 32 * 32},
    ),
    "internvl": HfPreset(
        "internvl",
        {**_VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        _QWEN2,
        spec={**_TILES, "max_tiles": 4, "num_frames": 4},
    ),
    "smolvlm": HfPreset(
        "smolvlm", _SQUARE, _LLAMA, spec={**_TILES, "downsample": 2, "edge": 64, "video_edge": 32, "num_frames": 4}
    ),
    "idefics3": HfPreset("idefics3", _SQUARE, _LLAMA, spec={**_TILES, "downsample": 2, "edge": 64}),
}
FAMILIES = tuple(PRESETS)
"""The families of transformers; "nvila" works with `tiny` too."""
CLIPS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
"""Families that take clips."""


@cache
@torch.inference_mode(False)  # whoever asks first: weights made in inference mode could never be differentiated
def tiny(family: str) -> VLM:
    """A tiny random model of a family (or "nvila"), float32 on the CPU, in evaluation mode."""
    if family == "nvila":
        return foveate.load("nano", random_weights=True, device="cpu")
    adapter = build(PRESETS[family])
    spread(adapter.model)
    adapter.model.eval().requires_grad_(False)
    return VLM(adapter, f"tiny-{family}")


@torch.no_grad()
def spread(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights as large as their fan-in allows, biases and norms off their usual values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(1 + 0.2 * noise)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def picture(seed: int = 0, width: int = 60, height: int = 40) -> Image.Image:
    """A picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def clip(seed: int = 0, frames: int = 6, width: int = 48, height: int = 32) -> VideoSource:
    """A clip of noise, two frames a second."""
    noise = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return VideoSource(noise, fps=2.0)
