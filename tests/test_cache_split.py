"""Values of visual tokens that are like the text are kept finer (`vidkv(protect=...)`); the store that holds both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foveate
from foveate.cache import vidkv
from foveate.cache.kivi import KeyCodec, dequantize, quantize
from foveate.cache.kvquant_levels import _plain
from foveate.cache.split import SplitStore
from foveate.cache.store import Store
from foveate.errors import RecipeError, UnsupportedError
from foveate.recipe import Recipe
from foveate.runtime import Clock, open_batch
from foveate.vlm import Request
from goldens_io import goldens_dir
from reduce_oracle import rows_of
from test_text_models import make

RNG = np.random.default_rng(4)
REQUESTS = [Request("what is it here?", RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(2)]
GROUP = 8
TEXT = f"vidkv(group={GROUP}, window={GROUP}, protect=0.3)"


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


def prefilled(vlm, requests):
    """The cache of a batch after its prompt, and the batch's logits."""
    cache, rows = vlm.new_cache(), rows_of(vlm, requests)
    return cache, rows, open_batch(vlm.adapter, rows, cache, Clock(vlm.device)).prefill()


def test_the_tokens_most_like_the_text_are_protected_in_whole_groups():
    text = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    visual = torch.arange(20.0)[:, None] * torch.tensor([[1.0, -1.0]])
    visual[3] += 100
    assert vidkv.most_like(visual, text, 0.3, 4).tolist() == [3, 17, 18, 19]  # 6 in groups of 4
    assert vidkv.most_like(visual, text, 0.4, 4).tolist() == [3, 13, 14, 15, 16, 17, 18, 19]
    assert len(vidkv.most_like(visual, text, 0.01, 8)) == 8 and len(vidkv.most_like(visual[:3], text, 0.5, 4)) == 0
    assert len(vidkv.most_like(visual, text, 1.0, 3)) == 18 and len(vidkv.most_like(visual, text[:0], 0.5, 4)) == 0


def test_protected_values_take_two_bits_and_the_others_three_levels(tiny):
    """What is read equals coding the protected tokens of the prompt by themselves, and the others by themselves."""
    request = REQUESTS[0]
    with Recipe.parse(TEXT).methods[0].attach(tiny):
        cache, (row,), _ = prefilled(tiny, [request])
    embeddings = tiny.model.get_input_embeddings()(row.input_ids)
    embeddings[row.where] = row.features
    is_text = torch.ones(len(row), dtype=torch.bool)
    is_text[row.where] = is_text[row.breaks] = False
    chosen = (embeddings[row.where] @ embeddings[is_text].T).mean(1).argsort(descending=True)
    count = int(len(row.where) * 0.3 / GROUP) * GROUP
    protected = torch.zeros(len(row), dtype=torch.bool)
    protected[row.where[chosen[:count]]] = True
    assert 0 < count < len(row.where)
    for layer, ((_, values),) in zip(cache.layers, _plain(tiny, [request])):
        found = layer.stores[1].read()[0]
        dense = values.unflatten(1, (len(found), -1)).transpose(0, 1)
        assert torch.equal(layer.stores[1].marks[0], protected)
        fine = dense[:, protected].transpose(-1, -2)
        fine = dequantize(*quantize(fine, 2, GROUP, torch.float16), torch.float32).transpose(-1, -2)
        torch.testing.assert_close(found[:, protected], fine, atol=1e-5, rtol=1e-4)
        rest = dense[:, ~protected]
        full = rest.shape[1] // GROUP * GROUP
        codes, scale = vidkv.ternary(rest[:, :full].transpose(-1, -2), GROUP)
        coarse = (codes.unflatten(-1, (-1, GROUP)) * scale[..., None].half().float()).flatten(-2)
        torch.testing.assert_close(found[:, ~protected][:, :full], coarse.transpose(-1, -2), atol=1e-5, rtol=1e-4)


def test_a_batch_protects_what_each_request_alone_does(tiny):
    short = Request("what?", REQUESTS[1].media)
    with Recipe.parse(TEXT).methods[0].attach(tiny):
        both, _, logits = prefilled(tiny, [REQUESTS[0], short])
        for index, request in enumerate((REQUESTS[0], short)):
            alone, _, single = prefilled(tiny, [request])
            torch.testing.assert_close(logits[index], single[0], atol=1e-4, rtol=1e-4)
            for one, other in zip(both.layers, alone.layers):
                assert torch.equal(one.stores[1].marks[index], other.stores[1].marks[0])
        alone.layers[0].reset()
        assert alone.layers[0].stores[1].lengths == []
        assert tiny.ask(REQUESTS[0].media, "what?", max_new_tokens=12).ids
    with Recipe.parse(f"vidkv(group={GROUP}, window={GROUP})").methods[0].attach(tiny):
        coarse, _, _ = prefilled(tiny, [REQUESTS[0]])
    _, values = _plain(tiny, [REQUESTS[0]])[0][0]

    def error(cache):
        found = cache.layers[0].stores[1].read()[0][:, : len(values)]
        return float((found - values.unflatten(1, (len(found), -1)).transpose(0, 1)).norm())

    assert error(both) < error(coarse)


@pytest.mark.parametrize("seed", range(4))
def test_both_stores_together_hold_tokens_in_their_order(seed):
    generator = torch.Generator().manual_seed(seed)
    store = SplitStore(Store(KeyCodec(2, 4, 4), limit=1000, keep=1000), Store(KeyCodec(2, 4, 4), limit=1000, keep=1000))
    held = [torch.zeros(2, 0, 3) for _ in range(3)]
    for step, size in enumerate((11, 1, 1, 5)):
        states = torch.randn(3, 2, size, 3, generator=generator)
        counts = torch.randint(1, size + 1, (3,), generator=generator).tolist() if size > 1 else [1, 1, 1]
        if step in (0, 3):
            store.coming = torch.rand(3, size, generator=generator) < 0.4
        store.append(states, counts)
        held = [torch.cat([old, new[:, :count]], dim=1) for old, new, count in zip(held, states, counts)]

    def same():
        found = store.read()
        assert store.lengths == [row.shape[1] for row in held]
        for row, part in zip(held, found):
            assert torch.equal(part[:, : row.shape[1]], row)

    same()
    store.select(torch.tensor([2, 0, 0]))
    held = [held[2], held[0], held[0]]
    same()
    sizes = [max(1, row.shape[1] - 4) for row in held]
    store.crop(sizes)
    held = [row[:, :size] for row, size in zip(held, sizes)]
    same()
    rank = torch.zeros(3, 2, dtype=torch.int64)
    assert torch.equal(store.read(rank)[:, :, 0], torch.stack([row[:, 0] for row in held]))


def test_mistakes_are_told(tiny, tmp_path):
    with pytest.raises(RecipeError, match="protect is 2"):
        Recipe.parse("vidkv(protect=2.0)")
    with pytest.raises(RecipeError, match="value_bits=2 does already"):
        Recipe.parse("vidkv(value_bits=2, protect=0.2)")
    with pytest.raises(UnsupportedError, match="sees nothing"):
        Recipe.parse(TEXT).check(foveate.load(make(tmp_path / "text"), device="cpu"))
    with Recipe.parse(TEXT).methods[0].attach(tiny), pytest.raises(UnsupportedError, match="protect="):
        tiny.ask(REQUESTS[0].media, "what?", reduce="fastv(keep=0.5, layer=1)", max_new_tokens=2)
