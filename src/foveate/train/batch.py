"""From samples to the micro-batches of one step, and a thread that prepares the next step while this one computes."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foveate.data.execute import Inputs, execute, normalise
from foveate.data.plan import MediaPlan, Plan, plan_sample
from foveate.data.spec import PreprocessSpec
from foveate.errors import InputError
from foveate.train.config import Stage
from foveate.train.dense import CHANNELS, rasterise
from foveate.train.family import place
from foveate.train.packing import Tokens, pack

if TYPE_CHECKING:
    from foveate.adapters.hf import HfAdapter
    from foveate.data.sample import Sample
    from foveate.train.sources import Mixture


@dataclass
class MicroBatch:
    """What one forward pass needs. Views of pictures come first in `pixels`, then frames of clips.

    input_ids, position_ids: [R, L] int64; allowed: bool [R, L, L]; target_index, targets: [T] int64 (see `Packed`);
    all five are None when the language model does not run. pixels: [n_views, 3, S, S] float32, `num_tiles` of them of
    pictures. image_grids, video_frames: as `NvilaForConditionalGeneration.forward` takes them. dense: labels
    [n_views, side*side, CHANNELS] int64, or None. Families of transformers have no `pixels`: their adapter takes
    `inputs` and `plans`, of each sample in the order of `input_ids`, and newlines [R, L] bool; where rows hold one
    sample each, `allowed` is what is no padding, bool [R, L].
    """

    pixels: Tensor
    num_tiles: int
    image_grids: list[tuple[int, int]]
    video_frames: list[int]
    dense: Tensor | None
    num_samples: int
    input_ids: Tensor | None = None
    position_ids: Tensor | None = None
    allowed: Tensor | None = None
    target_index: Tensor | None = None
    targets: Tensor | None = None
    num_tokens: int = 0
    newlines: Tensor | None = None
    inputs: tuple[Inputs, ...] = ()
    plans: tuple[Plan, ...] = ()

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same batch on `device`."""
        moved = {
            f.name: v.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(v := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclass
class StepData:
    """The micro-batches of a step of a stage, and the state of the sources after it."""

    step: int
    batches: list[MicroBatch]
    counters: dict[str, int]
    skipped: dict[str, int]

    @property
    def num_samples(self) -> int:
        return sum(b.num_samples for b in self.batches)

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed rows, without padding."""
        return sum(b.num_tokens for b in self.batches)


@dataclass
class Prepared:
    """One sample, ready to be packed. plan: of its media, and for families of transformers of its first branch."""

    tokens: Tokens | None
    inputs: Inputs
    plan: Plan
    view_labels: np.ndarray | None
    frame_labels: np.ndarray | None


class BatchMaker:
    """Makes the batches of a stage. `make(step)` must be called with consecutive steps: it moves the counters on.

    wants_text, wants_dense: whether any loss needs answers, or labels of patches. adapter: of a family of transformers.
    packs: whether samples may share a row, and branches a prefix.
    """

    def __init__(
        self,
        stage: Stage,
        spec: PreprocessSpec,
        tokenizer: Any,
        mixture: Mixture,
        *,
        wants_text: bool = True,
        wants_dense: bool = False,
        adapter: HfAdapter | None = None,
        packs: bool = True,
    ) -> None:
        self.stage, self.spec, self.tokenizer, self.mixture = stage, spec, tokenizer, mixture
        self.small_spec = dataclasses.replace(spec, mode="resize") if spec.mode != "pad" and not adapter else spec
        self.wants_text, self.wants_dense = wants_text, wants_dense
        self.adapter, self.packs = adapter, packs
        self._pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def make(self, step: int) -> StepData:
        """All micro-batches of `step` (counted from 0 in the stage)."""
        prepared = self.mixture.take(step, self.stage.batch_size, self.prepare)
        parts = np.array_split(np.arange(len(prepared)), self.stage.accumulate)
        batches = [self._join([prepared[i] for i in part]) for part in parts]
        return StepData(step, batches, dict(self.mixture.counters), dict(self.mixture.skipped))

    def prepare(self, sample: Sample, rng: np.random.Generator) -> Prepared:
        """Choose branches and resolution by `rng`, then plan, tokenise and load. Raises InputError if nothing fits."""
        spec = self.small_spec if rng.random() < self.stage.low_resolution else self.spec
        chosen = self._choose(sample, rng) if self.wants_text else [0]
        sample = dataclasses.replace(sample, branches=[sample.branches[i] for i in chosen])
        planned = plan_sample(sample, spec, self.tokenizer)
        tokens = self._fit(sample, planned.prefix.input_ids, planned.branches) if self.wants_text else None
        made = planned.prefix
        if self.adapter is not None and tokens is not None:
            made = place(self.adapter, made, tokens)
        labels = self._labels(sample, made.media) if self.wants_dense else (None, None)
        return Prepared(tokens, execute(made), made, *labels)

    def _choose(self, sample: Sample, rng: np.random.Generator) -> list[int]:
        """At most `questions_per_sample` branches: drawn by their skills' weights, without replacement."""
        count = len(sample.branches)
        limit = self.stage.questions_per_sample or count
        skills = sample.meta.get("skills", ())
        weights = np.ones(count)
        if len(skills) == count:
            weights = np.array([self.stage.skills.get(skill, 1.0) for skill in skills])
        keys = np.log(rng.random(count)) / np.maximum(weights, 1e-9)
        return [int(i) for i in np.argsort(-keys)[:limit]]

    def _fit(self, sample: Sample, prefix: np.ndarray, branches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tokens:
        if not len(prefix) or not self.packs:
            branches = branches[:1]  # whole dialogues would each need the media once more
        room = self.stage.max_length - len(prefix)
        kept = []
        for ids, labels in branches:
            if len(ids) <= room and (labels >= 0).any():
                kept.append((ids, labels))
                room -= len(ids)
        if not kept:
            need = len(prefix) + min((len(ids) for ids, _ in branches), default=0)
            raise InputError(f"{sample.id}: no answer fits, it needs {need} tokens, max_length {self.stage.max_length}")
        return Tokens(prefix, kept)

    def _labels(self, sample: Sample, media: Sequence[MediaPlan]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Dense labels of pictures and of frames; -100 everywhere for a sample without boxes."""
        out: dict[str, list[np.ndarray]] = {"image": [], "video": []}
        side, tile = self.spec.side, self.spec.tile_size
        first = 0  # objects are listed per picture, and per source frame of a clip
        for item in media:
            if sample.objects is None:
                out[item.kind].append(np.full((len(item.views), side, side, CHANNELS), -100, np.int64))
            elif item.kind == "image":
                out["image"].append(rasterise(sample.objects[first], item.views, side, tile))
                first += 1
            else:
                for view in item.views:
                    source = first + item.frames[view.frame]
                    objects = sample.objects[source] if source < len(sample.objects) else []
                    out["video"].append(rasterise(objects, [view], side, tile))
                first = len(sample.objects)
        return tuple(np.concatenate(v) if v else None for v in out.values())  # type: ignore[return-value]

    def _join(self, prepared: Sequence[Prepared]) -> MicroBatch:
        text: dict[str, Any] = {}
        if self.wants_text:
            sequences: list[Tokens] = [p.tokens for p in prepared]  # type: ignore[misc]
            packed = pack(sequences, self.stage.max_length, self._pad_id, self.packs)
            prepared = [prepared[i] for i in packed.order]  # media in the order of their placeholders
            names = ("input_ids", "position_ids", "allowed", "target_index", "targets")
            text = {name: torch.from_numpy(getattr(packed, name)) for name in names}
            text["num_tokens"] = sum(map(len, sequences))
            if not self.packs:
                text["allowed"] = torch.from_numpy(packed.real)
            if packed.newlines.any():
                text["newlines"] = torch.from_numpy(packed.newlines)
        inputs = [p.inputs for p in prepared]
        if self.adapter is not None:
            text |= {"inputs": tuple(inputs), "plans": tuple(p.plan for p in prepared)}
        views = [i.views for i in inputs if i.views is not None]
        frames = [i.frames for i in inputs if i.frames is not None]
        squares = [*views, *frames] or [np.zeros((0, 3, self.spec.tile_size, self.spec.tile_size), np.uint8)]
        dense = None
        if self.wants_dense:
            parts = [p.view_labels for p in prepared] + [p.frame_labels for p in prepared]
            arrays = [a for a in parts if a is not None] or [np.zeros((0, 1, 1, CHANNELS), np.int64)]
            dense = torch.from_numpy(np.concatenate(arrays)).flatten(1, 2)
        return MicroBatch(
            pixels=normalise(np.concatenate(squares), self.spec),
            num_tiles=sum(len(v) for v in views),
            image_grids=[tuple(g) for i in inputs if i.image_grids is not None for g in i.image_grids.tolist()],
            video_frames=[n for i in inputs if i.video_frames is not None for n in i.video_frames.tolist()],
            dense=dense,
            num_samples=len(prepared),
            **text,
        )


@contextlib.contextmanager
def prefetch(make: Callable[[int], StepData], steps: Sequence[int], depth: int = 2) -> Iterator[Iterator[StepData]]:
    """An iterator over `make(step)`, made in order by one thread, at most `depth` ahead. Its errors are raised here."""
    ready: queue.Queue[StepData | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: StepData | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                put(make(step))
            put(None)
        except BaseException as error:
            put(error)

    def items() -> Iterator[StepData]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="foveate-batches", daemon=True)
    thread.start()
    try:
        yield items()
    finally:
        stop.set()
        thread.join()
