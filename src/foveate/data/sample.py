"""One training or evaluation sample: media, and independent dialogues (branches) about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from foveate.errors import InputError

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ogv"))
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A picture that was not opened yet.

    data: path, encoded bytes, PIL image, or array [H, W], [H, W, 1|3|4] (uint8, uint16, bool, or float in 0..1).
    name: what errors and plans call it.
    """

    data: Any
    name: str = ""
    kind: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or _name(self.data, "image"))


@dataclass(frozen=True, eq=False)
class VideoSource:
    """A clip that was not opened yet.

    data: path of a file, path of a folder of frames, encoded bytes, array [T, H, W, 3] uint8, or a list of pictures
    (each as in `ImageSource`). fps: frames per second of a folder, array or list, when it is known.
    """

    data: Any
    name: str = ""
    fps: float = 0.0
    kind: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or _name(self.data, "video"))


Media = ImageSource | VideoSource


def as_media(value: Any, kind: str | None = None) -> Media:
    """An `ImageSource` or `VideoSource` around `value`; `kind` decides, or else the file name and the type do.

    Without `kind`: folders, clip file names, animated gifs, lists and 4-D arrays are clips, all else are pictures.
    """
    if isinstance(value, ImageSource | VideoSource):
        if kind not in (None, value.kind):
            raise InputError(f"{value.name}: this is {_a(value.kind)} where {_a(kind)} was expected")
        return value
    if isinstance(value, str) and value.startswith("data:"):
        from foveate.data.images import from_data_url

        guessed, data = from_data_url(value)
        return as_media(data, kind or guessed)
    if isinstance(value, str) and value.partition("://")[0].lower() in ("http", "https", "ftp"):
        raise InputError(f"{value[:120]}: addresses are not fetched here; download the file and give its path")
    if isinstance(value, str) and value.lower().startswith("file://"):
        value = value[len("file://") :]
    return (VideoSource if (kind or _guess(value)) == "video" else ImageSource)(value)


def _guess(value: Any) -> str:
    if isinstance(value, str | Path):
        path = Path(value)
        suffix = path.suffix.lower()
        if suffix == ".gif":
            from foveate.data.images import is_animated

            return "video" if is_animated(path) else "image"
        return "video" if suffix in VIDEO_SUFFIXES or path.is_dir() else "image"
    return "video" if isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4 else "image"


def _name(data: Any, kind: str) -> str:
    if isinstance(data, str | Path):
        return str(data)
    filename = getattr(data, "filename", "")
    return str(filename) if filename else f"<{kind}>"


def _a(kind: str | None) -> str:
    return {"image": "a picture", "video": "a clip"}.get(kind or "", str(kind))


@dataclass(frozen=True)
class Box:
    """A labelled object: half-open box in pixels of its picture, and what is known about it."""

    x0: float
    y0: float
    x1: float
    y1: float
    shape: str | None = None
    colour: str | None = None
    chars: str | None = None


Branch = list[tuple[str, str]]


@dataclass
class Sample:
    """Media and the dialogues about them. Each branch is an independent dialogue [(question, answer), ...].

    objects: per picture (or frame) its labelled boxes, where they are known. meta: skill, chance, difficulty, split …
    turns: the messages as they were given, for a dialogue that is not "media first, then text" (a system message, media
    inside the text or in a later turn); such a sample has one branch, and `messages` returns these turns.
    """

    id: str
    media: list[Media]
    branches: list[Branch]
    objects: list[list[Box]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] | None = None

    def messages(self, branch: int = 0, with_answer: bool = True) -> list[dict[str, Any]]:
        """OpenAI-style messages of one branch, media parts first in the first user turn.

        with_answer=False leaves the last answer out, so that the dialogue ends with the question to be answered.
        """
        if self.turns is not None:
            last_is_answer = bool(self.turns) and self.turns[-1].get("role") == "assistant"
            return list(self.turns[:-1] if last_is_answer and not with_answer else self.turns)
        out: list[dict[str, Any]] = []
        for i, (question, answer) in enumerate(self.branches[branch]):
            content: Any = question
            if i == 0 and self.media:
                content = [*media_parts(self.media), {"type": "text", "text": question}]
            out.append({"role": "user", "content": content})
            out.append({"role": "assistant", "content": answer})
        return out if with_answer else out[:-1]

    def question(self, branch: int = 0) -> str:
        """The last question of a branch, without its media."""
        return self.branches[branch][-1][0]

    def answer(self, branch: int = 0) -> str:
        """The last answer of a branch."""
        return self.branches[branch][-1][1]


def media_parts(media: Sequence[Media]) -> list[dict[str, Any]]:
    """Message parts that carry the media, in order."""
    return [{"type": m.kind, m.kind: m} for m in media]
