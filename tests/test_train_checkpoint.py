"""Checkpoints: whole or absent, refused with one line, and never lost."""

from __future__ import annotations

import dataclasses
import errno
import json

import pytest
import torch

from foveate.errors import CheckpointError, RecipeError
from foveate.train.checkpoint import TrainState, complete_checkpoints, load_checkpoint, save_checkpoint
from foveate.train.metrics import Metrics, read_metrics
from train_tiny import recipe, stage

RECIPE = recipe(stage(name="a"), stage(name="b"))
WHERE = {"stage": 0, "recipe_hash": RECIPE.hash(1)}


def state(step: int) -> TrainState:
    tensors = {"llm.weight": torch.full((3,), float(step))}
    return TrainState(tensors, {"llm.weight/step": torch.tensor(float(step))}, {"step": step, **WHERE})


def test_what_was_saved_comes_back(tmp_path) -> None:
    path = save_checkpoint(tmp_path, state(7), keep=2)
    assert path.name == "step-000007"
    loaded = load_checkpoint(path, RECIPE)
    assert loaded.state["step"] == 7 and torch.equal(loaded.model["llm.weight"], torch.full((3,), 7.0))
    assert loaded.optimizer["llm.weight/step"].shape == ()


def test_only_the_newest_are_kept(tmp_path) -> None:
    for step in (5, 10, 1000000):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000010", "step-1000000"]


@pytest.mark.parametrize("moment", ["model", "flush", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch, moment: str) -> None:
    save_checkpoint(tmp_path, state(1), keep=1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "model": "foveate.files.save_file",
        "flush": "foveate.train.checkpoint.flush_to_disk",
        "rename": "pathlib.Path.rename",
    }
    monkeypatch.setattr(target[moment], full)
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left on device \(\d+ MiB free\)") as caught:
        save_checkpoint(tmp_path, state(2), keep=1)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert load_checkpoint(tmp_path / "step-000001", RECIPE).state["step"] == 1


def test_what_a_kill_left_half_written_does_not_count_and_goes_away(tmp_path) -> None:
    save_checkpoint(tmp_path, state(1), keep=2)
    partial = tmp_path / ".partial-step-000002"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000001"]
    save_checkpoint(tmp_path, state(2), keep=2)
    assert not partial.exists()


def test_damaged_or_foreign_checkpoints_are_refused(tmp_path) -> None:
    path = save_checkpoint(tmp_path, state(1), keep=1)
    with pytest.raises(RecipeError, match="another recipe"):
        load_checkpoint(path, dataclasses.replace(RECIPE, seed=1))
    later = recipe(stage(name="a"), stage(name="b", steps=99))
    assert load_checkpoint(path, later).state["step"] == 1, "what lies ahead may be edited"
    assert load_checkpoint(path, dataclasses.replace(RECIPE, save_every=1)).state["step"] == 1
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="delete it"):
        load_checkpoint(path, RECIPE)
    (path / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path, RECIPE)


def test_metrics_of_a_resumed_run_read_as_if_it_never_stopped(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    metrics = Metrics(tmp_path, step=1)
    metrics.write(2, loss=2.5)
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2.5}]


def test_without_tensorboard_there_is_one_clear_message(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    metrics = Metrics(tmp_path)
    metrics.write(1, loss=1.0)
    metrics.close()
    assert len(caplog.messages) == 1 and "foveate[train]" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
