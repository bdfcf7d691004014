"""Timed requests to a model: the stages of one request, with a fixed number of new tokens and fresh pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.bench.timing import Timed, compare, machine
from foveate.errors import BudgetError

if TYPE_CHECKING:
    from foveate.recipe import Recipe
    from foveate.vlm import VLM

PICTURES = 8
"""Different pictures taken in turn, so that no cache of a picture can help."""


def bench(
    vlm: VLM,
    *,
    recipe: Recipe | None = None,
    against: Recipe | None = None,
    size: tuple[int, int] = (448, 448),
    prompt: str = "What is in the picture?",
    new_tokens: int = 16,
    pairs: int = 30,
    threads: int | None = None,
    seed: int = 0,
    min_seconds: float = 0.3,
    on_pair: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """{"device", "versions", "run", "rows"}: `vlm` with `recipe` (A) against `vlm` with `against` (B), by stage.

    rows: one for decode_image, preprocess, encode, select, prefill, decode (each token), ttft and total; see
    `timing.Row`. With no recipe at all B is timed against itself. threads: of torch, for this run.
    Raises BudgetError, RecipeError.
    """
    import torch

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        a = recipe.apply(vlm) if recipe else vlm
        b = against.apply(vlm) if against else vlm
        pictures = draw_pictures(size, seed)
        timed_a, tokens_a = timed_request(a, pictures, prompt, new_tokens)
        timed_b, tokens_b = timed_request(b, pictures, prompt, new_tokens)
        rows, run = compare(timed_a, timed_b, pairs=pairs, seed=seed, min_seconds=min_seconds, on_pair=on_pair)
        device, versions = machine()
    finally:
        torch.set_num_threads(before)
    return {
        "device": device,
        "versions": versions,
        "run": {
            "model": vlm.name,
            "recipe": a.recipe.text() or None,
            "against": b.recipe.text() or None,
            "device": str(vlm.device),
            "dtype": str(vlm.dtype).removeprefix("torch."),
            "size": list(size),
            "new_tokens": new_tokens,
            "tokens": {"a": tokens_a, "b": tokens_b},
            "seed": seed,
            **run,
        },
        "rows": [row.to_dict() for row in rows],
    }


def draw_pictures(size: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Pictures of smooth random colour, [H, W, 3] uint8: their content costs nothing special to any stage."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, size=(PICTURES, 16, 16, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC)) for tile in small]


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def timed_request(vlm: VLM, pictures: list[np.ndarray], prompt: str, new_tokens: int) -> tuple[Timed, dict[str, int]]:
    """(a function that runs one request on picture i and returns milliseconds by stage, the tokens of a request).

    Stop tokens are ignored: both sides of a comparison must produce equally many. "decode" is per new token after the
    first; ttft is the time to the first token, decoding of the picture's PNG and preprocessing included.
    """
    import torch
    from PIL import Image

    from foveate.adapters.shape import steps_of
    from foveate.data.sample import ImageSource, media_parts
    from foveate.runtime import STAGES, Clock, encode, generate, select

    reducers = vlm.reducers()
    files = [_png(picture) for picture in pictures]  # a request brings its picture encoded

    @torch.inference_mode()
    def run(i: int) -> tuple[dict[str, float], Any]:
        clock = Clock(vlm.device)
        start = time.perf_counter()
        with Image.open(io.BytesIO(files[i % len(files)])) as image:
            decoded = np.asarray(image.convert("RGB"))
        decode_image = (time.perf_counter() - start) * 1e3
        picture = ImageSource(decoded, name=f"picture {i % len(files)}")
        content = [*media_parts([picture]), {"type": "text", "text": prompt}]
        with clock.stage("preprocess"):
            plans = [vlm.plan([{"role": "user", "content": content}])]
            inputs = [vlm.prepare(plans[0])]
        steps = steps_of(reducers, vlm.adapter.shape)
        with clock.stage("encode"):
            encoded = encode(vlm.adapter, plans, inputs, [steps])
        with clock.stage("select"):
            rows = [select(vlm.adapter, plans[0], encoded[0], steps)]
        needed = len(rows[0]) + new_tokens
        if needed > vlm.adapter.max_context:
            raise BudgetError(
                f"the request needs {needed} tokens, the model takes {vlm.adapter.max_context}; use smaller pictures"
            )
        generate(vlm.adapter, rows, vlm.new_cache(), max_new_tokens=new_tokens, stop=(), clock=clock)
        ms = {"decode_image": decode_image, **{stage: clock.ms[stage] for stage in STAGES}}
        ms["ttft"] = decode_image + sum(ms[stage] for stage in STAGES[:-1])
        ms["total"] = ms["ttft"] + ms["decode"]
        ms["decode"] /= max(1, new_tokens - 1)
        return ms, rows[0]

    _, row = run(0)
    return (lambda i: run(i)[0]), {"text": row.text, "visual": row.visual, "kept": row.kept}
