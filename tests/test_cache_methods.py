"""What each cache method does by itself, and the mistakes that it names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import foveate
from cache_tiny import cache_of, decoder, method, positions_of, prompt, steps
from foveate.cache.int8 import Int8Cache, dequantize, quantize
from foveate.errors import RecipeError, UnsupportedError
from foveate.recipe import Recipe
from foveate.weights.packing import pack, pack_ternary, packed_width, unpack, unpack_ternary
from goldens_io import goldens_dir

# ---- one by one


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1e-2, 1.0, 300.0]), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=40, deadline=None)
def test_int8_codes_are_within_half_a_scale(seed, size, dtype):
    states = (torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(seed)) * size).to(getattr(torch, dtype))
    codes, scale = quantize(states)
    assert codes.dtype == torch.int8 and scale.shape == (2, 2, 5, 1)
    error = (dequantize(codes, scale, torch.float32) - states.float()).abs()
    assert bool((error <= scale.float() / 2 * (1 + 1e-5)).all())


@given(st.sampled_from([1, 2, 3, 4, 5, 8]), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_packing_is_undone(bits, rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, count), generator=generator)
    packed = pack(values, bits)
    assert packed.shape == (rows, packed_width(count, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, count).long(), values)
    trits = torch.randint(-1, 2, (rows, count), generator=generator)
    assert pack_ternary(trits).shape == (rows, -(-count // 5))
    assert torch.equal(unpack_ternary(pack_ternary(trits), count).long(), trits)


def test_kivi_keeps_its_window_and_codes_whole_chunks():
    layer = method("kivi(bits=2, group=8, window=16)").layer(0)
    keys, values = torch.randn(2, 1, 2, 41, 16)
    layer.update(keys, values)
    assert layer.stores[0].tails == [41 % 16] and layer.stores[1].tails == [16]
    for token in range(8):
        more = torch.randn(2, 1, 2, 1, 16)
        full, _ = layer.update(*more)
        assert torch.equal(full[:, :, -1:], more[0])
        assert layer.stores[0].tails == [(42 + token) % 16] and layer.stores[1].tails == [16]
    again, _ = layer.update(*torch.randn(2, 1, 2, 1, 16))
    assert torch.equal(again[:, :, :32], full[:, :, :32])  # what is coded stays as it is


def test_kivi_reads_equal_values_exactly():
    layer = method("kivi(bits=2, group=8, window=8)").layer(0)
    keys = torch.full((1, 1, 8, 8), 1.5)
    layer.update(keys, keys)
    layer.update(keys, keys)
    full, _ = layer.update(keys, keys)
    assert torch.equal(full, torch.full((1, 1, 24, 8), 1.5))


def test_sink_attends_to_first_and_recent_tokens_only():
    """Against a mask over the dense cache: the prompt is seen in full, later tokens see 2 + 9 tokens and themselves."""
    model = decoder()
    ids, mask = prompt(pads=(4, 0))
    found, _ = steps(model, cache_of(model, method("sink(first=2, window=9)")), ids, mask, count=5)
    dense = DynamicCache(config=model.config)
    out = [
        model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=dense).logits[:, -1]
    ]
    generator = torch.Generator().manual_seed(1)
    for token in torch.randint(1, model.config.vocab_size, (5,), generator=generator):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        rank, count = mask.cumsum(1) - 1, mask.sum(1, keepdim=True)
        seen = mask.bool() & ((rank < 2) | (rank >= count - 1 - 9))
        out.append(
            model(
                input_ids=token.expand(2, 1),
                attention_mask=seen[:, None, None],
                position_ids=count - 1,
                past_key_values=dense,
            ).logits[:, -1]
        )
    torch.testing.assert_close(found, torch.stack(out, 1), atol=1e-5, rtol=1e-5)


def test_alisa_selects_recent_tokens_and_those_looked_at():
    from foveate.cache.alisa import select

    score = torch.tensor([[[9.0, 1.0, 5.0, 5.0, 0.0, 8.0]]])
    real = torch.ones(1, 1, 6, dtype=torch.bool)
    assert select(score, real, [4])[0, 0].tolist() == [True, False, True, False, True, True]  # a tie: the earlier one
    real[..., 0] = False
    assert select(score, real, [4])[0, 0].tolist() == [False, False, True, True, True, True]
    assert select(score, real, [9])[0, 0].tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize(("cold", "tolerance"), [("drop", 1e-3), ("int8", 0.05), ("recompute", 0.05)])
def test_alisa_holds_the_keys_of_its_columns(cold, tolerance):
    """In the first layer keys depend on tokens alone, so those held can be looked up in a dense cache."""
    model = decoder()
    ids, mask = prompt(pads=(6, 0))
    cache = cache_of(model, method(f"alisa(keep=8, rows=6, cold={cold})"))
    _, grown = steps(model, cache, ids, mask, count=12, grown=True)
    whole = DynamicCache(config=model.config)
    steps(model, whole, ids, mask, count=12)
    layer, keys = cache.layers[0], whole.layers[0].keys
    assert layer.held == 8 and layer.columns == keys.shape[2]
    distance = torch.cdist(layer.keys, keys)  # [B, H, 8, T]
    assert float(distance.min(dim=-1).values.max()) < tolerance * float(keys.norm(dim=-1).mean())
    assert torch.equal(distance[:, :, -4:, -4:].argmin(-1), torch.arange(4).expand(2, 2, 4))  # the recent half
    if cold != "drop":
        expected = keys.gather(2, layer.column.long()[..., None].expand(-1, -1, -1, keys.shape[-1]))
        torch.testing.assert_close(layer.keys, expected, atol=tolerance * float(keys.abs().max()), rtol=0)
        assert bool(grown.bool().gather(1, layer.column.long().flatten(1)).all())  # no padding among them


def test_kvquant_shares_the_angles_of_a_batch():
    model = decoder()
    ids, mask = prompt(pads=(5, 0, 2))
    cache = cache_of(model, method("kvquant(bits=4)"))
    steps(model, cache, ids, mask, count=3)
    table = cache.layers[0].rotations.table
    assert all(layer.rotations.table is table for layer in cache.layers)
    assert table.shape == (ids.shape[1] + 3, 8)  # one entry for each position, half of the angles: they come twice


def test_kvquant_counts_its_outliers():
    layer = method("kvquant(bits=4, outliers=0.1, exact=2)").layer(0)
    keys, values = torch.randn(2, 1, 2, 200, 8, generator=torch.Generator().manual_seed(0))
    layer.update(keys, values)
    counts = layer.stores[0].parts["outliers"].counts[0]
    assert counts[:2].tolist() == [16, 16]
    assert 0.08 < float(counts[2:].sum()) / (198 * 16) < 0.12
    per_value = layer.stores[1].parts["outliers"].counts[0, 2:]
    assert bool((per_value == 2).all())  # one above and one below in each token of 16 channels
    capped = method("kvquant(bits=4, outliers=0.4, exact=0, cap=3)").layer(0)
    capped.update(keys, values)
    assert int(capped.stores[0].parts["outliers"].counts.max()) == 3


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


# ---- errors


def test_other_attention_than_full_is_refused(tiny, monkeypatch):
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = tiny.adapter.new_cache()
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=4)
    monkeypatch.setattr(tiny.adapter, "new_cache", lambda: cache)
    with pytest.raises(UnsupportedError, match=r"layer 1 .*SlidingWindow"):
        Int8Cache().check(tiny)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kivi(bits=3)", "bits is 3; it must be 2 or 4"),
        ("kivi(group=0)", "group is 0"),
        ("kivi(window=48)", "window=48 is no multiple of group=32"),
        ("kivi(window=16)", "use window=32"),
        ("vidkv(key_bits=2.5)", "key_bits is 2.5"),
        ("vidkv(value_bits=1.5)", "value_bits is 1.5; it must be 1 or 1.58 or 2"),
        ("vidkv(window=16)", "window=16 is shorter than group=32"),
        ("kvquant(bits=6)", "bits is 6"),
        ("kvquant(outliers=1.5)", "outliers is 1.5"),
        ("kvquant(exact=-1)", "exact is -1"),
        ("fp8(format=e3m4)", "format is 'e3m4'"),
        ("sink(window=0)", "window is 0"),
        ("sink(first=-1)", "first is -1"),
        ("alisa(keep=0.0)", "keep is 0.0"),
        ("alisa(keep=1)", "keep is 1"),
        ("alisa(rows=0)", "rows is 0"),
    ],
)
def test_a_mistake_is_told_in_one_line(text, told):
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_group_that_does_not_divide_a_head_is_told(tiny):
    width = tiny.adapter.text_config.hidden_size // tiny.adapter.text_config.num_attention_heads
    with pytest.raises(RecipeError, match=rf"group=24 does not divide the {width} channels of a head; use group="):
        method("kivi(group=24, window=48)").check(tiny)


def test_what_was_forgotten_cannot_be_rolled_back():
    model = decoder()
    ids, mask = prompt(pads=(0,))
    cache = cache_of(model, method("sink(window=8)"))
    steps(model, cache, ids, mask, count=1)
    with pytest.raises(UnsupportedError, match="cannot be rolled back"):
        cache.crop(-1)
    assert not cache.layers[0].is_croppable


def test_alisa_without_queries_says_so():
    with pytest.raises(UnsupportedError, match="make"):
        method("alisa").layer(0).update(*torch.randn(2, 1, 2, 4, 8))
