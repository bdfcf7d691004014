"""Whole runs of a tiny model: killed and resumed, stopped, refused; and what they leave behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.errors import RecipeError
from foveate.nvila.checkpoint import load, save
from foveate.train import memory
from foveate.train.checkpoint import complete_checkpoints
from foveate.train.config import TrainRecipe
from foveate.train.metrics import read_metrics
from foveate.train.trainer import Trainer
from train_tiny import recipe, stage, tiny_model, tokenizer

SOURCE = Path(__file__).parents[1] / "src"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No change to this process's allocator, and no TensorBoard (its import costs more than a run)."""
    monkeypatch.setattr("foveate.train.trainer.keep_freed_memory", lambda: False)
    monkeypatch.setattr("foveate.train.metrics._tensorboard", lambda folder, step: None)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with a tiny model whose attention has dropout (so random states matter) and a small data set."""
    folder = tmp_path_factory.mktemp("start")
    model = tiny_model()
    model.config.text_config.attention_dropout = 0.2
    save(model, tokenizer(), None, folder / "model")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": f"read mark {i}?", "answer": f"blue {i}"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def two_stages(start: Path, output: Path, **changes) -> TrainRecipe:
    tower = stage(
        name="tower", steps=3, train=("vision_tower", "heads"), losses={"dense": 1.0}, mixture={"world/scene": 1.0}
    )
    joint = stage(
        name="joint",
        steps=6,
        batch_size=3,
        accumulate=2,
        optimizer="muon",
        lr={"*": 0.02},
        adamw_lr=0.003,
        weight_decay=0.1,
        schedule="linear",
        losses={"lm": 1.0, "dense": 0.5},
        mixture={"world/scene": 1.0, str(start / "data.jsonl"): 1.0},
        questions_per_sample=2,
        low_resolution=0.5,
    )
    values = {"model": str(start / "model"), "output": str(output), "save_every": 2, "log_every": 1, "threads": 1}
    return recipe(tower, joint, **{**values, **changes})


def run(plan: TrainRecipe, **options):
    return Trainer(plan, quiet=True).run(**options)


def losses(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(output / "metrics.jsonl")]


def same_bytes(one: Path, other: Path) -> None:
    assert (one / "model" / "model.safetensors").read_bytes() == (other / "model" / "model.safetensors").read_bytes()
    last, other_last = complete_checkpoints(one)[-1], complete_checkpoints(other)[-1]
    assert last.name == other_last.name
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (last / name).read_bytes() == (other_last / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The folder of the run that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foveate.train.trainer.keep_freed_memory", lambda: False)
        patch.setattr("foveate.train.metrics._tensorboard", lambda folder, step: None)
        run(two_stages(start, output))
    return output


CHILD = """
import sys, time, yaml
from pathlib import Path
from foveate.train import checkpoint, metrics, optimizer, trainer
from foveate.train.config import TrainRecipe
metrics._tensorboard = lambda folder, step: None
step, flush = optimizer.StageOptimizer.step, checkpoint.flush_to_disk
def slow_step(self, number):
    time.sleep(0.15)
    return step(self, number)
def slow_flush(path):
    time.sleep(float(sys.argv[2]))
    flush(path)
optimizer.StageOptimizer.step, checkpoint.flush_to_disk = slow_step, slow_flush
recipe = TrainRecipe.from_dict(yaml.safe_load(Path(sys.argv[1]).read_text()))
trainer.Trainer(recipe, quiet=True).run(resume=True)
"""


def kill_when(condition, recipe_file: Path, flush_seconds: float) -> None:
    """Start the run in another process and end it with SIGKILL as soon as `condition()` holds."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(recipe_file), str(flush_seconds)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as child:
        limit = time.monotonic() + 300  # seconds of a busy machine; some ten of an idle one
        while not condition():
            if child.poll() is not None:
                pytest.fail(f"the run ended before it was killed: {child.stderr.read().decode()[-800:]}")
            assert time.monotonic() < limit, "the run did not get far enough"
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL


def test_killed_twice_and_resumed_the_run_ends_with_the_same_bits(start, whole, tmp_path) -> None:
    output = tmp_path / "run"
    plan = two_stages(start, output)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(plan.to_yaml())
    # first between checkpoints, in the second stage; then in the middle of writing one
    kill_when(lambda: len(read_metrics(output / "metrics.jsonl")) >= 5, recipe_file, 0.0)
    first = complete_checkpoints(output)[-1]
    kill_when(lambda: any(output.glob(".partial-step-*/state.json")), recipe_file, 0.3)
    assert complete_checkpoints(output)[-1] == first, "a checkpoint that is half written must not count"
    result = run(plan, resume=True)
    assert result.step == 9 and result.model == output / "model"
    same_bytes(whole, output)
    assert losses(output) == losses(whole)
    assert not list(output.glob(".partial*"))


def test_stopped_and_resumed_after_every_few_steps(start, whole, tmp_path) -> None:
    plan = two_stages(start, tmp_path / "run")
    for stop in (1, 2, 3):  # the second one ends exactly between the stages
        result = run(plan, resume=True, stop_after=stop)
        assert result.model is None
    assert run(plan, resume=True).step == 9
    same_bytes(whole, tmp_path / "run")


def test_resuming_a_finished_run_writes_its_model_again(start, whole, tmp_path) -> None:
    before = (whole / "model" / "model.safetensors").read_bytes()
    (whole / "model" / "model.safetensors").unlink()
    assert run(two_stages(start, whole), resume=True).step == 9
    assert (whole / "model" / "model.safetensors").read_bytes() == before


def test_the_released_model_loads_without_training_heads(whole) -> None:
    loaded = load(whole / "model")
    assert not any("heads" in name for name in loaded.model.state_dict())
    log = json.loads((whole / "model" / "training.json").read_text())
    assert log["recipe"]["stages"][1]["name"] == "joint" and log["log"][-1]["step"] == 9


def test_every_part_that_a_stage_names_moves_and_no_other(start, tmp_path) -> None:
    plan = two_stages(start, tmp_path / "run")
    before = load(start / "model").model.state_dict()
    run(plan, stop_after=3)
    trainer = Trainer(plan, quiet=True)
    trainer.run(resume=True, stop_after=1)
    state = trainer.model.state_dict()
    saved = {n.name: n for n in complete_checkpoints(tmp_path / "run")}
    assert "step-000003" in saved and "step-000004" in saved
    moved = {n.split(".")[0] for n in state if not torch.equal(state[n], before[n])}
    assert moved == {"vision_tower", "mm_projector", "llm"}
    from safetensors.torch import load_file

    tower_only = load_file(str(saved["step-000003"] / "model.safetensors"))
    assert {n.split(".")[0] for n in before if not torch.equal(tower_only[n], before[n])} == {"vision_tower"}


def test_a_tower_stage_never_runs_the_language_model(start, tmp_path, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the language model ran")

    monkeypatch.setattr("transformers.Qwen2Model.forward", refuse)
    run(two_stages(start, tmp_path / "run"), stop_after=3)
    with pytest.raises(AssertionError, match="language model ran"):
        run(two_stages(start, tmp_path / "run"), resume=True)


def test_another_recipe_or_a_second_start_is_refused(start, whole) -> None:
    plan = two_stages(start, whole)
    with pytest.raises(RecipeError, match="--resume"):
        run(plan)
    with pytest.raises(RecipeError, match="another recipe"):
        run(dataclasses.replace(plan, seed=1), resume=True)


def test_a_missing_source_is_said_before_the_first_step(start, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    plan = two_stages(start, tmp_path / "run")
    broken = dataclasses.replace(plan.stages[1], mixture={"easy-vqa": 1.0})
    with pytest.raises(RecipeError, match="FOVEATE_DATA"):
        run(dataclasses.replace(plan, stages=(plan.stages[0], broken)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_gradient_checkpointing_changes_memory_and_not_the_result(start, tmp_path) -> None:
    plan = two_stages(start, tmp_path / "a", model=str(start / "model"))
    plain = stage(steps=2, mixture={"world/scene": 1.0})
    results = []
    for name, on in (("a", False), ("b", True)):
        one = dataclasses.replace(plain, gradient_checkpointing=on)
        results.append(run(dataclasses.replace(plan, stages=(one,), output=str(tmp_path / name))).loss)
    assert results[0] == pytest.approx(results[1], abs=1e-5)


@pytest.mark.parametrize("attention", ["lean", "eager", "sdpa"])
def test_attention_forms_agree(start, tmp_path, attention: str) -> None:
    torch.manual_seed(0)
    model = load(start / "model").model
    model.config.text_config.attention_dropout = 0.0
    from foveate.train.attention import use_attention
    from foveate.train.step import run_model
    from train_tiny import batch_of, noise_sample

    batch = batch_of(model, [noise_sample(1), noise_sample(2)])
    use_attention(model, attention)
    hidden = run_model(model, batch, train_tower=False).hidden
    use_attention(model, "eager")
    torch.testing.assert_close(hidden, run_model(model, batch, train_tower=False).hidden, atol=2e-5, rtol=1e-4)


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(start, tmp_path) -> None:
    one = stage(steps=1, mixture={"world/scene": 1.0})
    values = {}
    for precision in ("float32", "bfloat16"):
        plan = recipe(one, model=str(start / "model"), output=str(tmp_path / precision), precision=precision, threads=1)
        trainer = Trainer(plan, quiet=True)
        values[precision] = trainer.run().loss
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert values["bfloat16"] != values["float32"]
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.05)


def test_allocator_setting_reports_whether_it_worked() -> None:
    assert memory.keep_freed_memory() in (True, False)


def test_run_json_tells_every_start(start, tmp_path) -> None:
    rows = (start / "data.jsonl").read_text()
    data = start / "some_bad.jsonl"
    data.write_text(rows + '{"image": "gone.png", "question": "q?", "answer": "a"}\n')
    plan = recipe(
        stage(steps=4, batch_size=3, mixture={str(data): 1.0}),
        model=str(start / "model"),
        output=str(tmp_path / "run"),
        threads=1,
    )
    run(plan, stop_after=1)
    run(plan, resume=True)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    first, second = told["starts"]
    assert told["steps"] == 4 and (first["from_step"], first["step"]) == (0, 1)
    assert (second["from_step"], second["step"]) == (1, 4) and second["seconds"] > 0
    assert {"torch", "foveate", "python"} <= set(second["versions"]) and "cpu" in second["device"]
    assert second["skipped"][str(data)] >= 2 and "gone.png: no such file" in second["reasons"][0]
