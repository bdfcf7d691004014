"""NVILA checkpoints: every layout in and out, Auto classes, refusals, and saving that never leaves half a model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from foveate import files
from foveate.errors import CheckpointError
from foveate.nvila import NvilaProcessor, build, convert, load, load_config, save
from goldens_io import goldens_dir

ROOT = goldens_dir("nvila")
VARIANTS = ("nvila", "lite", "video")
LAYOUTS = ("three-folder", "flat", "foveate")


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def fields(config: Any) -> dict[str, Any]:
    """What a config says about the model, without who wrote it and in which dtype it was loaded."""
    drop = ("architectures", "dtype", "_name_or_path", "transformers_version")
    nested = {k: v for k, v in config.to_dict().items() if k not in drop}
    return {k: {a: b for a, b in v.items() if a not in drop} if isinstance(v, dict) else v for k, v in nested.items()}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "nvila" / "ckpt", tmp_path / "ckpt"))


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every option on: nano with a small tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "nvila" / "ckpt" / "llm")
    model = build("nano", torch.bfloat16, seed=2, tokenizer=tokenizer)
    return save(model, tokenizer, None, tmp_path_factory.mktemp("nano") / "model")


@pytest.mark.parametrize("variant", [*VARIANTS, "nano"])
def test_nvila_layouts_round_trip_bit_for_bit(variant: str, nano: Path, tmp_path: Path) -> None:
    source = nano if variant == "nano" else ROOT / variant / "ckpt"
    first = load(source, dtype=None)
    path = source
    for step, layout in enumerate(("flat", "three-folder", "foveate", "flat")):
        path = convert(path, tmp_path / f"{step}", layout)
        again = load(path, dtype=None)
        assert equal(tensors(again.model), tensors(first.model))
        assert again.spec == first.spec
        assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
        assert fields(again.model.config) == fields(first.model.config)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_nvila_writes_the_published_tensor_names(variant: str, tmp_path: Path) -> None:
    official = ROOT / variant / "ckpt"
    written = convert(official, tmp_path / "out", "three-folder")
    for part in ("llm", "vision_tower", "mm_projector"):
        assert equal(load_file(written / part / "model.safetensors"), load_file(official / part / "model.safetensors"))
    flat = load_file(convert(official, tmp_path / "flat", "flat") / "model.safetensors")
    assert {key.split(".")[0] for key in flat} == {"llm", "vision_tower", "mm_projector"}
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in flat
    (written / "preprocess.json").unlink()  # what others write has none: the configs alone must say the same
    assert load(written).spec == load(official).spec


@pytest.mark.parametrize("variant", VARIANTS)
def test_nvila_flat_layout_implies_the_published_constants(variant: str, tmp_path: Path) -> None:
    path = convert(ROOT / variant / "ckpt", tmp_path / "flat", "flat")
    if variant == "video":  # the flat form exists for NVILA and Lite only
        return
    (path / "preprocess.json").unlink()
    keep = ("model_type", "text_config", "vision_config", "image_token_id", "video_token_id")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: config[k] for k in keep}))
    assert load(path).spec == load(ROOT / variant / "ckpt").spec
    assert equal(tensors(load(path).model), tensors(load(ROOT / variant / "ckpt").model))


def test_nvila_auto_classes_load_our_layout(nano: Path) -> None:
    ours = load(nano)
    assert AutoConfig.from_pretrained(nano).model_type == "foveate_nvila"
    processor = AutoProcessor.from_pretrained(nano)
    assert isinstance(processor, NvilaProcessor) and processor.spec == ours.spec
    model = AutoModelForImageTextToText.from_pretrained(nano)
    assert equal(tensors(model), tensors(ours.model))
    assert model.generation_config.eos_token_id == ours.model.generation_config.eos_token_id
    inputs = processor(text="What is this?", images=ROOT / "images" / "f_64x64_L.png")
    with torch.no_grad():
        expected = ours.model(**inputs).logits
        assert torch.equal(model.eval()(**inputs).logits, expected)


def test_nvila_transformers_own_save_loads_here(nano: Path, tmp_path: Path) -> None:
    """`save_pretrained` of transformers, and its tensor prefix "vision_model." of any version, are read as well."""
    ours = load(nano)
    ours.model.save_pretrained(tmp_path / "hf")
    NvilaProcessor(ours.tokenizer, ours.spec).save_pretrained(tmp_path / "hf")
    assert equal(tensors(load(tmp_path / "hf").model), tensors(ours.model))


def test_nvila_unknown_config_keys_are_ignored(copied: Path) -> None:
    for path in (copied / "config.json", *copied.glob("*/config.json")):
        edit(path, not_a_key={"_target_": "os.system"}, lora_enable=True, auto_map={"AutoModel": "evil.Model"})
    assert equal(tensors(load(copied).model), tensors(load(ROOT / "nvila" / "ckpt").model))


def test_nvila_encoder_names_come_from_a_table(copied: Path) -> None:
    edit(copied / "config.json", video_encoder={"_target_": "x.TSPVideoEncoder", "pool_sizes": [[4, 1, 1], [2, 2, 2]]})
    assert load(copied).model.config.video_pool_sizes == [[4, 1, 1], [2, 2, 2]]
    edit(copied / "config.json", video_encoder=json.dumps({"_target_": "os.system"}))
    with pytest.raises(CheckpointError, match=r"unknown encoder 'os.system'; known: BasicImageEncoder"):
        load(copied)
    edit(copied / "config.json", video_encoder=None, s2=True, dynamic_s2=False)
    with pytest.raises(CheckpointError, match="square S2"):
        load(copied)


def test_nvila_token_ids_come_from_the_tokenizer(nano: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(nano, tmp_path / "model"))
    edit(path / "config.json", image_token_id=1, video_token_id=2)
    loaded = load(path)
    vocabulary = loaded.tokenizer.get_vocab()
    assert loaded.model.config.image_token_id == vocabulary["<image>"]
    assert loaded.model.config.video_token_id == vocabulary["<vila/video>"]
    assert load_config(path)[0].image_token_id == vocabulary["<image>"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nvila_missing_and_misshaped_tensors_are_named(layout: str, tmp_path: Path) -> None:
    path = convert(ROOT / "nvila" / "ckpt", tmp_path / "model", layout)
    file = path / ("llm/model.safetensors" if layout == "three-folder" else "model.safetensors")
    state = load_file(file)
    key = next(k for k in state if k.endswith("layers.1.mlp.up_proj.weight"))
    shape = tuple(state[key].shape)
    save_file({k: v for k, v in state.items() if k != key}, file)
    with pytest.raises(CheckpointError) as missing:
        load(path)
    assert "llm.model.layers.1.mlp.up_proj.weight" in str(missing.value) and f"{shape}, found none" in str(
        missing.value
    )
    save_file(state | {key: state[key][:-1].contiguous()}, file)
    with pytest.raises(CheckpointError) as wrong:
        load(path)
    assert str((shape[0] - 1, shape[1])) in str(wrong.value) and f"expects {shape}" in str(wrong.value)
    file.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(path)


def test_nvila_pickles_are_refused(copied: Path) -> None:
    weight = copied / "llm" / "model.safetensors"
    weight.rename(weight.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*convert the checkpoint to safetensors"):
        load(copied)
    (copied / "llm" / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        load(copied)


def test_nvila_shards(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 100_000)
    path = convert(copied, tmp_path / "sharded", "three-folder")
    shards = sorted((path / "llm").glob("*.safetensors"))
    assert len(shards) > 2 and (path / "llm" / "model.safetensors.index.json").is_file()
    assert equal(tensors(load(path).model), tensors(load(copied).model))
    whole = AutoModelForImageTextToText.from_pretrained(convert(path, tmp_path / "ours"))
    assert equal(tensors(whole), tensors(load(copied).model))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        load(path)
    index = path / "llm" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../../ckpt/llm/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="shards must lie beside their index"):
        load(path)


def test_nvila_foreign_tensors_are_ignored_once(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = copied / "vision_tower" / "model.safetensors"
    save_file(load_file(file) | {"vision_model.head.probe": torch.zeros(1), "vision_model.extra": torch.zeros(1)}, file)
    with caplog.at_level(logging.WARNING, logger="foveate"):
        load(copied)
    assert len(caplog.records) == 1 and "1 tensors are not part of NVILA" in caplog.text  # the pooling head is expected


def test_nvila_saving_is_all_or_nothing(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, spec = load(nano)
    path = save(model, tokenizer, spec, tmp_path / "out", extra={"recipe.json": {"steps": []}})
    assert json.loads((path / "recipe.json").read_text()) == {"steps": []}
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, tokenizer, spec, path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()

    rename = Path.rename

    def stuck(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("moved away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(OSError, match="moved away"):
        save(model, tokenizer, spec, path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    monkeypatch.undo()
    save(model, tokenizer, spec, path)  # an older checkpoint is replaced, and its recipe with it
    assert not (path / "recipe.json").exists()

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        save(model, tokenizer, spec, tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="unknown layout 'onnx'; known: foveate"):
        save(model, tokenizer, spec, tmp_path / "new", layout="onnx")
    assert not (tmp_path / "new").exists()


def test_nvila_edited_preprocessing_is_noticed(nano: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(nano, tmp_path / "model"))
    edit(path / "preprocess.json", max_tiles=9)
    with pytest.raises(CheckpointError, match="was edited"):
        load(path)


def test_nvila_load_options(nano: Path) -> None:
    assert load(nano).model.dtype == torch.bfloat16
    loaded = load(nano, dtype="float32", attn="eager")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.model.llm.config._attn_implementation == "eager"
    assert not any(b.is_meta for b in loaded.model.buffers())
    with pytest.raises(CheckpointError, match="unknown dtype 'int3'"):
        load(nano, dtype="int3")


def test_nvila_what_is_no_checkpoint(tmp_path: Path, nano: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type 'llama'"):
        load(tmp_path)
    path = Path(shutil.copytree(nano, tmp_path / "model"))
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        load(path)
    path = Path(shutil.copytree(nano, tmp_path / "broken"))
    (path / "config.json").write_text('{"model_type": "foveate_nvila"}')
    with pytest.raises(CheckpointError, match="cannot be read as foveate"):
        load(path)
