"""Weights in few bits: packing, error bounds, bytes, and checkpoints that hold the packed integers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import foveate
from foveate.errors import CheckpointError, RecipeError
from foveate.recipe import Recipe
from foveate.weights.base import PARTS, module_bytes
from foveate.weights.linear import QuantizedLinear
from foveate.weights.packing import BITS, pack, packed_width, unpack
from foveate.weights.rtn import RTN, quantize
from goldens_io import goldens_dir

PICTURE = np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)
ALL = "rtn(bits=4, group=16, parts=[llm, vision_tower, mm_projector])"


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_packing_round_trip(bits, rows, columns, seed):
    values = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns).long(), values)


def test_packing_is_a_little_endian_stream_of_bits():
    assert pack(torch.tensor([[1, 2, 3, 0]]), 2).tolist() == [[0b00_11_10_01]]
    assert pack(torch.tensor([[0xA, 0xB, 0xC]]), 4).tolist() == [[0xBA, 0x0C]]
    values = [5, 2, 7, 0, 1, 6, 3, 4]
    assert pack(torch.tensor([values]), 3).tolist() == [
        list(sum(v << 3 * i for i, v in enumerate(values)).to_bytes(3, "little"))
    ]
    assert [packed_width(32, bits) for bits in BITS] == [8, 12, 16, 32]


@given(
    st.sampled_from(BITS),
    st.sampled_from([4, 8, 24]),
    st.booleans(),
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 1e-3, 1.0, 50.0]),
    st.sampled_from([0.0, 3.0]),
)
@settings(max_examples=80, deadline=None)
def test_errors_are_bounded_by_the_scale(bits, group, symmetric, seed, size, shift):
    """Symmetric: half a scale. Asymmetric: one scale (half for the code, half for the zero point)."""
    weight = (torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) + shift) * size
    codes, scale, zero = quantize(weight, bits, group, symmetric)
    assert int(codes.min()) >= 0 and int(codes.max()) < 2**bits
    layer = QuantizedLinear.of(nn.Linear(24, 5, bias=False), codes, scale, zero, bits)
    error = (layer.weight - weight).abs().view(5, -1, group)
    bound = scale.float()[..., None] * (0.5 if symmetric else 1.0)
    assert bool((error <= bound * (1 + 1e-4)).all())


def test_more_bits_and_smaller_groups_are_closer():
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))

    def error(bits, group):
        layer = QuantizedLinear.of(nn.Linear(96, 32), *quantize(weight, bits, group, False), bits)
        return float((layer.weight - weight).norm())

    assert error(8, 32) < error(4, 32) < error(3, 32) < error(2, 32)
    assert error(4, 16) < error(4, 32) < error(4, 96)
    assert error(8, 96) < 0.01 * float(weight.norm())


@pytest.mark.parametrize("weight", [torch.zeros(4, 16), torch.full((4, 16), 3.0), torch.full((4, 16), -2.0)])
def test_constant_groups_come_back(weight):
    for symmetric in (False, True):
        codes, scale, zero = quantize(weight, 4, 8, symmetric)
        layer = QuantizedLinear.of(nn.Linear(16, 4), codes, scale, zero, 4)
        torch.testing.assert_close(layer.weight, weight, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_the_layer_is_the_linear_layer_of_its_weight(bits, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(24, 6).to(dtype)
    layer = RTN(bits=bits, group=8).convert(linear)
    x = torch.randn(3, 24, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.dequantize(dtype), linear.bias))
    assert layer.bias is linear.bias
    assert layer.packed.nbytes == 6 * packed_width(24, bits)


def test_a_group_that_does_not_divide_names_the_layer_and_the_way_out(tiny):
    with pytest.raises(RecipeError, match=r"llm\.model\.layers\.0\.self_attn\.q_proj has 48 inputs.*group=7.*group=6"):
        Recipe.parse("rtn(group=7)").check(tiny)


def test_only_the_asked_linear_layers_change_and_the_dense_model_stays(tiny):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    answer = tiny.ask(PICTURE, "what?", max_new_tokens=4).ids
    small = Recipe.parse("rtn(bits=2, group=0, parts=[mm_projector])").apply(tiny, quiet=True)
    changed = {n for n, m in small.model.named_modules() if isinstance(m, QuantizedLinear)}
    assert changed and all(name.startswith("mm_projector.") for name in changed)
    whole = Recipe.parse(ALL).apply(tiny, quiet=True)
    kinds = {name: type(module) for name, module in whole.model.named_modules()}
    assert kinds["llm.lm_head"] is nn.Linear
    assert not [name for name, kind in kinds.items() if kind is nn.Linear and name != "llm.lm_head"]
    # copy on write: what was not replaced is the same tensor, and the dense model is as it was
    assert whole.model.llm.lm_head.weight is tiny.model.llm.lm_head.weight
    assert whole.model.llm is not tiny.model.llm
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    assert tiny.ask(PICTURE, "what?", max_new_tokens=4).ids == answer
    assert whole.logits(foveate.vlm.Request("what?", PICTURE)).isfinite().all()


def test_eight_bits_change_little_and_four_more(tiny):
    request = foveate.vlm.Request("what?", PICTURE)
    dense = tiny.logits(request)

    def change(text):
        return float((Recipe.parse(text).apply(tiny, quiet=True).logits(request) - dense).norm() / dense.norm())

    assert (
        0 < change("rtn(bits=8, group=16)") < 0.02 < change("rtn(bits=4, group=16)") < change("rtn(bits=2, group=16)")
    )


@pytest.mark.parametrize("text", [ALL, "rtn(bits=8, group=0) + int8", "rtn(bits=3, group=24, symmetric=true)"])
def test_a_checkpoint_holds_the_packed_integers_and_reloads_equal(tiny, tmp_path, text):
    small = Recipe.parse(text).apply(tiny, quiet=True)
    small.save(tmp_path / "small")
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert any(name.endswith(".packed") for name in stored)
    assert sum(tensor.nbytes for tensor in stored.values()) == module_bytes(small.model)
    parts = small.adapter.parts()
    assert module_bytes(small.model) == sum(module_bytes(parts[part]) for part in PARTS) < module_bytes(tiny.model)
    again = foveate.load(tmp_path / "small", device="cpu")
    assert again.recipe == small.recipe
    for name, value in small.model.state_dict().items():
        found = again.model.state_dict()[name]
        assert found.dtype == value.dtype and torch.equal(found, value), name
    request = foveate.vlm.Request("what?", PICTURE)
    # the tensors are equal; sums may differ in the last bit, as memory is aligned otherwise
    torch.testing.assert_close(again.logits(request), small.logits(request), atol=1e-6, rtol=1e-6)
    half = foveate.load(tmp_path / "small", device="cpu", dtype="bfloat16")
    assert half.model.llm.model.layers[0].self_attn.q_proj.scale.dtype == torch.float16
    assert half.logits(request).isfinite().all()


def test_a_damaged_recipe_file_is_an_error(tiny, tmp_path):
    Recipe.parse("rtn(bits=4, group=16)").apply(tiny, quiet=True).save(tmp_path / "small")
    path = tmp_path / "small" / "recipe.json"
    data = json.loads(path.read_text())
    for broken, words in (
        ("{", "recipe.json"),
        (json.dumps({**data, "family": "martian"}), "martian"),
        (json.dumps({**data, "methods": [{"name": "rtm"}]}), "rtn"),
        (json.dumps({**data, "methods": [{"name": "rtn", "bits": 8, "group": 16}]}), "shape"),
    ):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match=words):
            foveate.load(tmp_path / "small")
