"""How samples call the blocks of a part, recorded with blocks that hand their input through.

So no family's code (masks, rotary tables, windows) is repeated, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.data.execute import execute
from foveate.runtime import Level, encode, select
from foveate.weights.samples import Example, sees

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter


@dataclass
class Call:
    """How one sample goes through every block of a part. example: the sample's number; modality: [T] (see
    `foveate.weights.samples`), None in the tower; arguments: (args, kwargs) of each block, hidden states left out;
    added: block index -> what the model adds to the hidden states in front of that block."""

    example: int
    modality: Tensor | None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    added: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def record_calls(
    adapter: Adapter, part: str, blocks: Sequence[nn.Module], examples: Sequence[Example], chained: bool
) -> tuple[list[Call], list[Tensor]]:
    """How each sample calls the blocks, and the inputs of the first one; no chained block computes anything."""
    calls: list[Call] = []
    first: list[Tensor] = []
    for example in examples:
        modality = example.modality if part == "llm" else None
        with _recording(blocks, chained) as (found, inputs):
            feed(adapter, example, whole=part == "llm")
        for call in found:
            calls.append(Call(example.number, modality, call.arguments, call.added))
        first += inputs
    return calls, first


def feed(adapter: Adapter, example: Example, whole: bool = True) -> None:
    """Run the model on one sample: its tower and projector, and the language model if `whole`."""
    if not whole and not (sees(adapter) and example.plan.media):
        return
    encoded = encode(adapter, [example.plan], [execute(example.plan)], [()])
    if whole:
        Level(adapter, [select(adapter, example.plan, encoded[0], ())], adapter.new_cache()).prefill()


@contextmanager
def _recording(blocks: Sequence[nn.Module], chained: bool) -> Iterator[tuple[list[Call], list[Tensor]]]:
    found: list[Call] = []
    inputs: list[Tensor] = []
    previous: list[Tensor | None] = [None]

    def stand_in(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
            if index == 0:
                found.append(Call(0, None))
                inputs.append(hidden)
            elif hidden is not previous[0]:
                found[-1].added[index] = hidden - previous[0]
            found[-1].arguments.append((tuple(rest), _clean(kwargs)))
            previous[0] = hidden
            return hidden

        return forward

    def listen(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(Call(0, None, [(args, _clean(kwargs))]))

    handles = []
    if chained:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
    else:
        handles = [block.register_forward_pre_hook(listen, with_kwargs=True) for block in blocks]
    try:
        yield found, inputs
    finally:
        for block in blocks if chained else ():
            del block.forward
        for handle in handles:
            handle.remove()


def _clean(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments without a cache: a block sees each sample whole, once and again."""
    dropped = {"past_key_values": None, "past_key_value": None, "use_cache": False}
    return {key: dropped.get(key, value) for key, value in kwargs.items()}
