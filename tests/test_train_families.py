"""Training the families of transformers: packed samples see what they see alone, and a run of each learns and loads."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import foveate
from families import CLIPS, FAMILIES, PRESETS, clip, picture, spread
from foveate.adapters.presets import build
from foveate.data.sample import ImageSource, Sample
from foveate.errors import RecipeError
from foveate.recipe import Recipe
from foveate.train.batch import BatchMaker
from foveate.train.family import Family
from foveate.train.metrics import read_metrics
from foveate.train.optimizer import part_of, takes_muon
from foveate.train.step import run_model
from foveate.train.trainer import Trainer
from foveate.vlm import VLM
from plain_hf import plain
from train_tiny import recipe, stage


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("foveate.train.trainer.keep_freed_memory", lambda: False)
    monkeypatch.setattr("foveate.train.metrics._tensorboard", lambda folder, step: None)


def family(name: str, **text) -> Family:
    """A tiny model in training. text: changes of its language model's config."""
    preset = PRESETS[name]
    adapter = build(dataclasses.replace(preset, text={**preset.text, **text}))
    spread(adapter.model)
    return Family(adapter)


def sample(seed: int, questions: int, *media) -> Sample:
    media = list(media) or [ImageSource(picture(seed, 60 + 8 * seed, 40))]
    branches = [[(f"what is at {seed}{k}?" + " so" * k, f"it is {seed}{k}")] for k in range(questions)]
    return Sample(f"s{seed}", media, branches)


def batch_of(model: Family, samples: list[Sample], max_length: int = 1024):
    made = maker(model, max_length)
    return made._join([made.prepare(s, np.random.default_rng(0)) for s in samples])


def maker(model: Family, max_length: int) -> BatchMaker:
    where = stage(questions_per_sample=0, max_length=max_length)
    options = {"adapter": model.adapter, "packs": model.packs}
    return BatchMaker(where, model.spec, model.adapter.tokenizer, None, **options)  # type: ignore[arg-type]


def alone(model: Family, messages) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, targets) of one dialogue by the family's own code of transformers."""
    vlm = VLM(model.adapter, "tiny")
    made = vlm.plan(messages)
    logits = vlm.model(**plain(vlm, made, vlm.prepare(made))).logits[0]
    labels = torch.from_numpy(made.labels)
    where = (labels[1:] >= 0).nonzero().squeeze(1)
    return logits[where], labels[1:][where]


@torch.no_grad()
def check(model: Family, samples: list[Sample], max_length: int = 1024, kept: int | None = None) -> int:
    """Every branch in the batch has the logits of that branch alone. Returns the number of rows."""
    model.eval()
    batch = batch_of(model, samples, max_length)
    output = run_model(model, batch, train_tower=True)
    logits = output.head(output.hidden)
    wanted = [alone(model, s.messages(b)) for s in samples for b in range(len(s.branches[:kept]))]
    assert sum(len(targets) for _, targets in wanted) == len(batch.targets)
    for lone, targets in wanted:
        n = len(targets)
        at = [i for i in range(len(batch.targets) - n + 1) if torch.equal(batch.targets[i : i + n], targets)]
        assert len(at) == 1
        torch.testing.assert_close(logits[at[0] : at[0] + n], lone, atol=5e-5, rtol=1e-4)
    return len(batch.input_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_branches_have_the_logits_of_each_alone(name) -> None:
    samples = [sample(1, 3), sample(2, 1), sample(3, 2, ImageSource(picture(3)), ImageSource(picture(4, 40, 64)))]
    samples.append(Sample("text", [], [[("who?", "nobody 55")]]))
    if name in CLIPS:
        samples.append(sample(5, 2, clip(5)))
    model = family(name)
    assert check(model, samples, 1600) == 1
    longest = max(len(maker(model, 1600).prepare(s, np.random.default_rng(0)).tokens) for s in samples)
    assert check(model, samples, longest) > 1


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_a_whole_dialogue_with_media_between_its_texts(name) -> None:
    parts = [{"type": "text", "text": "first"}, {"type": "image", "image": ImageSource(picture(7))}]
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a ring 77"},
        {"role": "user", "content": [{"type": "image", "image": ImageSource(picture(8, 40, 90))}]},
        {"role": "assistant", "content": "a disc 88"},
    ]
    whole = dataclasses.replace(sample(7, 1), turns=turns)
    model = family(name)
    model.eval()
    samples = [whole, sample(1, 2)]
    with torch.no_grad():
        batch = batch_of(model, samples)
        output = run_model(model, batch, train_tower=True)
        lone, targets = alone(model, turns)
    at = [i for i in range(len(batch.targets)) if torch.equal(batch.targets[i : i + len(targets)], targets)]
    got = output.head(output.hidden)[at[0] : at[0] + len(targets)]
    torch.testing.assert_close(got, lone, atol=5e-5, rtol=1e-4)


def test_a_sliding_window_gets_one_sample_a_row() -> None:
    model = family("llava_next", sliding_window=24)
    assert not model.packs
    assert check(model, [sample(1, 3), sample(2, 1)], kept=1) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_learns_a_repeated_sample_and_its_model_loads(name, tmp_path) -> None:
    model = family(name)
    model.adapter.save(tmp_path / "start", {})
    media = {"video": "clip"} if name in CLIPS else {"image": "0.png"}
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "clip").mkdir()
    for k in range(4):
        picture(k, 48, 32).save(tmp_path / "clip" / f"{k}.png")
    row = {**media, "question": "what is it?", "answer": "a ring"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    where = stage(steps=3, batch_size=2, accumulate=2, lr={"*": 0.01}, mixture={str(tmp_path / "data.jsonl"): 1.0})
    plan = recipe(where, model=str(tmp_path / "start"), output=str(tmp_path / "run"), log_every=1, threads=1)
    result = Trainer(plan, quiet=True).run()
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[2] < losses[1] < losses[0]
    assert not result.skipped
    before, after = (foveate.load(p, device="cpu") for p in (tmp_path / "start", result.model))
    assert after.spec == before.spec
    changed = {part_of(n) for n, p in Family(after.adapter).named_parameters() if not torch.equal(p, get(before, n))}
    assert changed == {"vision_tower", "mm_projector", "llm"}
    assert after.ask([picture(0)], "what is it?", max_new_tokens=2).tokens["visual"] > 0


def get(vlm: VLM, name: str) -> torch.Tensor:
    return dict(Family(vlm.adapter).named_parameters())[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_part(name) -> None:
    model = family(name)
    named = dict(model.named_parameters())
    assert {id(p) for p in named.values()} == {id(p) for p in model.adapter.model.parameters()}
    for part in ("vision_tower", "mm_projector", "llm"):
        assert any(part_of(n) == part and takes_muon(n, p) for n, p in named.items()), part
    if name.startswith("qwen"):
        assert not [n for n in named if n.startswith("vision_tower.merger")]


def refused(tmp_path, pattern: str, name: str = "smolvlm", model=None, **changes) -> None:
    folder = model or tmp_path / "start"
    if not folder.is_dir():
        family(name).adapter.save(folder, {})
    plan = {k: changes.pop(k) for k in ("preprocess",) if k in changes}
    with pytest.raises(RecipeError, match=pattern) as error:
        Trainer(recipe(stage(**changes), model=str(folder), output=str(tmp_path / "run"), **plan), quiet=True).run()
    assert "\n" not in str(error.value)


def test_what_only_nvila_can_do_is_refused(tmp_path) -> None:
    refused(tmp_path, "low_resolution is 0.5.*smolvlm", low_resolution=0.5)
    refused(tmp_path, "loss 'dense'.*smolvlm.*'lm'", losses={"lm": 1.0, "dense": 1.0})
    refused(tmp_path, "preprocess cannot change 'max_tiles'.*edge", preprocess={"max_tiles": 2})
    vlm = VLM(family("smolvlm").adapter, "tiny")
    vlm.model.requires_grad_(False)
    Recipe.parse("rtn(bits=8,group=16)").apply(vlm).save(tmp_path / "small")
    refused(tmp_path, r"small was compressed by rtn\(.*uncompressed", model=tmp_path / "small")
    assert not (tmp_path / "run" / "model").exists()


def test_preprocessing_that_no_weight_depends_on_may_change(tmp_path) -> None:
    family("smolvlm").adapter.save(tmp_path / "start", {})
    plan = recipe(
        stage(steps=1, max_length=2048),
        model=str(tmp_path / "start"),
        output=str(tmp_path / "run"),
        preprocess={"edge": 32},
    )
    result = Trainer(plan, quiet=True).run()
    assert foveate.load(result.model, device="cpu").spec.edge == 32


@pytest.mark.parametrize(("name", "attention"), [("qwen3_vl", "lean"), ("internvl", "sdpa")])
def test_parts_attention_precision_and_checkpointing(name, attention, tmp_path) -> None:
    """Frozen parts stay as they are, whatever else a recipe asks for."""
    family(name).adapter.save(tmp_path / "start", {})
    picture(0).save(tmp_path / "0.png")
    row = {"image": "0.png", "question": "what is it?", "answer": "a ring"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    where = stage(
        steps=3,
        batch_size=1,
        train=("mm_projector", "llm"),
        optimizer="muon",
        lr={"*": 0.01},
        adamw_lr=0.003,
        gradient_checkpointing=True,
        mixture={str(tmp_path / "data.jsonl"): 1.0},
    )
    options = {"precision": "bfloat16", "attention": attention, "log_every": 1, "output": str(tmp_path / "run")}
    result = Trainer(recipe(where, model=str(tmp_path / "start"), **options), quiet=True).run()
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[2] < losses[0]
    before, after = (foveate.load(p, device="cpu") for p in (tmp_path / "start", result.model))
    changed = {part_of(n) for n, p in Family(after.adapter).named_parameters() if not torch.equal(p, get(before, n))}
    assert changed == {"mm_projector", "llm"}
