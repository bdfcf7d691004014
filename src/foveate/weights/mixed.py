"""`mixed`: round to nearest with its own number of bits in each decoder layer.

The bits are found by `foveate optimize --strategy milp`: a mixed-integer programme over measured scores of single
layers, the idea of Puzzle (arXiv 2411.19146) with storage formats as the blocks' alternatives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from foveate.errors import RecipeError
from foveate.weights.base import WeightMethod
from foveate.weights.rtn import RTN

if TYPE_CHECKING:
    from foveate.vlm import VLM
    from foveate.weights.calibrate import Block

CHOICES = (0, 2, 3, 4, 8)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Mixed(WeightMethod):
    """bits: one number for each decoder layer, of 2, 3, 4, 8, or 0 for a layer that stays as it is. group: as `rtn`."""

    bits: tuple[int, ...] = ()
    group: int = 32

    name: ClassVar[str] = "mixed"
    status: ClassVar[str] = "experimental"
    searched: ClassVar[bool] = False  # its space is a number for each layer: the strategy milp fills it
    summary: ClassVar[str] = "weights rounded to a number of bits of its own in each decoder layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts != ("llm",):
            raise RecipeError("mixed: parts must be [llm], whose layers the bits are for")
        wrong = next((bits for bits in self.bits if bits not in CHOICES), None)
        if wrong is not None or not self.bits:
            raise RecipeError(f"mixed: bits holds {wrong}; give one of {', '.join(map(str, CHOICES))} for each layer")

    def at(self, layer: int) -> RTN | None:
        """The rounding of one decoder layer, None where it stays dense."""
        return RTN(bits=self.bits[layer], group=self.group) if self.bits[layer] else None  # type: ignore[arg-type]

    def check(self, vlm: VLM) -> None:
        depth = vlm.adapter.shape.layers
        if len(self.bits) != depth:
            raise RecipeError(f"mixed: bits has {len(self.bits)} numbers, this model has {depth} decoder layers")
        super().check(vlm)

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        RTN(bits=8, group=self.group).check_layer(name, linear)

    def convert(self, linear: nn.Linear) -> nn.Module:
        """A layer outside the numbered ones stays."""
        return linear

    def empty(self, linear: nn.Linear) -> nn.Module:
        return linear

    def compress_(self, block: Block) -> None:
        rounding = self._of(block.full_name(""))
        if rounding:
            for name, linear in block.linears(self).items():
                block.replace(name, rounding.convert(linear))

    def prepare_(self, parts: dict[str, nn.Module]) -> None:
        for name, owner, attribute in self.targets(parts):
            if rounding := self._of(name):
                setattr(owner, attribute, rounding.empty(getattr(owner, attribute)))

    def _of(self, name: str) -> RTN | None:
        layer = decoder_layer(name)
        return self.at(layer) if layer is not None and layer < len(self.bits) else None


def decoder_layer(name: str) -> int | None:
    """The number of the decoder layer in a module's full name, None outside the layers."""
    found = _LAYER.search(f"{name}.")
    return int(found[1]) if found else None
