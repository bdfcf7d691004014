"""fp8_weights and maskllm: what is stored, what is learned, and that both save and load."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foveate
from foveate.errors import RecipeError
from foveate.recipe import Recipe
from foveate.vlm import Request
from foveate.weights.base import module_bytes
from foveate.weights.linear import Fp8Linear
from foveate.weights.maskllm import first_logits, mask_options, soft_mask
from test_text_models import make

DATA = "samples=3, seqlen=16"


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    return foveate.load(make(tmp_path_factory.mktemp("text") / "llama"), device="cpu")


@pytest.mark.parametrize("inputs", [True, False])
def test_fp8_layer_is_near_and_a_quarter_of_float32(inputs):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).requires_grad_(False)
    layer = Fp8Linear.of(linear, inputs)
    x = torch.randn(5, 64)
    error = float((layer(x) - linear(x)).norm() / linear(x).norm())
    assert 0 < error < 0.06
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight.nbytes * 4 == linear.weight.nbytes
    assert float(layer.weight.float().abs().amax(dim=1).min()) == torch.finfo(torch.float8_e4m3fn).max
    assert torch.isfinite(Fp8Linear.of(nn.Linear(4, 2).requires_grad_(False), inputs)(torch.zeros(1, 4))).all()


@pytest.mark.parametrize(
    "text", ["fp8_weights", f"maskllm(steps=4, {DATA})", f"maskllm(steps=2, {DATA}) + fp8_weights"]
)
def test_it_saves_and_loads(blind, tmp_path, text):
    made = Recipe.parse(text).apply(blind, quiet=True)
    made.save(tmp_path / "out")
    again = foveate.load(tmp_path / "out", device="cpu")
    request = Request("the big red fox ran and saw")
    assert again.recipe == made.recipe and torch.equal(again.logits(request), made.logits(request))
    assert not torch.equal(made.logits(request), blind.logits(request))
    if "fp8" in text:
        assert module_bytes(made.adapter.layers[0]) < 0.35 * module_bytes(blind.adapter.layers[0])


@pytest.mark.parametrize(("pattern", "keep", "of"), [("2:4", 2, 4), ("1:4", 1, 4)])
def test_exactly_n_of_m_stay(blind, pattern, keep, of):
    made = Recipe.parse(f"maskllm(pattern='{pattern}', steps=3, {DATA})").apply(blind, quiet=True)
    for layer, dense in zip(made.adapter.layers, blind.adapter.layers):
        for name, linear in dense.named_modules():
            if type(linear) is nn.Linear:
                weight = layer.get_submodule(name).weight
                stays = weight != 0
                assert bool((stays.reshape(-1, of).sum(1) == keep).all())
                assert torch.equal(weight[stays], linear.weight[stays])


def test_learned_masks_are_nearer_than_the_ones_they_start_from(blind):
    generator = torch.Generator()

    def error(text):
        made = Recipe.parse(text).apply(blind, quiet=True)
        ids = torch.randint(0, blind.adapter.text_config.vocab_size, (16, 12), generator=generator.manual_seed(1))
        hidden = blind.model.get_input_embeddings()(ids)
        rotary = blind.adapter.text_model.rotary_emb(hidden, torch.arange(12)[None])
        out = [vlm.adapter.layers[0](hidden, position_embeddings=rotary) for vlm in (made, blind)]
        out = [o[0] if isinstance(o, tuple) else o for o in out]
        return float((out[0] - out[1]).norm())

    start = error("magnitude(pattern='2:4')")
    learned = "maskllm(prior=magnitude, steps=60, rate=0.004, calib=random, samples=12, seqlen=12)"
    assert error(learned) < start


def test_a_soft_mask_becomes_a_choice():
    options = mask_options(2, 4)
    assert options.shape == (6, 4) and bool((options.sum(1) == 2).all())
    prior = torch.tensor([[True, False, False, True]])
    generator = torch.Generator().manual_seed(0)
    logits = first_logits(prior.repeat(500, 1), options, 3.0, generator)
    likeliest = options[logits.argmax(1)].mean(0)
    assert float(likeliest[[0, 3]].min()) > 0.9  # the prior's option has the largest overlap
    soft, hard = (soft_mask(logits, options, t, 500.0, generator) for t in (4.0, 0.05))
    assert torch.allclose(soft.sum(1), torch.full((500,), 2.0), atol=1e-4)
    assert float((hard - hard.round()).abs().mean()) < float((soft - soft.round()).abs().mean())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("maskllm(pattern='')", "pattern is empty"),
        ("maskllm(steps=0)", "steps is 0"),
        ("maskllm(pattern='4:2')", "'4:2'"),
    ],
)
def test_a_mistake_is_told(text, told):
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text)
    assert told in str(error.value)
