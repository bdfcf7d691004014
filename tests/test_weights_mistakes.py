"""Calibration: mistakes are one line that names what is wrong, and where its samples come from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import foveate
from foveate.cli import main
from foveate.errors import CheckpointError, InputError, RecipeError, UnsupportedError
from foveate.recipe import Recipe
from foveate.vlm import VLM, Request
from foveate.weights.base import linear_layers
from foveate.weights.samples import VISION, draw_examples
from foveate.weights.solve import inverse_factor, sparsegpt
from goldens_io import goldens_dir

PICTURE = np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)
REQUEST = Request("what?", PICTURE)


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


def apply(vlm, text, **options):
    return Recipe.parse(text).apply(vlm, quiet=True, **options)


def test_nan_activations_name_block_and_sample(tiny):
    broken = apply(tiny, "magnitude(sparsity=0.1)")
    layer = broken.model.llm.model.layers[1].post_attention_layernorm
    layer.weight = nn.Parameter(layer.weight.clone().fill_(float("nan")), requires_grad=False)
    with pytest.raises(InputError, match=r"llm block 1 .*NaN.*sample 0.*float32"):
        apply(VLM(broken.adapter, "broken"), "wanda(samples=2)")


def test_a_singular_hessian_names_the_layer():
    with pytest.raises(UnsupportedError, match=r"llm\.x: its Hessian is not finite"):
        inverse_factor(torch.full((3, 3), float("inf")), 0.01, "llm.x")
    indefinite = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    with pytest.raises(UnsupportedError, match=r"llm\.y: its Hessian is singular even with damping 1"):
        inverse_factor(indefinite, 0.01, "llm.y")
    repeated = torch.ones(4, 4)  # rank one: damping makes it invertible
    assert torch.isfinite(inverse_factor(repeated, 0.01)).all()
    assert torch.isfinite(sparsegpt(torch.randn(3, 4), torch.zeros(4, 4))).all()  # nothing ever flowed in


def test_a_full_disk_is_one_line_and_the_run_can_go_on(tiny, tmp_path, monkeypatch):
    from foveate import files

    real, written = files.save_file, []

    def full(tensors, path, **options):
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path, **options)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device \(\d+ MiB free\); make room and run the same"):
        apply(tiny, "wanda(samples=2)", state=tmp_path / "state")
    monkeypatch.setattr(files, "save_file", real)
    small = apply(tiny, "wanda(samples=2)", state=tmp_path / "state")
    assert torch.equal(small.logits(REQUEST), apply(tiny, "wanda(samples=2)").logits(REQUEST))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gptq(group=7)", "group=7 does not divide; use group=6"),
        ("awq(group=32)", "use group=24"),
        ("wanda(pattern='2:5')", "pattern 2:5 does not divide"),
        ("wanda(pattern='4:2')", "write how many stay of how many"),
        ("wanda(sparsity=1.0)", "below 1"),
        ("wanda(samples=0)", "at least 1"),
        ("wanda + sparsegpt", "both change the sparsity of llm"),
        ("gptq(group=16) + awq(group=16)", "both change the storage of llm"),
        ("gptq(group=16) + wanda", "turn them round"),
        ("wanda(samples=2) + gptq(group=16, samples=3)", "different calibration data"),
        ("wanda(calib='nowhere.txt')", "neither a file nor one of"),
        ("mbq(parts=[vision_tower])", "parts=\\[llm\\]"),
        ("smoothquant(alpha=2.0)", "between 0 and 1"),
        ("mbq(bits=4, act_bits=4)", "act_bits is 4"),
    ],
)
def test_mistakes_are_one_line(tiny, text, words):
    with pytest.raises((RecipeError, InputError, UnsupportedError), match=words) as caught:
        apply(tiny, text)
    assert "\n" not in str(caught.value)


def spoiled(tmp_path, leaf, value):
    """The checkpoint with one tensor of block 1 of the language model times `value`."""
    folder = tmp_path / "spoiled"
    shutil.copytree(goldens_dir("nvila") / "nvila" / "ckpt", folder)
    file = folder / "llm" / "model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if f"layers.1.{leaf}.weight" in name).mul_(value)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("leaf", "value", "text", "told"),
    [
        ("", 1, "awq(group=20)", "group=20 does not divide; use group=16"),
        ("", 1, "", "--recipe is empty"),
        ("mlp.up_proj", float("nan"), "rtn(group=16)", "layers.1.mlp.up_proj has NaN or infinite weights"),
        ("mlp.up_proj", float("nan"), "magnitude", "layers.1.mlp.up_proj has NaN or infinite weights"),
        ("input_layernorm", float("nan"), "gptq(group=16, samples=2)", "block 1 (model.layers.1) gives NaN"),
        ("mlp.down_proj", 1e38, "awq(group=16, samples=2)", "block 1 (model.layers.1) gives NaN or infinite"),
    ],
)
def test_a_bad_compression_is_one_line_and_leaves_nothing(tmp_path, capsys, leaf, value, text, told):
    folder = goldens_dir("nvila") / "nvila" / "ckpt" if not leaf else spoiled(tmp_path, leaf, value)
    assert main(["compress", str(folder), "--recipe", text, "-o", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert told in message and message.count("foveate: ") == 1 and "Traceback" not in message
    assert {path.name for path in tmp_path.iterdir()} <= {"spoiled"}


def test_more_damping_for_a_singular_layer_is_said(tmp_path, capsys, caplog):
    """Nothing flows into a layer but one direction: it is solved with more damping, which is said."""
    assert torch.isfinite(inverse_factor(torch.ones(4, 4), 0.0, "llm.x")).all()
    assert "llm.x: its Hessian is singular with damping 0; 0.01 is used" in caplog.text
    folder = spoiled(tmp_path, "input_layernorm", 0.0)
    recipe = "gptq(group=16, samples=2, damp=0.0)"
    assert main(["compress", str(folder), "--recipe", recipe, "-o", str(tmp_path / "out")]) == 0
    assert torch.isfinite(foveate.load(tmp_path / "out", device="cpu").logits(REQUEST)).all()


# ---- data


def test_sources_of_data(tiny, tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time there was a fox. " * 60)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"question": f"What is {i} and {i}?", "answer": str(2 * i)}) for i in range(40))
    )
    from foveate import world
    from foveate.data.formats.write import write_dataset

    own = tmp_path / "own.jsonl"
    write_dataset([world.draw("scene", i, split="train").sample() for i in range(3)], own)
    for source, sees in ((str(story), False), (str(rows), False), (str(own), True), ("random", False), ("auto", True)):
        one, two, other = (draw_examples(tiny, source, 3, 32, seed) for seed in (0, 0, 1))
        assert [e.plan.input_ids.tolist() for e in one] == [e.plan.input_ids.tolist() for e in two]
        assert [e.plan.input_ids.tolist() for e in one] != [e.plan.input_ids.tolist() for e in other], source
        assert bool((one[0].modality == VISION).any()) == sees, source
        assert sees or all(len(e.plan.input_ids) == 32 for e in one)
    with pytest.raises(InputError, match="no calibration sample passes through vision_tower"):
        apply(tiny, f"wanda(calib='{story}', parts=[vision_tower], seqlen=32)")
    small = apply(tiny, f"wanda(calib='{story}', samples=2, seqlen=32)")
    assert small.calibration["llm"]["content"] != str(story) and len(small.calibration["llm"]["content"]) == 16


def test_layers_that_never_run_are_counted(tiny, caplog):
    with caplog.at_level("WARNING"):
        apply(tiny, "gptq(parts=[vision_tower], group=4, samples=1)")
    reached = tiny.model.config.num_vision_layers < len(tiny.model.vision_tower.encoder.layers)
    loose = [name for name, _, _ in linear_layers(tiny.model.vision_tower) if not name.startswith("encoder.")]
    assert ("never reached" in caplog.text) == (reached or bool(loose))
