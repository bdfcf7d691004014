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

from families import FAMILIES, PRESETS, clip, picture
from foveate.adapters.presets import PRESETS as PUBLISHED
from foveate.adapters.presets import _tokenizer, build
from foveate.adapters.vocabulary import byte_tokenizer
from foveate.bench.cost import ModelShape, flops
from foveate.bench.counts import Request as Counts
from foveate.bench.counts import request_of_sizes
from foveate.cli import main
from foveate.cli.plan import shape_of
from foveate.data.plan import plan
from foveate.nvila.presets import PRESETS as NVILA
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
    assert request.prompt == plan.num_tokens
    embeds, cache = torch.zeros(1, request.prompt, shape.width), DynamicCache(config=vlm.model.config)
    places = torch.arange(request.prompt)[None]
    prefill = counted(lambda: adapter.forward(inputs_embeds=embeds, position_ids=places, past_key_values=cache))
    assert found["prefill"] == pytest.approx(prefill, rel=0.02)


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


def test_plan_knows_presets_and_folders(slow_attention: dict[str, VLM], tmp_path: Any, capsys: Any):
    slow_attention["qwen2_5_vl"].save(tmp_path / "model")
    for model, visual in (("llava-1.5-7b", 576), ("qwen2.5-vl-7b", 391), (tmp_path / "model", 30)):
        assert main(["plan", str(model), "--image", "640x480", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"]["visual"] == visual
    assert main(["plan", "llava-1.6"]) == 2
    assert "a preset; did you mean 'llava-1.5-7b'?" in capsys.readouterr().err
