"""Weight methods against numbers of their official code (tests/goldens/compress)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from foveate.registry import METHODS
from foveate.weights import gradients, pruning
from foveate.weights.awq import AWQ
from foveate.weights.calibrate import Block
from foveate.weights.grids import absmax_round, awq_grid, gptq_grid, quantize_groups
from foveate.weights.mbq import MBQ, modality_means, sensitivity
from foveate.weights.recording import Call
from foveate.weights.samples import ANSWER, TEXT, VISION
from foveate.weights.scaling import clip, fake, search, search_clip
from foveate.weights.smoothquant import smooth_scale
from foveate.weights.solve import gptq, sparsegpt
from foveate.weights.statistics import Statistics
from foveate.weights.structure import module_of
from foveate.weights.wanda import choose
from goldens_io import golden_cases, golden_methods


class Case(NamedTuple):
    """One golden case: inputs and outputs as tensors (numbers and JSON as they are), parameters decoded."""

    name: str
    ins: dict[str, torch.Tensor]
    params: dict[str, Any]
    outs: dict[str, Any]


def cases(family: str, method: str) -> list[Case]:
    def kind(entries: dict[tuple[str, str], Any], wanted: str) -> dict[str, Any]:
        return {leaf: _value(value) for (at, leaf), value in entries.items() if at == wanted}

    found = golden_cases(family, method)
    return [Case(name, *(kind(case, word) for word in ("in", "param", "out"))) for name, case in found.items()]


def _value(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(np.ascontiguousarray(value)) if value.ndim else float(value)


def by_name(method: str):
    found = cases("compress", method)
    return pytest.mark.parametrize("case", found, ids=[case.name for case in found])


def statistics(x: torch.Tensor, *kinds: str) -> Statistics:
    found = Statistics(kinds)
    for sample in x:  # one by one, as calibration does
        found.add(sample)
    return found


def share_equal(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one == other).double().mean())


# ---- pruning


@by_name("wanda")
def test_golden_compress_wanda(case: Case):
    weight, x, params = case.ins["W"], case.ins["X"], case.params
    found = statistics(x, "hessian")
    score = pruning.wanda_score(weight, found.norm)
    if "metric" in case.outs:
        torch.testing.assert_close(statistics(x, "norm").norm, case.outs["scaler_row"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(score, case.outs["metric"], rtol=1e-4, atol=1e-5)
        return
    sparsity, drop, of = params.get("sparsity", 0.0), params.get("prune_n", 0), params.get("prune_m", 0)
    if params["method"] == "magnitude":
        mask = pruning.pattern_mask(weight.abs(), drop, of) if of else pruning.magnitude_mask(weight, sparsity)
    else:
        mask = choose(score, sparsity, drop, of, variant=params["method"] == "wanda_variant")
    if "W_new" in case.outs:
        # the ablation's code divides by the count twice, so that the k-th sample weighs 1/k; ours weighs all alike
        norm = sum(sample.square().sum(dim=0) / (k + 1) for k, sample in enumerate(x))
        mask = choose(pruning.wanda_score(weight, norm), sparsity, drop, of)
        made = sparsegpt(
            weight, found.hessian, mask=mask, damp=params["percdamp"], block=params["blocksize"], name=case.name
        )
        assert share_equal(made == 0, case.outs["W_new"] == 0) > 0.999
        torch.testing.assert_close(made, case.outs["W_new"], rtol=2e-3, atol=1e-3)
    else:
        assert share_equal(mask, case.outs["mask_pruned"]) >= 0.9999


@by_name("sparsegpt")
def test_golden_compress_sparsegpt(case: Case):
    weight, x, params = case.ins["W"], case.ins["X"].clone(), case.params
    if params.get("zeroed_input_channel") is not None:
        x[..., params["zeroed_input_channel"]] = 0
    hessian = statistics(x, "hessian").hessian
    if "H" in case.outs:
        torch.testing.assert_close(hessian, case.outs["H"], rtol=1e-4, atol=1e-3)
        return
    made = sparsegpt(
        weight,
        hessian,
        params["sparsity"],
        params["prune_n"],
        params["prune_m"],
        damp=params["percdamp"],
        block=params["blocksize"],
        bits=params["quant_bits"],
    )
    expected = case.outs["W_new"]
    assert share_equal(made == 0, expected == 0) > 0.999
    close = torch.isclose(made, expected, rtol=2e-3, atol=1e-4)
    assert float(close.double().mean()) > 0.995  # a borderline pick flips, and its row follows
    rows = x.flatten(0, 1)

    def error(w: torch.Tensor) -> float:
        return float((rows @ (w - weight).T).square().mean())

    assert error(made) == pytest.approx(error(expected), rel=1e-2)


@by_name("owl")
def test_golden_compress_owl(case: Case):
    weights, x, params = case.ins["Ws"], case.ins["X"], case.params
    dense, outliers = x, []
    for weight in weights:
        score = pruning.wanda_score(weight, statistics(dense, "norm").norm)
        outliers.append(pruning.outlier_percentage([score], params["M"]))
        dense = dense @ weight.T
    torch.testing.assert_close(
        torch.tensor(outliers, dtype=torch.float64), case.outs["outlier_pct"], rtol=1e-4, atol=1e-5
    )
    if "prune_m" in params:
        drops = pruning.owl_pattern(outliers, params["prune_n"], params["prune_m"], params["Lambda"])
        assert drops == case.outs["pruned_per_8"].tolist()
        real = [drop / params["prune_m"] for drop in drops]
        assert real == pytest.approx(case.outs["sparsity_real"].tolist(), abs=1e-3)
        return
    shares = pruning.owl_sparsities(outliers, params["sparsity"], params["Lambda"])
    kept = torch.tensor([1 - share for share in shares], dtype=torch.float64)
    torch.testing.assert_close(kept, case.outs["density"], rtol=1e-6, atol=1e-6)
    flowing = x
    for index, weight in enumerate(weights):
        if params["pruner"] == "magnitude":
            mask = pruning.magnitude_mask(weight, shares[index])
        else:
            score = pruning.wanda_score(weight, statistics(flowing, "norm").norm)
            mask = pruning.rows_mask(score, shares[index])
        assert share_equal(mask, case.outs["mask"][index]) >= 0.999
        assert float(mask.double().mean()) == pytest.approx(float(case.outs["sparsity_real"][index]), abs=1e-3)
        flowing = flowing @ weight.masked_fill(mask, 0).T  # later layers see what pruned ones give


# ---- quantization


@by_name("gptq")
def test_golden_compress_gptq(case: Case):
    weight, x, params = case.ins["W"], case.ins["X"], case.params
    bits, group, symmetric = params["bits"], params["group"], params["sym"]
    if "percdamp" not in params:
        made = quantize_groups(weight, bits, group, symmetric, gptq_grid)
        torch.testing.assert_close(made.weight, case.outs["Q"], rtol=1e-4, atol=1e-5)
        return
    solved = gptq(
        weight,
        statistics(x, "hessian").hessian,
        bits,
        group,
        symmetric=symmetric,
        act_order=params["actorder"],
        static_groups=params["static_groups"],
        mse=params["mse"],
        damp=params["percdamp"],
        block=params["blocksize"],
    )
    torch.testing.assert_close(solved.scale[:, :1], case.outs["scale"][:, :1], rtol=1e-3, atol=1e-5)
    assert float(torch.isclose(solved.scale, case.outs["scale"], rtol=2e-2).double().mean()) > 0.97
    assert share_equal(solved.zero, case.outs["zero"]) > 0.97
    assert float(torch.isclose(solved.weight, case.outs["Q"], rtol=2e-2, atol=1e-4).double().mean()) >= 0.97
    rows = x.flatten(0, 1)
    error, expected = (float((rows @ (q - weight).T).square().mean()) for q in (solved.weight, case.outs["Q"]))
    assert error == pytest.approx(expected, rel=1e-2)
    if solved.quantized is not None:
        torch.testing.assert_close(solved.quantized.weight, solved.weight)
        assert int(solved.quantized.codes.min()) >= 0 and int(solved.quantized.codes.max()) < 2**bits


@by_name("awq")
def test_golden_compress_awq(case: Case):
    weight, x, params = case.ins["W"], case.ins["X"], case.params
    mean = statistics(x, "mean").absmean
    if "x_mean_abs" in case.outs:
        torch.testing.assert_close(mean, case.outs["x_mean_abs"], rtol=1e-4, atol=1e-5)
        return
    bits, group = params["bits"], params["group"]
    symmetric = not params["zero_point"]
    rows = x.flatten(0, 1)
    target = rows @ weight.T

    def loss(scale: torch.Tensor) -> float:
        return float((rows @ (fake(weight * scale, bits, group, symmetric) / scale).T - target).square().mean())

    found = search(mean, loss, params["grid"])
    torch.testing.assert_close(torch.tensor(found.losses, dtype=torch.float64), case.outs["loss20"], rtol=1e-3, atol=0)
    assert found.ratio == pytest.approx(case.outs["best_ratio"])
    torch.testing.assert_close(found.scale, case.outs["scales"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fake(weight, bits, group, symmetric), case.outs["RTN"], rtol=1e-4, atol=1e-5)
    if "Wq_scaled" in case.outs:
        torch.testing.assert_close(
            fake(weight * found.scale, bits, group, symmetric), case.outs["Wq_scaled"], rtol=1e-4, atol=1e-5
        )
        return
    scaled = weight * found.scale
    limit = search_clip(scaled, rows / found.scale, bits, group, symmetric)
    same = torch.isclose(limit, case.outs["clipmax_after_scale"], rtol=1e-4)
    assert float(same.double().mean()) > 0.99  # neighbouring limits may be equally good
    clipped = clip(scaled, case.outs["clipmax_after_scale"])
    made = quantize_groups(clipped, bits, group, symmetric, awq_grid)
    torch.testing.assert_close(made.scale, case.outs["qscale"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.zero, case.outs["qzero"])
    assert (
        float(torch.isclose(made.weight, case.outs["Wq_scaled_clipped"], rtol=1e-4, atol=1e-5).double().mean()) > 0.999
    )


@by_name("smoothquant")
def test_golden_compress_smoothquant(case: Case):
    one, two, x, absmax = (case.ins[name] for name in ("W1", "W2", "X", "act_absmax"))
    params, outs = case.params, case.outs
    rows = x.flatten(0, 1)
    torch.testing.assert_close(statistics(x, "max").absmax, absmax, rtol=1e-5, atol=0)
    if "norm" in params:
        scale = smooth_scale(absmax, [one, two], params["alpha"])
        for name, value in (("s", scale), ("W1", one * scale), ("W2", two * scale)):
            if name in outs:
                torch.testing.assert_close(value, outs[name], rtol=1e-5, atol=1e-6)
        gamma = outs["norm_w"] * scale  # what the norm must have been, the same in every channel or one of the inputs
        torch.testing.assert_close(gamma / scale, outs["norm_w"], rtol=1e-5, atol=1e-7)
        if params["beta"] is not None:
            torch.testing.assert_close(params["beta"] / scale, outs["norm_b"], rtol=1e-5, atol=1e-7)
        return
    per = {"per_channel": "row", "per_token": "row", "per_tensor": "tensor"}
    if "W1_q" in outs:
        made = absmax_round(one, params["bits"], per[case.name.removeprefix("wq_")])
        torch.testing.assert_close(made, outs["W1_q"], rtol=1e-5, atol=1e-6)
    elif "X_q" in outs:
        made = absmax_round(rows, params["bits"], per[case.name.removeprefix("aq_")])
        torch.testing.assert_close(made, outs["X_q"], rtol=1e-5, atol=1e-6)
    else:
        scale = smooth_scale(absmax, [one, two], params["alpha"])
        weight = absmax_round(one * scale, 8, per[params["weight"]])
        made = absmax_round(rows / scale, 8, per[params["act"]]) @ weight.T
        torch.testing.assert_close(made, outs["y"], rtol=1e-4, atol=1e-3)


# ---- a whole decoder layer


def layer_block(case: Case, method: AWQ | MBQ, modality: torch.Tensor | None) -> Block:
    """The case's LLaMA layer with its input in front of it, as the calibrator would hand it over."""
    params, x = case.params, case.ins["x"]
    config = LlamaConfig(
        hidden_size=params["hidden"],
        intermediate_size=params["intermediate"],
        num_attention_heads=params["heads"],
        num_key_value_heads=params["heads"],
        rms_norm_eps=params["rms_eps"],
        num_hidden_layers=1,
        vocab_size=8,
        attn_implementation="eager",
    )
    layer = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
    layer.load_state_dict({k.removeprefix("weight."): v for k, v in case.ins.items() if k.startswith("weight.")})
    length = x.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    kwargs = {"attention_mask": mask, "position_embeddings": (case.ins["cos"], case.ins["sin"])}
    stream = SimpleNamespace(
        part="llm",
        places=[("layer", nn.ModuleDict({"layer": layer}), "layer")],
        stop=set(),
        calls=[Call(0, modality, [((), kwargs)])],
        chained=True,
        methods=[method],
        surveys={},
        tokens="all",
        groups={},
        hidden=lambda call: x,
    )
    return Block(stream, 0)


@torch.no_grad()
def check_search(case: Case, method: AWQ | MBQ, modality: torch.Tensor | None) -> Block:
    block = layer_block(case, method, modality)
    outputs = [out for _, out in block.collect(method.kinds)]
    if "y_fp" in case.outs:
        torch.testing.assert_close(outputs[0], case.outs["y_fp"], rtol=1e-4, atol=1e-5)
    found = {group.before: result for group, result in method.find(block).items()}
    names = [key.removeprefix("ratio.") for key in case.outs if key.startswith("ratio.")]
    assert sorted(found) == sorted(names)
    for name in names:
        losses = torch.tensor(found[name].losses, dtype=torch.float64)
        torch.testing.assert_close(losses, case.outs[f"loss20.{name}"], rtol=2e-3, atol=0)
        near = losses[round(case.outs[f"ratio.{name}"] * len(losses))]
        assert found[name].ratio == pytest.approx(case.outs[f"ratio.{name}"]) or losses.min() > 0.999 * near
        if found[name].ratio == pytest.approx(case.outs[f"ratio.{name}"]):
            torch.testing.assert_close(found[name].scale, case.outs[f"scale.{name}"], rtol=1e-3, atol=1e-5)
    return block


@by_name("awq_llama_layer")
@torch.no_grad()
def test_golden_compress_awq_llama_layer(case: Case):
    params = case.params
    method = AWQ(bits=params["bits"], group=params["group"], symmetric=not params["zero_point"])
    block = check_search(case, method, None)
    method.compress_(block)
    for key, expected in case.outs.items():
        name = key.removeprefix("weight.").removesuffix(".weight")
        if key.startswith("weight."):
            made = module_of(block, name).weight
            # scales are stored in 16 bits, and a rounding at the edge may fall to the other side
            step = float(expected.abs().max()) / 2 ** params["bits"]
            close = torch.isclose(made, expected, rtol=3e-3, atol=step / 50)
            assert float(close.double().mean()) > 0.98, key
    error = (block.run(0) - case.outs["y_fp"]).square().mean()
    expected = (case.outs["y_awq"] - case.outs["y_fp"]).square().mean()
    assert float(error) == pytest.approx(float(expected), rel=0.03)


MBQ_CASES = cases("compress", "mbq")


@pytest.mark.parametrize("case", [c for c in MBQ_CASES if "bits" in c.params], ids=lambda case: case.name)
def test_golden_compress_mbq(case: Case):
    params = case.params
    modality = torch.full(case.ins["vis_mask"].shape, TEXT)
    modality[case.ins["vis_mask"]], modality[case.ins["cap_mask"]] = VISION, ANSWER
    method = MBQ(
        bits=params["bits"],
        group=params["group"],
        symmetric=not params["zero_point"],
        act_bits=params.get("act_bits") or 0,
        loss=params["loss"],
        reweight=params["masks"],
        rho=params["vision_weight"],
    )
    check_search(case, method, modality)


class SensitivityBlock(nn.Module):
    """What `sens` was computed with: each token takes in half the mean of those before it, then two residual layers."""

    def __init__(self, attention: torch.Tensor, mlp: torch.Tensor) -> None:
        super().__init__()
        for name, weight in (("o_proj", attention), ("down_proj", mlp)):
            setattr(self, name, nn.Linear(*weight.shape[::-1], bias=False))
            getattr(self, name).weight.data = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, hidden.shape[1] + 1)[:, None]
        hidden = hidden + 0.5 * hidden.cumsum(dim=1) / count
        hidden = hidden + self.o_proj(hidden)
        return hidden + self.down_proj(nn.functional.silu(hidden))


@pytest.mark.parametrize("case", [c for c in MBQ_CASES if "target" in c.ins], ids=lambda case: case.name)
def test_golden_compress_mbq_sensitivity(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Gradients at both outputs of every block; the loss is the squared error of the answers, divided by samples."""
    x, target, vision, answer = (case.ins[name] for name in ("x", "target", "vis", "cap"))
    samples, depth = len(x), sum(name.endswith("o_proj.weight") and name.startswith("W.") for name in case.ins)
    weights = [[case.ins[f"W.{i}.{name}.weight"] for name in ("o_proj", "down_proj")] for i in range(depth)]
    blocks = nn.ModuleList(SensitivityBlock(*pair) for pair in weights).requires_grad_(False)
    modality = torch.where(vision, VISION, torch.where(answer, ANSWER, TEXT))

    def loss(hidden: torch.Tensor, ids: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        number = int(ids[0])
        return (hidden[0] - target[number])[answer[number]].square().mean() / samples

    monkeypatch.setattr(gradients, "answer_loss", loss)
    stream = SimpleNamespace(
        calls=[Call(n, modality[n], [((), {})] * depth) for n in range(samples)],
        places=[("", blocks, str(index)) for index in range(depth)],
        adapter=SimpleNamespace(head=lambda hidden: hidden),
        hidden=lambda n: x[n : n + 1],
        advance=lambda n, index, hidden: blocks[index](hidden),
        example=lambda call: SimpleNamespace(plan=SimpleNamespace(input_ids=[call.example])),
    )
    means: dict[str, torch.Tensor] = {}
    for found in gradients.gradients(stream, lambda name, _: bool(name)):
        for name, gradient in found.outputs.items():
            key = f"layers.{found.index}.{name}"
            means[key] = means.get(key, 0) + modality_means(gradient, found.call.modality) / samples
    expected = {key.partition(".")[2] for key in case.outs}
    assert expected == set(means)
    for key, pair in means.items():
        wanted = [float(case.outs[f"{kind}_grad.{key}"]) for kind in ("vis", "cap")]
        assert pair.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-12)
    for index, ratios in enumerate(sensitivity(stream)):
        for name, ratio in zip(("o_proj", "down_proj"), ratios):
            seen = [float(case.outs[f"{kind}_grad.layers.{index}.{name}"]) for kind in ("vis", "cap")]
            assert ratio == pytest.approx(seen[0] / seen[1], rel=1e-4)


def test_golden_compress_files_of_registered_methods_are_all_checked():
    """Names of files that some test of this folder reads; a method whose file none reads is a gap."""
    read = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    registered = {name.replace("_", "") for name in METHODS.names()}
    found = [name for name in golden_methods("compress") if name.split("_")[0] in registered]
    assert found and [name for name in found if f'"{name}"' not in read] == []
