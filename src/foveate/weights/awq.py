"""`awq`: inputs that are large get weights that are rounded more finely, by trading scale with the layer before.

Source: AWQ, arXiv 2306.00978, read in mit-han-lab/llm-awq @ d6e797a. Departures: groups of layers are found by running
the block (`foveate.weights.structure`), so any family works; codes are those of the float16 scales that are stored;
one group per row and symmetric grids work (the code stops).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from foveate.errors import RecipeError
from foveate.weights.base import CalibratedMethod, with_weight
from foveate.weights.grids import awq_grid, quantize_groups
from foveate.weights.linear import QuantizedLinear, check_group, empty_quantized
from foveate.weights.scaling import Found, clip, fake, mean_square, output_loss, search, search_clip
from foveate.weights.structure import Group, find_groups, module_of, scale_

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block

NEVER_CLIPPED = ("q_", "k_", "query", "key", "Wqkv", "qkv")
"""Parts of names of layers that are not clipped: attention logits are too sensitive."""
_CLIP_TOKENS = 4096


@dataclass(frozen=True)
class ScaleSearch(CalibratedMethod):
    """What AWQ and MBQ share: bits, group, and a block whose layers trade scale before they are rounded."""

    bits: Literal[2, 3, 4, 8] = 4
    group: int = 32
    symmetric: bool = False
    sequential: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("mean",)
    shown: ClassVar[tuple[str, ...]] = ("bits", "group")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 0:
            raise RecipeError(f"{self.name}: group is {self.group}; give a number of inputs, or 0 for one per output")

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        check_group(self.name, name, linear, self.group)

    def empty(self, linear: nn.Linear) -> nn.Module:
        return empty_quantized(linear, self.bits, self.group, self.symmetric)

    @abstractmethod
    def search_group(self, block: Block, group: Group) -> Found:
        """The best scale of one group, on the block as it came."""

    def find(self, block: Block) -> dict[Group, Found]:
        """The scales of all groups; every one is searched on the original block."""
        found = {}
        for group in find_groups(block):
            if block.statistics.get(group.layers[0]) is not None:
                found[group] = self.search_group(block, group)
        return found

    def quantize_(self, block: Block) -> None:
        """Round all layers, as they are now."""
        for name, linear in block.linears(self).items():
            made = quantize_groups(
                linear.weight.detach(), self.bits, self.group, self.symmetric, awq_grid, torch.float16
            )
            block.replace(name, QuantizedLinear.of(linear, made.codes, made.scale, made.zero, self.bits))


@dataclass(frozen=True)
class AWQ(ScaleSearch):
    """Weights in `bits` bits with one scale per `group` inputs of each output (group 0: one scale per output).

    A scale is the mean |x| of each input to a power that is searched in 20 steps for the least error of the block's
    output; clip: then the largest weights of each group are cut where that helps.
    """

    clip: bool = True

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "activation-aware weights in 2, 3, 4 or 8 bits; size only, not speed"

    def search_group(self, block: Block, group: Group) -> Found:
        records = block.record({"it": module_of(block, group.inspect)})["it"]
        mean = block.statistics[group.layers[0]].absmean  # type: ignore[union-attr]

        def rounded(weight: Tensor) -> Tensor:
            return fake(weight, self.bits, self.group, self.symmetric)

        return search(mean, output_loss(block, group, records, rounded, mean_square))

    def compress_(self, block: Block) -> None:
        if any(found is not None for found in block.statistics.values()):
            scales = self.find(block)
            inputs = self._inputs(block) if self.clip else {}
            for group, found in scales.items():
                scale_(block, group, found.scale)
                for name in group.layers:
                    if name in inputs:
                        inputs[name] = inputs[name] / found.scale
            for name, x in inputs.items():
                linear = module_of(block, name)
                limit = search_clip(linear.weight.detach(), x, self.bits, self.group, self.symmetric)
                block.replace(name, with_weight(linear, clip(linear.weight.detach().float(), limit)))
        self.quantize_(block)

    def _inputs(self, block: Block) -> dict[str, Tensor]:
        """[T, I] what the layers that may be clipped meet: a bounded number of tokens, spread over the samples."""
        layers = {
            name: linear
            for name, linear in block.linears(self).items()
            if block.statistics.get(name) is not None
            and not any(mark in name.rpartition(".")[2] for mark in NEVER_CLIPPED)
        }
        seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        total = max(1, sum(block.statistics[name].tokens for name in layers) // max(1, len(layers)))  # type: ignore[union-attr]
        step = max(1, total // _CLIP_TOKENS)

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args: seen[name].append(args[0].detach().flatten(0, -2)[::step])

        handles = [linear.register_forward_pre_hook(keep(name)) for name, linear in layers.items()]
        try:
            for number in range(len(block.calls)):
                block.run(number)
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.cat(parts).float() for name, parts in seen.items() if parts}
