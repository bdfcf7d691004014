"""Caches: near the dense one, truly small, right for batches, padding, layers of other lengths and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import foveate
from cache_tiny import cache_of, decoder, greedy, method, positions_of, prompt, steps
from foveate.bench.cost import ModelShape, kv_bytes
from foveate.cache.base import cache_bytes
from foveate.cache.int8 import Int8Cache
from foveate.cache.layer import PackedLayer
from foveate.effect import cache_bytes_per_token
from foveate.errors import CheckpointError, InputError, RecipeError
from foveate.recipe import Recipe
from foveate.reduce.uniform import Uniform
from foveate.runtime import Clock, open_batch
from foveate.vlm import Request
from goldens_io import goldens_dir
from reduce_oracle import rows_of

RNG = np.random.default_rng(2)
PICTURE, OTHER = (RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(2))

PACKED = (
    "int8",
    "fp8",
    "fp8(format=e5m2, scaled=false)",
    "kivi(bits=2, group=8, window=16)",
    "kivi(bits=4, group=4, window=8, value_bits=2)",
    "vidkv(group=8, window=16)",
    "vidkv(key_bits=1, value_bits=1, group=8, window=8)",
    "vidkv(group=8, window=16, protect=0.5)",
    "vidkv(key_bits=2, value_bits=2, group=4, window=8)",
    "kvquant(bits=3)",
    "kvquant(bits=2, q_norm=true, outliers=0.05)",
    "kvquant(bits=5, cap=1, exact=3)",
    "kvquant(bits=3, levels=nf)",
    "kvquant(bits=4, levels=int)",
)
EVICTING = (
    "sink(first=2, window=9)",
    "alisa(keep=0.5, rows=3)",
    "alisa(keep=7)",
    "alisa(keep=0.4, cold=int8)",
    "alisa(keep=6, rows=4, cold=recompute)",
)
IDENTITY = (
    "kivi(bits=2, group=8, window=128)",
    "kvquant(bits=2, exact=200)",
    "kvquant(bits=3, outliers=1.0)",
    "sink(window=200)",
    "alisa(keep=1.0)",
    "alisa(keep=200, cold=int8)",
)


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


@pytest.fixture(scope="module")
def exact():
    """In float64: codes are discontinuous, and the rounding of a float32 batch turns a few of them over."""
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu", dtype=torch.float64)


# ---- every method, on a decoder of transformers


@pytest.mark.parametrize("text", IDENTITY)
def test_with_a_budget_that_is_never_used_up_it_is_the_dense_cache(text):
    model = decoder()
    ids, mask = prompt(pads=(0, 7))
    dense, _ = steps(model, DynamicCache(config=model.config), ids, mask)
    found, _ = steps(model, cache_of(model, method(text)), ids, mask)
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", PACKED + EVICTING)
def test_a_row_of_a_padded_batch_is_the_row_alone(text):
    """Through the prompt and 14 steps, in which windows fill up and overflow at other steps for each row."""
    model = decoder()
    ids, mask = prompt(pads=(13, 0, 2))
    together, _ = steps(model, cache_of(model, method(text)), ids, mask)
    for row, pads in enumerate((13, 0, 2)):
        alone, _ = steps(model, cache_of(model, method(text)), ids[row : row + 1, pads:], None)
        torch.testing.assert_close(together[row], alone[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("text", PACKED + EVICTING)
def test_what_stands_in_padding_changes_nothing(text):
    model = decoder()
    ids, mask = prompt(pads=(9, 0))
    other = torch.where(mask == 0, (ids + 5) % model.config.vocab_size, ids)
    first, _ = steps(model, cache_of(model, method(text)), ids, mask, count=4)
    second, _ = steps(model, cache_of(model, method(text)), other, mask, count=4)
    assert torch.equal(first, second)


@pytest.mark.parametrize("text", PACKED + EVICTING)
def test_it_is_another_cache_than_the_dense_one_yet_near_it(text):
    model = decoder()
    ids, mask = prompt(pads=(0, 3))
    dense, whole = steps(model, DynamicCache(config=model.config), ids, mask)
    found, cache = steps(model, cache_of(model, method(text)), ids, mask)
    assert torch.equal(found[:, 0], dense[:, 0])  # the prompt attends to itself exactly
    error = float((found - dense).norm() / dense.norm())
    assert 0 < error < (1.4 if text in EVICTING or "bits=1," in text else 0.75)
    assert all(layer.get_seq_length() == whole.get_seq_length() for layer in cache.layers)
    assert cache_bytes(cache) < cache_bytes(whole) or "cold" in text


@pytest.mark.parametrize("text", ("int8", "kivi(bits=2, group=8, window=16)", "kvquant(bits=3)", *EVICTING[:2]))
def test_generate_of_transformers_takes_it(text):
    model = decoder()
    ids, mask = prompt(pads=(5, 0))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache_of(model, method(text)),
        max_new_tokens=12,
        do_sample=False,
    )
    assert torch.equal(out[:, ids.shape[1] :], greedy(model, cache_of(model, method(text)), ids, mask, 12))


@pytest.mark.parametrize("text", PACKED + EVICTING)
def test_rows_can_be_dropped_repeated_and_reordered(text):
    model = decoder()
    ids, mask = prompt(pads=(13, 0, 2))
    cache = cache_of(model, method(text))
    _, mask = steps(model, cache, ids, mask, count=6, grown=True)
    for layer in cache.layers:
        layer.batch_select_indices(torch.tensor([2, 0]))
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([3, 0]))  # rows 0 and 2 of the first batch
    token = torch.tensor([[3], [3]])
    after = model(input_ids=token, attention_mask=torch.cat([mask[[0, 2]], mask[:2, -1:]], 1), past_key_values=cache)
    expected = []
    for row in (0, 2):
        own = cache_of(model, method(text))
        _, seen = steps(model, own, ids[row : row + 1], prompt(pads=(13, 0, 2))[1][row : row + 1], count=6, grown=True)
        seen = torch.cat([seen, seen[:, -1:]], 1)
        expected.append(model(input_ids=token[:1], attention_mask=seen, past_key_values=own).logits[0])
    torch.testing.assert_close(after.logits, torch.stack(expected), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "text", ("int8", "kivi(bits=4, group=8, window=16)", "vidkv(group=8, window=16)", "kvquant(bits=4)")
)
@pytest.mark.parametrize("gone", [1, 4, 20])
def test_cropping_takes_the_last_columns_away(text, gone):
    model = decoder()
    ids, mask = prompt(pads=(6, 0))
    cache = cache_of(model, method(text))
    _, grown = steps(model, cache, ids, mask, count=8, grown=True)
    length = cache.layers[0].get_seq_length()
    before = [layer.stores[0].lengths for layer in cache.layers]
    cache.crop(-gone)
    assert [layer.stores[1].lengths for layer in cache.layers] == [[n - gone for n in row] for row in before]
    assert cache.get_seq_length() == length - gone
    seen = torch.cat([grown[:, : length - gone], grown[:, -1:]], 1)
    token = torch.tensor([[3], [3]])
    found = model(input_ids=token, attention_mask=seen, past_key_values=cache).logits
    short = DynamicCache(config=model.config)
    _, grown = steps(model, short, ids, mask, count=8, grown=True)
    short.crop(-gone)
    near = model(input_ids=token, attention_mask=seen, past_key_values=short).logits
    assert float((found - near).norm() / near.norm()) < (1.2 if "vidkv" in text else 0.5)
    cache.reset()
    again, _ = steps(model, cache, ids, mask, count=2)
    fresh, _ = steps(model, cache_of(model, method(text)), ids, mask, count=2)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("text", ["kvquant(bits=4, outliers=1.0)", "alisa(keep=0.5, cold=recompute)", "sink(window=8)"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "glm"])
def test_families_differ_in_biases_norms_and_rotary_embedding(text, family):
    model = decoder(family)
    ids, mask = prompt(pads=(4, 0))
    together, _ = steps(model, cache_of(model, method(text)), ids, mask, count=8)
    alone, _ = steps(model, cache_of(model, method(text)), ids[:1, 4:], None, count=8)
    torch.testing.assert_close(together[0], alone[0], atol=2e-4, rtol=1e-4)
    if text.startswith("kvquant"):  # every value is an outlier: what remains is turning keys back and forth
        dense, _ = steps(model, DynamicCache(config=model.config), ids, mask, count=8)
        torch.testing.assert_close(together, dense, atol=1e-5, rtol=1e-4)


def test_attention_backends_agree():
    for text in ("int8", "sink(window=8)", "alisa(keep=0.5)"):
        found = []
        for attn in ("sdpa", "eager"):
            model = decoder("llama", attn, torch.float32)  # in float64 an additive mask overflows
            ids, mask = prompt(pads=(4, 0))
            found.append(steps(model, cache_of(model, method(text)), ids, mask, count=6)[0])
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


# ---- bytes


def filled(text, tokens, heads=2, width=32, dtype=torch.float16):
    cache = type("Cache", (), {"layers": [method(text).layer(0)]})()
    keys, values = torch.randn(2, 1, heads, tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    cache.layers[0].update(keys, values)
    return cache_bytes(cache)


def test_bytes_are_what_the_format_says():
    """Measured from the tensors, against the arithmetic of each format: 600 tokens, 2 heads of 32 channels, float16."""
    tokens, values = 600, 600 * 2 * 32
    dense = 2 * 2 * values
    assert filled("int8", tokens) == 2 * (values + 2 * tokens * 2)
    assert filled("fp8(scaled=false)", tokens) == dense // 2
    coded_keys, coded_values = 512, 600 - 128  # keys in chunks of the window, values all but the window
    expected = [
        coded * 64 * 2 // 8 + coded * 64 // 32 * 4 + (tokens - coded) * 64 * 2 for coded in (coded_keys, coded_values)
    ]
    assert filled("kivi(bits=2)", tokens) == sum(expected)
    pages = tokens // 32
    left = (tokens - pages * 32) * 64 * 2
    hard = pages * (4 + 2 * 16 * (32 * 2 // 8 + 4))  # which channels; codes, scale and minimum of 16 of them
    easy = pages * 2 * 16 * (32 // 8 + 2)
    trits = pages * 2 * (-(-32 * 32 // 5) + 32 * 2)
    assert filled("vidkv", tokens) == hard + easy + trits + 2 * left
    assert filled("sink(first=4, window=96)", tokens) == 2 * 2 * 100 * 64


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("kivi(bits=2)", 3.0, 3.3),
        ("kivi(bits=4)", 5.0, 5.3),
        ("vidkv", 2.1, 2.5),
        ("kvquant(bits=3, exact=0)", 3.0, 4.6),
    ],
)
def test_bits_of_a_value_in_a_long_prompt(text, low, high):
    tokens = 8192
    bits = filled(text, tokens) * 8 / (2 * tokens * 64)
    assert low <= bits <= high


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "fp8",
        "kivi",
        "kvquant(bits=3)",
        "vidkv",
        "sink(window=64)",
        "alisa",
        "alisa(cold=int8)",
        "alisa(cold=recompute)",
    ],
)
def test_every_method_tells_its_effect_and_its_cost(vlm, capsys, text):
    """The effect is measured with the model's own cache, a plan's cost without a model: both see the same bytes."""
    made = Recipe.parse(text).apply(vlm)
    assert "cache          2048 ->" in capsys.readouterr().err
    shape = ModelShape.from_config(vlm.model.config, vlm.spec)
    measured, planned = cache_bytes_per_token(made), kv_bytes(shape, "float32", method(text))
    if "recompute" in text:  # the inputs of a layer are wider than its keys, which a plan does not know
        assert planned < measured
    else:
        assert measured == planned


def test_bytes_of_a_batch_do_not_count_padding():
    """A row of 3 tokens beside one of 160 adds its own tail, not 160 tokens."""
    layer = method("kivi(bits=2, group=32, window=32)").layer(0)
    layer._new = torch.arange(160) >= torch.tensor([[157], [0]])
    keys, values = torch.randn(2, 2, 2, 160, 32)
    layer.update(keys, values)
    assert layer.stores[0].lengths == [3, 160] and layer.stores[0].paged == [0, 5]


# ---- on visual language models


@pytest.mark.parametrize(
    "text", ["kivi(bits=4, group=6, window=12)", "kvquant(bits=4)", "vidkv(group=8, window=16)", *EVICTING]
)
def test_it_composes_with_tokens_that_leave_at_every_place(exact, text):
    """Rows of unequal reduction in one batch, so layers of unequal length, against each row alone."""
    tiny = exact
    requests = [
        Request("what?", PICTURE, reduce="uniform(keep=0.6) + fastv(keep=5, layer=1)"),
        Request("what is it here?", [PICTURE, OTHER], reduce="fastv(keep=0.4, layer=2)"),
        Request("who are you?"),
    ]
    tokens = torch.tensor([[5, 9, 7]]).expand(6, -1)

    def logits(some, columns):
        batch = open_batch(tiny.adapter, rows_of(tiny, some), tiny.new_cache(), Clock(tiny.device))
        out = [batch.prefill(), *(batch.decode(token[columns]) for token in tokens)]
        return batch, torch.stack(out, 1)

    with torch.inference_mode(), method(text).attach(tiny):
        batch, together = logits(requests, slice(None))
        lengths = [layer.get_seq_length() for layer in batch.cache.layers]
        assert len(set(lengths)) > 1
        for index, request in enumerate(requests):
            _, alone = logits([request], slice(index, index + 1))
            torch.testing.assert_close(together[index], alone[0], atol=2e-4, rtol=1e-4)


def test_caches_that_forget_refuse_methods_that_choose_among_what_is_cached(tiny):
    class Chooser(Uniform):
        name = "chooser"
        sites = ("cache",)

        def steps(self, shape):
            return (self.step("cache", self.select, layer=1),)

    for text, refused in (("sink(window=9)", True), ("alisa", True), ("int8", False)):
        recipe = Recipe((Chooser(keep=0.5), method(text)))
        if not refused:
            recipe.check(tiny)
            continue
        with pytest.raises(RecipeError, match=r"chooser chooses among cached tokens, .* forgets some"):
            recipe.check(tiny)


def test_answers_stay_close_to_the_dense_cache(tiny, monkeypatch):
    found: list[torch.Tensor] = []
    forward = tiny.adapter.forward
    monkeypatch.setattr(tiny.adapter, "forward", lambda **kw: found.append(forward(**kw)) or found[-1])
    dense = tiny.ask(PICTURE, "what?", max_new_tokens=3)
    exact = list(found)
    found.clear()
    with Int8Cache().attach(tiny):
        tiny.ask(PICTURE, "what?", max_new_tokens=3)
    assert torch.equal(found[0], exact[0])  # the prompt attends to itself exactly
    assert not torch.equal(found[1], exact[1])
    assert float((found[1] - exact[1]).abs().max()) < 0.05 * float(exact[1].std())
    assert dense.ids == tiny.ask(PICTURE, "what?", max_new_tokens=3).ids


def test_generate_of_a_visual_model_takes_the_cache(tiny):
    inputs = tiny.prepare(tiny.plan(Request("what?", PICTURE).to_messages())).model_kwargs()
    cache = Int8Cache().make(tiny.adapter)
    with torch.inference_mode():
        out = tiny.model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
    with Int8Cache().attach(tiny):
        ids = tiny.ask(PICTURE, "what?", max_new_tokens=5).ids
    assert out[0, -5:].tolist()[: len(ids)] == ids
    assert isinstance(cache.layers[0], PackedLayer) and cache.layers[0].stores[0].lengths == [cache.get_seq_length()]


def test_levels_are_calibrated_saved_and_read(tiny, tmp_path):
    from foveate.cache.kvquant_levels import calibrate, read_levels

    file = tmp_path / "levels.safetensors"
    requests = [Request("what?", PICTURE), Request("what is it here?", OTHER)]
    levels = calibrate(method("kvquant(bits=3)"), tiny, requests, file)
    assert len(levels) == len(tiny.adapter.layers) and len(levels[0].key_levels) == 8
    again = read_levels(str(file), 3)
    assert all(torch.equal(a.key_upper, b.key_upper) for a, b in zip(levels, again))
    with method(f"kvquant(bits=3, file='{file}')").attach(tiny):
        other = tiny.logits(requests[0])
        assert tiny.ask(PICTURE, "what?", max_new_tokens=3).ids
    assert other.shape == tiny.logits(requests[0]).shape
    small = Recipe.parse(f"kvquant(bits=3, file='{file}')").apply(tiny, quiet=True)
    small.save(tmp_path / "out")
    file.rename(tmp_path / "gone.safetensors")
    there = foveate.load((tmp_path / "out").rename(tmp_path / "elsewhere"), device="cpu")
    assert torch.equal(there.logits(requests[0]), other)  # the levels travel inside the checkpoint
    there.save(tmp_path / "twice")
    assert torch.equal(foveate.load(tmp_path / "twice", device="cpu").logits(requests[0]), other)
    broken = tmp_path / "twice" / "kvquant-levels.json"
    broken.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"kvquant-levels.json does not hold levels"):
        foveate.load(tmp_path / "twice", device="cpu").ask(PICTURE, "what?")
    (tmp_path / "gone.safetensors").rename(file)
    with pytest.raises(CheckpointError, match="8 levels, bits=4 takes 16"):
        method(f"kvquant(bits=4, file='{file}')").check(tiny)
    with pytest.raises(CheckpointError, match="not a file"):
        method("kvquant(bits=4, file='nowhere')").check(tiny)
    with pytest.raises(InputError, match="no requests"):
        calibrate(method("kvquant(bits=3)"), tiny, [], file)


# ---- prompts in two passes


@pytest.mark.parametrize("text", PACKED[:5] + EVICTING)
@torch.no_grad()
def test_a_prompt_in_two_passes_is_the_row_alone(text):
    """The second pass has several tokens that see the first ones through the cache, as in a dialogue."""
    model = decoder()
    ids, mask = prompt(pads=(13, 0, 2))

    def second(ids, mask):
        cache = cache_of(model, method(text))
        positions = positions_of(mask)
        model(input_ids=ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], past_key_values=cache)
        out = model(input_ids=ids[:, 20:], attention_mask=mask, position_ids=positions[:, 20:], past_key_values=cache)
        return torch.cat([out.logits, _next(model, cache, mask, positions)], dim=1)

    together = second(ids, mask)
    for row in range(3):
        own = ids[row : row + 1]
        alone = cache_of(model, method(text))
        pads = int((mask[row] == 0).sum())
        positions = torch.arange(30 - pads)[None]
        model(input_ids=own[:, pads:20], position_ids=positions[:, : 20 - pads], past_key_values=alone)
        out = model(input_ids=own[:, 20:], position_ids=positions[:, 20 - pads :], past_key_values=alone).logits
        after = _next(model, alone, torch.ones(1, 30 - pads, dtype=torch.long), positions)
        torch.testing.assert_close(together[row], torch.cat([out, after], 1)[0], atol=2e-4, rtol=1e-4)


def _next(model, cache, mask, positions):
    seen = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    token = torch.full((len(mask), 1), 5)
    return model(input_ids=token, attention_mask=seen, position_ids=positions[:, -1:] + 1, past_key_values=cache).logits


@torch.no_grad()
def test_sink_in_two_passes_against_a_mask():
    model = decoder()
    ids, mask = prompt(pads=(4, 0))
    positions = positions_of(mask)
    cache, dense = cache_of(model, method("sink(first=2, window=5)")), DynamicCache(config=model.config)
    for held in (cache, dense):
        model(input_ids=ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], past_key_values=held)
    found = model(input_ids=ids[:, 20:], attention_mask=mask, position_ids=positions[:, 20:], past_key_values=cache)
    rank, count = mask[:, :20].cumsum(1) - 1, mask[:, :20].sum(1, keepdim=True)
    past = mask[:, :20].bool() & ((rank < 2) | (rank >= count - 5))
    inner = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    allowed = torch.cat([past[:, None, None].expand(-1, 1, 10, -1), inner], dim=-1)
    wanted = model(input_ids=ids[:, 20:], attention_mask=allowed, position_ids=positions[:, 20:], past_key_values=dense)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_alisa_in_two_passes_against_a_mask():
    """Which columns each head has kept is read from the layer; what they do is checked against the dense cache."""
    model = decoder()
    ids, mask = prompt(pads=(0, 0))
    positions = positions_of(mask)
    cache, dense = cache_of(model, method("alisa(keep=8, cold=int8)")), DynamicCache(config=model.config)
    for held in (cache, dense):
        model(input_ids=ids[:, :20], position_ids=positions[:, :20], past_key_values=held)
    layer = cache.layers[0]
    kept = torch.zeros(2, 2, 20, dtype=torch.bool).scatter(2, layer.column.long(), True).repeat_interleave(2, dim=1)
    wanted_keys = dense.layers[0].keys.gather(2, layer.column.long()[..., None].expand(-1, -1, -1, 8))
    assert torch.equal(layer.keys, wanted_keys)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 10, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = model.model.rotary_emb(hidden, positions[:, 20:])
    inner = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, 4, -1, -1)
    allowed = torch.cat([kept[:, :, None].expand(-1, -1, 10, -1), inner], dim=-1)
    expected = attention(
        hidden_states=hidden, position_embeddings=rotary, attention_mask=allowed, past_key_values=dense
    )
    found = attention(hidden_states=hidden, position_embeddings=rotary, attention_mask=None, past_key_values=cache)
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-6)


def test_rotary_positions_of_three_axes(monkeypatch):
    """Qwen2.5-VL turns keys by time, row and column; every value is an outlier, so turning is all that happens."""
    from families import picture
    from families import tiny as family

    vlm = family("qwen2_5_vl")
    request = Request("what is it?", picture())
    dense = vlm.respond(request, 6).ids
    steps_of_dense, steps_of_ours = [], []
    forward = vlm.adapter.forward
    for cache, found in ((None, steps_of_dense), ("kvquant(bits=4, outliers=1.0)", steps_of_ours)):
        monkeypatch.setattr(vlm.adapter, "forward", lambda _into=found, **kw: _into.append(forward(**kw)) or _into[-1])
        if cache is None:
            vlm.respond(request, 6)
        else:
            with method(cache).attach(vlm):
                assert vlm.respond(request, 6).ids == dense
    for ours, theirs in zip(steps_of_ours, steps_of_dense, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
