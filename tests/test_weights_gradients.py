"""Gradients block by block are those of the whole model; what they weigh is better by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import families
import foveate
from foveate.cache import kvquant_levels, nuq
from foveate.cache.kvquant import KVQuant
from foveate.errors import RecipeError, UnsupportedError
from foveate.recipe import Recipe
from foveate.vlm import Request
from foveate.weights.calibrate import Stream
from foveate.weights.gradients import answer_loss
from foveate.weights.lowrank import weight_of
from foveate.weights.lq_lora import decompose, fisher_means
from foveate.weights.samples import ANSWER, VISION, Example, draw_examples, modality_of
from test_text_models import make

PICTURE = np.random.default_rng(5).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def whole(stream, number, wanted):
    """Gradients of one sample's loss through the whole language model, with respect to what `wanted` gives then."""
    with torch.enable_grad():
        state = stream.hidden(number).clone().requires_grad_()
        for index in range(len(stream.calls[number].arguments)):
            state = stream.advance(number, index, state)
        call = stream.calls[number]
        ids = torch.as_tensor(stream.example(call).plan.input_ids)
        return torch.autograd.grad(answer_loss(stream.adapter.head(state), ids, call.modality), wanted())


def stream_of(vlm, examples):
    stream = Stream(vlm, "llm", (), examples, None)
    stream.start()
    return stream


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    return foveate.load(make(tmp_path_factory.mktemp("text") / "llama"), device="cpu")


@pytest.mark.parametrize("family", ["llava", "text"])
def test_importance_is_the_squared_gradient_of_each_weight(blind, family):
    vlm = blind if family == "text" else families.tiny(family)
    stream = stream_of(vlm, draw_examples(vlm, "auto", 2, 24, 0))
    found = fisher_means(stream)
    layers = [
        (index, name, module)
        for index, layer in enumerate(vlm.adapter.layers)
        for name, module in layer.named_modules()
        if type(module) is nn.Linear
    ]
    assert not any(module.weight.requires_grad for _, _, module in layers)
    for _, _, module in layers:
        module.weight.requires_grad_()
    try:
        passes = [whole(stream, n, lambda: [m.weight for _, _, m in layers]) for n in range(len(stream.calls))]
    finally:
        for _, _, module in layers:
            module.weight.requires_grad_(False)
    for (index, name, _), *each in zip(layers, *passes):
        fisher = sum(gradient.square() for gradient in each)
        for dim, part in zip((1, 0), found[index][name]):
            mean = fisher.mean(dim=dim)
            torch.testing.assert_close(torch.tensor(part), mean / mean.mean(), rtol=1e-3, atol=1e-4)


def test_gradients_weigh_the_decomposition(blind):
    """Against the full squared gradients, the part they weigh errs less than the one that inputs weigh, or nothing."""
    examples = draw_examples(blind, "random", 4, 24, 0)
    found = fisher_means(stream_of(blind, examples))
    how = "rank=8, bits=2, block=16, calib=random, samples=4, seqlen=24"
    errors = {}
    for more in ("by=gradients", "by=inputs", "weighted=false"):
        made = Recipe.parse(f"lq_lora({how}, {more})").apply(blind, quiet=True)
        errors[more] = 0.0
        for index, layer in enumerate(blind.adapter.layers):
            for name, (rows, columns) in found[index].items():
                low = made.adapter.layers[index].get_submodule(name)
                error = weight_of(low.base) + low.lora_B.float() @ low.lora_A.float() - layer.get_submodule(name).weight
                errors[more] += float((error.square() * torch.tensor(rows)[:, None] * torch.tensor(columns)).sum())
    assert errors["by=gradients"] < min(errors["by=inputs"], errors["weighted=false"])


def test_means_of_rows_and_columns_are_all_that_the_decomposition_needs():
    """Importance whose rows and columns are independent gives the same parts as its own product of means."""
    generator = torch.Generator().manual_seed(0)
    weight, rows, columns = (torch.rand(n, generator=generator) for n in ((24, 32), (24, 1), (1, 32)))
    means = [(rows * columns).mean(dim=d, keepdim=True) for d in (1, 0)]
    one, other = (decompose(weight, 4, 3, block=16, outer=16, fisher=f) for f in (rows * columns, means[0] * means[1]))
    torch.testing.assert_close(one[1] @ one[2], other[1] @ other[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_levels_weighted_by_gradients(tmp_path, family):
    """Values and gradients are those of one pass through the whole model, and levels follow the weights."""
    vlm = families.tiny(family)
    requests = [Request("what is it here?", PICTURE), Request("what?", PICTURE)]
    plain, weighed = kvquant_levels._plain(vlm, requests), kvquant_levels._weighed(vlm, requests)
    for one, other in zip(plain, weighed):
        for (keys, values), (k, v, *weights) in zip(one, other):
            torch.testing.assert_close(k, keys, rtol=1e-3, atol=1e-3 * float(keys.abs().max()))
            torch.testing.assert_close(v, values, rtol=1e-3, atol=1e-3 * float(values.abs().max()))
            assert all(w.shape == k.shape and bool((w >= 0).all()) for w in weights)
    plan = vlm.plan(requests[0].to_messages())
    kinds = modality_of(plan, vlm.adapter)
    stream = stream_of(vlm, [Example(0, plan, torch.where(kinds == VISION, VISION, ANSWER))])
    seen = []
    handle = vlm.adapter.layers[0].self_attn.v_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    try:
        (gradient,) = whole(stream, 0, lambda: seen)
    finally:
        handle.remove()
    square = gradient[0].square()
    torch.testing.assert_close(weighed[0][0][3], square, rtol=1e-3, atol=1e-3 * float(square.max()))
    one, other = (
        kvquant_levels.calibrate(KVQuant(bits=2), vlm, requests, tmp_path / "levels", weighted=weighted)
        for weighted in (False, True)
    )
    keys, by = (torch.cat([part[i][1:] for part in weighed[0]]) for i in (0, 2))
    scale, shift = nuq.scale_and_shift(*nuq.key_range(keys, 0.01))
    inner = (keys - shift) / scale
    found = inner.abs() <= 1

    def error(levels):
        return float((by[found] * (inner[found] - levels[nuq.nearest(inner[found], levels).long()]) ** 2).sum())

    assert error(other[0].key_levels) < error(one[0].key_levels)


def test_weights_of_keys_need_their_projection(tmp_path, monkeypatch):
    vlm = families.tiny("llava")
    attention = vlm.adapter.layers[0].self_attn
    monkeypatch.setattr(attention, "_modules", {n: m for n, m in attention._modules.items() if n != "k_proj"})
    with pytest.raises(UnsupportedError, match="has no k_proj"):
        kvquant_levels.calibrate(KVQuant(bits=2), vlm, [Request("what?")], tmp_path / "levels", weighted=True)


def test_gradients_are_taken_where_there_are_any(blind):
    with pytest.raises(RecipeError, match="gradients are taken in llm only"):
        Recipe.parse("lq_lora(rank=4, parts=[vision_tower])")
    assert Recipe.parse("lq_lora(rank=4, parts=[vision_tower], by=inputs)")
