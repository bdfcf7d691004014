"""Gradients of the language model's loss, block by block: what `mbq`, `lq_lora` and `kvquant` weigh errors by.

The loss is that of the answers of the calibration samples, or of their text where that is all there is. Each block runs
twice per sample, once forward and once with gradients, and only its own activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.weights.recording import Call
from foveate.weights.samples import ANSWER

if TYPE_CHECKING:
    from foveate.weights.calibrate import Stream


@dataclass(frozen=True)
class Gradients:
    """Of one sample's loss in one block: with respect to the outputs of modules [..., T, D] and to weights [O, I], by
    the modules' names in the block; None where the loss does not depend on one. made: the outputs themselves."""

    call: Call
    index: int
    made: dict[str, Tensor]
    outputs: dict[str, Tensor | None]
    weights: dict[str, Tensor | None]


def nothing(name: str, module: nn.Module) -> bool:
    """Chooses no module."""
    return False


def gradients(
    stream: Stream,
    outputs: Callable[[str, nn.Module], bool] = nothing,
    weights: Callable[[str, nn.Module], bool] = nothing,
    use: Callable[[Call], bool] = lambda call: True,
) -> Iterator[Gradients]:
    """The gradients of every sample that `use` takes and that has an answer, its last block first.

    outputs, weights: whether a module (name in the block, module) is wanted.
    """
    blocks = len(stream.calls[0].arguments)
    for number, call in enumerate(stream.calls):
        modality = call.modality
        assert modality is not None
        if not bool((modality[1:] == ANSWER).any()) or not use(call):
            continue
        labels = torch.as_tensor(stream.example(call).plan.input_ids)
        inputs = [stream.hidden(number).detach()]
        with torch.no_grad():
            for index in range(blocks):
                inputs.append(stream.advance(number, index, inputs[-1]))
        with torch.enable_grad():
            last = inputs.pop().requires_grad_()
            gradient = torch.autograd.grad(answer_loss(stream.adapter.head(last), labels, modality), last)[0]
        for index in reversed(range(blocks)):
            _, owner, attribute = stream.places[index]
            block = getattr(owner, attribute)
            with torch.enable_grad(), _tapped(block, outputs, weights) as (made, held):
                start = inputs.pop().clone().requires_grad_()
                out = stream.advance(number, index, start)
                wanted = [start, *made.values(), *held.values()]
                gradient, *found = torch.autograd.grad(out, wanted, gradient, allow_unused=True)
            outs = {name: value.detach() for name, value in made.items()}
            yield Gradients(call, index, outs, dict(zip(made, found)), dict(zip(held, found[len(made) :])))


def answer_loss(logits: Tensor, ids: Tensor, modality: Tensor) -> Tensor:
    """Mean cross-entropy of the answer tokens, each predicted from the position before. logits: [1, T, V]; ids: [T]."""
    wanted = (modality == ANSWER).nonzero()[:, 0]
    wanted = wanted[wanted > 0].to(logits.device)
    return nn.functional.cross_entropy(logits[0, wanted - 1].float(), ids.to(logits.device)[wanted])


@contextmanager
def _tapped(
    block: nn.Module, outputs: Callable[[str, nn.Module], bool], weights: Callable[[str, nn.Module], bool]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Outputs as they are made, and weights, by name; weights require gradients until the end."""
    made: dict[str, Tensor] = {}
    modules = dict(block.named_modules())
    held: dict[str, Any] = {name: module.weight for name, module in modules.items() if weights(name, module)}
    before = {name: weight.requires_grad for name, weight in held.items()}

    def keep(name: str) -> Any:
        return lambda module, args, out: made.__setitem__(name, out)

    handles = [m.register_forward_hook(keep(name)) for name, m in modules.items() if outputs(name, m)]
    try:
        for weight in held.values():
            weight.requires_grad_()
        yield made, held
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in held.items():
            weight.requires_grad_(before[name])
