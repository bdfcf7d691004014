"""Counts against torch's own counter, against published sizes, and against allocated memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from foveate.adapters.presets import describe
from foveate.bench.cost import Effect, ModelShape, Request, estimate, flops, kv_bytes, weights
from foveate.bench.counts import request_of_sizes
from foveate.bench.device import Device, devices
from foveate.bench.shape import connector_linears
from foveate.data.plan import plan
from foveate.data.spec import PreprocessSpec
from foveate.effect import cache_bytes_per_token
from foveate.errors import InputError, UnknownNameError
from foveate.nvila.presets import PRESETS, build
from foveate.recipe import Recipe
from foveate.reduce.fastervlm import FasterVLM
from foveate.reduce.fastv import FastV
from foveate.reduce.flowcut import FlowCut
from foveate.reduce.hired import HiRED
from foveate.reduce.pyramiddrop import PyramidDrop
from foveate.reduce.uniform import Uniform
from foveate.weights.base import module_bytes
from foveate.weights.linear import QuantizedLinear


@pytest.fixture(scope="module")
def nano():
    return build("nano", attn="eager").eval()  # torch has no count for its fused attention on a CPU


def shape_of(name: str) -> ModelShape:
    config = PRESETS.get(name).config()
    return ModelShape.from_config(config, config.spec)


def counted(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_of_every_stage_equal_torchs_counter(nano):
    shape = ModelShape.from_config(nano.config, nano.spec)
    request = request_of_sizes(nano.spec, shape, images=[(300, 200)], text=40, new=1)
    found = flops(shape, request, causal=False)
    pixels = torch.zeros(request.views, 3, nano.spec.tile_size, nano.spec.tile_size)
    features = nano.tower(pixels)
    grid = (2, 3)
    cache = DynamicCache(config=nano.config.text_config)
    embeds = torch.zeros(1, request.prompt, shape.width)

    assert found["tower"] == pytest.approx(counted(lambda: nano.tower(pixels)), rel=0.01)
    assert found["connector"] == pytest.approx(counted(lambda: nano.connect(features, [grid])), rel=0.01)
    prefill = counted(lambda: nano.llm(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1))
    assert found["prefill"] == pytest.approx(prefill, rel=0.01)
    step = counted(
        lambda: nano.llm(inputs_embeds=embeds[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    )
    assert found["decode"] == pytest.approx(step, rel=0.01)
    assert flops(shape, request)["prefill"] < found["prefill"]


def test_kv_bytes_equal_the_allocated_cache(nano):
    shape = ModelShape.from_config(nano.config, nano.spec)
    cache = DynamicCache(config=nano.config.text_config)
    with torch.no_grad():
        nano.llm(inputs_embeds=torch.zeros(1, 50, shape.width), past_key_values=cache, use_cache=True)
    allocated = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert 50 * kv_bytes(shape, "float32") == allocated


def test_weights_of_a_recipe_equal_the_converted_model(vlm):
    shape = ModelShape.from_config(vlm.model.config, vlm.spec)
    for text in ("rtn(bits=4)", "rtn(bits=8, parts=[llm, vision_tower, mm_projector])", "rtn(bits=3, group=0)"):
        recipe = Recipe.parse(text)
        made = recipe.apply(vlm, quiet=True)
        layers = [m for m in made.model.modules() if isinstance(m, QuantizedLinear)]
        measured = sum(module_bytes(layer) - (layer.bias.nbytes if layer.bias is not None else 0) for layer in layers)
        dense, small = (sum(weights(shape, "float32", found).values()) for found in ((), recipe.of("weights")))
        replaced = sum(4 * layer.in_features * layer.out_features for layer in layers)
        assert dense - small == replaced - measured


def test_cache_of_a_recipe_is_measured(vlm):
    shape = ModelShape.from_config(vlm.model.config, vlm.spec)
    (int8,) = Recipe.parse("int8").of("cache")
    assert kv_bytes(shape, "float32") == cache_bytes_per_token(vlm)
    assert kv_bytes(shape, "float32", int8) == cache_bytes_per_token(Recipe.parse("int8").apply(vlm, quiet=True))


@pytest.mark.parametrize(
    ("name", "connector_m", "llm_b"),
    [
        # projector files of 124.85 MB and 122.2 MB in bf16 hold 62.4 M and 61.1 M values, norms and biases included
        ("nvila-8b", 62.425, 7.07),
        ("nvila-lite-8b", 61.101, 7.07),
        ("nvila-lite-2b", 43.52, 1.54),
    ],
)
def test_published_sizes(name, connector_m, llm_b):
    shape = shape_of(name)
    assert shape.connector_params / 1e6 == pytest.approx(connector_m, rel=0.002)
    assert (shape.layers * shape.layer_params + shape.head_params) / 1e9 == pytest.approx(llm_b, rel=0.01)
    assert shape.tower_params / 1e6 == pytest.approx(413.3 * 26 / 27, rel=0.01)  # the 27th layer is not run


@pytest.mark.parametrize(
    ("size", "tokens", "views"),
    [((448, 448), 2304, 14), ((1920, 1080), 3072, 17), ((1080, 1920), 2560, 15)],
)
def test_tokens_of_the_published_sizes(size, tokens, views):
    shape = shape_of("nvila-8b")
    request = request_of_sizes(PreprocessSpec(), shape, images=[size], text=10)
    assert (request.visual, request.views, request.text) == (tokens, views, 11)
    assert request.groups == ((256,) * (tokens // 256),)


def test_a_clip_of_256_frames_has_32_groups():
    config = PRESETS.get("nvila-8b-video").config()
    request = request_of_sizes(config.spec, shape_of("nvila-8b-video"), frames=256)
    assert request.prompt == 8224 and request.views == 256 and request.connector_rows == 256 * 256
    odd = request_of_sizes(config.spec, shape_of("nvila-8b-video"), frames=9)
    assert odd.views == 9 and odd.prompt == 2 * 257  # the second group holds one frame


@pytest.mark.parametrize("mode", ["dynamic_s2", "dynamic", "resize"])
@pytest.mark.parametrize("media", [[(300, 100)], [(300, 100), (90, 90)], 5, 8])
def test_counts_without_pixels_equal_those_of_the_plan(vlm, mode, media):
    spec = replace(vlm.spec, mode=mode)
    shape = ModelShape.from_config(vlm.model.config, spec)
    clip = media if isinstance(media, int) else None
    sizes = [] if clip else media
    parts = [{"type": "image", "image": np.zeros((h, w, 3), np.uint8)} for w, h in sizes]
    if clip:
        parts.append({"type": "video", "video": np.zeros((clip, 64, 64, 3), np.uint8)})
    made = plan([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], spec, vlm.tokenizer)
    real = Request.from_plan(made, shape)
    text = made.num_text - (made.media[0].blocks if mode == "dynamic" and len(sizes) == 1 else 0)
    assert request_of_sizes(spec, shape, images=sizes, frames=clip, text=text) == real


def test_reducers_round_in_each_group():
    request = Request(views=3, visual=25, kept=25, text=5, groups=((9, 9), (7,)))
    shape = shape_of("nano")
    assert Effect((FasterVLM(keep=0.5),)).apply(request, shape).kept == 5 + 5 + 4  # a share for each view
    assert Effect((Uniform(keep=0.5),)).apply(request, shape).kept == 9 + 4  # one for each picture
    assert Effect((FasterVLM(keep=1),)).apply(request, shape).kept == 3
    assert Effect((FasterVLM(keep=0.5),)).apply(Request(text=4), shape).kept == 0


def test_selection_costs_what_its_signal_costs():
    shape = shape_of("nano")
    request = request_of_sizes(PRESETS.get("nano").spec, shape, images=[(128, 128)], text=8)
    assert Effect((Uniform(keep=0.5),)).selection_flops(shape, request) == 0
    extra = Effect((FasterVLM(keep=0.5),)).selection_flops(shape, request)
    assert extra == request.views * 2 * 64 * 64 * 96
    assert Effect((HiRED(keep=0.5),)).selection_flops(shape, request) == 2 * extra  # the first block and the last
    assert Effect((FlowCut(keep=0.5),)).selection_flops(shape, request) == 0  # one query for each view


@pytest.mark.parametrize("method", [FasterVLM(keep=0.5), HiRED(keep=0.5)])
def test_where_there_is_a_cls_token_no_map_is_made(method):
    _, config, spec = describe("llava-1.5-7b")
    shape = ModelShape.from_config(config, spec)
    request = request_of_sizes(spec, shape, images=[(336, 336)], text=8)
    assert Effect((method,)).selection_flops(shape, request) == 0


def test_methods_inside_the_language_model_cost_their_rows_and_save_by_layer():
    shape = shape_of("nvila-8b")
    request = request_of_sizes(PreprocessSpec(), shape, images=[(448, 448)], text=50)
    text, visual, queries = request.text, request.visual, shape.heads * shape.head_size
    effect = Effect((FastV(keep=0.5, layer=2),))
    small = effect.apply(request, shape)
    assert small.per_layer == (visual, visual, *[visual // 2] * (shape.layers - 2))
    row = 2 * shape.width * queries + 2 * queries * (text + visual)
    assert effect.selection_flops(shape, small) == row
    keys = 2 * (text + visual) * shape.width * shape.kv_heads * shape.head_size
    pyramid = Effect((PyramidDrop(keep=0.5, layers=(2,)),))
    assert pyramid.selection_flops(shape, pyramid.apply(request, shape)) == row + keys
    dense, dropped = (flops(shape, one)["prefill"] for one in (request, small))
    each = 2 * shape.layer_params * visual / 2 + 4 * queries * (
        (text + visual) * (text + visual + 1) / 2 - (text + visual // 2) * (text + visual // 2 + 1) / 2
    )
    assert dense - dropped == pytest.approx((shape.layers - 2) * each)
    assert small.cached == text + visual * (2 + (shape.layers - 2) / 2) / shape.layers
    assert small.prompt == text + visual


def test_estimate_sees_every_saving():
    shape, device = shape_of("nvila-8b"), devices()["h200"]
    request = request_of_sizes(PreprocessSpec(), shape, images=[(1920, 1080)], text=64, new=64)
    dense = estimate(shape, request, device)
    half = estimate(shape, request, device, effect=Effect(reducers=(Uniform(keep=0.5),)))
    small = estimate(shape, request, device, effect=Effect.of(Recipe.parse("rtn(bits=4, group=128) + int8")))
    assert dense["tokens"]["kept"] == 3072 and half["tokens"]["kept"] == 1536
    assert (
        half["flops"]["prefill"] < 0.55 * dense["flops"]["prefill"]
        and half["flops"]["tower"] == dense["flops"]["tower"]
    )
    assert half["ms"]["ttft"] < dense["ms"]["ttft"] and half["bytes"]["kv"] < dense["bytes"]["kv"]
    assert small["bytes"]["weights"] < 0.5 * dense["bytes"]["weights"]
    assert small["bytes"]["kv_per_token"] == 2 * 28 * 4 * (128 + 2)
    assert small["ms"]["decode"] < 0.45 * dense["ms"]["decode"]
    assert weights(shape)["llm"] == 2 * (shape.layers * shape.layer_params + shape.head_params)


def test_roofline_takes_the_slower_side():
    device = Device("d", "d", {"bfloat16": 100.0}, {"": 10.0}, {"flops": 0.5, "bandwidth": 1.0}, "")
    assert device.ms(100, 1, "bfloat16") == 2000 and device.ms(1, 100, "bfloat16") == 10_000
    assert all(d.source and d.ms(1e12, 1e9, "bfloat16") > 0 for d in devices().values())


def test_bad_sizes_and_names_are_said():
    shape = shape_of("nano")
    spec = PRESETS.get("nano").spec
    with pytest.raises(InputError, match="longer than 200 times"):
        request_of_sizes(spec, shape, images=[(30_000, 1)])
    with pytest.raises(InputError, match="the limit is 100"):
        request_of_sizes(replace(spec, max_pixels=100), shape, images=[(64, 64)])
    with pytest.raises(UnknownNameError, match="unknown connector 'mpl'"):
        connector_linears("mpl", 4, 4)


def test_peak_memory_counts_weights_cache_and_the_worst_moment():
    from foveate.bench.cost import activation_bytes

    shape, device = shape_of("nvila-8b"), devices()["h200"]
    small = request_of_sizes(PreprocessSpec(), shape, images=[(448, 448)], text=64, new=8)
    large = request_of_sizes(PreprocessSpec(), shape, images=[(1920, 1080)], text=64, new=8)
    found = [estimate(shape, request, device)["bytes"] for request in (small, large)]
    assert found[0]["peak"] < found[1]["peak"]
    for request, row in zip((small, large), found):
        assert row["peak"] == row["weights"] + row["kv"] + activation_bytes(shape, request)
    half = replace(large, kept=large.kept // 2)
    assert activation_bytes(shape, half) <= activation_bytes(shape, large)
    assert activation_bytes(shape, large, "float32") > activation_bytes(shape, large)


@pytest.mark.slow
def test_a_process_that_fails_says_why():
    from foveate.bench.memory import Job, peak

    with pytest.raises(InputError, match="unknown model 'nanoo'"):
        peak(Job("nanoo"))
