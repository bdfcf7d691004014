"""Where samples come from, and which one is next: pure functions of (seed, stage, step, position).

A source is endless. Its samples are numbered; a run keeps one counter per source, and the counters are the whole data
position of a checkpoint. Drawn worlds use the counter as the scene's index; a finite set is passed in a new order each
epoch. Which source gives sample i of step s depends on the seed, stage, s and i only, so nothing has to be replayed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from foveate.errors import InputError, RecipeError

if TYPE_CHECKING:
    from foveate.data.formats.index import Index
    from foveate.data.sample import Sample

_log = logging.getLogger("foveate")
T = TypeVar("T")
NAMED = {"easy-vqa": "train", "nlvr": "dev-train"}
"""Sets of the data folder that may be trained into a released model, with the split that is used; the rest of `dev`
stays for choosing between models."""
MAX_BAD_IN_A_ROW = 100
MAX_REASONS = 100
STAGE_STRIDE = 10**9
"""Numbers of a source that each stage has for itself, so that no stage draws the scenes of another again."""


class Source(Protocol):
    """Samples by number, without end."""

    name: str

    def sample(self, index: int) -> Sample:
        """Sample `index` (any number from 0). Raises InputError for one that cannot be used."""
        ...


class WorldSource:
    """Drawn scenes of one kind."""

    def __init__(self, kind: str, seed: int, options: dict[str, Any]) -> None:
        from foveate import world

        if kind not in world.KINDS:
            raise RecipeError(f"source 'world/{kind}': no such kind; known: {', '.join(world.KINDS)}")
        self.name, self._kind, self._seed, self._options = f"world/{kind}", kind, seed, options
        self._draw = world.draw

    def sample(self, index: int) -> Sample:
        scene = self._draw(self._kind, index, split="train", seed=self._seed, **self._options)
        return scene.sample(skills=[q.skill for q in scene.questions])


class ListSource:
    """A finite set, in a new order each epoch; the order depends on the seed and the epoch only.

    samples: a list, or an index that reads a sample when asked. Where that is cheap in blocks only, the blocks come in
    a new order, and in each of them the samples.
    """

    def __init__(self, name: str, samples: Sequence[Sample] | Index, seed: int) -> None:
        if not len(samples):
            raise RecipeError(f"source {name!r} holds no usable sample")
        self.name, self._samples, self._seed = name, samples, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self._samples))
        if self._order[0] != epoch:
            self._order = (epoch, self._permutation(_rng(self._seed, self.name, epoch)))
        return self._samples[int(self._order[1][position])]

    def _permutation(self, rng: np.random.Generator) -> np.ndarray:
        blocks = getattr(self._samples, "blocks", ())
        if not len(blocks):
            return rng.permutation(len(self._samples))
        parts = np.split(np.arange(len(self._samples)), blocks[1:])
        return np.concatenate([rng.permutation(parts[i]) for i in rng.permutation(len(parts))])


class Mixture:
    """The sources of one stage with their weights and counters.

    `counters` maps source name to the number of samples taken; `skipped` counts those that could not be used (a bad
    sample of a finite set once an epoch).
    """

    def __init__(self, weights: dict[Source, float], seed: int, stage: int) -> None:
        self.sources = list(weights)
        total = sum(weights.values())
        self._cumulative = np.cumsum([w / total for w in weights.values()])
        self._seed, self._stage = seed, stage
        self.counters = {s.name: 0 for s in self.sources}
        self.skipped: dict[str, int] = {}
        self.reasons: list[str] = []
        """What was wrong with the first bad samples that this process met."""

    def take(self, step: int, count: int, prepare: Callable[[Sample, np.random.Generator], T]) -> list[T]:
        """`prepare(sample, rng)` of the `count` samples of `step`; `rng` depends on the sample's place alone.

        A sample for which it raises InputError is skipped and counted, and the next one of its source takes its place.
        """
        picks = _rng(self._seed, "mixture", self._stage, step).random(count)
        out = []
        for i, pick in enumerate(picks):
            place = min(int(np.searchsorted(self._cumulative, pick, side="right")), len(self.sources) - 1)
            out.append(self._next(self.sources[place], (step, i), prepare))
        return out

    def restore(self, state: dict[str, dict[str, int]]) -> None:
        """Go on from the "counters" and "skipped" of a checkpoint."""
        self.counters.update(state["counters"])
        self.skipped = dict(state["skipped"])

    def skip(self, name: str, reason: str) -> None:
        """Count a sample of source `name` that could not be used."""
        self.skipped[name] = self.skipped.get(name, 0) + 1
        if len(self.reasons) < MAX_REASONS and f"{name}: {reason}" not in self.reasons:
            self.reasons.append(f"{name}: {reason}")

    def _next(self, source: Source, place: tuple[int, int], prepare: Callable[[Sample, np.random.Generator], T]) -> T:
        for _ in range(MAX_BAD_IN_A_ROW):
            index = self.counters[source.name]
            self.counters[source.name] = index + 1
            try:
                return prepare(
                    source.sample(self._stage * STAGE_STRIDE + index), _rng(self._seed, "sample", self._stage, *place)
                )
            except InputError as error:
                reason = str(error)
                self.skip(source.name, reason)
        raise InputError(f"source {source.name!r}: {MAX_BAD_IN_A_ROW} samples in a row failed, the last one: {reason}")


def open_mixture(
    mixture: dict[str, float],
    *,
    seed: int,
    stage: int,
    data_dir: str | Path | None = None,
    world: dict[str, Any] | None = None,
    cache: dict[str, Source | None] | None = None,
) -> Mixture:
    """Open the sources of a stage. A missing one whose name ends in "?" is left out with one warning.

    data_dir: folder of the named sets, default $FOVEATE_DATA. cache: sources already open in this run, by
    name; None for one that was left out. Raises RecipeError for a source that is unknown, or missing and not optional.
    """
    cache = {} if cache is None else cache
    weights: dict[Source, float] = {}
    for text, weight in mixture.items():
        if weight <= 0:
            continue
        name = text.removesuffix("?")
        try:
            if name not in cache or (cache[name] is None and not text.endswith("?")):
                cache[name] = _open(name, seed, data_dir, world or {})
            if (source := cache[name]) is not None:
                weights[source] = weight
        except (RecipeError, InputError, OSError) as error:
            if not text.endswith("?"):
                raise
            cache[name] = None  # said once, however many stages name it
            _log.warning(f"optional source left out: {error}")
    if not weights:
        raise RecipeError(f"none of the sources {', '.join(mixture)} is there; give --data or set FOVEATE_DATA")
    return Mixture(weights, seed, stage)


def _open(name: str, seed: int, data_dir: str | Path | None, world: dict[str, Any]) -> Source:
    if name.startswith("world/"):
        return WorldSource(name.removeprefix("world/"), seed, world)
    if name in NAMED:
        folder = data_dir or os.environ.get("FOVEATE_DATA")
        if not folder:
            raise RecipeError(f"source {name!r} needs its folder: give --data DIR, or set FOVEATE_DATA")
        from foveate.data.datasets import load_named

        return ListSource(name, load_named(name, folder, NAMED[name]), seed)
    if not Path(name).exists():
        known = f"world/<kind>, {', '.join(NAMED)}, or the path of a data set"
        raise RecipeError(f"source {name!r} is neither a name nor a file that exists; known: {known}")
    from foveate.data.formats.index import open_index

    return ListSource(name, open_index(name), seed)  # a bad sample is counted when its turn comes


def _rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone, the same on every platform and in every process."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
