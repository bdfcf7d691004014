"""One optimizer step: forward and backward over its micro-batches, with the loss of the whole step as the mean."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.train.attention import additive_mask, compute_dtype
from foveate.train.config import LOSSES
from foveate.train.family import Family
from foveate.train.losses import Loss, StepOutput

if TYPE_CHECKING:
    from foveate.nvila import NvilaForConditionalGeneration
    from foveate.train.batch import MicroBatch

    Trainable = NvilaForConditionalGeneration | Family


@dataclass
class StageLosses:
    """The losses of a stage with their weights and training heads."""

    losses: dict[str, Loss]
    weights: dict[str, float]
    heads: nn.ModuleDict

    def head(self, name: str) -> nn.Module | None:
        """The training head of loss `name`, if it has one."""
        return self.heads[name] if name in self.heads else None  # noqa: SIM401 (a ModuleDict has no get)

    @property
    def needs_llm(self) -> bool:
        """Whether the language model has to run."""
        return any(loss.needs_llm for loss in self.losses.values())


def make_losses(weights: dict[str, float], model: Trainable, tokenizer: Any, heads: nn.ModuleDict) -> StageLosses:
    """`StageLosses` for a stage; adds to `heads` those that are not there yet, so that they live on between stages.

    Raises RecipeError for a loss that reads patches, which families of transformers do not hand out.
    """
    losses = {}
    for name in weights:
        kind = LOSSES.get(name)
        if isinstance(model, Family):
            model.check_loss(name, kind)
            loss: Loss = kind(0, 0, tokenizer)
        else:
            loss = kind(model.config.vision_config.hidden_size, model.spec.side, tokenizer)
        losses[name] = loss
        if name not in heads and (head := loss.make_head()) is not None:
            heads[name] = head
    return StageLosses(losses, weights, heads)


def run_model(model: Trainable, batch: MicroBatch, train_tower: bool) -> StepOutput:
    """Tower features (not of a `Family`), and where the batch has text the hidden states at its supervised positions.

    Only those positions reach the output head: with most of a row visual tokens or questions, logits everywhere would
    be the largest tensor of the step by far.
    """
    if isinstance(model, Family):
        hidden, head = model.run(batch)
        return StepOutput(None, hidden.flatten(0, 1).index_select(0, batch.target_index), head)
    with contextlib.nullcontext() if train_tower else torch.no_grad():
        features = model.tower(batch.pixels) if batch.pixels.shape[0] else None
    if batch.input_ids is None:
        return StepOutput(features)
    pictures, clips = [], []
    if batch.num_tiles:
        pictures = model.connect(features[: batch.num_tiles], batch.image_grids)
    if len(batch.video_frames):
        clips = model.connect_video(features[batch.num_tiles :], batch.video_frames)
    embeds = model.embed(batch.input_ids, pictures, clips)
    hidden = model.llm.model(
        inputs_embeds=embeds,
        attention_mask=additive_mask(batch.allowed, compute_dtype(embeds)),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    return StepOutput(features, hidden.flatten(0, 1).index_select(0, batch.target_index), model.llm.lm_head)


def accumulate_gradients(
    model: Trainable,
    losses: StageLosses,
    batches: Sequence[MicroBatch],
    precision: str,
    train_tower: bool = True,
) -> dict[str, float]:
    """Add the gradient of the step's mean loss to the parameters. Returns "loss" and the value of every loss and term.

    Each term is divided by its count over all of `batches`, so splitting a step into micro-batches changes nothing.
    """
    totals = {n: sum((loss.totals(b) for b in batches), torch.zeros(1)) for n, loss in losses.losses.items()}
    values = {name: torch.zeros_like(total) for name, total in totals.items()}
    for batch in batches:
        batch = batch.to(model.device)
        with autocast(precision, model.device.type):
            output = run_model(model, batch, train_tower)
            step_loss = torch.zeros((), device=model.device)
            for name, loss in losses.losses.items():
                sums = loss.sums(output, batch, losses.head(name))
                means = sums / totals[name].clamp(min=1e-9).to(sums)
                factors = means.new_tensor([f for _, f in loss.terms])
                step_loss = step_loss + losses.weights[name] * (means * factors).sum()
                values[name] = values[name] + means.detach().double().cpu()
        if step_loss.requires_grad:
            step_loss.backward()
    return _named_values(losses, values)


def autocast(precision: str, device_type: str = "cpu") -> contextlib.AbstractContextManager:
    """The autocast context of a recipe's precision; none in float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, torch.bfloat16)


def _named_values(losses: StageLosses, values: dict[str, Tensor]) -> dict[str, float]:
    out = {"loss": 0.0}
    for name, loss in losses.losses.items():
        terms = values[name].tolist()
        value = sum(v * factor for v, (_, factor) in zip(terms, loss.terms))
        out["loss"] += losses.weights[name] * value
        out[name] = value
        if len(terms) > 1:
            out |= {f"{name}/{term}": v for v, (term, _) in zip(terms, loss.terms)}
    return out
