"""Optimizers of a stage: torch's AdamW, or torch's Muon for hidden matrices with AdamW for everything else.

Muon (momentum .95, 5 Newton-Schulz steps, update scaled by max(1, rows / columns) ** .5) takes the matrices inside the
tower's encoder layers, the projector and the decoder layers. Patch convolution, embeddings, positions, output head,
norms, biases and the training heads go to AdamW.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from foveate.errors import RecipeError
from foveate.train.config import PARTS, Stage

HIDDEN = re.compile(r"(^vision_tower\..*(layers?|blocks)\.\d+\.)|(^mm_projector\.)|(^llm\..*layers\.\d+\.)")
"""Names of parameters inside layers, where a matrix is a hidden one."""


def part_of(name: str) -> str:
    """The part ("vision_tower", "mm_projector", "llm", "heads") a parameter belongs to, by its first name."""
    part = name.split(".", 1)[0]
    if part not in PARTS:
        raise RecipeError(f"parameter {name!r} belongs to none of the parts {', '.join(PARTS)}")
    return part


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains this parameter: a matrix inside a layer, not a table of positions."""
    return parameter.ndim == 2 and bool(HIDDEN.search(name)) and "position" not in name and "embed" not in name


def select_trainable(named: Iterable[tuple[str, nn.Parameter]], stage: Stage) -> list[tuple[str, nn.Parameter]]:
    """Freeze what `stage` does not train; returns the others, by name. Raises RecipeError if nothing is left."""
    parts = set(stage.trained_parts())
    chosen = []
    for name, parameter in named:
        parameter.requires_grad_(part_of(name) in parts)
        if parameter.requires_grad:
            chosen.append((name, parameter))
    if not chosen:
        raise RecipeError(f"stage {stage.name!r} trains nothing: train is {stage.train}, parts are {', '.join(PARTS)}")
    return chosen


class StageOptimizer:
    """The one or two torch optimizers of a stage, stepped together, with the schedule applied.

    Names, not positions, identify state, so a checkpoint can be checked against the model it is loaded into.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], stage: Stage) -> None:
        self.stage = stage
        self._names: dict[nn.Parameter, str] = {}
        muon: dict[str, list[nn.Parameter]] = {}
        adamw: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, p in named:
            self._names[p] = name
            part = part_of(name)
            if stage.optimizer == "muon" and takes_muon(name, p):
                muon.setdefault(part, []).append(p)
            else:
                decays = p.ndim > 1 and "position" not in name and "embed" not in name
                adamw.setdefault((part, decays), []).append(p)
        self.optimizers: list[torch.optim.Optimizer] = []
        if muon:
            groups = [{"params": ps, "lr": stage.part_lr(part)} for part, ps in muon.items()]
            self.optimizers.append(
                torch.optim.Muon(
                    groups, weight_decay=stage.weight_decay, momentum=0.95, ns_steps=5, adjust_lr_fn="original"
                )
            )
        if adamw:
            groups = [
                {"params": ps, "lr": stage.part_adamw_lr(part), "weight_decay": stage.weight_decay if decays else 0.0}
                for (part, decays), ps in adamw.items()
            ]
            # One kernel for all tensors of a group: a small model has many tensors of a few hundred numbers.
            self.optimizers.append(torch.optim.AdamW(groups, betas=stage.betas, fused=True))
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def _groups(self) -> Iterator[dict]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return list(self._names)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, step: int) -> float:
        """Clip, set the rates for `step` (counted from 0 in the stage) and step. Returns the gradient norm."""
        parameters = [p for p in self._names if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.stage.clip_norm or math.inf, foreach=True)
        factor = lr_factor(self.stage, step)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor
        for optimizer in self.optimizers:
            optimizer.step()
        return float(norm)

    def rate(self) -> float:
        """The highest rate of the last step."""
        return max(group["lr"] for group in self._groups())

    def state_tensors(self) -> dict[str, Tensor]:
        """Flat state: "<parameter>/<key>" to tensor (a 0-d step counter included)."""
        out = {}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    out[f"{self._names[parameter]}/{key}"] = torch.as_tensor(value).detach().clone().contiguous()
        return out

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises KeyError on a parameter that this stage does not train."""
        by_name = {name: p for p, name in self._names.items()}
        owner = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, value in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            parameter = by_name[parameter_name]
            owner[parameter].state[parameter][key] = value.clone()


def lr_factor(stage: Stage, step: int) -> float:
    """Factor of the peak rate at `step` (from 0): linear warm-up, then the schedule over the last steps."""
    warm = min(1.0, (step + 1) / stage.warmup_steps) if stage.warmup_steps else 1.0
    if stage.schedule == "constant":
        return warm
    length = max(1.0, stage.steps * stage.decay_fraction)
    progress = min(1.0, max(0.0, (step - (stage.steps - length)) / length))
    fall = 1.0 - progress if stage.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return warm * (stage.final_lr_ratio + (1.0 - stage.final_lr_ratio) * fall)
