"""Checkpoints for other programs: what plain transformers reads, with the logits that were saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import families
import foveate
from foveate.cli import main
from foveate.errors import CheckpointError, UnsupportedError
from foveate.recipe import Recipe
from foveate.vlm import Request
from foveate.weights import export
from goldens_io import goldens_dir
from test_text_models import make

EXPORTS = [
    "rtn(bits=4, group=16, symmetric=true)",
    "rtn(bits=8, group=0, symmetric=true)",
    "gptq(bits=4, group=16, symmetric=true, samples=2, seqlen=16)",
    "awq(bits=4, group=16, symmetric=true, samples=2, seqlen=16)",
    "smoothquant(samples=2, seqlen=16)",
    "wanda(samples=2, seqlen=16) + gptq(bits=8, group=16, symmetric=true, samples=2, seqlen=16)",
    "sparsegpt(pattern='2:4', samples=2, seqlen=16)",
    "fp8_weights",
    "fp8_weights(inputs=false)",
]


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    return foveate.load(make(tmp_path_factory.mktemp("text") / "llama"), device="cpu")


def logits(model, vlm, text="the big red fox ran and saw") -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([vlm.tokenizer(text).input_ids])).logits[0, -1]


@pytest.mark.parametrize("text", EXPORTS)
def test_transformers_reads_the_same_model(blind, tmp_path, text):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra: test)")
    small = Recipe.parse(text).apply(blind, quiet=True)
    export.save(small, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = small.logits(Request("the big red fox ran and saw"))
    tolerance = 2e-4 if "smoothquant" in text else 1e-5
    torch.testing.assert_close(logits(plain, blind), expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(expected, blind.logits(Request("the big red fox ran and saw")), atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_model_that_sees_is_read_too(tmp_path, family):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra: test)")
    vlm = families.tiny(family)
    small = Recipe.parse("rtn(group=16, symmetric=true)").apply(vlm, quiet=True)
    export.save(small, tmp_path / "out")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        hidden = small.adapter.text_model(input_ids=ids, use_cache=False).last_hidden_state
        expected = small.model.get_output_embeddings()(hidden)
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    again = foveate.load(tmp_path / "out", device="cpu")
    request = Request("what?", families.picture())
    torch.testing.assert_close(again.logits(request), small.logits(request), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", EXPORTS)
def test_the_same_folder_loads_here(blind, tmp_path, text):
    small = Recipe.parse(text).apply(blind, quiet=True)
    export.save(small, tmp_path / "out")
    again = foveate.load(tmp_path / "out", device="cpu")
    assert again.recipe == small.recipe
    for name, value in small.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    again.save(tmp_path / "ours")
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())


def test_the_layout_is_that_of_the_format(blind, tmp_path):
    small = Recipe.parse("rtn(bits=4, group=16, symmetric=true)").apply(blind, quiet=True)
    export.save(small, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name, layer = "model.layers.0.mlp.up_proj", small.model.model.layers[0].mlp.up_proj
    words, scale = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
    assert words.dtype == torch.int32 and words.shape == (48, 32 * 4 // 32) and scale.shape == (48, 2)
    codes = torch.stack([words >> 4 * i & 15 for i in range(8)], dim=-1).flatten(1)
    weight = ((codes - 8).unflatten(1, (2, 16)) * scale.float()[..., None]).flatten(1)
    assert torch.equal(weight, layer.weight) and stored[f"{name}.weight_shape"].tolist() == [48, 32]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    (group,) = config["config_groups"].values()
    assert group["weights"]["group_size"] == 16 and name in group["targets"] and config["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rtn(bits=4, group=16)", "symmetric=true"),
        ("rtn(bits=3, group=16, symmetric=true)", "takes 4 or 8"),
        ("rtn(bits=2, group=16, symmetric=true)", "takes 4 or 8"),
    ],
)
def test_what_the_format_cannot_hold_is_one_line(blind, tmp_path, text, words):
    with pytest.raises(UnsupportedError, match=words):
        export.save(Recipe.parse(text).apply(blind, quiet=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_that_transformers_does_not_know(tmp_path):
    tiny = foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")
    small = Recipe.parse("rtn(group=16, symmetric=true)").apply(tiny, quiet=True)
    with pytest.raises(UnsupportedError, match="save as foveate"):
        export.save(small, tmp_path / "out")


def test_a_full_disk_leaves_the_old_checkpoint(blind, tmp_path, monkeypatch):
    import foveate.files as files

    export.save(blind, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    small = Recipe.parse("rtn(group=16, symmetric=true)").apply(blind, quiet=True)
    for write in (lambda: export.save(small, tmp_path / "out"), lambda: small.save(tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"No space left on device \(\d+ MiB free\); nothing was changed"):
            write()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_command(blind, tmp_path, capsys):
    story = tmp_path / "story.txt"
    story.write_text("the big red fox ran and the dog saw a cat . " * 20)
    options = ["--recipe", "awq(bits=4, group=16, symmetric=true) + int8", "--format", "compressed-tensors"]
    data = ["--calib", str(story), "--samples", "2", "--seqlen", "16"]
    assert main(["compress", blind.name, *options, *data, "-o", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "compressed-tensors" and str(story) in found["recipe"]
    assert found["weights"]["llm"]["after"] < found["weights"]["llm"]["before"]
    manifest = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert manifest["llm"]["source"] == str(story) and manifest["llm"]["samples"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "story.txt"]  # no state is left behind
    assert main(["compress", blind.name, "--recipe", "int8", *data, "-o", str(tmp_path / "b")]) == 2
    assert "looks at data" in capsys.readouterr().err
