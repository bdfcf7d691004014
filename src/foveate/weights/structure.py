"""Which layers of a block can trade scale with what stands before them, found by looking at the block as it runs.

A group is a norm (or a linear layer) and the linear layers that read its output: dividing the one by s and multiplying
the inputs of the others by s changes nothing. Norms are found because their output is the very tensor that the linear
layers get; linear layers (values before the output projection, up before down) because the block's output stays the
same when they are scaled. Every group is tried with powers of two before it is believed, so no family's names are
needed, and a gate, a shared norm or a norm of another form is never scaled wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.weights.base import with_weight

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block


@dataclass(frozen=True)
class Group:
    """before: the name in the block of what is divided; layers: whose inputs are multiplied; inspect: whose output
    shows the effect ("" is the block); offset: the norm multiplies by 1 + weight."""

    before: str
    layers: tuple[str, ...]
    inspect: str
    offset: bool = False


def find_groups(block: Block) -> list[Group]:
    """The groups of a block, in the order in which data meets them; kept for blocks of the same form."""
    form = tuple((name, linear.in_features, linear.out_features) for name, linear in block.original.items())
    known = block.stream.groups
    if form not in known:
        known[form] = _search(block) if block.calls and block.module is not None else []
    return known[form]


def scale_(block: Block, group: Group, scale: Tensor) -> None:
    """Divide what stands before by `scale` [I] and multiply the layers' inputs by it.

    `block.original` and the statistics follow, so that a later method sees the dense layers in their new scale.
    """
    was = {name: module_of(block, name) for name in (group.before, *group.layers)}
    _trade(block, group, scale)
    for name, module in was.items():
        if name in block.original:
            before = block.original[name]
            made = module_of(block, name) if before is module else _scaled(before, scale, divide=name == group.before)
            block.original[name] = made
    for name in group.layers:
        if (found := block.statistics.get(name)) is not None:
            found.divide(scale)


def _trade(block: Block, group: Group, scale: Tensor) -> None:
    before = module_of(block, group.before)
    if isinstance(before, nn.Linear):
        block.replace(group.before, _scaled(before, scale, divide=True))
    else:
        for name, parameter in list(before.named_parameters(recurse=False)):
            add = 1.0 if group.offset and name == "weight" else 0.0
            value = (parameter.detach().float() + add) / scale - add
            setattr(before, name, nn.Parameter(value.to(parameter), requires_grad=False))
    for name in group.layers:
        block.replace(name, _scaled(module_of(block, name), scale))


def _scaled(linear: nn.Linear, scale: Tensor, divide: bool = False) -> nn.Linear:
    """The layer with its inputs multiplied by `scale`, or (divide) its last outputs divided by it."""
    weight = linear.weight.detach().float()
    if not divide:
        return with_weight(linear, weight * scale)
    divisor = torch.ones(linear.out_features).to(linear.weight).float()
    divisor[-len(scale) :] = scale
    bias = None if linear.bias is None else linear.bias.detach().float() / divisor
    return with_weight(linear, weight / divisor[:, None], bias)


def _search(block: Block) -> list[Group]:
    norms = {
        name: module
        for name, module in block.module.named_modules()
        if type(module) is not nn.Linear
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.dim() == 1
        and not list(module.children())
    }
    names = list(block.original)
    linears = {name: module_of(block, name) for name in names}
    outputs, inputs, reference = _trace(block, norms, linears)
    order = [name for name in inputs if name in linears]  # as they are called
    found: list[Group] = []
    taken: set[str] = set()
    for norm, made in outputs.items():
        readers = [name for name in order if _same(inputs[name], made)]
        if readers and not taken & set(readers):
            for offset in (False, True):
                group = Group(norm, tuple(readers), _inspect(readers), offset)
                if _holds(block, group, reference):
                    found.append(group)
                    taken |= set(readers)
                    break
    for name in order:
        if name in taken:
            continue
        for other in reversed(order[: order.index(name)]):
            near = other.rpartition(".")[0] == name.rpartition(".")[0]
            group = Group(other, (name,), name)
            if near and linears[other].out_features == linears[name].in_features and _holds(block, group, reference):
                found.append(group)
                break
    return sorted(found, key=lambda group: order.index(group.layers[0]))


def _trace(
    block: Block, norms: dict[str, nn.Module], linears: dict[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What each norm gives and each linear layer gets for the first call, and the block's output."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep_output(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(name, output)

    def keep_input(name: str) -> Any:
        return lambda module, args: inputs.__setitem__(name, args[0])

    handles = [module.register_forward_hook(keep_output(name)) for name, module in norms.items()]
    handles += [module.register_forward_pre_hook(keep_input(name)) for name, module in linears.items()]
    try:
        reference = block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, inputs, reference


def _holds(block: Block, group: Group, reference: Tensor) -> bool:
    """Whether the block's output stays as it is when the group trades a scale of powers of two."""
    width = module_of(block, group.layers[0]).in_features
    generator = torch.Generator().manual_seed(width)
    scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (width,), generator=generator)].to(reference.device)
    before = module_of(block, group.before)
    if not isinstance(before, nn.Linear) and before.weight.numel() != width:
        return False
    linears = {name: module_of(block, name) for name in (*group.layers, group.before)}
    parameters = dict(before.named_parameters(recurse=False))
    _trade(block, group, scale)
    try:
        out = block.run(0)
    finally:
        for name, module in linears.items():
            if isinstance(module, nn.Linear):
                block.replace(name, module)
        if not isinstance(before, nn.Linear):
            for name, parameter in parameters.items():
                setattr(before, name, parameter)
    error = (out.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-12)
    return bool(error < (1e-4 if reference.dtype == torch.float32 else 2e-2))


def _inspect(layers: Sequence[str]) -> str:
    """The module whose output shows what happened: the layer itself, or what several layers have in common."""
    if len(layers) == 1:
        return layers[0]
    pieces = [name.split(".")[:-1] for name in layers]
    shared = []
    for column in zip(*pieces):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def module_of(block: Block, name: str) -> Any:
    """The module of this name in the block; "" is the block itself."""
    return block.module.get_submodule(name) if name else block.module


def _same(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and (
        one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)
    )
