"""What the families of transformers write around visual tokens, and which frames of a clip they take.

A picture's marker in the rendered chat (`spec.image_token`) becomes a text with one placeholder for each run of visual
tokens: views are told apart by text (Idefics3, SmolVLM, Qwen3-VL), wrapped (InternVL), or not at all. Frame rules are
those of each family's video processor. Sources: the processors of transformers 5.19 to 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from foveate.data.fit import Fit
from foveate.data.spec import PreprocessSpec
from foveate.data.video import VideoInfo
from foveate.errors import InputError, UnknownNameError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE = 24.0
"""Frames per second assumed where a prompt needs times and the clip's rate is not known."""

_NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_OPENAI: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD}
_QWEN: dict[str, Any] = {
    "mode": "native",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "downsample": 2,
    "temporal_patch": 2,
    "fps": 2.0,
    "min_frames": 4,
    "num_frames": 768,
}
_QWEN2: dict[str, Any] = {
    **_QWEN,
    **_OPENAI,
    "min_area": 56 * 56,
    "max_area": 28 * 28 * 1280,
    "video_min_area": 128 * 28 * 28,
    "video_max_area": 28 * 28 * 768,
}
_SPLIT: dict[str, Any] = {"mode": "split", "filter": "lanczos", "image_token": "<image>"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llava": {"mode": "crop", "image_token": "<image>", "tile_size": 336, "edge": 336, "downsample": 1, **_OPENAI},
    "llava_next": {
        "mode": "anyres",
        "image_token": "<image>",
        "tile_size": 336,
        "pinpoints": _NEXT,
        "downsample": 1,
        **_OPENAI,
    },
    "llava_onevision": {
        "mode": "anyres",
        "image_token": "<image>",
        "video_token": "<video>",
        "tile_size": 384,
        "pinpoints": tuple((384 * row, 384 * col) for row in range(1, 7) for col in range(1, 7)),
        "max_anyres": 9,
        "downsample": 1,
        "video_pool": ((1, 2, 2),),
        "num_frames": 32,
    },
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": {
        **_QWEN,
        "patch_size": 16,
        "min_area": 256 * 256,
        "max_area": 4096 * 4096,
        "video_min_area": 4096,
        "video_max_area": 25_165_824,
    },
    "internvl": {
        "mode": "dynamic",
        "image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    },
    "idefics3": {**_SPLIT, "tile_size": 364, "edge": 4 * 364},
    "smolvlm": {
        **_SPLIT,
        "video_token": "<video>",
        "tile_size": 512,
        "patch_size": 16,
        "downsample": 4,
        "edge": 2048,
        "video_edge": 2048,
        "fps": 1.0,
        "num_frames": 64,
    },
}
"""Fields of the spec that each family's published checkpoints share; a checkpoint's own files come before them."""

FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
VISION = ("<|vision_start|>", "<|vision_end|>")
IMG = ("<img>", "</img>")


def family_spec(family: str, **fields: Any) -> PreprocessSpec:
    """The spec of a family with its published defaults, and `fields` instead of them. Raises InputError."""
    if family not in DEFAULTS:
        raise UnknownNameError(f"unknown family {family!r}; known: {', '.join(DEFAULTS)}")
    basis = {"scales": (), "image_end": "", "repeat_frames": False, **DEFAULTS[family]}
    return PreprocessSpec(**{**basis, "family": family, **fields})


def family_tokens(spec: PreprocessSpec) -> tuple[str, ...]:
    """Special tokens of the family's prompts, placeholders first; text that spells them is removed from messages."""
    wraps = {"internvl": IMG, "idefics3": (FAKE, GLOBAL), "smolvlm": (FAKE, GLOBAL)}
    around = VISION if spec.family.startswith("qwen") else wraps.get(spec.family, ())
    return tuple(token for token in (spec.image_token, spec.video_token, *around) if token)


def family_template(spec: PreprocessSpec) -> str:
    """A plain chat template of ours, with the roles of ChatML, for a tokenizer that comes without one."""
    image, video = spec.image_token, spec.video_token
    if spec.family.startswith("qwen"):
        image, video = (token.join(VISION) for token in (image, video))
    elif spec.mode != "split":
        image, video = image + "\n", video + "\n"
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ " + repr(image) + " }}"
        "{% elif part['type'] == 'video' %}{{ " + repr(video) + " }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


# ---- text around visual tokens


def image_text(spec: PreprocessSpec, fit: Fit) -> tuple[str, tuple[int, ...]]:
    """(text, runs): the text that replaces a picture's marker, and how many visual tokens each placeholder in it is."""
    token = spec.image_token
    if spec.mode == "split":
        return _split_text(spec, fit)
    if spec.family == "internvl":
        return token.join(IMG), (fit.num_tokens,)
    return token, (fit.num_tokens,)


def video_text(spec: PreprocessSpec, fit: Fit, frames: Sequence[int], info: VideoInfo) -> tuple[str, tuple[int, ...]]:
    """(text, runs) of a clip's marker; frames: source indices, whole temporal patches."""
    units = fit.levels[0].units
    runs = (fit.num_tokens // units,) * units
    if spec.family == "internvl":
        body = spec.image_token.join(IMG)
        return "\n".join(f"Frame{i + 1}: {body}" for i in range(units)), runs
    if spec.family == "qwen3_vl":
        rate = info.fps or RATE
        groups = [frames[i : i + spec.temporal_patch] for i in range(0, len(frames), spec.temporal_patch)]
        times = [(group[0] / rate + group[-1] / rate) / 2 for group in groups]
        return "".join(f"<{time:.1f} seconds>{spec.video_token.join(VISION)}" for time in times), runs
    if spec.family == "smolvlm":
        return _smol_video(spec, frames, info), runs
    return spec.video_token, (fit.num_tokens,)


def _split_text(spec: PreprocessSpec, fit: Fit) -> tuple[str, tuple[int, ...]]:
    """Idefics3 and SmolVLM: each tile behind its place, a line feed after each row, the whole picture last."""
    cells = fit.levels[0].rows * fit.levels[0].cols
    tiles = [view for view in fit.views if view.scale]
    text = "".join(
        f"{FAKE}<row_{view.row + 1}_col_{view.col + 1}>{spec.image_token}"
        + ("\n" if after is None or after.row > view.row else "")
        for view, after in zip(tiles, [*tiles[1:], None])
    )
    whole = f"{FAKE}{GLOBAL}{spec.image_token}{FAKE}"
    return (f"{text}\n{whole}" if tiles else whole), (cells,) * len(fit.views)


def _smol_video(spec: PreprocessSpec, frames: Sequence[int], info: VideoInfo) -> str:
    rate = info.fps or RATE
    seconds = [index / rate for index in frames]
    length = int(info.num_frames / info.fps) if info.fps else int(seconds[-1])
    clock = f"{length // 3600}:{length // 60 % 60:02d}:{length % 60:02d}"
    if length >= 86400:
        days = length // 86400
        clock = f"{days} day{'s' if days > 1 else ''}, {length // 3600 % 24}:{clock.split(':', 1)[1]}"
    whole = f"{FAKE}{GLOBAL}{spec.image_token}{FAKE}"
    lines = "".join(f"\nFrame from {int(s // 60):02d}:{int(s % 60):02d}:{whole}" for s in seconds)
    intro = f"You are provided the following series of {in_words(len(frames))} frames"
    return f"{intro} from a {clock} [H:MM:SS] video.\n{lines}\n\n"


_UNITS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number from 1 to 999,999 in English words: "one hundred and twenty-three"."""
    if number < 20:
        return (_UNITS + _TEENS)[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_UNITS[number % 10]}" if number % 10 else "")
    if number < 1000:
        rest = f" and {in_words(number % 100)}" if number % 100 else ""
        return f"{_UNITS[number // 100]} hundred{rest}"
    joint = " and " if number % 1000 < 100 else ", "
    rest = joint + in_words(number % 1000) if number % 1000 else ""
    return f"{in_words(number // 1000)} thousand{rest}"


# ---- which frames of a clip


def pick_frames(info: VideoInfo, spec: PreprocessSpec, wanted: int | None, name: str = "the clip") -> tuple[int, ...]:
    """Source indices of the frames to take, whole temporal patches (the last frame is repeated to fill one).

    wanted: as many as this, however long the clip is (SmolVLM: at most one for each 1/fps seconds). Otherwise
    `spec.fps` decides, within `min_frames` and `num_frames`; where it is 0 or the clip's rate is not known,
    `num_frames` are spread over the clip. Never more than there are. Raises InputError when the family takes no clips.
    """
    if not spec.video_token:
        raise InputError(f"{name}: {spec.family} takes no clips; give some of its frames as pictures")
    total = info.num_frames
    if spec.family == "smolvlm":
        taken = _smol_frames(info, spec, wanted)
    else:
        count = _count(info, spec, wanted)
        if spec.family == "qwen3_vl":
            taken = [int(i) for i in np.linspace(0, total - 1, count).round()]
        else:
            shift = total / count / 2 if spec.family == "internvl" else 0.0
            taken = [int(shift + i * total / count) if shift else i * total // count for i in range(count)]
    fill = -len(taken) % spec.temporal_patch
    return (*taken, *taken[-1:] * fill)


def _count(info: VideoInfo, spec: PreprocessSpec, wanted: int | None) -> int:
    total, joined = info.num_frames, spec.temporal_patch if spec.family != "qwen3_vl" else 1
    if wanted is None and not info.fps and total <= spec.num_frames:
        return total  # a list of frames that somebody chose
    if wanted is not None:
        count = round(wanted / joined) * joined
    elif spec.fps > 0 and info.fps > 0:
        count = min(max(int(total / info.fps * spec.fps), spec.min_frames), spec.num_frames)
    else:
        count = spec.num_frames
    count = min(count, total)
    return max(count // joined * joined, 1)


def _smol_frames(info: VideoInfo, spec: PreprocessSpec, wanted: int | None) -> list[int]:
    """SmolVLM: at most one frame each 1/fps seconds; long clips lose a second at both ends."""
    total, most = info.num_frames, wanted or spec.num_frames
    first, last, count = 0, total - 1, min(most, total)
    if spec.fps > 0 and info.fps > 0:
        seconds = total / info.fps
        count = max(min(round(spec.fps * seconds), most), 1)
        if seconds - 2 > most * spec.fps:
            first, last = int(info.fps), min(int(total - info.fps), total - 1)
            if first >= last:
                first, last = 0, total - 1
    return [int(i) for i in np.unique(np.linspace(first, last, count, dtype=int))]
