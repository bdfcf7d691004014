"""The kinds of scenes by name, and `draw`, which makes the scene of an index."""

from __future__ import annotations

from foveate.errors import InputError
from foveate.registry import Registry
from foveate.world.scene import Options, Scene, build, check_split
from foveate.world.vocabulary import DIGITS

_KINDS = Registry(
    "kind of scene",
    {
        "scene": "foveate.world.pictures:scene",
        "count": "foveate.world.pictures:count",
        "digits": "foveate.world.pictures:digits",
        "tags": "foveate.world.pictures:tags",
        "bars": "foveate.world.charts:bars",
        "lines": "foveate.world.charts:lines",
        "table": "foveate.world.charts:table",
        "pair": "foveate.world.pairs:pair",
        "dialogue": "foveate.world.pairs:dialogue",
        "clip_motion": "foveate.world.clips:motion",
        "clip_order": "foveate.world.clips:order",
        "clip_flash": "foveate.world.clips:flash",
        "clip_needle": "foveate.world.clips:needle",
        "single": "foveate.world.single:single",
        "boxes": "foveate.world.boxes:boxes",
        "clip_signs": "foveate.world.lessons:signs",
        "grid": "foveate.world.lessons:grid",
        "plot": "foveate.world.charts:plot",
        "inventory": "foveate.world.inventory:inventory",
    },
)
KINDS = (
    "scene",
    "count",
    "digits",
    "tags",
    "bars",
    "lines",
    "table",
    "pair",
    "dialogue",
    "clip_motion",
    "clip_order",
    "clip_flash",
    "clip_needle",
    "single",
    "boxes",
    "clip_signs",
    "grid",
    "plot",
    "inventory",
)
"""Every kind. `single` and `boxes` carry training-only questions in the manner of easy-VQA and NLVR."""
LESSONS = ("clip_signs", "grid", "plot", "inventory")
"""Kinds that lead up to a skill; they add no words that the tokenizer has to learn."""
CLIP_KINDS = tuple(kind for kind in KINDS if kind.startswith("clip_"))
MIN_FRAMES, MAX_FRAMES = 8, 32


def check_kind(kind: str) -> str:
    """`kind`, or UnknownNameError with the nearest names."""
    if kind not in KINDS:
        _KINDS.get(kind)
    return kind


def draw(
    kind: str,
    index: int,
    *,
    split: str = "train",
    seed: int | str = 0,
    size: int | None = None,
    frames: int | None = None,
    alphabet: str = DIGITS,
) -> Scene:
    """The scene number `index` of a kind, split and seed: the same on every machine; pixels are drawn when read.

    size: side of square pictures in pixels, None for the kind's own (128; `single` 64; `boxes` 400 x 100, where size
    is the height). frames: length of a clip, 8 to 32, None for a random one. alphabet: characters of labels and tables.
    Raises UnknownNameError for a kind, InputError for a split, size, length or alphabet that there is not.
    """
    generator = _KINDS.get(kind)
    check_split(split)
    if frames is not None and not MIN_FRAMES <= frames <= MAX_FRAMES:
        raise InputError(f"frames={frames}: clips of the drawn world have {MIN_FRAMES} to {MAX_FRAMES} frames")
    if size is not None and not 16 <= size <= 2048:
        raise InputError(f"size={size}: pictures of the drawn world are 16 to 2048 pixels wide")
    if len(set(alphabet)) < 2 or len(set(alphabet)) != len(alphabet) or not alphabet.isalnum():
        raise InputError(f"alphabet={alphabet!r}: give at least 2 different letters or digits")
    return build(kind, generator, (seed, index), split, Options(size, frames, alphabet), kind in CLIP_KINDS)
