"""Kernels compute what their layers compute; where the machine has none, nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import foveate
from foveate.recipe import Recipe
from foveate.vlm import Request
from foveate.weights.kernels import FEW_ROWS, accelerate_, fits_int4, fits_sparse, int4_kernel
from foveate.weights.rtn import RTN

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64])
def test_the_int4_kernel_multiplies_by_the_layers_weight(device, symmetric, group):
    torch.manual_seed(0)
    linear = nn.Linear(128, 64).to(device, torch.bfloat16).requires_grad_(False)
    layer = RTN(bits=4, group=group, symmetric=symmetric).convert(linear)
    assert fits_int4(layer, torch.bfloat16) and not fits_int4(layer, torch.float32)
    layer.kernel = int4_kernel(layer)
    x = torch.randn(1, 5, 128, device=device, dtype=torch.bfloat16)
    exact = x.float() @ layer.weight.T + linear.bias.float()
    made = layer(x)
    assert made.dtype == torch.bfloat16 and made.shape == exact.shape
    assert float((made.float() - exact).norm() / exact.norm()) < 0.01
    many = torch.randn(FEW_ROWS + 1, 128, device=device, dtype=torch.bfloat16)
    plain = copy.copy(layer)
    plain.kernel = None
    assert layer.kernel(many) is None and torch.equal(layer(many), plain(many))


def test_a_model_with_kernels_saves_what_it_was(tmp_path, nano_folder):
    vlm = foveate.load(nano_folder, device="cpu", dtype="bfloat16")
    small = Recipe.parse("rtn(bits=4, group=32)").apply(vlm, quiet=True)
    picture = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    request = Request("what?", picture)
    before, state = small.logits(request), {name: t.clone() for name, t in small.model.state_dict().items()}
    assert accelerate_(small)["int4"] == 7 * len(small.adapter.layers)
    assert float((small.logits(request) - before).norm() / before.norm()) < 0.05
    assert small.ask(picture, "what?", max_new_tokens=3).ids
    assert state.keys() == small.model.state_dict().keys()
    small.save(tmp_path / "small")
    assert foveate.load(tmp_path / "small", device="cpu", dtype="bfloat16").recipe == small.recipe
    dense = foveate.load(nano_folder, device="cpu")
    assert accelerate_(dense) == {"int4": 0, "sparse": 0}


def test_sparse_kernels_are_for_devices_that_have_them():
    layer = nn.Linear(64, 32, bias=False)
    layer.weight.data[:, ::2] = 0
    assert not fits_sparse(layer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 kernels need a CUDA device")
def test_semi_structured_layers_on_a_gpu(nano_folder):
    vlm = foveate.load(nano_folder, device="cuda", dtype="bfloat16")
    small = Recipe.parse("magnitude(pattern='2:4')").apply(vlm, quiet=True)
    request = Request("what?", torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    before = small.logits(request)
    assert accelerate_(small)["sparse"] > 0
    assert float((small.logits(request) - before).norm() / before.norm()) < 0.05
