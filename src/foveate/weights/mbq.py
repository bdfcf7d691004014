"""`mbq`: AWQ's search with a loss that weighs vision tokens against answers by how much the model's loss feels them.

Source: MBQ, arXiv 2412.19509, read in thu-nics/MBQ @ a4d460d. Departures: gradients are taken block by block, so that
one block's activations exist at a time; samples are those of `calib` (the paper: image captions). `distort` is the
code's: the target is what the dense model gives, the trial gets what earlier blocks have become. `sequential` feeds
both with the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from foveate.errors import RecipeError, UnsupportedError
from foveate.weights.awq import ScaleSearch
from foveate.weights.gradients import gradients
from foveate.weights.grids import absmax_round, awq_grid, quantize_groups
from foveate.weights.linear import QuantizedLinear, empty_quantized
from foveate.weights.samples import ANSWER, VISION
from foveate.weights.scaling import Found, fake, output_loss, search
from foveate.weights.structure import Group, module_of, scale_

if TYPE_CHECKING:
    from foveate.vlm import VLM
    from foveate.weights.calibrate import Block, Stream
    from foveate.weights.recording import Call

ATTENTION_OUTPUTS = ("o_proj", "out_proj", "wo")
MLP_OUTPUTS = ("down_proj", "fc2", "w2")


def balanced_loss(
    targets: Sequence[Tensor], outputs: Sequence[Tensor], modality: Sequence[Tensor], rho: float | None, kind: str
) -> float:
    """The reconstruction loss of MBQ over all samples.

    targets, outputs: [..., T, D]; modality: [T] or [B, T] per sample. rho: weight of vision tokens, None for a plain
    mean over all tokens. kind "mae": (sum over answers of |d| + rho * sum over vision) / (their elements together);
    "mse": mean over answers of d^2 + rho * mean over vision. Other tokens count in neither.
    """
    sums, counts = {ANSWER: 0.0, VISION: 0.0}, {ANSWER: 0, VISION: 0}
    total, elements = 0.0, 0
    for target, output, what in zip(targets, outputs, modality):
        error = target.float() - output.float()
        error = error.abs() if kind == "mae" else error.square()
        total, elements = total + float(error.double().sum()), elements + error.numel()
        rows = error.flatten(0, -2).double().sum(dim=-1)  # [B * T]
        flat = what.to(rows.device).expand(error.shape[:-1]).flatten()
        for token in sums:
            sums[token] += float(rows[flat == token].sum())
            counts[token] += int((flat == token).sum()) * error.shape[-1]
    if rho is None or not counts[ANSWER] + counts[VISION]:
        return total / elements
    if kind == "mae":
        return (sums[ANSWER] + rho * sums[VISION]) / (counts[ANSWER] + counts[VISION])
    return sums[ANSWER] / max(1, counts[ANSWER]) + rho * sums[VISION] / max(1, counts[VISION])


def floored(ratios: Sequence[float]) -> list[float]:
    """Each ratio, but not below the median of all."""
    middle = median(ratios)
    return [max(ratio, middle) for ratio in ratios]


@dataclass(frozen=True)
class MBQ(ScaleSearch):
    """Weights in `bits` bits per `group` inputs, or with act_bits=8 weights per output and inputs per token.

    loss: what is summed; reweight=false: all tokens alike. rho: a fixed weight of vision tokens instead of the measured
    ratio of gradients. distort: measure what earlier, rounded blocks hand over against the output of the dense model.
    """

    bits: Literal[2, 3, 4, 8] = 3
    act_bits: int = 0
    loss: Literal["mae", "mse"] = "mae"
    reweight: bool = True
    rho: float | None = None
    distort: bool = False

    name: ClassVar[str] = "mbq"
    summary: ClassVar[str] = "AWQ balanced between vision and text by gradients, W3 or W4A8; size only, not speed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act_bits not in (0, 8):
            raise RecipeError(f"mbq: act_bits is {self.act_bits}; it must be 0 (inputs as they are) or 8")
        if self.rho is not None and self.rho < 0:
            raise RecipeError(f"mbq: rho is {self.rho}; it must be 0 or more")

    @property
    def _form(self) -> tuple[int, int, bool, int | None]:
        """bits, group, symmetric, act_bits of the layers."""
        return (self.bits, 0, True, self.act_bits) if self.act_bits else (self.bits, self.group, self.symmetric, None)

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        if "vision_tower" not in vlm.adapter.parts():
            raise UnsupportedError("mbq balances vision against text, and this model sees nothing; use awq")
        if self.parts != ("llm",):
            raise UnsupportedError("mbq works on the language model, where both kinds of tokens meet; give parts=[llm]")

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        if not self.act_bits:
            super().check_layer(name, linear)

    def empty(self, linear: nn.Linear) -> nn.Module:
        return empty_quantized(linear, *self._form)

    def survey(self, stream: Stream) -> Any:
        """[attention, mlp] of each block: how much of the loss's gradient vision tokens get against answers."""
        if not self.reweight or self.rho is not None:
            return None
        found = sensitivity(stream)
        return [list(pair) for pair in zip(floored([a for a, _ in found]), floored([m for _, m in found]))]

    def search_group(self, block: Block, group: Group) -> Found:
        module = {"it": module_of(block, group.inspect)}
        records = block.record(module)["it"]
        targets = [output for _, _, output in block.record(module, dense=True)["it"]] if self.distort else None
        modality = [call.modality for call in block.calls]
        mean = block.statistics[group.layers[0]].absmean  # type: ignore[union-attr]
        rho = self._rho(block, group)

        def rounded(weight: Tensor) -> Tensor:
            return absmax_round(weight, self.bits) if self.act_bits else fake(weight, *self._form[:3])

        def measure(targets: list[Tensor], outputs: list[Tensor]) -> float:
            return balanced_loss(targets, outputs, modality, rho, self.loss)  # type: ignore[arg-type]

        act = (lambda x: absmax_round(x, self.act_bits)) if self.act_bits else None
        return search(mean, output_loss(block, group, records, rounded, measure, act, targets))

    def _rho(self, block: Block, group: Group) -> float | None:
        if not self.reweight:
            return None
        if self.rho is not None:
            return self.rho
        attention, mlp = block.survey_of(self)[block.index]
        in_mlp = any(name.rpartition(".")[2] in (*MLP_OUTPUTS, "gate_proj", "up_proj", "fc1") for name in group.layers)
        return mlp if in_mlp else attention

    def compress_(self, block: Block) -> None:
        if any(found is not None for found in block.statistics.values()):
            for group, found in self.find(block).items():
                scale_(block, group, found.scale)
        bits, group_size, symmetric, act_bits = self._form
        for name, linear in block.linears(self).items():
            made = quantize_groups(linear.weight.detach(), bits, group_size, symmetric, awq_grid, torch.float16)
            block.replace(name, QuantizedLinear.of(linear, made.codes, made.scale, made.zero, bits, act_bits))


def sensitivity(stream: Stream) -> list[tuple[float, float]]:
    """For each block the ratio of mean |dL/dy| of vision tokens to answers, at attention's and the MLP's output; L is
    the language model's loss on the answers."""
    sums = torch.zeros(len(stream.calls[0].arguments), 2, 2, dtype=torch.float64)  # [block, place, vision or answer]
    for found in gradients(stream, lambda name, _: _place(name) is not None, use=_has_both):
        for name, gradient in found.outputs.items():
            if gradient is not None:
                sums[found.index, _place(name)] += modality_means(gradient, found.call.modality)
    if not bool(sums.any()):
        raise UnsupportedError("mbq: no calibration sample has both vision tokens and an answer; give calib= such data")
    ratios = sums[..., 0] / sums[..., 1].clamp(min=1e-30)
    return [(float(attention), float(mlp)) for attention, mlp in ratios]


def _place(name: str) -> int | None:
    """0 for the projection that ends attention, 1 for the one that ends the MLP."""
    leaf = name.rpartition(".")[2]
    return 0 if leaf in ATTENTION_OUTPUTS else 1 if leaf in MLP_OUTPUTS else None


def _has_both(call: Call) -> bool:
    return bool((call.modality == VISION).any()) and bool((call.modality == ANSWER).any())


def modality_means(gradient: Tensor, modality: Tensor) -> Tensor:
    """[2] mean |gradient| over vision tokens, and over answer tokens. gradient: [..., T, D]."""
    rows = gradient.detach().abs().double().mean(dim=-1).flatten()
    flat = modality.to(rows.device).expand(gradient.shape[:-1]).flatten()
    return torch.stack([rows[flat == VISION].mean(), rows[flat == ANSWER].mean()]).cpu()
