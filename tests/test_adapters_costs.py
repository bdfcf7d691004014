"""Costs of every family of transformers: FLOPs equal torch's counter, counts without pixels equal those of the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from families import CLIPS, FAMILIES, PRESETS, clip, picture
from foveate.adapters.presets import PRESETS as PUBLISHED
from foveate.adapters.presets import _tokenizer, build
from foveate.adapters.shape import steps_of
from foveate.adapters.vocabulary import byte_tokenizer
from foveate.bench.cost import Effect, ModelShape, activation_bytes, flops
from foveate.bench.counts import Request as Counts
from foveate.bench.counts import request_of_sizes, tower_blocks
from foveate.cli import main
from foveate.cli.plan import shape_of
from foveate.data.plan import plan
from foveate.nvila.presets import PRESETS as NVILA
from foveate.recipe import Recipe
from foveate.runtime import encode, select
from foveate.vlm import VLM, Request
from plain_hf import CASES, MIXES


@pytest.fixture(scope="module")
def slow_attention() -> dict[str, VLM]:
    """Models whose attention torch can count: it has no count for its fused kernel on a CPU."""
    return {family: VLM(build(PRESETS[family], attn="eager"), family) for family in FAMILIES}


def counted(call: Any) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "mix"), [c for c in CASES if c[1] != "text"])
def test_flops_of_every_stage_equal_torchs_counter(slow_attention: dict[str, VLM], family: str, mix: str):
    vlm = slow_attention[family]
    adapter = vlm.adapter
    plan = vlm.plan(Request("What is it?", MIXES[mix]).to_messages())
    inputs, shape = vlm.prepare(plan), ModelShape.from_config(vlm.model.config, vlm.spec)
    request = Counts.from_plan(plan, shape)
    found = flops(shape, request, causal=False)
    encode = counted(lambda: adapter.encode([inputs], [plan]))
    assert found["tower"] + found["connector"] == pytest.approx(encode, rel=0.02)
    if "post_encoder" in adapter.sites:  # padding stays out of the connector
        patches = torch.zeros(request.visual, vlm.model.config.vision_config.hidden_size)
        assert found["connector"] == pytest.approx(counted(lambda: adapter.connect(patches)), rel=0.02)
    assert request.prompt == plan.num_tokens
    embeds, cache = torch.zeros(1, request.prompt, shape.width), DynamicCache(config=vlm.model.config)
    places = torch.arange(request.prompt)[None]
    prefill = counted(lambda: adapter.forward(inputs_embeds=embeds, position_ids=places, past_key_values=cache))
    assert found["prefill"] == pytest.approx(prefill, rel=0.02)


VIEWS = {
    "pictures": MIXES["pictures"],  # LLaVA-NeXT leaves out patches of padding
    "narrow picture": [picture(5, 10, 200)],  # and whole views of it
    "clip and picture": MIXES["clip and picture"],
}
LEFT = [
    (family, media)
    for family in ("llava", "llava_next", "internvl", "smolvlm", "idefics3")
    for media in VIEWS
    if "clip" not in media or family in CLIPS
]
"""Families whose tokens may leave inside the tower."""


@pytest.mark.parametrize("recipe", ["tome(keep=0.25)", "pitome(keep=3)", "flowcut(keep=0.5) + uniform(keep=0.5)"])
@pytest.mark.parametrize(("family", "media"), LEFT)
def test_a_tower_that_tokens_leave_is_counted_block_by_block(
    slow_attention: dict[str, VLM], family: str, media: str, recipe: str
):
    vlm = slow_attention[family]
    if "flowcut" in recipe and not vlm.adapter.has_cls:
        pytest.skip("leaves at the end")
    seen, work = encoded(vlm, VIEWS[media], recipe)
    shape = ModelShape.from_config(vlm.model.config, vlm.spec)
    whole = Counts.from_plan(vlm.plan(Request("What is it?", VIEWS[media]).to_messages()), shape)
    small = Effect(Recipe.parse(recipe).of("reduce")).apply(whole, shape)
    assert [block[1:] for block in tower_blocks(shape, small)] == seen
    assert seen[0][0] == tower_blocks(shape, whole)[0].rows > seen[-1][2]
    found, dense = (flops(shape, request) for request in (small, whole))
    assert found["tower"] + found["connector"] == work
    assert found["tower"] < dense["tower"] and found["connector"] < dense["connector"]
    assert activation_bytes(shape, small) <= activation_bytes(shape, whole)


def encoded(vlm: VLM, media: Any, recipe: str) -> tuple[list[tuple[int, int, int]], int]:
    """What a recipe leaves of a tower, as it runs: for each block (rows of attention, pairs, rows of the MLP), and the
    FLOPs of all modules, which are not those of choosing."""
    adapter, reducers = vlm.adapter, Recipe.parse(recipe).of("reduce")
    plan = vlm.plan(Request("What is it?", media).to_messages())
    inputs, steps = vlm.prepare(plan), steps_of(reducers, adapter.shape)
    attending: list[list[int]] = [[] for _ in adapter.blocks]
    feeding: list[list[int]] = [[] for _ in adapter.blocks]
    handles = []
    for number, block in enumerate(adapter.blocks):
        for module, lengths in ((adapter.attention_of(block).q, attending[number]), (block.mlp, feeding[number])):
            note = lambda _, args, lengths=lengths: lengths.extend([args[0].shape[1]] * args[0].shape[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(note))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        (part,) = encode(adapter, [plan], [inputs], [steps])
        select(adapter, plan, part, steps)
    for handle in handles:
        handle.remove()
    seen = [(sum(a), sum(n * n for n in a), sum(fed)) for a, fed in zip(attending, feeding)]
    modules = {name: sum(found.values()) for name, found in counter.get_flop_counts().items() if "." not in name}
    return seen, sum(modules.values()) - modules["Global"]


def test_the_connector_takes_what_is_left_before_it(slow_attention: dict[str, VLM]):
    for family, recipe in (("llava_next", "visionzip(keep=0.5)"), ("llava", "prumerge(keep=0.25) + uniform(keep=0.5)")):
        vlm = slow_attention[family]
        shape = ModelShape.from_config(vlm.model.config, vlm.spec)
        whole = Counts.from_plan(vlm.plan(Request("What is it?", MIXES["tall picture"]).to_messages()), shape)
        small = Effect(Recipe.parse(recipe).of("reduce")).apply(whole, shape)
        _, work = encoded(vlm, MIXES["tall picture"], recipe)
        found = flops(shape, small)
        assert found["tower"] + found["connector"] == work
        assert small.kept <= small.connector_rows < whole.connector_rows and not small.per_block


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[(60, 40)], [(24, 90)], [(60, 40), (30, 30)]])
def test_counts_without_pixels_equal_those_of_the_plan(slow_attention: dict[str, VLM], family: str, sizes: Any):
    vlm = slow_attention[family]
    shape = ModelShape.from_config(vlm.model.config, vlm.spec)
    pictures = [picture(0, *size) for size in sizes]
    real = Counts.from_plan(vlm.plan(Request("?", pictures).to_messages()), shape)
    counts = request_of_sizes(vlm.spec, shape, images=sizes, text=1)
    assert replace(counts, text=0) == replace(real, text=0)
    assert counts.text < real.text  # the chat template's own tokens are not counted


@pytest.mark.parametrize("name", sorted([*NVILA.names(), *PUBLISHED.names()]))
def test_visual_tokens_of_every_preset_are_those_of_the_plan(name: str):
    shape, spec, _, _ = shape_of(name)
    tokenizer = _tokenizer(spec) if spec.family else byte_tokenizer()
    pictures = [[(448, 448)], [(1280, 720)], [(50, 37)], [(640, 480), (300, 700)]]
    for sizes, frames in [*((sizes, 0) for sizes in pictures), *(((), frames) for frames in (1, 8, 9))]:
        if frames and spec.family and not spec.video_token:
            continue
        parts = [{"type": "image", "image": np.zeros((h, w, 3), np.uint8)} for w, h in sizes]
        parts += [{"type": "video", "video": np.zeros((frames, 72, 128, 3), np.uint8)}] * bool(frames)
        options = {"num_frames": frames} if frames else {}
        made = plan([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], spec, tokenizer, **options)
        real = Counts.from_plan(made, shape)
        counts = request_of_sizes(spec, shape, images=sizes, frames=frames or None, clip=(128, 72))
        assert replace(counts, text=real.text) == real, (sizes, frames)


def test_groups_are_those_of_the_layout(slow_attention: dict[str, VLM]):
    for family, vlm in slow_attention.items():
        plan = vlm.plan(Request("?", [picture(), *([clip()] if vlm.adapter.takes_clips else [])]).to_messages())
        request = Counts.from_plan(plan, ModelShape.from_config(vlm.model.config, vlm.spec))
        assert [list(group) for group in request.groups] == vlm.adapter.layout(plan).features().sizes(), family


def test_plan_shows_the_tower_that_a_recipe_leaves(capsys: Any):
    found = {}
    for recipe in ("uniform(keep=0.25)", "tome(keep=0.25)"):
        call = ["plan", "smolvlm-256m", "--image", "512x512", "--device", "h200", "--recipe", recipe]
        assert main(call) == 0
        text = capsys.readouterr().out
        assert main([*call, "--json"]) == 0
        found[recipe] = (json.loads(capsys.readouterr().out), text)
    (dense, words), (merged, others) = found.values()
    assert dense["tokens"] == merged["tokens"] and dense["flops"]["prefill"] == merged["flops"]["prefill"]
    for unit in ("flops", "ms"):
        assert 0.5 < merged[unit]["tower"] / dense[unit]["tower"] < 0.7
    tower = [next(line for line in shown.splitlines() if line.startswith("tower")) for shown in (words, others)]
    assert tower[0] != tower[1]


def test_plan_knows_presets_and_folders(slow_attention: dict[str, VLM], tmp_path: Any, capsys: Any):
    slow_attention["qwen2_5_vl"].save(tmp_path / "model")
    for model, visual in (("llava-1.5-7b", 576), ("qwen2.5-vl-7b", 391), (tmp_path / "model", 30)):
        assert main(["plan", str(model), "--image", "640x480", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"]["visual"] == visual
    assert main(["plan", "llava-1.6"]) == 2
    assert "a preset; did you mean 'llava-1.5-7b'?" in capsys.readouterr().err
