"""Low-rank parts beside compressed layers (eora, lq_lora): golden vectors, recipes, checkpoints and PEFT's files."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import families
import foveate
from foveate.errors import BudgetError, RecipeError, UnsupportedError
from foveate.recipe import Recipe
from foveate.vlm import Request
from foveate.weights import export
from foveate.weights import normal_float as nf
from foveate.weights.lowrank import (
    LowRankLinear,
    eigenspace_low_rank,
    running_covariance,
    save_adapter,
    svd_low_rank,
    weight_of,
    without_adapter,
)
from foveate.weights.lq_lora import LQLoRA, allocate, decompose
from goldens_io import golden_cases
from test_text_models import make

EORA, LQ = (golden_cases("compress", name) for name in ("eora", "lqlora"))
DATA = "samples=2, seqlen=16"


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    return foveate.load(make(tmp_path_factory.mktemp("text") / "llama"), device="cpu")


# ---- golden vectors


@pytest.mark.parametrize("name", [n for n, case in EORA.items() if ("param", "rank") in case])
def test_compress_eora_golden(name):
    case = EORA[name]
    weight, compressed, inputs = (case.tensor(part) for part in ("W", "W_compressed", "X"))
    b, a = eigenspace_low_rank(weight - compressed, running_covariance(inputs), case["param", "rank"])
    wanted = case.tensor("B", "out") @ case.tensor("A", "out")
    assert a.shape == case.tensor("A", "out").shape and b.shape == case.tensor("B", "out").shape
    assert float((b @ a - wanted).norm() / wanted.norm()) < 1e-3
    plain_b, plain_a = svd_low_rank(weight - compressed, case["param", "rank"])
    seen = [(inputs @ (weight - compressed - product).T).square().mean() for product in (b @ a, plain_b @ plain_a)]
    assert seen[0] < seen[1]  # what EoRA is for


@pytest.mark.parametrize("name", [n for n, case in EORA.items() if ("out", "official_hook") in case])
def test_compress_eora_golden_covariance(name):
    case = EORA[name]
    wanted = case.tensor("official_hook", "out")
    torch.testing.assert_close(running_covariance(case.tensor("X")), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, case in LQ.items() if ("out", "quant_only") in case])
def test_compress_lqlora_golden_normal_float(name):
    case = LQ[name]
    bits, block, outer, scale_bits = case.params("bits", "B0", "B1", "scale_bits")
    torch.testing.assert_close(nf.normal_float(bits).float(), case.tensor("values", "out"), atol=1e-6, rtol=0)
    found = nf.rounded(case.tensor("A"), bits, block, outer, scale_bits)
    torch.testing.assert_close(found, case.tensor("quant_only", "out"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n, case in LQ.items() if ("out", "L1") in case])
def test_compress_lqlora_golden_decomposition(name):
    case = LQ[name]
    bits, block, outer, scale_bits, rank, rounds = case.params("bits", "B0", "B1", "scale_bits", "rank", "max_iters")
    weight = case.tensor("A")
    fisher = case.tensor("fisher") if case["param", "fisher"] else None
    q, left, right, used = decompose(
        weight, rank, bits, block=block, outer=outer, fisher=fisher, rounds=rounds, scale_bits=scale_bits
    )
    importance = torch.ones_like(weight) if fisher is None else fisher.sqrt()
    error = float((importance * (weight - q - left @ right)).norm())
    official = weight - case.tensor("Q", "out") - case.tensor("L1", "out") @ case.tensor("L2", "out")
    assert error == pytest.approx(float((importance * official).norm()), rel=5e-3)
    assert 1 < used <= rounds and left.shape[1] == rank


# ---- parts


def test_normal_float_layer_holds_what_it_reads():
    linear = nn.Linear(24, 10)
    layer = nf.NormalFloatLinear.of(linear, linear.weight.detach(), 3, 16, 4)
    torch.testing.assert_close(layer.weight, nf.rounded(linear.weight.detach(), 3, 16, 4))
    x = torch.randn(2, 24)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, linear.bias))
    assert layer.packed.nbytes == 15 * 6 and layer.scale_codes.nbytes == 15
    empty = nf.NormalFloatLinear(24, 10, 3, 16, 4, True)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


def test_covariance_without_full_rank_gives_finite_parts():
    inputs = torch.randn(5, 12)
    b, a = eigenspace_low_rank(torch.randn(8, 12), inputs.T @ inputs, 3)
    assert bool(torch.isfinite(b @ a).all())
    b, a = eigenspace_low_rank(torch.randn(8, 12), torch.zeros(12, 12), 3)
    assert bool(torch.isfinite(b @ a).all())


def test_a_budget_is_spent_as_well_as_trying_all():
    generator = torch.Generator().manual_seed(0)
    costs, sizes = torch.rand(2, 4, 3, generator=generator).tolist()
    for budget in (1.2, 1.8, 2.4):
        tried = itertools.product(range(3), repeat=4)
        fits = [t for t in tried if sum(sizes[i][c] for i, c in enumerate(t)) <= budget]
        if not fits:
            with pytest.raises(BudgetError, match="smallest choices"):
                allocate(costs, sizes, budget)
            continue
        best = min(sum(costs[i][c] for i, c in enumerate(t)) for t in fits)
        chosen = allocate(costs, sizes, budget)
        assert sum(sizes[i][c] for i, c in enumerate(chosen)) <= budget
        assert sum(costs[i][c] for i, c in enumerate(chosen)) <= best * 1.02 + 1e-9
    with pytest.raises(BudgetError, match="smallest choices"):
        allocate(costs, sizes, 0.01)


# ---- on a model


def error_of(vlm, dense):
    """Mean squared error of the first block's layers, on normal noise."""
    total = 0.0
    for name, layer in dense.adapter.layers[0].named_modules():
        if type(layer) is nn.Linear:
            x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
            total += float((vlm.adapter.layers[0].get_submodule(name)(x) - layer(x)).square().mean())
    return total


@pytest.mark.parametrize(
    "text",
    [
        f"rtn(bits=2, group=16) + eora(rank=4, {DATA})",
        f"wanda(sparsity=0.6, {DATA}) + eora(rank=4, {DATA})",
        "rtn(bits=2, group=16) + eora(rank=4, space=plain)",
        f"rtn(bits=2, group=16) + eora(rank=4, space=activation, {DATA})",
        f"awq(bits=2, group=16, {DATA}) + eora(rank=4, {DATA})",
        f"smoothquant({DATA}) + eora(rank=4, space=activation, {DATA})",
        f"lq_lora(rank=4, bits=3, block=16, {DATA})",
        "lq_lora(rank=4, bits=2, block=16, weighted=false, plan=['down_proj=4/32'])",
    ],
)
def test_it_mends_saves_and_loads(blind, tmp_path, text):
    made = Recipe.parse(text).apply(blind, quiet=True)
    layer = made.adapter.layers[0].self_attn.q_proj
    assert isinstance(layer, LowRankLinear) and layer.lora_A.shape[0] == 4
    plain = text.partition(" + eora")[0] if "eora" in text else "rtn(bits=2, group=0)"
    # SmoothQuant's error is of rounded activations, which no low-rank term mends: there it must only do no harm.
    allowed = 1.01 if "smoothquant" in text else 1.0
    assert error_of(made, blind) < allowed * error_of(Recipe.parse(plain).apply(blind, quiet=True), blind)
    made.save(tmp_path / "out")
    again = foveate.load(tmp_path / "out", device="cpu")
    assert again.recipe == made.recipe
    request = Request("the big red fox ran and saw")
    torch.testing.assert_close(again.logits(request), made.logits(request), atol=1e-6, rtol=1e-5)
    if "plan" in text:
        assert made.adapter.layers[0].mlp.down_proj.base.bits == 4 and layer.base.bits == 2


def test_the_adapter_is_written_in_the_form_of_peft(blind, tmp_path):
    made = Recipe.parse(f"rtn(bits=2, group=16) + eora(rank=4, {DATA})").apply(blind, quiet=True)
    save_adapter(made, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 4
    for name in config["target_modules"]:
        layer = made.model.get_submodule(name)
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        x = torch.randn(3, layer.in_features)
        expected = layer.base(x) + x @ (b.float() @ a.float()).T * config["lora_alpha"] / config["r"]
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert len(tensors) == 2 * len(config["target_modules"])
    with pytest.raises(UnsupportedError, match="no low-rank parts"):
        save_adapter(blind, tmp_path / "none")


def block_error(vlm, dense):
    """Mean squared error of the first block's output, on normal noise: it stays what it is when scales are traded."""
    hidden = torch.randn(4, 12, dense.adapter.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary = dense.adapter.text_model.rotary_emb(hidden, torch.arange(12)[None])
    one, other = (v.adapter.layers[0](hidden, position_embeddings=rotary) for v in (vlm, dense))
    return float((one - other).square().mean())


MOVED = {
    "awq": f"awq(bits=2, group=16, symmetric=true, {DATA})",
    "clipless": f"awq(bits=2, group=16, clip=false, {DATA})",
    "pruned": f"wanda(sparsity=0.5, {DATA}) + awq(bits=3, group=16, {DATA})",
    "smoothquant": f"smoothquant(alpha=0.9, {DATA})",
}


@pytest.mark.parametrize("base", MOVED)
def test_layers_in_another_scale_are_mended(blind, base):
    """A part of full rank makes up for all of the error, whatever the norm before has traded."""
    layer = blind.adapter.layers[0]
    full = min(layer.self_attn.k_proj.weight.shape)
    made, small = (
        Recipe.parse(MOVED[base] + more).apply(blind, quiet=True) for more in (f" + eora(rank={full}, {DATA})", "")
    )
    mended = made.adapter.layers[0]
    low = mended.self_attn.k_proj
    whole = weight_of(low.base) + low.lora_B.float() @ low.lora_A.float()
    wanted = layer.self_attn.k_proj.weight * layer.input_layernorm.weight
    assert not torch.equal(mended.input_layernorm.weight, layer.input_layernorm.weight)
    torch.testing.assert_close(
        whole * mended.input_layernorm.weight, wanted, rtol=0, atol=2e-3 * float(wanted.abs().max())
    )
    assert block_error(made, blind) < block_error(small, blind)


def test_both_kinds_of_tokens_balanced_are_mended():
    vlm = families.tiny("llava")
    made = Recipe.parse("mbq(bits=2, group=16, samples=2) + eora(rank=16, samples=2)").apply(vlm, quiet=True)
    small = Recipe.parse("mbq(bits=2, group=16, samples=2)").apply(vlm, quiet=True)
    assert block_error(made, vlm) < 0.5 * block_error(small, vlm)


def test_an_adapter_belongs_to_the_weights_in_their_new_scale(blind, tmp_path):
    """What other programs do: the base as they read it, the adapter's product added beside each layer."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra: test)")
    text = f"awq(bits=4, group=16, symmetric=true, {DATA})"
    made = Recipe.parse(f"{text} + eora(rank=4, {DATA})").apply(blind, quiet=True)
    save_adapter(made, tmp_path / "adapter")
    base = without_adapter(made)
    assert base.recipe == Recipe.parse(text) and isinstance(made.adapter.layers[0].mlp.up_proj, LowRankLinear)
    export.save(base, tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
        plain.get_submodule(name).register_forward_hook(lambda m, x, y, a=a, b=b: y + x[0] @ a.T @ b.T)
    ids = torch.tensor([blind.tokenizer("the big red fox ran and saw").input_ids])
    with torch.no_grad():
        found = plain(ids).logits[0, -1]
    expected = made.logits(Request("the big red fox ran and saw"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, base.logits(Request("the big red fox ran and saw")), atol=1e-4)
    with pytest.raises(UnsupportedError, match="no eora"):
        without_adapter(base)


def test_a_budget_becomes_a_plan(blind):
    method = LQLoRA(rank=4, weighted=False)
    planned = method.with_budget(blind, 3.0)
    assert planned.plan and Recipe.parse(Recipe((planned,)).text()).methods == (planned,)
    made = Recipe((planned,)).apply(blind, quiet=True)
    bases = [m for m in made.model.modules() if isinstance(m, nf.NormalFloatLinear)]
    stored = sum(b.packed.nbytes + b.scale_codes.nbytes for b in bases) * 8
    assert stored / sum(b.in_features * b.out_features for b in bases) <= 3.0 + 0.05
    poor = error_of(Recipe((method.with_budget(blind, 2.2),)).apply(blind, quiet=True), blind)
    assert error_of(made, blind) < poor
    with pytest.raises(BudgetError, match="the budget is"):
        method.with_budget(blind, 1.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"eora(rank=4, {DATA})", "write that method first"),
        (f"rtn(bits=2, group=16) + eora(rank=1000, {DATA})", "rank=1000 is more than it has"),
        ("lq_lora(rank=1000, weighted=false)", "rank=1000 is more than it has"),
        ("lq_lora(bits=5)", "bits is 5"),
        ("lq_lora(plan=['down_proj=5/3'])", "'down_proj=5/3'"),
        ("lq_lora(rank=4, weighted=false, plan=['dwn_proj=4/32'])", "did you mean 'down_proj'?"),
        ("eora(rank=0)", "rank is 0"),
    ],
)
def test_a_mistake_is_told(blind, text, told):
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text).apply(blind, quiet=True)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_dense_weights_must_still_be_there(blind):
    small = Recipe.parse("rtn(bits=2, group=16)").apply(blind, quiet=True)
    with pytest.raises(RecipeError, match=r"write that method first|is gone"):
        Recipe.parse(f"eora(rank=4, {DATA})").apply(small, quiet=True)


def test_the_weight_of_a_layer():
    from foveate.weights.linear import Int8Linear

    linear = nn.Linear(8, 4)
    assert torch.equal(weight_of(linear), linear.weight)
    torch.testing.assert_close(weight_of(Int8Linear.of(linear)), linear.weight.detach(), atol=0.01, rtol=0)
