"""Messages to an explicit plan: views, tiles, frames and exact token counts, before any model or pixel is touched.

Train, ask, eval and serve all go through `plan`; `foveate.data.execute` turns the plan into the model's inputs.

Departures from the official NVILA code: a clip is one video block and uses the video encoder (its main branch lost
that); frame folders sort naturally; clips without a frame rate are sampled evenly; the last group of a pooled clip may
be shorter (the official code stops with a shape error); in training too, only a single picture is tiled, as in
inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from foveate.data.chat import IGNORE, IMAGE_TOKEN, VIDEO_TOKEN, ChatCodec, codec, media_of, parse_messages
from foveate.data.families import RATE, image_text, pick_frames, video_text
from foveate.data.fit import Canvas, Fit, fit_clip, fit_image
from foveate.data.images import image_size
from foveate.data.sample import ImageSource, Media, Sample, VideoSource
from foveate.data.spec import PreprocessSpec
from foveate.data.tiling import Level, View, image_layout
from foveate.data.video import VideoInfo, probe_video, sample_frames
from foveate.errors import BudgetError, InputError


class Span(NamedTuple):
    """A run of tokens: kind "text", "image" or "video"; media is the index into `Plan.media`, -1 for text."""

    kind: str
    start: int
    length: int
    media: int = -1


@dataclass(frozen=True, eq=False)
class MediaPlan:
    """What one picture or clip becomes.

    size: (width, height) of the source. views: all squares the tower sees, in the order of the pixel tensor.
    resizes: (columns, rows) of tiles the whole picture (or frame) is resized to, one after the other.
    block: (rows, cols) of tiles of the joined S2 map, or None. frames, times: source indices of the sampled frames and
    their seconds (empty when unknown). grid: (units, rows, cols) of language-model tokens; units is 1 for a picture,
    the number of tiles in mode "dynamic", the number of pooled groups of a clip (first level; all are in `levels`).
    num_tokens: features and the end tokens. marker: the text that stands for it before expansion. blocks: how many
    placeholders the marker holds (mode "dynamic": one for each tile, each a picture of its own to the model).
    Families of transformers only: canvases, view_size, kept: as `foveate.data.fit.Fit` has them. runs: visual tokens of
    each placeholder. seconds_per_unit: seconds between two units of a clip (the mean rate of the sampled frames).
    """

    kind: str
    name: str
    size: tuple[int, int]
    views: tuple[View, ...]
    resizes: tuple[tuple[int, int], ...]
    block: tuple[int, int] | None
    frames: tuple[int, ...]
    times: tuple[float, ...]
    grid: tuple[int, int, int]
    levels: tuple[Level, ...]
    num_tokens: int
    marker: str
    blocks: int
    source: Media = field(repr=False)
    info: VideoInfo | None = field(default=None, repr=False)
    canvases: tuple[Canvas, ...] = ()
    view_size: tuple[int, int] = (0, 0)
    kept: tuple[int, int, int, int] | None = None
    runs: tuple[int, ...] = ()
    seconds_per_unit: float = 0.0

    @property
    def num_features(self) -> int:
        """Placeholder positions that are features, without end tokens and separators."""
        return sum(level.units * level.rows * level.cols for level in self.levels)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "kind": self.kind,
            "name": self.name,
            "size": list(self.size),
            "views": [{**view._asdict(), "box": [round(x, 2) for x in view.box]} for view in self.views],
            "block": list(self.block) if self.block else None,
            "frames": list(self.frames),
            "times": [round(t, 3) for t in self.times],
            "grid": list(self.grid),
            "levels": [level._asdict() for level in self.levels],
            "tokens": self.num_tokens,
        }


@dataclass(frozen=True, eq=False)
class Plan:
    """A request before it is executed.

    input_ids: [L] int64, media placeholders expanded to one id per feature followed by the end tokens, so that
    L == num_tokens. labels: [L] int64 with -100 where there is no target, or None when the last turn is not an answer.
    """

    input_ids: np.ndarray
    labels: np.ndarray | None
    media: tuple[MediaPlan, ...]
    spans: tuple[Span, ...]
    spec: PreprocessSpec

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_visual(self) -> int:
        """Tokens of media: features and end tokens."""
        return sum(item.num_tokens for item in self.media)

    @property
    def num_text(self) -> int:
        return self.num_tokens - self.num_visual

    @property
    def num_views(self) -> int:
        """Squares the vision tower sees."""
        return sum(len(item.views) for item in self.media)

    @property
    def spec_hash(self) -> str:
        return _spec_hash(self.spec)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for `--json` and `--dry-run`."""
        return {
            "tokens": {"total": self.num_tokens, "text": self.num_text, "visual": self.num_visual},
            "views": self.num_views,
            "spans": [span._asdict() for span in self.spans],
            "media": [item.to_dict() for item in self.media],
            "spec_hash": self.spec_hash,
        }


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """A sample whose branches share their media: `prefix` ends with the last media token.

    branches: for each branch (ids, labels), [L_b] int64 each; prefix.input_ids followed by ids is that branch alone.
    When a dialogue is not "media first", each branch is whole, `prefix.input_ids` is empty and `prefix.spans` are of
    the first branch.
    """

    prefix: Plan
    branches: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def num_tokens(self) -> int:
        """Length of the prefix and all branches together."""
        return self.prefix.num_tokens + sum(len(ids) for ids, _ in self.branches)


def plan(
    messages: Sequence[dict[str, Any]],
    spec: PreprocessSpec,
    tokenizer: Any,
    *,
    num_frames: int | None = None,
    max_context: int | None = None,
    add_generation_prompt: bool = True,
) -> Plan:
    """The plan of a chat. Reads headers of files only.

    A dialogue that ends with an assistant message is a training dialogue: it gets labels and no generation prompt.
    Raises InputError for messages or media that cannot be used, BudgetError above `max_context` tokens.
    """
    chat = codec(tokenizer, spec)
    turns = parse_messages(messages)
    media = plan_media(media_of(turns), spec, chat, num_frames)
    made = _expand(*chat.dialogue(turns, media, add_generation_prompt), spec, chat)
    _check_context(made, made.num_tokens, max_context)
    return made


def plan_sample(
    sample: Sample,
    spec: PreprocessSpec,
    tokenizer: Any,
    *,
    num_frames: int | None = None,
    max_context: int | None = None,
) -> SamplePlan:
    """The plan of a training sample with all its branches; the media are planned once.

    Raises as `plan`; `max_context` holds for the prefix with the longest branch.
    """
    chat = codec(tokenizer, spec)
    if sample.turns is not None:
        whole = plan(sample.messages(), spec, tokenizer, num_frames=num_frames, max_context=max_context)
        labels = whole.labels if whole.labels is not None else np.full(whole.num_tokens, IGNORE, np.int64)
        return SamplePlan(_without_ids(whole), ((whole.input_ids, labels),))
    media = plan_media(sample.media, spec, chat, num_frames)
    made = encode_branches(sample, media, tokenizer, spec)
    longest = made.prefix.num_tokens + max((len(ids) for ids, _ in made.branches), default=0)
    _check_context(made.prefix, longest, max_context)
    return made


def encode_branches(
    sample: Sample, media: Plan | Sequence[MediaPlan], tokenizer: Any, spec: PreprocessSpec
) -> SamplePlan:
    """The shared prefix of a sample and (ids, labels) of each branch after it; cached by text, so fast for drawn data.

    media: the plans of `sample.media`, or a `Plan` that holds them. prefix + branch equals the plan of that branch
    alone; where the chat template does not allow that, the branches are whole and the prefix has no ids.
    """
    chat = codec(tokenizer, spec)
    items = tuple(media.media if isinstance(media, Plan) else media)
    if spec.family:
        return _family_branches(sample, items, chat, spec)
    marker = "".join(item.marker for item in items)
    cut = max(marker.rfind(IMAGE_TOKEN), marker.rfind(VIDEO_TOKEN), 0)
    rests = [chat.rest(marker[cut:], tuple(branch)) for branch in sample.branches]
    prefix = _prefix(chat, marker, cut, rests[0].head) if rests else ()
    if not prefix or any(rest.head != rests[0].head for rest in rests):
        return _whole_branches(sample, items, marker, chat, spec)
    branches = tuple((np.array(rest.ids, np.int64), np.array(rest.labels, np.int64)) for rest in rests)
    return SamplePlan(_expand(prefix, [IGNORE] * len(prefix), items, spec, chat), branches)


def _prefix(chat: ChatCodec, marker: str, cut: int, head: tuple[int, ...]) -> tuple[int, ...]:
    """Ids up to the last placeholder of `marker`, from the ids up to it when it is the only one; () if that is unsafe.

    The placeholders are special tokens, which tokenizers split off first; one probe for each marker makes sure.
    """
    if cut == 0:
        return head
    prefix = head[:-1] + chat.encode(marker[:cut]) + head[-1:]
    probe = (("?", "."),)
    alone, whole = chat.rest(marker[cut:], probe), chat.rest(marker, probe)
    return prefix if whole.head == prefix and whole.ids == alone.ids else ()


def _whole_branches(
    sample: Sample, media: tuple[MediaPlan, ...], marker: str, chat: ChatCodec, spec: PreprocessSpec
) -> SamplePlan:
    """Branches that hold all their ids, for text-only samples and for templates whose opening differs by dialogue."""
    branches = []
    for branch in sample.branches:
        rest = chat.rest(marker, tuple(branch))
        labels = [IGNORE] * len(rest.head) + list(rest.labels)
        whole = _expand(rest.head + rest.ids, labels, media, spec, chat)
        branches.append((whole.input_ids, whole.labels))
    empty = Plan(np.zeros(0, np.int64), np.zeros(0, np.int64), media, (), spec)
    return SamplePlan(empty, tuple(branches))


def _family_branches(sample: Sample, media: tuple[MediaPlan, ...], chat: ChatCodec, spec: PreprocessSpec) -> SamplePlan:
    """Each dialogue rendered by the family's template, cut behind the last media token if all are the same up to it."""
    wholes = [
        _expand(*chat.dialogue(parse_messages(sample.messages(i)), media, False), spec, chat)
        for i in range(len(sample.branches))
    ]
    if not wholes:
        return SamplePlan(Plan(np.zeros(0, np.int64), np.zeros(0, np.int64), media, (), spec), ())
    first = wholes[0]
    cut = max((span.start + span.length for span in first.spans if span.media >= 0), default=0)
    head = first.input_ids[:cut]
    shared = all(np.array_equal(whole.input_ids[:cut], head) and (whole.labels[:cut] < 0).all() for whole in wholes)
    if not cut or not shared:
        return SamplePlan(_without_ids(first), tuple((whole.input_ids, whole.labels) for whole in wholes))
    spans = tuple(span for span in first.spans if span.start < cut)
    prefix = replace(first, input_ids=head, labels=np.full(cut, IGNORE, np.int64), spans=spans)
    return SamplePlan(prefix, tuple((whole.input_ids[cut:], whole.labels[cut:]) for whole in wholes))


def plan_media(
    sources: Sequence[Media], spec: PreprocessSpec, chat: ChatCodec, num_frames: int | None = None
) -> tuple[MediaPlan, ...]:
    """Plans of media in order. NVILA tiles a single picture (by `spec.mode`); several are one square each."""
    tiled = sum(source.kind == "image" for source in sources) == 1
    if spec.family:
        return tuple(_plan_family(source, spec, tiled, num_frames) for source in sources)
    ends = len(chat.encode(spec.image_end)), len(chat.encode(spec.video_sep))
    made = []
    for source in sources:
        if isinstance(source, ImageSource):
            form = _image_form(*image_size(source, spec), spec, tiled, ends[0])
            made.append(replace(form, name=source.name, source=source))
        else:
            made.append(_plan_video(source, spec, num_frames or spec.num_frames, ends))
    return tuple(made)


@lru_cache(maxsize=4096)
def _image_form(width: int, height: int, spec: PreprocessSpec, tiled: bool, end: int) -> MediaPlan:
    """The plan of any picture of this size; name and source are filled in by the caller."""
    layout = image_layout(width, height, spec, tiled)
    units, rows, cols = layout.grid
    per_tile = tiled and spec.mode == "dynamic"
    return MediaPlan(
        kind="image",
        name="",
        size=(width, height),
        views=layout.views,
        resizes=layout.resizes,
        block=layout.block,
        frames=(),
        times=(),
        grid=layout.grid,
        levels=(Level(units, rows, cols),),
        num_tokens=units * (rows * cols + end),
        marker=f"{IMAGE_TOKEN}\n" * units if per_tile else IMAGE_TOKEN,
        blocks=units,
        source=None,  # type: ignore[arg-type]
    )


def _plan_family(source: Media, spec: PreprocessSpec, alone: bool, num_frames: int | None) -> MediaPlan:
    """The plan of a picture or clip for a family of transformers."""
    if isinstance(source, ImageSource):
        return family_image(image_size(source, spec), spec, alone, source)
    if num_frames is not None and num_frames < 1:
        raise InputError(f"{source.name}: num_frames is {num_frames}; it must be 1 or more")
    return family_clip(probe_video(source, spec), spec, num_frames, source)


def family_image(
    size: tuple[int, int], spec: PreprocessSpec, alone: bool = True, source: ImageSource | None = None
) -> MediaPlan:
    """The plan of any picture of this (width, height), for a family of transformers. alone: it is the only one."""
    fit = fit_image(*size, spec, alone)
    return _family_media(source or ImageSource(None, "a picture"), size, fit, fit.views, *image_text(spec, fit))


def family_clip(
    info: VideoInfo, spec: PreprocessSpec, num_frames: int | None = None, source: VideoSource | None = None
) -> MediaPlan:
    """The plan of any clip of which this is known, for a family of transformers."""
    source = source or VideoSource(None, "a clip")
    frames = pick_frames(info, spec, num_frames, source.name)
    distinct = len(frames) - (len(frames) > 1 and frames[-1] == frames[-2])
    fit = fit_clip(*info.size, distinct, spec)
    rate = distinct / info.num_frames * info.fps if info.fps else RATE
    item = _family_media(
        source,
        info.size,
        fit,
        tuple(view._replace(frame=i) for i in range(len(frames)) for view in fit.views),
        *video_text(spec, fit, frames, info),
    )
    return replace(
        item,
        frames=frames,
        times=tuple(info.time(i) for i in frames) if info.fps else (),
        info=info,
        seconds_per_unit=spec.temporal_patch / rate,
    )


def _family_media(
    source: Media, size: tuple[int, int], fit: Fit, views: tuple[View, ...], marker: str, runs: tuple[int, ...]
) -> MediaPlan:
    return MediaPlan(
        kind=source.kind,
        name=source.name,
        size=size,
        views=views,
        resizes=(),
        block=None,
        frames=(),
        times=(),
        grid=tuple(fit.levels[-1][:3]),
        levels=fit.levels,
        num_tokens=fit.num_tokens,
        marker=marker,
        blocks=len(runs),
        source=source,
        canvases=fit.canvases,
        view_size=fit.view,
        kept=fit.kept,
        runs=runs,
    )


def _plan_video(source: VideoSource, spec: PreprocessSpec, num_frames: int, ends: tuple[int, int]) -> MediaPlan:
    if num_frames < 1:
        raise InputError(f"{source.name}: num_frames is {num_frames}; it must be 1 or more")
    info = probe_video(source, spec)
    frames = sample_frames(info.num_frames, num_frames, info.fps, spec.fps, repeat=spec.repeat_frames)
    pool = spec.video_pool or ((1, 1, 1),)
    side, levels = spec.token_side, []
    for t, h, w in pool:  # a last group that is not full is the mean of what it has
        levels.append(Level(-(-len(frames) // t), -(-side // h), -(-side // w), t))
    layout = image_layout(*info.size, spec, False)
    return MediaPlan(
        kind="video",
        name=source.name,
        size=info.size,
        views=tuple(view._replace(frame=i) for i in range(len(frames)) for view in layout.views),
        resizes=layout.resizes,
        block=None,
        frames=frames,
        times=tuple(info.time(i) for i in frames) if info.fps else (),
        grid=tuple(levels[0][:3]),
        levels=tuple(levels),
        num_tokens=sum(n * (r * c + ends[0]) for n, r, c, _ in levels) + len(levels) * ends[1],
        marker=VIDEO_TOKEN,
        blocks=1,
        source=source,
        info=info,
    )


def _expand(
    ids: Sequence[int],
    labels: Sequence[int] | None,
    media: Sequence[MediaPlan],
    spec: PreprocessSpec,
    chat: ChatCodec,
) -> Plan:
    """The plan with each placeholder in `ids` replaced by its run of placeholders and end tokens."""
    end, sep = chat.encode(spec.image_end), chat.encode(spec.video_sep)
    owners = [(i, item, block) for i, item in enumerate(media) for block in range(item.blocks)]
    at = [k for k, token in enumerate(ids) if chat.is_media(token)]
    if len(at) != len(owners):  # text cannot do this; a template that repeats or drops messages can
        raise InputError(f"the chat template made {len(at)} media placeholders of {len(owners)}; use a plain template")
    out: list[int] = []
    out_labels: list[int] = []
    spans: list[Span] = []
    previous = 0
    for k, (i, item, number) in zip(at, owners):
        if k > previous:
            spans.append(Span("text", len(out), k - previous))
            out += ids[previous:k]
        if item.runs:
            block = tuple(ids[k : k + 1]) * item.runs[number]
        else:
            token = chat.image_id if item.kind == "image" else chat.video_id
            block = _block_ids(item.levels, item.blocks, token, end, sep if item.kind == "video" else ())
        spans.append(Span(item.kind, len(out), len(block), i))
        if labels is not None:
            out_labels += labels[previous:k]
            out_labels += [IGNORE] * len(block)
        out += block
        previous = k + 1
    if len(ids) > previous:
        spans.append(Span("text", len(out), len(ids) - previous))
        out += ids[previous:]
    if labels is not None:
        out_labels += labels[previous:]
    return Plan(
        input_ids=np.array(out, np.int64),
        labels=np.array(out_labels, np.int64) if labels is not None else None,
        media=tuple(media),
        spans=tuple(spans),
        spec=spec,
    )


@lru_cache(maxsize=4096)
def _block_ids(
    levels: tuple[Level, ...], blocks: int, token: int, end: tuple[int, ...], sep: tuple[int, ...]
) -> tuple[int, ...]:
    """Ids that replace one placeholder: for each level its units of features, each closed by `end`, then `sep`."""
    out: tuple[int, ...] = ()
    for units, rows, cols, _ in levels:
        out += ((token,) * (rows * cols) + end) * (units // blocks) + sep
    return out


_SMALLER = {
    "anyres": "smaller canvases (pinpoints)",
    "dynamic": "fewer tiles (max_tiles)",
    "native": "fewer pixels (max_area, video_max_area)",
    "split": "a smaller longest side (edge)",
} | dict.fromkeys(("crop", "resize", "pad"), "fewer pictures")
"""What makes a picture of a family cost less, by mode."""


def _check_context(made: Plan, tokens: int, limit: int | None) -> None:
    if limit is not None and tokens > limit:
        raise BudgetError(
            f"the prompt needs {tokens:,} tokens ({made.num_visual:,} visual); the limit is {limit:,} (max_context); "
            + (
                f"use fewer frames (num_frames) or {_SMALLER[made.spec.mode]}"
                if made.spec.family
                else "use fewer frames (num_frames), fewer tiles (max_tiles), or mode 'resize'"
            )
        )


def _without_ids(made: Plan) -> Plan:
    """The plan's media alone, for branches that hold all ids themselves."""
    return replace(made, input_ids=np.zeros(0, np.int64), labels=np.zeros(0, np.int64))


@lru_cache(maxsize=64)
def _spec_hash(spec: PreprocessSpec) -> str:
    return spec.hash()
