"""Tiny checkpoints (files, no weights) of each family of transformers, and its own processor run on Pillow alone."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.adapters.vocabulary import byte_tokenizer
from foveate.data.families import DEFAULTS, IMG, VISION, family_spec, family_template, family_tokens
from foveate.data.hf import spec_from_hf
from foveate.data.sample import VideoSource
from foveate.data.spec import PreprocessSpec

MODELS = "transformers.models."
TILES = [[56 * rows, 56 * cols] for rows in range(1, 4) for cols in range(1, 4)]
QWEN = {"min_pixels": 28 * 28 * 3, "max_pixels": 28 * 28 * 30}
SPLIT = {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 56}}
FILES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # family: image processor, processor, the image processor's fields, fields of config.json
    "llava": (
        "clip.image_processing_pil_clip:CLIPImageProcessorPil",
        "llava.processing_llava:LlavaProcessor",
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        {"vision_config": {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}},
    ),
    "llava_next": (
        "llava_next.image_processing_pil_llava_next:LlavaNextImageProcessorPil",
        "llava_next.processing_llava_next:LlavaNextProcessor",
        {
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "image_grid_pinpoints": TILES[:6],
        },
        {
            "vision_config": {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14},
            "image_grid_pinpoints": TILES[:6],
        },
    ),
    "llava_onevision": (
        "llava_onevision.image_processing_pil_llava_onevision:LlavaOnevisionImageProcessorPil",
        "llava_onevision.processing_llava_onevision:LlavaOnevisionProcessor",
        {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": TILES, "image_mean": [0.5] * 3},
        {
            "vision_config": {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 11},
            "vision_aspect_ratio": "anyres_max_2",
            "image_grid_pinpoints": TILES,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
        "qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor",
        QWEN,
        {},
    ),
    "qwen3_vl": (
        "qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
        "qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor",
        {**QWEN, "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {},
    ),
    "internvl": (
        "got_ocr2.image_processing_pil_got_ocr2:GotOcr2ImageProcessorPil",
        "internvl.processing_internvl:InternVLProcessor",
        {"size": {"height": 56, "width": 56}, "min_patches": 1, "max_patches": 6},
        {"vision_config": {"model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]}},
    ),
    "idefics3": (
        "idefics3.image_processing_pil_idefics3:Idefics3ImageProcessorPil",
        "idefics3.processing_idefics3:Idefics3Processor",
        SPLIT,
        {"scale_factor": 2, "vision_config": {"image_size": 56, "patch_size": 14}},
    ),
    "smolvlm": (
        "smolvlm.image_processing_pil_smolvlm:SmolVLMImageProcessorPil",
        "smolvlm.processing_smolvlm:SmolVLMProcessor",
        SPLIT,
        {"scale_factor": 4, "vision_config": {"image_size": 56, "patch_size": 7}},
    ),
}
FAMILIES = tuple(FILES)


class Tiny:
    """A family's folder of files, what we read from it, and the processor of transformers for it."""

    def __init__(self, family: str, folder: Path, spec: PreprocessSpec, tokenizer: Any, processor: Any) -> None:
        self.family, self.folder, self.spec, self.tokenizer, self.processor = family, folder, spec, tokenizer, processor

    def reference(self, messages: Sequence[dict[str, Any]], pictures: list[Image.Image]) -> Any:
        """What transformers makes of messages with parts {"type": "image"} and the pictures, as numpy arrays."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images: Any = pictures if self.family in ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl") else [pictures]
        return self.processor(images=images or None, text=[text], return_tensors="np")


class Clips(dict):
    """What a processor asks of its video processor; the real ones need torchvision."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self.__dict__.update(fields)


def tokenizer_of(spec: PreprocessSpec) -> Any:
    """Bytes, the family's special tokens under the names its processor asks for, and a plain template."""
    tokenizer = byte_tokenizer(
        (*family_tokens(spec), *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)))
    )
    tokenizer.chat_template = family_template(spec)
    names = {"image_token": spec.image_token, "video_token": spec.video_token}
    if spec.family.startswith("qwen"):
        names |= dict(zip(("vision_start_token", "vision_end_token"), VISION))
    if spec.family == "internvl":
        names |= dict(zip(("start_image_token", "end_image_token"), IMG), context_image_token=spec.image_token)
    for name, token in names.items():
        if token:
            object.__setattr__(tokenizer, name, token)
            object.__setattr__(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def tiny(family: str, folder: Path, patch: pytest.MonkeyPatch, image: str = "", **changes: Any) -> Tiny:
    """The tiny checkpoint of a family, written to `folder`. changes: fields of its image processor, or of `image`."""
    import json

    from transformers.processing_utils import ProcessorMixin

    image_name, processor_name, image_fields, config = FILES[family]
    made = _load(image or image_name)(**{**image_fields, **changes})
    tokenizer = tokenizer_of(family_spec(family))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = {f"{n}_id": getattr(tokenizer, f"{n}_id", None) for n in ("image_token", "video_token")}
    (folder / "config.json").write_text(json.dumps({"model_type": family, **ids, **config}))
    spec = spec_from_hf(folder)
    patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)  # no clips without torchvision
    more: dict[str, Any] = {"chat_template": tokenizer.chat_template}
    if family in ("llava", "llava_next"):
        more |= {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if DEFAULTS[family].get("video_token"):
        more["video_processor"] = Clips(
            merge_size=2, temporal_patch_size=2, model_input_names=[], num_frames=None, fps=None
        )
    lengths = {"llava_onevision": "num_image_tokens", "internvl": "image_seq_length"}
    if family in (*lengths, "idefics3", "smolvlm"):
        more[lengths.get(family, "image_seq_len")] = spec.token_side**2
    if family == "llava_onevision":
        more |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"}
    if family == "smolvlm":
        from foveate.data.families import in_words

        patch.setattr(f"{MODELS}smolvlm.processing_smolvlm.num2words", in_words)
    return Tiny(family, folder, spec, tokenizer, _load(processor_name)(made, tokenizer, **more))


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(MODELS + module), attribute)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a slope, so that each filter, cut and shift shows."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed + 7 * width + height).integers(0, 256, (height, width))
    return Image.fromarray(np.stack([x % 256, y % 256, noise], -1).astype(np.uint8))


def ask(*pictures: Any, text: str = "Which?", kind: str = "image") -> list[dict[str, Any]]:
    """A system message, and a user's with media and a text."""
    parts = [{"type": kind, kind: item} for item in pictures]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
    ]


def bare(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages in the form of transformers: parts everywhere, media without payload."""
    return [
        {
            "role": m["role"],
            "content": [{"type": "text", "text": m["content"]}]
            if isinstance(m["content"], str)
            else [part if part["type"] == "text" else {"type": part["type"]} for part in m["content"]],
        }
        for m in messages
    ]


def frames_of(frames: int, width: int = 64, height: int = 40, fps: float = 0.0) -> VideoSource:
    """A clip of so many frames that all differ."""
    return VideoSource([picture(width, height, seed) for seed in range(frames)], fps=fps)
