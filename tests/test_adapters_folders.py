"""Folders, presets and commands of every family of transformers: what is written, read, refused and said."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import families_hf
import foveate
from families import FAMILIES, clip, picture, spread, tiny
from families import PRESETS as SMALL
from foveate.adapters import ADAPTERS
from foveate.adapters.base import COMMON_SIGNALS
from foveate.adapters.presets import PRESETS, HfPreset, config_of, describe
from foveate.effect import effect
from foveate.errors import CheckpointError, InputError, UnknownNameError, UnsupportedError
from foveate.nvila.initialise import empty, randomise
from foveate.recipe import Recipe
from foveate.reduce.base import Scorer
from foveate.vlm import VLM, Request
from plain_hf import MIXES, plain, prepared


def same_weights(one: VLM, other: VLM) -> bool:
    """Bit for bit, buffers included."""
    left, right = (
        {name: value for model in (vlm.model,) for name, value in (*model.named_parameters(), *model.named_buffers())}
        for vlm in (one, other)
    )
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_is_a_plain_checkpoint(family: str, tmp_path: Path):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, "picture")
    expected = vlm.logits(Request("What is it?", MIXES["picture"]))
    vlm.save(tmp_path / "model")
    again = foveate.load(tmp_path / "model", device="cpu")
    assert again.adapter.family == family and again.spec == vlm.spec
    assert same_weights(again, vlm)
    torch.testing.assert_close(again.logits(Request("What is it?", MIXES["picture"])), expected, atol=1e-5, rtol=0)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(theirs) is type(vlm.model)
    torch.testing.assert_close(theirs(**plain(vlm, plan, inputs)).logits[0, -1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_transformers_wrote_is_read(family: str, tmp_path: Path):
    vlm = tiny(family)
    vlm.model.save_pretrained(tmp_path)
    vlm.tokenizer.save_pretrained(tmp_path)
    spec = vlm.spec.to_dict()
    (tmp_path / "preprocess.json").write_text(json.dumps(spec))
    again = foveate.load(tmp_path, device="cpu")
    assert same_weights(again, vlm)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "model"
    tiny("llava").save(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def edit(folder: Path, name: str, **changes: Any) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **changes}))


def test_a_missing_tensor_is_named(broken: Path):
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.multi_modal_projector.linear_2.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.multi_modal_projector.linear_2.weight' is missing.*\(32, 32\)"):
        foveate.load(broken)


def test_a_wrong_shape_is_named(broken: Path):
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(280, 16)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*has shape \(280, 16\), the config expects \(280, 32\)"):
        foveate.load(broken)


def test_a_pickle_is_refused(broken: Path):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which can run code; convert"):
        foveate.load(broken)


def test_what_does_not_fit_is_said(broken: Path):
    edit(broken, "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="is quantized with awq; give the folder of the unquantized checkpoint"):
        foveate.load(broken)
    edit(broken, "config.json", quantization_config=None, image_token_index=3)
    with pytest.raises(CheckpointError, match="'<image>' is token 260 of the tokenizer, but image_token_id is 3"):
        foveate.load(broken)
    edit(broken, "config.json", image_token_index=260, vision_feature_layer=[-2, -1])
    with pytest.raises(CheckpointError, match=r"vision_feature_layer is \[-2, -1\]: connectors that join several"):
        foveate.load(broken)
    text = json.loads((broken / "config.json").read_text())["text_config"]
    edit(broken, "config.json", vision_feature_layer=-2, text_config={**text, "vocab_size": 200})
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, the embedding 200 rows in .*broken"):
        foveate.load(broken)
    edit(broken, "config.json", text_config=text, vision_feature_select_strategy="full")
    with pytest.raises(CheckpointError, match="with a clip_vision_model tower only 'default' is supported"):
        foveate.load(broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; copy the tokenizer files"):
        foveate.load(broken)


def test_an_error_while_saving_leaves_the_old_folder(broken: Path, monkeypatch: pytest.MonkeyPatch):
    before = sorted((path.name, path.read_bytes()) for path in broken.iterdir())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(foveate.files, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device \(\d+ MiB free\); nothing was changed"):
        tiny("llava").save(broken)
    assert sorted((path.name, path.read_bytes()) for path in broken.iterdir()) == before
    assert sorted(path.name for path in broken.parent.iterdir()) == ["broken"]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_processor_files_come_along(family: str, tmp_path: Path):
    """Files that only transformers' processors read survive loading and saving byte for byte."""
    tiny(family).save(tmp_path / "one")
    (tmp_path / "one" / "processor_config.json").write_text('{"processor_class": "SomeProcessor",  "odd": [1]}')
    foveate.load(tmp_path / "one").save(tmp_path / "two")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    adapter = foveate.load(tmp_path / "one").adapter
    for other in (adapter.with_spec(adapter.spec), adapter.with_model(adapter.model)):
        assert other.files == adapter.files and "processor_config.json" in other.files


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_weights_are_saved_and_found_again(family: str, tmp_path: Path):
    vlm, request = tiny(family), Request("What is it?", MIXES["picture"])
    small = Recipe.parse("rtn(bits=8, group=16, parts=[vision_tower, mm_projector, llm]) + int8").apply(vlm, quiet=True)
    assert sum(effect(vlm, small).weights["vision_tower"]) < sum(effect(vlm, vlm).weights["vision_tower"])
    expected = small.logits(request)
    assert 1e-4 < (expected - vlm.logits(request)).abs().max() < 0.5
    small.save(tmp_path / "small")
    again = foveate.load(tmp_path / "small", device="cpu")
    assert again.recipe == small.recipe
    torch.testing.assert_close(again.logits(request), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_near(family: str, tmp_path: Path):
    tiny(family).save(tmp_path / "model")
    half = foveate.load(tmp_path / "model", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    request = Request("What is it?", MIXES["pictures"])
    full = tiny(family).logits(request)
    assert (half.logits(request) - full).abs().max() < 0.35 * full.std()
    plan, inputs = prepared(half, "pictures")
    names = [name for name in half.adapter.signals if name not in COMMON_SIGNALS]
    (encoded,) = half.adapter.encode([inputs], [plan], names)
    assert {value.dtype for value in encoded.signals.values()} == {torch.float32}


def test_weights_are_read_as_they_are_stored_unless_asked_otherwise(broken: Path):
    stored = {name: tensor.to(torch.float16) for name, tensor in load_file(broken / "model.safetensors").items()}
    save_file(stored, broken / "model.safetensors")
    for asked, dtype in (("auto", torch.float16), (torch.float32, torch.float32)):
        adapter = ADAPTERS.get("llava").load(broken, dtype=asked, device=torch.device("cpu"), attn=None)
        assert {p.dtype for p in adapter.model.parameters()} == {dtype} and adapter.model.config.dtype == dtype


def test_internvit_with_head_norms_is_read_behind_them_and_other_selections_are_refused():
    vlm = tiny("internvl")
    block = copy.deepcopy(vlm.adapter.blocks[0])
    assert vlm.adapter.attention_of(block).q is block.attention.q_proj
    block.attention.q_norm = torch.nn.LayerNorm(4)
    assert vlm.adapter.attention_of(block).q is block.attention.q_norm
    config = copy.deepcopy(vlm.model.config)
    config.vision_feature_select_strategy = "full"
    with pytest.raises(CheckpointError, match="InternVL has -1 and 'default'"):
        vlm.adapter.check_config(config)


# ---- presets

PUBLISHED = {
    "llava-1.5-7b": 7_063_427_072,
    "llava-next-7b": 7_566_747_648,
    "llava-onevision-0.5b": 893_618_208,
    "llava-onevision-7b": 8_030_348_832,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "internvl2.5-1b": 938_193_024,
    "smolvlm-256m": 256_484_928,
}
"""Parameters of the published checkpoints (their model pages), tied embeddings counted once."""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_size(name: str):
    kind, config, spec = describe(name)
    model = empty(kind.model_class(), config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]  # tied ones are one object
    assert spec.family == kind.family


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_matrices(family: str):
    """What costs are computed from, against the tower and connector themselves."""
    vlm = tiny(family)
    sizes, parts = vlm.adapter.sizes(vlm.model.config), vlm.adapter.parts()
    connector = [parts["mm_projector"], *getattr(vlm.adapter.tower, "deepstack_merger_list", ())]
    matrices = [m for block in vlm.adapter.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(vlm.adapter.blocks) == sizes.layers
    per_layer = 4 * sizes.width**2 + sizes.mlp_matrices * sizes.width * sizes.mlp
    assert sum(m.weight.numel() for m in matrices) == sizes.layers * per_layer
    modules = [m for part in connector for m in part.modules() if isinstance(m, torch.nn.Linear)]
    linears = [(m.in_features, m.out_features) for m in modules]
    assert sorted(linears) == sorted(sizes.connector)
    assert sizes.joined == vlm.spec.downsample**2 and sizes.cls == int(vlm.adapter.has_cls)
    tower = [m for m in vlm.adapter.tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)]
    assert sizes.patch_inputs == tower[0].weight[0].numel()


# ---- the command line


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_commands_run_on_a_folder(family: str, tmp_path: Path, capsys: Any, caplog: Any):
    from foveate.cli import main

    tiny(family).save(tmp_path / "model")
    picture().save(tmp_path / "picture.png")
    ask = ["ask", tmp_path / "picture.png", "What is it?", "--model", tmp_path / "model", "--max-new-tokens", "2"]
    for more in ([], ["--reduce", "uniform(keep=0.5)"], ["--reduce", "fastv(keep=0.5)"]):
        assert main([str(word) for word in [*ask, "--json", *more]]) == 0
        tokens = json.loads(capsys.readouterr().out)["tokens"]
        assert tokens["kept"] == (tokens["visual"] if not more else tokens["visual"] // 2)
    words = ["eval", tmp_path / "model", "--json", "--limit", "1"]
    for task in ("world/colour", "world/motion"):
        words += ["--task", task]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    clips = family == "qwen2_5_vl"
    assert list(json.loads(out)["tasks"]) == ["world/colour", *(["world/motion"] if clips else [])]
    assert ("llava_next takes no clips, so these tasks are left out: world/motion" in caplog.text) != clips


@dataclass(frozen=True)
class ByCLS(Scorer):
    """Needs what only a CLS token can tell."""

    name: ClassVar[str] = "by_cls"
    signals: ClassVar[tuple[str, ...]] = ("cls_attention@-2",)

    def score(self, signals: dict[str, torch.Tensor], layout: Any) -> torch.Tensor:
        return signals["cls_attention@-2"].mean(dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_that_needs_cls_works_or_is_told_why_not(family: str):
    vlm, request = tiny(family), Request("What?", [picture()], reduce=ByCLS(keep=0.5))
    if vlm.adapter.has_cls:
        answer = vlm.respond(request, max_new_tokens=1)
        assert answer.tokens["kept"] < answer.tokens["visual"]
        return
    expected = (
        f"by_cls needs cls_attention@-2, which the '{family}' adapter does not offer: its encoder has no CLS token; "
    )
    with pytest.raises(UnsupportedError, match=f"{expected}try .*'uniform', which needs no signal"):
        vlm.respond(request)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_docs_tell_sites_and_signals(family: str):
    text = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{family}` |"))
    adapter, cells = tiny(family).adapter, [cell.strip() for cell in row.strip("|").split("|")]
    assert ("encoder" in adapter.sites) == ("in the encoder" in cells[2])
    assert ("post_encoder" in adapter.sites) == ("after it" in cells[2])
    assert ("CLS" in cells[3]) == adapter.has_cls
    assert ("clips" in cells[1]) == adapter.takes_clips


def test_what_a_family_cannot_do_is_said(tmp_path: Path):
    with pytest.raises(InputError, match="llava takes no clips; give some of its frames as pictures"):
        tiny("llava").logits(Request("What?", [clip()]))
    with pytest.raises(UnknownNameError, match=r"unknown preset 'llava-1\.5'; did you mean 'llava-1.5-7b'"):
        foveate.load("llava-1.5", random_weights=True)
    with pytest.raises(CheckpointError, match=r"'qwen2\.5-vl-7b' is an architecture without weights; give the folder"):
        foveate.load("qwen2.5-vl-7b")


# ---- checkpoints as they are published


@pytest.mark.parametrize(
    ("family", "stored", "ours"),
    [
        (
            "llava",
            "language_model.model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        ("llava", "language_model.lm_head.weight", "lm_head.weight"),
        ("llava", "vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("llava", "model.vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("llava_next", "image_newline", "model.image_newline"),
        ("internvl", "multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("qwen2_5_vl", "visual.blocks.0.attn.qkv.bias", "model.visual.blocks.0.attn.qkv.bias"),
        ("qwen2_5_vl", "model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("qwen2_vl", "model.layers.1.self_attn.q_proj.bias", "model.language_model.layers.1.self_attn.q_proj.bias"),
        ("qwen3_vl", "model.visual.merger.norm.bias", "model.visual.merger.norm.bias"),
        ("smolvlm", "model.text_model.norm.weight", "model.text_model.norm.weight"),
    ],
)
def test_names_of_published_tensors_find_their_place(family: str, stored: str, ours: str):
    assert tiny(family).adapter.canonical(stored) == ours
    assert ours in tiny(family).model.state_dict()


@pytest.mark.parametrize("family", families_hf.FAMILIES)
def test_a_published_folder_answers_as_transformers_does(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder without any file of ours, against the family's own processor and model from a picture's pixels on."""
    folder = families_hf.tiny(family, tmp_path, monkeypatch)
    base, stored = SMALL[family], families_hf.FILES[family][3]
    vision = {**base.vision, "patch_size": folder.spec.patch_size, **stored.get("vision_config", {})}
    options = {**base.options, **{name: value for name, value in stored.items() if name != "vision_config"}}
    if family == "qwen2_5_vl":
        vision["window_size"] = 56
    if family == "internvl":
        options["image_seq_length"] = folder.spec.token_side**2
    preset = HfPreset(family, vision, {**base.text, "vocab_size": 384}, options)
    architecture = ADAPTERS.get(family).model_class()
    model = randomise(empty(architecture, config_of(preset, folder.spec, folder.tokenizer)), torch.float32)
    spread(model)
    model.save_pretrained(tmp_path)
    vlm = foveate.load(tmp_path, device="cpu")
    assert vlm.spec == folder.spec and not (tmp_path / "preprocess.json").exists()

    pictures = [families_hf.picture(100, 70)]
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    theirs = folder.reference([{"role": "user", "content": parts}], pictures)
    inputs = {name: torch.as_tensor(np.asarray(value)) for name, value in theirs.items()}
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    expected = model(**inputs).logits[0, -1]
    found = vlm.logits(Request("What is it?", pictures))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
