"""Quantized caches: close to the dense one, truly small, and correct for batches, padding and transformers itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.cache.base import cache_bytes
from foveate.cache.int8 import Int8Cache, Int8Layer, dequantize, quantize
from foveate.errors import UnsupportedError
from foveate.runtime import Clock, prefill
from foveate.vlm import Request
from goldens_io import goldens_dir

RNG = np.random.default_rng(2)
PICTURE, OTHER = (RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(2))


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1e-2, 1.0, 300.0]), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=40, deadline=None)
def test_codes_are_within_half_a_scale(seed, size, dtype):
    states = (torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(seed)) * size).to(getattr(torch, dtype))
    codes, scale = quantize(states)
    assert codes.dtype == torch.int8 and scale.shape == (2, 2, 5, 1)
    error = (dequantize(codes, scale, torch.float32) - states.float()).abs()
    assert bool((error <= scale.float() / 2 * (1 + 1e-5)).all())


def fill(layer, *lengths, dtype=torch.float32):
    torch.manual_seed(0)
    parts = [(torch.randn(3, 2, n, 8, dtype=dtype), torch.randn(3, 2, n, 8, dtype=dtype)) for n in lengths]
    for keys, values in parts:
        out = layer.update(keys, values)
    return out, parts


def test_new_tokens_are_exact_and_old_ones_close():
    (keys, values), parts = fill(Int8Layer(), 6, 1)
    assert keys.shape == (3, 2, 7, 8)
    assert torch.equal(keys[..., -1:, :], parts[1][0])
    assert torch.equal(values[..., -1:, :], parts[1][1])
    torch.testing.assert_close(keys[..., :6, :], parts[0][0], atol=0.02, rtol=0)
    assert not torch.equal(keys[..., :6, :], parts[0][0])


def test_bytes_are_measured_from_the_tensors(tiny):
    row = 2 * 3 * 2 * 10 * (8 * 1 + 2)  # keys and values; codes, and a 2-byte scale per token and head
    cache = Int8Cache().make(tiny.adapter)
    for index in range(len(cache.layers)):
        cache.update(torch.randn(3, 2, 10, 8), torch.randn(3, 2, 10, 8), index)
    assert cache_bytes(cache) == len(cache.layers) * row
    assert cache.layers[0].keys.dtype == torch.int8
    assert cache.layers[0].keys.untyped_storage().nbytes() == 3 * 2 * 10 * 8


def test_batch_operations_take_codes_and_scales_along():
    layer = Int8Layer()
    fill(layer, 4)
    whole = dequantize(layer.keys, layer.key_scale, torch.float32)
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(dequantize(layer.keys, layer.key_scale, torch.float32), whole[[2, 0]])
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0]))
    assert torch.equal(dequantize(layer.keys, layer.key_scale, torch.float32), whole[[0, 2]])
    layer.crop(-1)
    assert layer.get_seq_length() == 3 and layer.value_scale.shape[-2] == 3
    layer.reset()
    assert layer.get_seq_length() == 0
    fill(layer, 2)
    assert layer.get_seq_length() == 2


def test_answers_stay_close_to_the_dense_cache(tiny, monkeypatch):
    steps: list[torch.Tensor] = []
    forward = tiny.adapter.forward
    monkeypatch.setattr(tiny.adapter, "forward", lambda **kw: steps.append(forward(**kw)) or steps[-1])
    dense = tiny.ask(PICTURE, "what?", max_new_tokens=3)
    exact = list(steps)
    steps.clear()
    with Int8Cache().attach(tiny):
        tiny.ask(PICTURE, "what?", max_new_tokens=3)
    assert torch.equal(steps[0], exact[0])  # the prompt attends to itself exactly
    assert not torch.equal(steps[1], exact[1])
    assert float((steps[1] - exact[1]).abs().max()) < 0.05 * float(exact[1].std())
    assert dense.ids == tiny.ask(PICTURE, "what?", max_new_tokens=3).ids


def test_padded_rows_equal_rows_alone(tiny):
    requests = [Request("what?", PICTURE, reduce="uniform(keep=0.3)"), Request("what is it here?", [PICTURE, OTHER])]
    with Int8Cache().attach(tiny):
        together = tiny.answer(requests, max_new_tokens=6)
        alone = [tiny.respond(request, 6) for request in requests]
        assert [a.ids for a in together] == [a.ids for a in alone]
        plans = [tiny.plan(r.to_messages()) for r in requests]
        with torch.inference_mode():
            rows = tiny._rows(
                plans, [tiny.prepare(p) for p in plans], [tiny.reducers(r.reduce) for r in requests], Clock(tiny.device)
            )
            both = prefill(tiny.adapter, rows, tiny.new_cache())[0]
            single = prefill(tiny.adapter, rows[1:], tiny.new_cache())[0]
    torch.testing.assert_close(both[1:], single, atol=2e-5, rtol=1e-5)


def test_generate_of_transformers_takes_the_cache(tiny):
    inputs = tiny.prepare(tiny.plan(Request("what?", PICTURE).to_messages())).model_kwargs()
    cache = Int8Cache().make(tiny.adapter)
    with torch.inference_mode():
        out = tiny.model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
    with Int8Cache().attach(tiny):
        ids = tiny.ask(PICTURE, "what?", max_new_tokens=5).ids
    assert out[0, -5:].tolist()[: len(ids)] == ids
    assert cache.layers[0].keys.dtype == torch.int8


def test_other_attention_than_full_is_refused(tiny, monkeypatch):
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = tiny.adapter.new_cache()
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=4)
    monkeypatch.setattr(tiny.adapter, "new_cache", lambda: cache)
    with pytest.raises(UnsupportedError, match=r"layer 1 .*SlidingWindow"):
        Int8Cache().check(tiny)
