"""Overhead of this machine: what requests to very small models take beyond the parts that were timed alone.

It is measured where it is spent, in whole requests, because the same operations take less when nothing else runs
between them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foveate.bench import cost
from foveate.bench.memory import resident, trim
from foveate.bench.requests import Load, timed_request
from foveate.data.sample import media_parts
from foveate.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from foveate.bench.device import Device
    from foveate.bench.meter import Meter

DEPTHS = (2, 8)
"""Layers of the small models."""
CHOICE = "uniform(keep=0.5)"
"""A recipe that chooses at no cost worth mentioning: what is left is handing over."""
STAGES = ("tower", "select", "prefill", "decode")
LOAD = Load((128, 128), prompt="What is in it?", new_tokens=5)


def with_overhead(device: Device, meter: Meter, dtype: torch.dtype, recipes: Sequence[str]) -> Device:
    """The device with block_ms and call_ms of this dtype.

    A model of few and one of more layers tell what a block adds and what is left at no layer; the larger one with each
    of `recipes`, of one method each, what a block so stored adds.
    """
    few, more = DEPTHS
    name = str(dtype).removeprefix("torch.")
    start, _ = left(device, meter, few, dtype)
    dense, _ = left(device, meter, more, dtype)
    block = {stage: max(0.0, dense[stage] - start[stage]) / (more - few) for stage in ("tower", "prefill", "decode")}
    call = {stage: max(0.0, start[stage] - few * block.get(stage, 0.0)) for stage in STAGES}
    call["choose"] = left(device, meter, more, dtype, CHOICE)[0]["select"]
    for recipe in recipes:
        found, kinds = left(device, meter, more, dtype, recipe)
        kind = kinds.cache or kinds.weights["llm"]
        block |= {f"{stage} {kind}": max(0.0, found[stage] - dense[stage]) / more for stage in ("prefill", "decode")}
    return replace(
        device,
        block_ms=device.block_ms | {f"{stage} {name}": ms for stage, ms in block.items()},
        call_ms=device.call_ms | {f"{stage} {name}": ms for stage, ms in call.items()},
    )


def held(where: torch.device, dtypes: Sequence[torch.dtype]) -> float:
    """Bytes that this process holds once a small model of each dtype has answered, no weights among them."""
    for dtype in dtypes:
        timed_request(small_model(DEPTHS[0], where, dtype), LOAD)
    trim()
    return float(resident())


def left(
    device: Device, meter: Meter, layers: int, dtype: torch.dtype, recipe: str = ""
) -> tuple[dict[str, float], Any]:
    """(milliseconds by stage that a device without overhead does not predict, `roofline.Kinds` of the recipe)."""
    vlm, made = small_model(layers, meter.where, dtype), Recipe.parse(recipe) if recipe else Recipe()
    for method in made.of("weights"):
        store(vlm, method)
    cheap = Recipe(tuple(method for method in made if method.socket != "weights"))
    run, _ = timed_request(cheap.apply(vlm, quiet=True) if cheap else vlm, LOAD)
    found: list[dict[str, float]] = []
    end = time.perf_counter() + 4 * meter.seconds
    while time.perf_counter() < end or len(found) < 4:
        found.append(run(len(found)))
    took = {stage: sorted(one[stage] for one in found)[len(found) // 4] for stage in STAGES}
    content = [*media_parts(LOAD.media(0)[:1]), {"type": "text", "text": LOAD.prompt}]
    plan = vlm.plan([{"role": "user", "content": content}])
    shape, effect = cost.ModelShape.from_config(vlm.model.config, vlm.spec), cost.Effect.of(made)
    bare = replace(device, block_ms={}, call_ms={})
    name = str(dtype).removeprefix("torch.")
    known = cost.estimate(shape, cost.Request.from_plan(plan, shape), bare, dtype=name, effect=effect)["ms"]
    known |= {"tower": known["tower"] + known["connector"], "select": known["selection"]}
    meter.advance()
    return {stage: max(0.0, took[stage] - known[stage]) for stage in STAGES}, effect.kinds(shape)


def store(vlm: Any, method: Any) -> None:
    """Give every layer that a weights method takes its form, all zeros, in place."""
    for _, owner, attribute in list(method.targets(vlm.adapter.parts())):
        plain = getattr(owner, attribute)
        made = method.empty(plain)
        for held in made.buffers():
            held.zero_()
        made.bias = plain.bias
        setattr(owner, attribute, made)


def small_model(layers: int, where: torch.device, dtype: torch.dtype) -> Any:
    """A `VLM` of hardly any width, of the kind of `nano`, with so many layers in its tower and its language model."""
    from dataclasses import replace

    from foveate.adapters.nvila import NvilaAdapter
    from foveate.adapters.vocabulary import byte_tokenizer
    from foveate.nvila.checkpoint import media_token_ids
    from foveate.nvila.initialise import random_model
    from foveate.nvila.presets import PRESETS
    from foveate.vlm import VLM

    nano, tokenizer = PRESETS.get("nano"), byte_tokenizer()
    small = replace(
        nano,
        text=nano.text | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": layers},
        vision=nano.vision | {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": layers},
    )
    image, video = media_token_ids(tokenizer)
    model = random_model(small.config(image_token_id=image, video_token_id=video), dtype, where)
    model.eval().requires_grad_(False)
    return VLM(NvilaAdapter(model, tokenizer, model.spec), "small")
