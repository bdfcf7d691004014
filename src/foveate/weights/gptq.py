"""`gptq`: weights are rounded one column at a time, and the columns still to come make up for the error.

Source: GPTQ, arXiv 2210.17323, read in IST-DASLab/gptq @ 2d65066; the loop is `foveate.weights.solve`. Departures:
grids are those of the float16 scales that are stored; columns in order of activation need grids fixed beforehand (or
one grid a row), so that no index is stored; `keep_zeros` leaves what pruning dropped at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from foveate.errors import RecipeError
from foveate.weights.base import CalibratedMethod
from foveate.weights.linear import QuantizedLinear, check_group, empty_quantized
from foveate.weights.solve import gptq

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block

TRUE_SEQUENTIAL = (("q_proj", "k_proj", "v_proj", "qkv"), ("o_proj", "out_proj"), ("gate_proj", "up_proj", "fc1"))


@dataclass(frozen=True)
class GPTQ(CalibratedMethod):
    """Weights in `bits` bits with one scale per `group` inputs of each output (group 0: one scale per output).

    symmetric: no zero point (what `--format compressed-tensors` writes). act_order: columns by falling activation, with
    grids fixed beforehand. static_groups: grids fixed beforehand in any order. mse: search the range of each grid.
    true_sequential: inside a block too, later layers see what the earlier ones have become. damp, block: see sparsegpt.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group: int = 32
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False
    true_sequential: bool = False
    keep_zeros: bool = True
    damp: float = 0.01
    block: int = 128

    name: ClassVar[str] = "gptq"
    kinds: ClassVar[tuple[str, ...]] = ("hessian",)
    shown: ClassVar[tuple[str, ...]] = ("bits", "group")
    summary: ClassVar[str] = "weights rounded to 2, 3, 4 or 8 bits, each error made up for; size only, not speed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 0 or self.block < 1 or self.damp < 0:
            raise RecipeError(
                f"gptq: group is {self.group}, block {self.block}, damp {self.damp}; need group >= 0, block >= 1, "
                "damp >= 0"
            )

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        check_group(self.name, name, linear, self.group)

    def empty(self, linear: nn.Linear) -> nn.Module:
        return empty_quantized(linear, self.bits, self.group, self.symmetric)

    def compress_(self, block: Block) -> None:
        layers = block.linears(self)
        for names in self._turns(list(layers)):
            if self.true_sequential and block.calls and names is not layers:
                block.refresh(self.kinds, names)
            for name in names:
                block.replace(name, self._solve(block, name, layers[name]))

    def _turns(self, names: list[str]) -> list[list[str]]:
        """Layers that are solved from one set of statistics, in the order of the data."""
        if not self.true_sequential:
            return [names]
        turns = [[n for n in names if n.rpartition(".")[2] in leaves] for leaves in TRUE_SEQUENTIAL]
        turns.append([n for n in names if not any(n in turn for turn in turns)])
        return [turn for turn in turns if turn]

    def _solve(self, block: Block, name: str, linear: nn.Linear) -> nn.Module:
        found = block.statistics.get(name)
        weight = linear.weight.detach()
        hessian = torch.eye(weight.shape[1], device=weight.device) if found is None else found.hessian
        solved = gptq(
            weight,
            hessian,
            self.bits,
            self.group,
            symmetric=self.symmetric,
            act_order=self.act_order,
            static_groups=self.static_groups or self.act_order,
            mse=self.mse,
            damp=self.damp,
            block=self.block,
            keep_zeros=self.keep_zeros,
            dtype=torch.float16,
            name=block.full_name(name),
        ).quantized
        assert solved is not None
        return QuantizedLinear.of(linear, solved.codes, solved.scale, solved.zero, self.bits)
