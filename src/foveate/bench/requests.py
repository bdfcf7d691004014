"""Timed requests to a model: the stages of one request, with a fixed number of new tokens and fresh pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.bench.timing import Timed, compare
from foveate.clock import OPENING, STAGES, Clock
from foveate.errors import BudgetError
from foveate.machine import machine

if TYPE_CHECKING:
    from foveate.data.sample import Media
    from foveate.recipe import Recipe
    from foveate.vlm import VLM

PICTURES = 8
"""Different pictures taken in turn, so that no cache of a picture can help."""
NAMES = {OPENING: OPENING, "preprocess": "preprocess", "encode": "tower", "select": "select", "prefill": "prefill"}
"""Our names of the clock's stages up to the first token; the tower's holds the connector."""


@dataclass(frozen=True)
class Load:
    """What is asked of a model again and again: `batch` requests at once, each of a picture of `size` (width, height),
    or of a clip of `frames` such pictures, and a prompt; `new_tokens` are answered."""

    size: tuple[int, int] = (448, 448)
    frames: int | None = None
    batch: int = 1
    prompt: str = "What is in the picture?"
    new_tokens: int = 16

    def media(self, seed: int) -> list[Media]:
        """Different pictures or clips, to be taken in turn. Pictures are JPEG files in memory; frames are pixels."""
        from foveate.data.sample import ImageSource, VideoSource

        pictures = draw_pictures(self.size, seed)
        if self.frames is None:
            return [ImageSource(jpeg(picture), name=f"picture {i}") for i, picture in enumerate(pictures)]
        clips = []
        for i, first in enumerate(pictures):
            shown = np.stack([np.roll(first, 4 * frame, axis=1) for frame in range(self.frames)])
            clips.append(VideoSource(shown, name=f"clip {i}"))
        return clips


def bench(
    vlm: VLM,
    *,
    recipe: Recipe | None = None,
    against: Recipe | None = None,
    load: Load | None = None,
    pairs: int = 30,
    threads: int | None = None,
    seed: int = 0,
    min_seconds: float = 0.3,
    on_pair: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """{"device", "versions", "run", "rows"}: `vlm` with `recipe` (A) against `vlm` with `against` (B), by stage.

    rows: one for decode_image, preprocess, tower, select, prefill, decode (each token), ttft and total; see
    `timing.Row`. With no recipe at all B is timed against itself. threads: of torch, for this run. Raises BudgetError,
    RecipeError.
    """
    load = load or Load()
    with torch_threads(threads):
        a = recipe.apply(vlm, quiet=True) if recipe else vlm
        b = against.apply(vlm, quiet=True) if against else vlm
        timed_a, tokens_a = timed_request(a, load, seed)
        timed_b, tokens_b = timed_request(b, load, seed)
        rows, run = compare(timed_a, timed_b, pairs=pairs, seed=seed, min_seconds=min_seconds, on_pair=on_pair)
        device, versions = machine()
    return {
        "device": device,
        "versions": versions,
        "run": {
            "model": vlm.name,
            "recipe": a.recipe.text() or None,
            "against": b.recipe.text() or None,
            "device": str(vlm.device),
            "dtype": str(vlm.dtype).removeprefix("torch."),
            "size": list(load.size),
            "frames": load.frames,
            "batch": load.batch,
            "new_tokens": load.new_tokens,
            "tokens": {"a": tokens_a, "b": tokens_b},
            "seed": seed,
            **run,
        },
        "rows": [row.to_dict() for row in rows],
    }


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch inside the block; None leaves them."""
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_pictures(size: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Pictures of smooth random colour, [H, W, 3] uint8: their content costs nothing special to any stage."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, size=(PICTURES, 16, 16, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC)) for tile in small]


def jpeg(picture: np.ndarray) -> bytes:
    """A picture as the bytes of a JPEG file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, format="JPEG", quality=92)
    return out.getvalue()


def timed_request(vlm: VLM, load: Load, seed: int = 0) -> tuple[Timed, dict[str, int]]:
    """(a function that runs batch i and returns milliseconds by stage, the tokens of one request).

    Stop tokens are ignored: both sides of a comparison must produce equally many. "decode" is per new token after the
    first; ttft is the time to the first token, opening the picture included.
    """
    import torch

    from foveate.adapters.shape import steps_of
    from foveate.data.sample import media_parts
    from foveate.runtime import encode, generate, select

    reducers, media = vlm.reducers(), load.media(seed)

    @torch.inference_mode()
    def run(i: int) -> tuple[dict[str, float], Any]:
        clock = Clock(vlm.device, extra=(OPENING,))
        plans, inputs = [], []
        with clock.stage("preprocess"):
            for number in range(i * load.batch, (i + 1) * load.batch):
                content = [*media_parts([media[number % len(media)]]), {"type": "text", "text": load.prompt}]
                plans.append(vlm.plan([{"role": "user", "content": content}], num_frames=load.frames))
                inputs.append(vlm.prepare(plans[-1]))
        steps = [steps_of(reducers, vlm.adapter.shape) for _ in plans]
        with clock.stage("encode"):
            encoded = encode(vlm.adapter, plans, inputs, steps)
        with clock.stage("select"):
            rows = [select(vlm.adapter, *parts) for parts in zip(plans, encoded, steps)]
        needed = max(map(len, rows)) + load.new_tokens
        if needed > vlm.adapter.max_context:
            raise BudgetError(
                f"the request needs {needed} tokens, the model takes {vlm.adapter.max_context}; use smaller pictures "
                "or fewer frames"
            )
        generate(vlm.adapter, rows, vlm.new_cache(), max_new_tokens=load.new_tokens, stop=(), clock=clock)
        ms = {name: clock.ms[stage] for stage, name in NAMES.items()}
        ms["decode"] = clock.ms[STAGES[-1]] / max(1, load.new_tokens - 1)
        ms["ttft"] = sum(ms[name] for name in NAMES.values())
        ms["total"] = ms["ttft"] + clock.ms[STAGES[-1]]
        return ms, rows[0]

    _, row = run(0)
    tokens = {"text": row.text, "visual": row.visual, "kept": row.kept}
    return (lambda i: run(i)[0]), tokens
