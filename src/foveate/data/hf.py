"""The preprocessing spec and the chat template of a checkpoint in the layout of transformers, read from its JSON files.

Read: config.json, preprocessor_config.json, video_preprocessor_config.json, processor_config.json (older and newer
layouts), and for the text of token ids tokenizer.json or tokenizer_config.json. Nothing is imported or run. What cannot
be reproduced exactly is refused with one line.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from foveate.data.families import DEFAULTS, family_spec
from foveate.data.spec import PreprocessSpec
from foveate.disk import read_json
from foveate.errors import CheckpointError, InputError, UnsupportedError

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Filters of Pillow by the number that `resample` holds."""


def spec_from_hf(folder: str | Path) -> PreprocessSpec:
    """The spec of a checkpoint folder. Raises UnsupportedError for a rule that is not known, CheckpointError for files.

    A preprocess.json of ours is not looked at. What a file leaves out is the default of the family.
    """
    folder = Path(folder)
    config, own = _json(folder, "config.json"), _json(folder, "processor_config.json", {})
    family = str(config.get("model_type"))
    if family not in DEFAULTS:
        raise UnsupportedError(
            f"{folder}: model_type {family!r} has no preprocessing here; known: {', '.join(DEFAULTS)}"
        )
    image = own.get("image_processor") or _json(folder, "preprocessor_config.json", None)
    if image is None:
        raise CheckpointError(
            f"{folder} has neither preprocessor_config.json nor an image_processor in processor_config.json"
        )
    video = own.get("video_processor") or _json(folder, "video_preprocessor_config.json", image)
    fields = _pixels(image, family)
    tower = config.get("vision_config") or {}
    if patch := image.get("patch_size") or tower.get("patch_size"):
        fields["patch_size"] = int(patch[0] if isinstance(patch, list) else patch)
    fields |= _READERS[family](image, video, own, config)
    fields |= _tokens(folder, config, family)
    try:
        return family_spec(family, **fields)
    except InputError as error:
        raise UnsupportedError(f"{folder}: {error}") from None


def hf_chat_template(folder: str | Path) -> str | None:
    """The chat template of the checkpoint's processor, or of its tokenizer, or None. Raises CheckpointError."""
    folder = Path(folder)
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = _json(folder, name, {}).get("chat_template")
        if isinstance(found, list):  # several named ones
            found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
        if found:
            return found
    return None


def _json(folder: Path, name: str, *default: Any) -> Any:
    """The content of a JSON file; `default` when it is missing and one is given."""
    file = folder / name
    return default[0] if default and not file.is_file() else read_json(file)


# ---- what all families share


def _pixels(image: dict[str, Any], family: str) -> dict[str, Any]:
    """Normalisation and filter."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if image.get(step) is False:
            raise UnsupportedError(
                f"{family}: {step} is false; only pictures that are resized and normalised are known"
            )
    factor = image.get("rescale_factor")
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UnsupportedError(f"{family}: rescale_factor is {factor}; only 1/255 is known")
    fields: dict[str, Any] = {}
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        if image.get(name) is not None:
            value = image[name]
            fields[key] = tuple(value) if isinstance(value, list) else (value,) * 3
    if image.get("resample") is not None:
        number = image["resample"]
        if not isinstance(number, int) or not 0 <= number < len(RESAMPLE):
            raise UnsupportedError(f"{family}: resample is {number!r}; known: 0 to {len(RESAMPLE) - 1}, as in Pillow")
        fields["filter"] = RESAMPLE[number]
    return fields


def _tokens(folder: Path, config: dict[str, Any], family: str) -> dict[str, str]:
    """Texts of the placeholder tokens: the config's ids looked up in the tokenizer's files, or the family's own."""
    texts = {entry["id"]: entry["content"] for entry in _json(folder, "tokenizer.json", {}).get("added_tokens", ())}
    settings = _json(folder, "tokenizer_config.json", {})
    for number, entry in settings.get("added_tokens_decoder", {}).items():
        texts.setdefault(int(number), entry["content"])
    fields = {}
    for name in ("image_token", "video_token"):
        if name == "video_token" and family in ("internvl", "smolvlm"):
            continue  # the template's marker; the features of clips have the placeholder of pictures
        number = config.get(f"{name}_id", config.get(f"{name}_index"))
        if DEFAULTS[family].get(name) and number in texts:
            fields[name] = texts[number]
    return fields


def _square(value: Any, family: str, what: str) -> int:
    """Side of a square size given in any of the forms of transformers."""
    if isinstance(value, int):
        return value
    if isinstance(value, dict):
        sides = {value[k] for k in ("height", "width") if value.get(k)} or {value.get("shortest_edge")}
        if len(sides) == 1 and None not in sides:
            return int(sides.pop())
    raise UnsupportedError(f"{family}: {what} is {value!r}; only square views are known")


def _frames(video: dict[str, Any]) -> dict[str, Any]:
    """How a clip is sampled, where the file says it."""
    fields: dict[str, Any] = {}
    if video.get("num_frames") is not None:
        fields |= {"num_frames": int(video["num_frames"]), "fps": 0.0}
    elif video.get("fps") is not None:
        fields["fps"] = float(video["fps"])
    if video.get("max_frames") is not None and "num_frames" not in fields:
        fields["num_frames"] = int(video["max_frames"])
    if video.get("min_frames") is not None:
        fields["min_frames"] = int(video["min_frames"])
    return fields


def _same(video: dict[str, Any], image: dict[str, Any], family: str, *names: str) -> None:
    """Refuse clips that are prepared in another way than pictures; we have one set of numbers for both."""
    for name in names:
        if video.get(name) is not None and image.get(name) is not None and video[name] != image[name]:
            raise UnsupportedError(
                f"{family}: {name} is {image[name]!r} for pictures and {video[name]!r} for clips; one value is known"
            )


def _no_cls(own: dict[str, Any], config: dict[str, Any], family: str) -> None:
    """Refuse a visual CLS token among the features: it has no place in the picture."""
    strategy = config.get("vision_feature_select_strategy") or own.get("vision_feature_select_strategy") or "default"
    kind = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    if strategy != "default" and "clip" in kind and "siglip" not in kind:
        raise UnsupportedError(
            f"{family}: vision_feature_select_strategy {strategy!r} keeps CLS; only 'default' is known"
        )


def _check_length(length: Any, fields: dict[str, Any], config: dict[str, Any], family: str) -> None:
    """Refuse a number of tokens for each view that does not come from its size."""
    patch = (config.get("vision_config") or {}).get("patch_size") or DEFAULTS[family].get("patch_size", 14)
    side = fields["tile_size"] // int(patch[0] if isinstance(patch, list) else patch)
    ours = (-(-side // fields["downsample"])) ** 2
    if length is not None and int(length) != ours:
        raise UnsupportedError(f"{family}: {length} tokens a view, but views of {fields['tile_size']} px have {ours}")


# ---- families


def _llava(image: dict[str, Any], video: Any, own: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    _no_cls(own, config, "llava")
    size = image.get("size", {"shortest_edge": 224})
    if image.get("do_pad"):
        side = _square(size, "llava", "size")
        if image.get("do_center_crop", True) and _square(image.get("crop_size", side), "llava", "crop_size") != side:
            raise UnsupportedError(
                f"llava: do_pad with size {side} and crop_size {image['crop_size']}; they must be equal"
            )
        return {"mode": "pad", "tile_size": side}
    if image.get("do_center_crop", isinstance(size, int) or "shortest_edge" in size):
        edge = _square(size, "llava", "size")
        if isinstance(size, dict) and "shortest_edge" not in size:
            raise UnsupportedError(f"llava: size {size!r} with do_center_crop; only shortest_edge is known")
        return {"mode": "crop", "edge": edge, "tile_size": _square(image.get("crop_size", 224), "llava", "crop_size")}
    if not isinstance(size, dict) or "height" not in size:
        raise UnsupportedError(f"llava: size {size!r} without do_center_crop gives views of many shapes; none is known")
    return {"mode": "resize", "tile_size": _square(size, "llava", "size")}


def _anyres(image: dict[str, Any], config: dict[str, Any], family: str, tile: int) -> dict[str, Any]:
    size = _square(image.get("size", tile), family, "size")
    crop = image.get("crop_size") if image.get("do_center_crop", family == "llava_next") else None
    if crop is not None and _square(crop, family, "crop_size") != size:
        raise UnsupportedError(f"{family}: size {size} and crop_size {crop}; only equal ones are known")
    fields: dict[str, Any] = {"tile_size": size}
    points = image.get("image_grid_pinpoints") or config.get("image_grid_pinpoints")
    if points:
        fields["pinpoints"] = tuple((int(rows), int(cols)) for rows, cols in points)
    if config.get("image_grid_pinpoints") and points != config["image_grid_pinpoints"]:
        raise UnsupportedError(f"{family}: image_grid_pinpoints differ between config.json and the image processor")
    return fields


def _llava_next(image: dict[str, Any], video: Any, own: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    _no_cls(own, config, "llava_next")
    return _anyres(image, config, "llava_next", 224)


def _llava_onevision(
    image: dict[str, Any], video: dict[str, Any], own: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    fields = _anyres(image, config, "llava_onevision", 384)
    _same(video, image, "llava_onevision", "size", "image_mean", "image_std", "resample")
    aspect = str(config.get("vision_aspect_ratio") or own.get("vision_aspect_ratio") or "anyres_max_9")
    if not aspect.startswith("anyres_max_") or not aspect.rpartition("_")[2].isdigit():
        raise UnsupportedError(f"llava_onevision: vision_aspect_ratio is {aspect!r}; only anyres_max_N is known")
    return {**fields, "max_anyres": int(aspect.rpartition("_")[2]), **_frames(video)}


def _qwen(image: dict[str, Any], video: dict[str, Any], own: Any, config: dict[str, Any]) -> dict[str, Any]:
    family = str(config["model_type"])
    _same(
        video, image, family, "patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "resample"
    )
    fields: dict[str, Any] = _frames(video)
    for key, name in (("downsample", "merge_size"), ("temporal_patch", "temporal_patch_size")):
        if image.get(name) is not None:
            fields[key] = int(image[name])
    for source, names in ((image, ("min_area", "max_area")), (video, ("video_min_area", "video_max_area"))):
        size = source.get("size") or {}
        for key, edge, pixels in zip(names, ("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels")):
            value = source.get(pixels) or size.get(pixels) or size.get(edge)
            if value is not None:
                fields[key] = int(value)
    if video.get("cap_pixels_per_frame"):
        fields["video_tokens"] = int(video.get("max_video_tokens") or (768 if family == "qwen3_vl" else 128000))
    return fields


def _internvl(
    image: dict[str, Any], video: dict[str, Any], own: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    size = _square(image.get("size", 384), "internvl", "size")
    _same(video, image, "internvl", "size", "image_mean", "image_std", "resample")
    ratio = config.get("downsample_ratio", 0.5)
    if not (1 / ratio).is_integer():
        raise UnsupportedError(f"internvl: downsample_ratio is {ratio}; only one over a whole number is known")
    fields = {"tile_size": size, "downsample": int(1 / ratio), **_frames(video)}
    for key, name in (("min_tiles", "min_patches"), ("max_tiles", "max_patches")):
        if image.get(name) is not None:
            fields[key] = int(image[name])
    length = own.get("image_seq_length", config.get("image_seq_length"))
    _check_length(length, fields, config, "internvl")
    return fields


def _split(image: dict[str, Any], video: dict[str, Any], own: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    family = str(config["model_type"])
    most = image.get("max_image_size") or {"longest_edge": 364}
    size = image.get("size") or {"longest_edge": 4 * 364}
    if "longest_edge" not in size:
        raise UnsupportedError(f"{family}: size is {size!r}; only longest_edge is known")
    fields = {
        "tile_size": int(most["longest_edge"]),
        "edge": int(size["longest_edge"]),
        "downsample": int(config.get("scale_factor", 2)),
    }
    if image.get("do_image_splitting") is False:
        fields["max_tiles"] = 1
    length = own.get("image_seq_len")
    _check_length(length, fields, config, family)
    if family == "smolvlm":
        _same(video, image, family, "max_image_size", "image_mean", "image_std", "resample")
        sampling = video.get("video_sampling") or image.get("video_sampling") or {}
        edge = (sampling.get("video_size") or video.get("size") or size).get("longest_edge")
        fields["video_edge"] = int(edge)
        if sampling:
            fields |= {"num_frames": int(sampling["max_frames"]), "fps": float(sampling["fps"])}
    return fields


_READERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
    "idefics3": _split,
    "smolvlm": _split,
}
