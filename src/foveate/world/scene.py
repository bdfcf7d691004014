"""What a generator makes: a `Scene` with pictures, questions, answers and ground truth; and which split it falls in.

Train, validation and test are disjoint by construction: the hash of a scene's canonical ground truth (what is where, on
a coarse grid, without the jitter of pixels and shades) names its split, and `draw` rejects layouts until one falls in
the split that was asked for. No seed can therefore draw a test scene for training.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from foveate.errors import InputError
from foveate.world.vocabulary import DIGITS

if TYPE_CHECKING:
    from foveate.data.sample import Sample

SPLITS = {"train": (0, 192), "validation": (192, 224), "test": (224, 256)}
"""Half-open ranges of the first byte of a scene's signature: three quarters train, an eighth each of the others."""

Turn = tuple[str, str]


class Box(NamedTuple):
    """Ground truth of one thing in one image, in pixels of the drawn image, half open: x0 <= x < x1.

    A string is one Box a character: `chars` holds that character and `index` its place in the string.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    shape: str | None = None
    colour: str | None = None
    chars: str | None = None
    index: int = 0


class Question(NamedTuple):
    """One scored answer: the last of `turns`; turns before it are history that is given with their answers.

    chance: what a guesser scores who knows the question's text but not the picture. difficulty: of the skill (the
    count, characters of a string, frames of a clip, otherwise things in the picture). form: which template, so that
    balance and chance are known per template. auxiliary: asked in training only, never scored; a scene's other
    questions never tell each other's answers.
    """

    skill: str
    turns: tuple[Turn, ...]
    chance: float
    difficulty: int = 1
    form: str = ""
    auxiliary: bool = False

    @property
    def text(self) -> str:
        return self.turns[-1][0]

    @property
    def answer(self) -> str:
        return self.turns[-1][1]


@dataclass(frozen=True)
class Options:
    """What a generator may be told. size: side in pixels (None: the kind's own). frames: length of clips."""

    size: int | None = None
    frames: int | None = None
    alphabet: str = DIGITS


Picture = tuple[list[np.ndarray], list[list[Box]]]


class Draft(NamedTuple):
    """A layout before its split is known: ground truth first, questions and pixels only when it is accepted."""

    truth: dict[str, Any]
    ask: Callable[[], list[Question]]
    paint: Callable[[], Picture]


Generator = Callable[[random.Random, Options], Draft]


@dataclass
class Scene:
    """One drawn picture, pair or clip with all its questions. Pixels are drawn when `images` is first read.

    images: uint8 arrays [height, width, 3], one an image or frame. objects: one list of Box an image. truth: the
    canonical ground truth, plain JSON values. signature: its hash, which decides the split.
    """

    kind: str
    questions: list[Question]
    truth: dict[str, Any]
    signature: str
    clip: bool = False
    id: str = ""
    _paint: Callable[[], Picture] | None = field(default=None, repr=False)

    @cached_property
    def _picture(self) -> Picture:
        assert self._paint is not None
        return self._paint()

    @property
    def images(self) -> list[np.ndarray]:
        return self._picture[0]

    @property
    def objects(self) -> list[list[Box]]:
        return self._picture[1]

    @property
    def split(self) -> str:
        return split_of(self.signature)

    def __getstate__(self) -> dict[str, Any]:
        """Plain data for other processes: the pixels are drawn, the closure that draws them stays behind."""
        return {**self.__dict__, "_picture": self._picture, "_paint": None}

    def sample(self, questions: list[Question] | None = None, **meta: Any) -> Sample:
        """This scene as a data `Sample`: all questions (or those given) as branches about the same media.

        meta: kind, signature, split, and `skills`, `forms`, `auxiliary` with one entry a branch, and what is given.
        """
        from foveate.data import sample as data

        asked = self.questions if questions is None else questions
        name = f"{self.kind} {self.signature[:12]}"
        if self.clip:
            media: list[data.Media] = [data.VideoSource(self.images, name)]
        else:
            media = [data.ImageSource(image, name) for image in self.images]
        return data.Sample(
            id=self.id,
            media=media,
            branches=[list(q.turns) for q in asked],
            objects=[[data.Box(*box[:7]) for box in boxes] for boxes in self.objects],
            meta={
                "kind": self.kind,
                "signature": self.signature,
                "split": self.split,
                "skills": [q.skill for q in asked],
                "forms": [q.form for q in asked],
                "auxiliary": [q.auxiliary for q in asked],
                **meta,
            },
        )


def signature(kind: str, truth: dict[str, Any]) -> str:
    """Hash of a canonical ground truth, 32 hex digits."""
    text = json.dumps([kind, truth], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split_of(signature: str) -> str:
    """The split a scene belongs to, by its signature alone."""
    byte = int(signature[:2], 16)
    return next(name for name, (low, high) in SPLITS.items() if low <= byte < high)


def check_split(split: str) -> str:
    """`split`, or InputError when there is none of that name."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r} of the drawn world; use one of {', '.join(SPLITS)}")
    return split


def stable_random(*key: Any) -> random.Random:
    """A generator seeded by the text of `key`: the same on every machine, process and Python version."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def build(kind: str, generator: Generator, key: tuple[Any, ...], split: str, options: Options, clip: bool) -> Scene:
    """The first layout of `generator` that falls in `split`, as a Scene; deterministic in `key` and `options`."""
    low, high = SPLITS[split]
    rng = stable_random(split, kind, *key)
    while True:
        draft = generator(rng, options)
        code = signature(kind, draft.truth)
        if low <= int(code[:2], 16) < high and (questions := draft.ask()):
            break
    name = "-".join(map(str, (kind, split, *key)))
    return Scene(kind, questions, draft.truth, code, clip, name, draft.paint)
