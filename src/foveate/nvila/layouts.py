"""What each published layout of NVILA says about its model: config files in, `NvilaConfig` out. Plain JSON, no classes.

    three-folder   llm/ vision_tower/ mm_projector/ and a top-level config.json (also the "-hf-preview" repositories)
    flat           config.json of model_type "nvila" or "nvila_lite", one set of weights (the "-hf" repositories)
    foveate        config.json of model_type "foveate_nvila", model.safetensors, preprocess.json

Unknown keys of foreign configs are ignored; a name of a class in a config (`_target_`) is looked up in a fixed table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Qwen2Config, SiglipVisionConfig

from foveate.data.spec import PreprocessSpec
from foveate.errors import CheckpointError, FoveateError
from foveate.files import CONFIG_ERRORS, read_json, write_json
from foveate.nvila.configuration import NvilaConfig, connector_ratio

LAYOUTS = ("foveate", "three-folder", "flat")
PARTS = ("llm", "vision_tower", "mm_projector")

_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "attention_dropout",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
)
_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
_ENCODERS = {"BasicImageEncoder": False, "BasicVideoEncoder": False, "TSPVideoEncoder": True}
_OPTIONS = ("projector_output_norm", "visual_position_embedding")


def detect(folder: Path) -> str:
    """The layout of a checkpoint folder, one of `LAYOUTS`. Raises CheckpointError when there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of an NVILA checkpoint")
    if all((folder / part / "config.json").is_file() for part in PARTS):
        return "three-folder"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json and no {'/ '.join(PARTS)}/ folders; it is no checkpoint")
    kind = read_json(folder / "config.json").get("model_type")
    if kind == NvilaConfig.model_type:
        return "foveate"
    if kind in ("nvila", "nvila_lite"):
        return "flat"
    raise CheckpointError(
        f"{folder}/config.json has model_type {kind!r}; NVILA checkpoints have {NvilaConfig.model_type}, nvila, "
        f"nvila_lite, or the folders {', '.join(PARTS)}"
    )


def read_config(folder: Path, layout: str, media_ids: tuple[int, int]) -> NvilaConfig:
    """The config of a checkpoint. media_ids: `<image>` and `<vila/video>` ids of its tokenizer, which always win.

    A `preprocess.json` beside the config wins over what the layout implies. Raises CheckpointError.
    """
    top = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    reader = {"foveate": _foveate, "three-folder": _three_folder, "flat": _flat}[layout]
    stored = read_json(folder / "preprocess.json") if (folder / "preprocess.json").is_file() else None
    try:
        fields = reader(folder, top, stored)
        return NvilaConfig(**fields | {"image_token_id": media_ids[0], "video_token_id": media_ids[1]})
    except FoveateError:
        raise
    except CONFIG_ERRORS as error:
        text = " ".join(repr(error).split())
        raise CheckpointError(f"{folder}/config.json cannot be read as {layout}: {text}") from error


def write_configs(config: NvilaConfig, folder: Path, layout: str) -> None:
    """The config files of one layout (weights and tokenizer are written elsewhere)."""
    spec = config.spec
    write_json(folder / "preprocess.json", spec.to_dict() | {"hash": spec.hash()})
    options = {name: getattr(config, name) for name in _OPTIONS}
    if layout == "foveate":
        config.architectures = ["NvilaForConditionalGeneration"]
        config.save_pretrained(folder)
    elif layout == "flat":
        head = {
            "architectures": ["NVILAForConditionalGeneration"],
            "model_type": "nvila" if spec.mode == "dynamic_s2" else "nvila_lite",
            "image_token_id": config.image_token_id,
            "video_token_id": config.video_token_id,
            "text_config": _text_dict(config),
            "vision_config": _vision_dict(config),
        }
        # Others hard-code these; a model that differs from the published constants still finds its way back
        extra = {"projector_type": config.projector_type, "vision_feature_layer": config.vision_feature_layer}
        write_json(folder / "config.json", head | extra | options)
    else:
        _write_three_folder(config, spec, folder, options)


# ---- reading


def _foveate(folder: Path, top: dict[str, Any], stored: dict[str, Any] | None) -> dict[str, Any]:
    known = NvilaConfig().to_dict().keys()
    fields = {k: v for k, v in top.items() if k in known and k not in ("model_type", "tie_word_embeddings")}
    if stored is not None:
        fields["preprocess"] = stored
    return fields | {"text_config": _text(top["text_config"]), "vision_config": _vision(top["vision_config"])}


def _flat(folder: Path, top: dict[str, Any], stored: dict[str, Any] | None) -> dict[str, Any]:
    lite = top["model_type"] == "nvila_lite"
    vision = _vision(top["vision_config"])
    side = vision.image_size
    spec = PreprocessSpec(  # the constants of the published code, in units of the tower's side
        mode="dynamic" if lite else "dynamic_s2",
        tile_size=side,
        patch_size=vision.patch_size,
        scales=() if lite else (side, 2 * side, 3 * side),
        downsample=3 if lite else 2,
    )
    return {
        "vision_config": vision,
        "text_config": _text(top["text_config"]),
        "projector_type": top.get("projector_type") or ("mlp_downsample_3x3_fix" if lite else "mlp_downsample"),
        "vision_feature_layer": top.get("vision_feature_layer", -2),
        "preprocess": stored or spec.to_dict(),
        **{name: top[name] for name in _OPTIONS if name in top},
    }


def _three_folder(folder: Path, top: dict[str, Any], stored: dict[str, Any] | None) -> dict[str, Any]:
    vision = _vision(read_json(folder / "vision_tower" / "config.json"))
    projector = read_json(folder / "mm_projector" / "config.json")
    kind = projector["mm_projector_type"]
    return {
        "vision_config": vision,
        "text_config": _text(read_json(folder / "llm" / "config.json")),
        "projector_type": kind,
        "vision_feature_layer": top.get("mm_vision_select_layer", -2),
        "preprocess": stored or _derived_spec(folder, top, vision, kind).to_dict(),
        **{name: projector[name] for name in _OPTIONS if name in projector},
    }


def _derived_spec(folder: Path, top: dict[str, Any], vision: SiglipVisionConfig, projector: str) -> PreprocessSpec:
    mode = top.get("image_aspect_ratio") or "resize"
    if top.get("dynamic_s2"):
        mode = "dynamic_s2"
    elif top.get("s2"):
        raise CheckpointError(f"{folder}/config.json asks for square S2 ('s2': true); only dynamic_s2 is supported")
    scales = top.get("s2_scales") or ()
    if isinstance(scales, str):
        scales = tuple(int(s) for s in scales.split(","))
    image, video = _encoder(top.get("image_encoder")), _encoder(top.get("video_encoder"))
    if image["end"] != video["end"]:
        raise CheckpointError(
            f"image_encoder ends with {image['end']!r} and video_encoder with {video['end']!r}; they must be equal"
        )
    preprocessor = folder / "vision_tower" / "preprocessor_config.json"
    pixels = read_json(preprocessor) if preprocessor.is_file() else {}
    return PreprocessSpec(
        # any other word means the image processor's own resize, which is the square resize
        mode=mode if mode in ("dynamic_s2", "dynamic", "pad") else "resize",
        tile_size=vision.image_size,
        patch_size=vision.patch_size,
        scales=scales if mode == "dynamic_s2" else (),
        resize_to_scale=top.get("s2_resize_output_to_scale_idx", 0) if mode == "dynamic_s2" else -1,
        downsample=connector_ratio(projector),
        min_tiles=top.get("min_tiles") or 1,
        max_tiles=top.get("max_tiles") or 12,
        mean=tuple(pixels.get("image_mean") or (0.5, 0.5, 0.5)),
        std=tuple(pixels.get("image_std") or (0.5, 0.5, 0.5)),
        num_frames=top.get("num_video_frames") or 8,
        fps=top.get("fps") or 0.0,
        video_pool=tuple(tuple(level) for level in video["pool"]),
        image_end=image["end"],
        video_sep=video["sep"],
    )


def _encoder(value: Any) -> dict[str, Any]:
    """Pool sizes and end tokens of an encoder entry (a dict, or the JSON text of one; None is the basic encoder)."""
    if isinstance(value, str):
        value = json.loads(value)
    value = value or {"_target_": "BasicVideoEncoder"}
    name = str(value.get("_target_")).rpartition(".")[2]
    if name not in _ENCODERS:
        raise CheckpointError(f"unknown encoder {value.get('_target_')!r}; known: {', '.join(_ENCODERS)}")
    if value.get("start_tokens"):
        raise CheckpointError(f"{name} has start_tokens {value['start_tokens']!r}; only end and separator tokens exist")
    return {
        "pool": value["pool_sizes"] if _ENCODERS[name] else (),
        "end": value.get("end_tokens", "\n") or "",
        "sep": value.get("sep_tokens") or "",
    }


def _text(data: dict[str, Any]) -> Qwen2Config:
    kind = data.get("model_type", "qwen2")
    if kind != "qwen2":
        raise CheckpointError(f"the language model has model_type {kind!r}; only qwen2 is supported")
    # rope_theta of older files and rope_parameters of newer ones never both: the newer one is complete
    drop = {"rope_theta", "rope_scaling"} if data.get("rope_parameters") else set()
    return Qwen2Config(**{k: data[k] for k in _TEXT_KEYS if data.get(k) is not None and k not in drop})


def _vision(data: dict[str, Any]) -> SiglipVisionConfig:
    return SiglipVisionConfig(**{k: data[k] for k in _VISION_KEYS if k in data})


# ---- writing


def _text_dict(config: NvilaConfig) -> dict[str, Any]:
    """Fields of Qwen2 as transformers 4 and 5 both read them."""
    data = config.text_config.to_dict()
    rope = data.get("rope_parameters") or {}
    fields = {k: data[k] for k in _TEXT_KEYS if k in data and k != "rope_parameters"}
    fields |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": rope.get("rope_theta")}
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if config.dtype is not None:
        fields["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return fields


def _vision_dict(config: NvilaConfig) -> dict[str, Any]:
    data = config.vision_config.to_dict()
    fields = {k: data[k] for k in _VISION_KEYS if k in data}
    return fields | {
        "model_type": "siglip_vision_model",
        "architectures": ["SiglipVisionModel"],
        "vision_use_head": False,
    }


def _write_three_folder(config: NvilaConfig, spec: PreprocessSpec, folder: Path, options: dict[str, Any]) -> None:
    video = {"_target_": "llava.model.encoders.BasicVideoEncoder"}
    if config.video_pool_sizes:
        video = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": config.video_pool_sizes}
        if spec.video_sep:
            video["sep_tokens"] = spec.video_sep
    image = {"_target_": "llava.model.encoders.BasicImageEncoder"}
    if spec.image_end != "\n":
        image["end_tokens"] = video["end_tokens"] = spec.image_end
    s2 = spec.mode == "dynamic_s2"
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "resume_path": folder.name,
            **{f"{part}_cfg": {"_name_or_path": part} for part in PARTS},
            "hidden_size": config.text_config.hidden_size,
            "mm_hidden_size": config.mm_hidden,
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_vision_select_feature": "cls_patch",
            "image_aspect_ratio": spec.mode,
            "dynamic_s2": s2,
            "s2": False,
            "s2_scales": ",".join(str(s) for s in spec.scales) or None,
            "s2_max_split_size": spec.tile_size,
            "s2_resize_output_to_scale_idx": spec.resize_to_scale,
            "min_tiles": spec.min_tiles,
            "max_tiles": spec.max_tiles,
            "num_video_frames": spec.num_frames,
            "fps": spec.fps,
            "image_encoder": json.dumps(image),
            "video_encoder": json.dumps(video),
        },
    )
    write_json(folder / "llm" / "config.json", _text_dict(config))
    write_json(folder / "vision_tower" / "config.json", _vision_dict(config))
    write_json(
        folder / "vision_tower" / "preprocessor_config.json",
        {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": list(spec.mean),
            "image_std": list(spec.std),
            "size": {"height": spec.tile_size, "width": spec.tile_size},
        },
    )
    head = {"mm_projector_type": config.projector_type, "model_type": "v2l_projector"}
    write_json(folder / "mm_projector" / "config.json", head | {"architectures": ["MultimodalProjector"]} | options)
