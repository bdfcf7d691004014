"""The training loop: stages, checkpoints, metrics, exact resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import CheckpointError, RecipeError
from foveate.progress import Progress
from foveate.train.attention import use_attention
from foveate.train.batch import BatchMaker, StepData, prefetch
from foveate.train.checkpoint import (
    PARTIAL,
    TrainState,
    complete_checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_text,
)
from foveate.train.config import Stage, TrainRecipe
from foveate.train.family import Family, core
from foveate.train.memory import keep_freed_memory
from foveate.train.metrics import Metrics
from foveate.train.model import load_trainable, save_released
from foveate.train.optimizer import StageOptimizer, select_trainable
from foveate.train.record import FILE, RunRecord
from foveate.train.sources import Mixture, Source, open_mixture
from foveate.train.step import StageLosses, accumulate_gradients, make_losses

_log = logging.getLogger("foveate")
SHOWN_REASONS = 3
MODEL_FOLDER = "model"
FILES = {"recipe.yaml", "tokenizer", "metrics.jsonl", "tensorboard", FILE, MODEL_FOLDER}
"""What a run may have left before its first checkpoint."""
RANDOM_STATE = "random/torch"


@dataclass
class TrainResult:
    """What a run did. model: folder of the released model, or None when the run was stopped before its end."""

    output: Path
    model: Path | None
    step: int
    total_steps: int
    seconds: float
    loss: float | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "output": str(self.output),
            "model": str(self.model) if self.model else None,
            "step": self.step,
            "total_steps": self.total_steps,
            "seconds": round(self.seconds, 3),
            "loss": self.loss,
            "skipped": self.skipped,
        }


class Trainer:
    """Runs a recipe. All state that matters is in the model, the stage's optimizer and `self.step`.

    A step's batches are a function of the recipe, the stage, the step and the counters of the sources; the counters
    stored with a checkpoint are those after its last finished step, however far the prefetcher has run ahead.
    """

    def __init__(self, recipe: TrainRecipe, data_dir: str | Path | None = None, quiet: bool = False) -> None:
        self.recipe, self.data_dir, self.quiet = recipe, data_dir, quiet
        self.output = Path(recipe.output or f"runs/{recipe.name}")
        self.step = 0
        self.heads = nn.ModuleDict({"heads": nn.ModuleDict()})
        self._sources: dict[str, Source | None] = {}
        self._skipped: dict[str, int] = {}
        self._reasons: list[str] = []
        self._checkpointing = False

    def run(self, resume: bool = False, stop_after: int | None = None) -> TrainResult:
        """Train to the end, or until `stop_after` more steps are done (a checkpoint is written then).

        Raises RecipeError when the folder holds a run and `resume` is False, or one of another recipe.
        """
        start = time.monotonic()
        found = complete_checkpoints(self.output)
        if found and not resume:
            raise RecipeError(
                f"{self.output} holds a run at {found[-1].name}; add --resume, or choose another --output"
            )
        state = load_checkpoint(found[-1], self.recipe) if found else None
        if state is None:
            check_folder(self.output)
            if resume:
                _log.warning(f"{self.output} holds no checkpoint; the run begins at its start")
        for number in range(len(self.recipe.stages)):
            self._open(number)  # a source that is missing is reported now, not hours later
        self._prepare_process()
        model, self.tokenizer = load_trainable(self.recipe, self.output, self.data_dir)
        self.model = model.to(_device(self.recipe.device))
        use_attention(core(self.model), self.recipe.attention)
        write_text(self.output / "recipe.yaml", self.recipe.to_yaml())
        position = self._restore_model(state) if state is not None else None

        metrics = Metrics(self.output, self.step)
        record = RunRecord(self.output, self.recipe, self.step)
        total = self.recipe.total_steps
        last = total if stop_after is None else min(self.step + stop_after, total)
        loss, first_step = None, 0
        try:
            for number, stage in enumerate(self.recipe.stages):
                if first_step + stage.steps > self.step and last > self.step:
                    loss = self._run_stage(number, first_step, last, position, metrics)
                first_step += stage.steps
        finally:
            metrics.close()
            seconds = round(time.monotonic() - start, 3)
            record.update(step=self.step, seconds=seconds, loss=loss, skipped=self._skipped, reasons=self._reasons)
        model_folder = None
        if self.step == total:
            model_folder = self.output / MODEL_FOLDER
            save_released(self.model, self.tokenizer, self.recipe, model_folder, self.output)
        seconds = time.monotonic() - start
        return TrainResult(self.output, model_folder, self.step, total, seconds, loss, self._skipped)

    def _run_stage(
        self, number: int, first_step: int, last: int, position: TrainState | None, metrics: Metrics
    ) -> float | None:
        """Run stage `number`, which begins at `first_step`, up to step `last` of the run. Returns the last loss."""
        stage = self.recipe.stages[number]
        end = min(first_step + stage.steps, last)
        losses = self._losses(number)
        optimizer = StageOptimizer(select_trainable(self._named_parameters(), stage), stage)
        mixture = self._open(number)
        if position is not None and position.state["stage"] == number:
            optimizer.load_state_tensors(position.optimizer)
            mixture.restore(position.state["sources"])
        self._set_checkpointing(stage.gradient_checkpointing)
        maker = BatchMaker(
            stage,
            self.model.spec,
            self.tokenizer,
            mixture,
            wants_text=losses.needs_llm,
            wants_dense="dense" in losses.losses,
            **({"adapter": self.model.adapter, "packs": self.model.packs} if isinstance(self.model, Family) else {}),
        )
        train_tower = "vision_tower" in stage.trained_parts()
        bar = Progress(stage.name, stage.steps, done=self.step - first_step, quiet=self.quiet)
        meter = _Meter()
        values: dict[str, float] = {}
        with prefetch(maker.make, range(self.step - first_step, end - first_step)) as batches:
            for data in meter.waits(batches):
                optimizer.zero_grad()
                values = accumulate_gradients(self.model, losses, data.batches, self.recipe.precision, train_tower)
                norm = optimizer.step(data.step)
                self.step = first_step + data.step + 1
                self._check_finite(values, stage)
                meter.add(data)
                if self.step % self.recipe.log_every == 0 or self.step == end:
                    row = {**values, "grad_norm": norm, "lr": optimizer.rate(), **meter.rates()}
                    metrics.write(self.step, stage=stage.name, **row)
                if self.step % self.recipe.save_every == 0 or self.step == end:
                    self._save(number, optimizer, data)
                shown = {k: f"{v:.3f}" for k, v in values.items() if "/" not in k and (k != "loss" or len(values) > 2)}
                bar.update(data.step + 1, **shown, **meter.short())
        bar.close()
        for name, count in mixture.skipped.items():
            self._skipped[name] = self._skipped.get(name, 0) + count
        if mixture.skipped:
            total = sum(mixture.skipped.values())
            shown = "; ".join(mixture.reasons[:SHOWN_REASONS]) + ("; …" if len(mixture.reasons) > SHOWN_REASONS else "")
            _log.warning(f"stage {stage.name}: {total} samples skipped: {shown}")
        self._reasons += mixture.reasons
        return values.get("loss")

    def _open(self, number: int) -> Mixture:
        return open_mixture(
            self.recipe.stages[number].mixture,
            seed=self.recipe.seed,
            stage=number,
            data_dir=self.data_dir,
            world=self.recipe.world,
            cache=self._sources,
        )

    def _losses(self, number: int) -> StageLosses:
        losses = make_losses(self.recipe.stages[number].losses, self.model, self.tokenizer, self.heads["heads"])
        self.heads.to(self.model.device)
        return losses

    def _prepare_process(self) -> None:
        keep_freed_memory()
        if self.recipe.threads:
            torch.set_num_threads(self.recipe.threads)
        torch.manual_seed(self.recipe.seed)

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.model.named_parameters(), *self.heads.named_parameters()]

    def _set_checkpointing(self, on: bool) -> None:
        self.model.train()
        model = core(self.model)
        if on:
            # transformers 5.20 or so renamed it
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        elif self._checkpointing:
            disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
            disable()
        self._checkpointing = on

    def _state_tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name; tied tensors once, under their first name."""
        out, seen = {}, set()
        for name, tensor in [*self.model.state_dict().items(), *self.heads.state_dict().items()]:
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                out[name] = tensor.detach()
        return out

    def _save(self, stage: int, optimizer: StageOptimizer, data: StepData) -> None:
        state = {
            "step": self.step,
            "stage": stage,
            "recipe_hash": self.recipe.hash(stage + 1),
            "sources": {"counters": data.counters, "skipped": data.skipped},
            "skipped": self._skipped,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        tensors = {name: t.cpu().contiguous() for name, t in self._state_tensors().items()}
        optimizer_state = {**optimizer.state_tensors(), RANDOM_STATE: torch.get_rng_state()}
        save_checkpoint(self.output, TrainState(tensors, optimizer_state, state), self.recipe.keep_checkpoints)

    def _restore_model(self, saved: TrainState) -> TrainState:
        """Weights, heads, random state and counters of a checkpoint; returns it without them, for its stage."""
        self.step = int(saved.state["step"])
        self._skipped = dict(saved.state["skipped"])
        if saved.state["threads"] != torch.get_num_threads():
            _log.warning(
                f"the run was at {saved.state['threads']} threads and goes on with {torch.get_num_threads()}: "
                "it will not repeat bit for bit"
            )
        for number in range(saved.state["stage"] + 1):
            self._losses(number)  # makes the training heads, whose values are then replaced
        own = self._state_tensors()
        if own.keys() != saved.model.keys():
            wrong = sorted(own.keys() ^ saved.model.keys())[0]
            raise CheckpointError(f"the checkpoint and the model differ in {wrong!r}; was the model's folder changed?")
        for name, tensor in saved.model.items():
            own[name].copy_(tensor)
        torch.set_rng_state(saved.optimizer.pop(RANDOM_STATE))
        return saved

    def _check_finite(self, values: dict[str, float], stage: Stage) -> None:
        if values["loss"] != values["loss"]:
            raise RecipeError(
                f"loss is not a number at step {self.step} of stage {stage.name!r}; lower lr, or set clip_norm; "
                f"the last checkpoint in {self.output} is from before"
            )


def check_folder(folder: Path) -> None:
    """Raise RecipeError when `folder` cannot become that of a run: it is a file, or holds other things."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--output {folder} is a file; give the name of a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if name not in FILES and not name.startswith(PARTIAL)]
    if foreign:
        raise RecipeError(f"--output {folder} holds {foreign[0]!r}, which is not of a run; give a new folder")


class _Meter:
    """Throughput since the last line of metrics, and the share of the time spent waiting for data."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start, self._samples, self._tokens, self._steps, self._waited = time.monotonic(), 0, 0, 0, 0.0

    def waits(self, batches: Iterator[StepData]) -> Iterator[StepData]:
        """`batches`, timing how long each one was waited for."""
        while True:
            start = time.monotonic()
            data = next(batches, None)
            self._waited += time.monotonic() - start
            if data is None:
                return
            yield data

    def add(self, data: StepData) -> None:
        self._samples += data.num_samples
        self._tokens += data.num_tokens
        self._steps += 1

    def rates(self) -> dict[str, float]:
        """Rates since the last call."""
        spent = max(1e-9, time.monotonic() - self._start)
        out = {
            "samples_per_s": round(self._samples / spent, 2),
            "tokens_per_s": round(self._tokens / spent, 1),
            "step_ms": round(1000 * spent / max(1, self._steps), 1),
            "wait_ms": round(1000 * self._waited / max(1, self._steps), 1),
        }
        self._reset()
        return out

    def short(self) -> dict[str, str]:
        """For the progress line."""
        spent = max(1e-9, time.monotonic() - self._start)
        return {"samples/s": f"{self._samples / spent:.0f}", "tokens/s": f"{self._tokens / spent:.0f}"}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
