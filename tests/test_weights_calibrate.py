"""The calibrator: bounded memory, resume, one message for each mistake; and what each method does to a model."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import families
import foveate
from families import FAMILIES
from foveate.recipe import Recipe
from foveate.vlm import Request
from foveate.weights import calibrate, recording
from foveate.weights.base import linear_layers
from foveate.weights.calibrate import Stream
from foveate.weights.linear import Int8Linear, QuantizedLinear
from foveate.weights.mbq import sensitivity
from foveate.weights.samples import ANSWER, TEXT, VISION, draw_examples, token_weights
from foveate.weights.solve import inverse_factor, sparsegpt
from foveate.weights.statistics import Statistics
from foveate.weights.structure import find_groups, scale_
from goldens_io import goldens_dir

PICTURE = np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)
REQUEST = Request("what?", PICTURE)
CALIBRATED = [
    "wanda(samples=3)",
    "wanda(samples=3, variant=true)",
    "wanda(samples=3, update=true)",
    "sparsegpt(samples=3)",
    "sparsegpt(samples=3, pattern='2:4')",
    "owl(samples=3, sparsity=0.6)",
    "owl(samples=3, pruner=sparsegpt)",
    "owl(samples=3, pattern='4:8', spread=2.0)",
    "gptq(samples=3, group=16)",
    "gptq(samples=2, group=0, act_order=true, mse=true, true_sequential=true)",
    "awq(samples=3, group=16)",
    "awq(samples=3, group=0, symmetric=true)",
    "smoothquant(samples=3)",
    "mbq(samples=3, group=16)",
    "mbq(samples=3, bits=4, act_bits=8)",
    "mbq(samples=3, group=16, distort=true)",
]


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


def apply(vlm, text, **options):
    return Recipe.parse(text).apply(vlm, quiet=True, **options)


def zeros(model) -> float:
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


# ---- what methods do


@pytest.mark.parametrize("text", CALIBRATED)
def test_methods_change_copies_save_and_reload_equal(tiny, tmp_path, text):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    small = apply(tiny, text)
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    assert torch.isfinite(small.logits(REQUEST)).all()
    small.save(tmp_path / "small")
    again = foveate.load(tmp_path / "small", device="cpu")
    assert again.recipe == small.recipe
    torch.testing.assert_close(again.logits(REQUEST), small.logits(REQUEST), atol=1e-6, rtol=1e-6)
    stored = json.loads((tmp_path / "small" / "calibration.json").read_text())
    assert stored["llm"]["samples"] in (2, 3) and stored["llm"]["source"] == "auto"


def test_sparsity_is_what_was_asked_for(tiny):
    layers = tiny.adapter.parts()["llm"].model.layers
    for text, share in (
        ("wanda(sparsity=0.5, samples=2)", 0.5),
        ("magnitude(sparsity=0.75)", 0.75),
        ("sparsegpt(sparsity=0.25, samples=2)", 0.25),
        ("owl(sparsity=0.5, samples=2)", 0.5),
    ):
        small = apply(tiny, text)
        assert zeros(small.model.llm.model.layers) == pytest.approx(share, abs=0.02), text
    assert zeros(layers) == 0
    for text in ("magnitude(pattern='2:4')", "wanda(pattern='2:4', samples=2)", "sparsegpt(pattern='2:4', samples=2)"):
        small = apply(tiny, text)
        for layer in small.model.llm.model.layers.modules():
            if isinstance(layer, nn.Linear):
                groups = (layer.weight == 0).unflatten(1, (-1, 4)).sum(dim=-1)
                assert int(groups.min()) == int(groups.max()) == 2, text


def test_second_order_beats_plain_on_its_own_objective(tiny):
    """Per layer, the error of the output over calibration inputs: sparsegpt < magnitude, gptq < rtn."""
    generator = torch.Generator().manual_seed(0)
    weight, mix = torch.randn(24, 32, generator=generator), torch.randn(32, 32, generator=generator)
    x = torch.randn(400, 32, generator=generator) @ mix
    found = Statistics(("hessian",))
    found.add(x)
    from foveate.weights.grids import gptq_grid, quantize_groups
    from foveate.weights.pruning import magnitude_mask, rows_mask, wanda_score
    from foveate.weights.solve import gptq

    def error(w):
        return float((x @ (w - weight).T).square().mean())

    pruned = error(sparsegpt(weight, found.hessian, 0.5))
    wanda = error(weight.masked_fill(rows_mask(wanda_score(weight, found.norm), 0.5), 0))
    assert pruned < wanda < 1.05 * error(weight.masked_fill(magnitude_mask(weight, 0.5), 0))
    plain = error(quantize_groups(weight, 3, 16, False, gptq_grid).weight)
    assert error(gptq(weight, found.hessian, 3, 16).weight) < 0.7 * plain


def test_zeros_stay_under_a_quantizer(tiny):
    for text in ("gptq(group=16, samples=2)", "rtn(group=16)", "smoothquant(samples=2)"):
        both = apply(tiny, f"sparsegpt(sparsity=0.5, samples=2) + {text}")
        for layer in both.model.llm.model.layers.modules():
            if isinstance(layer, QuantizedLinear):
                assert float((layer.weight == 0).float().mean()) > 0.45
            if isinstance(layer, Int8Linear):
                assert float((layer.weight == 0).float().mean()) > 0.45


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_every_part(family):
    """Eight bits change little, wherever they are; every linear layer of the parts is taken."""
    vlm = families.tiny(family)
    request = Request("what?", families.picture())
    dense = vlm.logits(request)
    everywhere = "parts=[vision_tower, mm_projector, llm], samples=2"
    for text, bound in ((f"smoothquant({everywhere})", 0.1), (f"gptq(bits=8, group=0, {everywhere})", 0.1)):
        small = apply(vlm, text)
        change = float((small.logits(request) - dense).norm() / dense.norm())
        assert 0 < change < bound, text
        left = [name for part in small.adapter.parts().values() for name, _, _ in linear_layers(part)]
        assert [name for name in left if name != "lm_head"] == []
    assert float((apply(vlm, "mbq(bits=8, group=0, samples=2)").logits(request) - dense).norm() / dense.norm()) < 0.1


def test_the_deployment_recipe_of_nvila(tiny):
    small = apply(tiny, "smoothquant(parts=[vision_tower], samples=2) + awq(bits=4, group=16, samples=2)")
    parts = small.adapter.parts()
    tower = [m for m in parts["vision_tower"].encoder.layers.modules() if isinstance(m, (nn.Linear, Int8Linear))]
    assert tower and all(isinstance(layer, Int8Linear) for layer in tower)
    assert any(isinstance(layer, QuantizedLinear) for layer in parts["llm"].modules())
    dense = tiny.logits(REQUEST)
    assert float((small.logits(REQUEST) - dense).norm() / dense.norm()) < 0.3


def test_smoothing_and_scaling_change_nothing_by_themselves(tiny):
    """Before anything is rounded the model is the same: eight bits after smoothing are close to dense."""
    dense = tiny.logits(REQUEST)
    for text in ("smoothquant(samples=2)", "awq(bits=8, group=16, samples=2, clip=false)"):
        made = apply(tiny, text).logits(REQUEST)
        assert float((made - dense).norm() / dense.norm()) < 0.05


def test_groups_are_found_without_names(tiny):
    examples = draw_examples(tiny, "auto", 1, 64, 0)
    stream = Stream(tiny, "llm", [Recipe.parse("awq(group=16)").methods[0]], examples, None)
    stream.start()
    with torch.no_grad():
        block = next(iter(stream.dense(("mean",))))
        groups = {group.before: group.layers for group in find_groups(block)}
    assert groups["input_layernorm"] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert groups["post_attention_layernorm"] == ("mlp.gate_proj", "mlp.up_proj")
    assert groups["mlp.up_proj"] == ("mlp.down_proj",)
    assert "mlp.gate_proj" not in groups  # a gate is not linear in what it scales
    assert "self_attn.v_proj" not in groups  # grouped queries: one value feeds several heads


def test_the_int8_layer_multiplies_integers():
    torch.manual_seed(0)
    linear = nn.Linear(24, 6).requires_grad_(False)
    layer = Int8Linear.of(linear)
    x = torch.randn(2, 5, 24)
    weight = layer.weight.float() * layer.scale
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
    expected = ((x / scale).round().clamp(-128, 127) * scale) @ weight.T + linear.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert float((weight - linear.weight).abs().max()) <= float(layer.scale.max()) / 2 * 1.001


# ---- streams


@pytest.mark.parametrize("family", [*FAMILIES, "nvila"])
def test_blocks_replay_the_models_own_forward(family):
    """Running the blocks one after the other on recorded arguments gives the states that the model itself computes,
    with what a family adds between its blocks (Qwen3-VL's deep features)."""
    tiny = families.tiny(family)
    examples = draw_examples(tiny, "auto", 2, 64, 1)
    layers = list(tiny.adapter.layers)
    calls, hidden = recording.record_calls(tiny.adapter, "llm", layers, examples, True)
    assert len(calls) == len(examples) == len(hidden) and "forward" not in vars(layers[0])
    seen = []
    handle = layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    try:
        with torch.no_grad():
            for example in examples:
                recording.feed(tiny.adapter, example)
            for number, call in enumerate(calls):
                state = hidden[number]
                for index, (layer, (args, kwargs)) in enumerate(zip(layers, call.arguments)):
                    state = layer(state + call.added.get(index, 0), *args, **kwargs)
                assert bool(call.added) == (family == "qwen3_vl")
                torch.testing.assert_close(state, seen[number], rtol=1e-5, atol=1e-6)
    finally:
        handle.remove()
    assert int((calls[0].modality == VISION).sum()) > 0 and int((calls[0].modality == ANSWER).sum()) > 0


def test_gradients_block_by_block_are_those_of_the_whole_model(tiny):
    """MBQ's ratios, against one backward pass through the whole language model with hooks on the same outputs."""
    examples = draw_examples(tiny, "auto", 2, 64, 2)
    blind = dataclasses.replace(examples[0], modality=torch.where(examples[0].modality == ANSWER, ANSWER, TEXT))
    mbq = Recipe.parse("mbq(group=16)").methods[0]
    stream = Stream(tiny, "llm", [mbq], [*examples, blind], None)  # without vision tokens a sample says nothing
    stream.start()
    found = sensitivity(stream)
    layers = list(tiny.adapter.layers)
    sums = torch.zeros(len(layers), 2, 2, dtype=torch.float64)
    for number, call in enumerate(stream.calls[:-1]):
        outputs, handles = {}, []
        for index, layer in enumerate(layers):
            for which, module in enumerate((layer.self_attn.o_proj, layer.mlp.down_proj)):
                key = (index, which)
                keep = lambda m, a, out, k=key, to=outputs: to.__setitem__(k, out)  # noqa: E731
                handles.append(module.register_forward_hook(keep))
        with torch.enable_grad():
            state = stream.hidden(number).clone().requires_grad_()
            for layer, (args, kwargs) in zip(layers, call.arguments):
                state = layer(state, *args, **kwargs)
            logits = tiny.adapter.head(state)[0]
            ids = torch.tensor(examples[number].plan.input_ids)
            wanted = (call.modality == ANSWER).nonzero()[:, 0]
            loss = torch.nn.functional.cross_entropy(logits[wanted - 1], ids[wanted])
            gradients = torch.autograd.grad(loss, list(outputs.values()))
        for handle in handles:
            handle.remove()
        for (index, which), gradient in zip(outputs, gradients):
            rows = gradient[0].abs().double().mean(dim=-1)
            for place, token in enumerate((VISION, ANSWER)):
                sums[index, which, place] += rows[call.modality == token].mean()
    expected = (sums[..., 0] / sums[..., 1]).tolist()
    assert [list(pair) for pair in found] == [pytest.approx(pair, rel=1e-4) for pair in expected]
    assert found[-1][1] == 0  # nothing looks at vision tokens after the last block
    assert 0 < found[0][0] < 1
    assert mbq.survey(stream) == [pytest.approx(pair) for pair in np.maximum(found, np.median(found, axis=0)).tolist()]


def test_a_distorted_trial_is_measured_against_the_dense_model(tiny, monkeypatch):
    """Of the last block: inputs are what the compressed blocks before it give, targets what the dense model does."""
    import foveate.weights.mbq as mbq

    real, seen = mbq.output_loss, []

    def keep(block, group, records, *args):
        if block.index == len(tiny.adapter.layers) - 1 and not seen:
            seen.append((group.inspect, records, args[-1]))
        return real(block, group, records, *args)

    monkeypatch.setattr(mbq, "output_loss", keep)
    made = apply(tiny, "mbq(group=16, samples=2, bits=2, distort=true)")
    assert made.recipe.text() == "mbq(bits=2, group=16, samples=2, distort=true)"
    ((inspect, records, targets),) = seen
    examples = draw_examples(tiny, "auto", 2, 512, 0)
    last = len(tiny.adapter.layers) - 1
    for vlm, found in ((made, [kwargs["hidden_states"] for _, kwargs, _ in records]), (tiny, targets)):
        stream = Stream(vlm, "llm", (), examples, None)
        stream.start()
        for number, value in enumerate(found):
            state = stream.hidden(number)
            for index in range(last):
                state = stream.advance(number, index, state)
            layer = vlm.adapter.layers[last]
            if vlm is made:  # its norm has been scaled since, so that of the dense model is asked
                wanted = tiny.adapter.layers[last].input_layernorm(state)
            else:
                args, kwargs = stream.calls[number].arguments[last]
                wanted = layer.get_submodule(inspect)(layer.input_layernorm(state), *args, **kwargs)[0]
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    plain = apply(tiny, "mbq(group=16, samples=2, bits=2)")
    assert not torch.equal(plain.logits(REQUEST), made.logits(REQUEST))


def test_statistics_are_those_of_all_tokens_together():
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    found = Statistics(("hessian", "max", "mean"))
    for sample in x:
        found.add(sample)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(found.hessian, 2 / 3 * flat.T @ flat)
    torch.testing.assert_close(found.norm, flat.square().sum(dim=0) / 3)
    torch.testing.assert_close(found.absmax, flat.abs().amax(dim=0))
    torch.testing.assert_close(found.absmean, flat.abs().mean(dim=0))
    modality = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    assert token_weights(modality, "all") is None
    weights = token_weights(modality, "balanced")
    assert float(weights[:2].sum()) == pytest.approx(float(weights[2:].sum())) and float(weights.mean()) == 1
    only = Statistics(("hessian",))
    only.add(x[0], token_weights(modality, "text"))
    torch.testing.assert_close(only.norm, x[0, :2].square().sum(dim=0) * 7 / 2)


def test_statistics_and_dense_layers_follow_a_traded_scale(tiny):
    """After a trade of scales they are what another pass through the changed block finds."""
    vlm = apply(tiny, "rtn(bits=8, group=16, parts=[vision_tower])")  # its language model is a copy
    stream = Stream(vlm, "llm", [Recipe.parse("awq(group=16)").methods[0]], draw_examples(vlm, "auto", 2, 64, 0), None)
    stream.start()
    block, kinds = calibrate.Block(stream, 0), ("hessian", "max", "mean", "norm")
    list(block.collect(kinds))
    groups = find_groups(block)
    assert len(groups) > 2
    for group in groups:
        width = block.original[group.layers[0]].in_features
        scale_(block, group, torch.rand(width, generator=torch.Generator().manual_seed(width)) + 0.5)
    followed = dict(block.statistics)
    list(block.collect(kinds))
    for name, found in block.statistics.items():
        for kind in ("hessian", "norm", "absmax", "absmean"):
            one, other = getattr(found, kind), getattr(followed[name], kind)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
        assert torch.equal(block.original[name].weight, block.module.get_submodule(name).weight)
    only = Statistics(("norm",))
    only.add(torch.ones(3, 2))
    only.divide(torch.tensor([1.0, 2.0]))
    assert only.norm.tolist() == [3.0, 0.75]


def test_a_large_hessian_is_added_by_halves(monkeypatch):
    """Only blocks on and above the diagonal are computed; what is read is all of it."""
    monkeypatch.setattr("foveate.weights.statistics._BLOCK", 16)
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(0))
    found = Statistics(("hessian",))
    for sample in x:
        found.add(sample)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(found.hessian, 2 / 3 * flat.T @ flat)
    assert torch.equal(found.hessian, found.hessian.T)
    torch.testing.assert_close(found.norm, flat.square().sum(dim=0) / 3)
    found.divide(torch.full((40,), 2.0))
    torch.testing.assert_close(found.hessian, 2 / 3 * flat.T @ flat / 4)


@pytest.mark.parametrize("size", [5, 256, 257, 700])
def test_the_factor_is_that_of_the_inverse(size):
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size))
    hessian = x.T @ x
    factor = inverse_factor(hessian, 0.01)
    assert torch.equal(factor, factor.triu())
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(size)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_no_more_than_one_block_is_worked_on_at_a_time(tiny, monkeypatch):
    """Statistics exist for one block, and hidden states once per sample, whatever the number of blocks."""
    alive, most = [0], [0]
    init, step = calibrate.Block.__init__, calibrate.Stream._step

    def counted(self, *args):
        init(self, *args)

    def measured(self, block, *args):
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        out = step(self, block, *args)
        kept = sum(t.nbytes for t in self._hidden) + sum(t.nbytes for t in out)
        one = sum(self.hidden(i).nbytes for i in range(len(self.calls)))
        assert kept <= 2 * one
        assert block.statistics and {name.split(".")[0] for name in block.statistics} <= {"self_attn", "mlp"}
        alive[0] -= 1
        return out

    monkeypatch.setattr(calibrate.Block, "__init__", counted)
    monkeypatch.setattr(calibrate.Stream, "_step", measured)
    apply(tiny, "gptq(samples=3, group=16)")
    assert most[0] == 1


@pytest.mark.parametrize(
    "text",
    [
        "smoothquant(parts=[vision_tower], samples=2) + owl(sparsity=0.5, samples=2) + gptq(group=16, samples=2)",
        "mbq(group=16, samples=2, distort=true)",
        "lq_lora(rank=4, samples=2)",
    ],
)
def test_a_crash_resumes_at_its_block(tiny, tmp_path, monkeypatch, caplog, text):
    whole = apply(tiny, text)
    state = tmp_path / "state"
    real, done = calibrate.Stream._compress, []

    def crash(self, block):
        if self.part == "llm" and block.index == 2:
            raise KeyboardInterrupt
        real(self, block)

    monkeypatch.setattr(calibrate.Stream, "_compress", crash)
    with pytest.raises(KeyboardInterrupt):
        apply(tiny, text, state=state)

    def count(self, block):
        done.append((self.part, block.index))
        real(self, block)

    monkeypatch.setattr(calibrate.Stream, "_compress", count)
    with caplog.at_level("WARNING"):
        again = apply(tiny, text, state=state)
    assert done == [("llm", 2)] and "resuming at block 2 of 3 of llm" in caplog.text
    assert not state.exists()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_the_state_of_another_run_is_not_taken_up(tiny, tmp_path, monkeypatch, caplog):
    state = tmp_path / "state"
    monkeypatch.setattr(calibrate.State, "clear", lambda self: None)
    apply(tiny, "wanda(samples=2)", state=state)
    monkeypatch.undo()
    with caplog.at_level("WARNING"):
        other = apply(tiny, "wanda(samples=2, sparsity=0.25)", state=state)
    assert "its recipe differs" in caplog.text
    assert zeros(other.model.llm.model.layers) == pytest.approx(0.25, abs=0.02)
