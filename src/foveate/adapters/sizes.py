"""`Sizes`: the numbers of a vision tower and its connector that costs depend on, read off a config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What encoding one patch costs. The language model's numbers are in its own config.

    layers: tower blocks that run. full_layers: those in which every patch of a view attends to every other; in the
    others to those of its window, of `window` x `window` patches. mlp_matrices: 2, or 3 where the MLP is gated.
    cls: tokens beside the patches of a view. patch_inputs: values of one patch. connector: (inputs, outputs) of its
    linear layers, all of which run once for each `joined` patches. gathers: only patches that become tokens get there.
    """

    layers: int
    width: int
    mlp: int
    heads: int
    patch_inputs: int
    connector: tuple[tuple[int, int], ...]
    joined: int = 1
    cls: int = 0
    mlp_matrices: int = 2
    full_layers: int = -1
    window: int = 0
    gathers: bool = False

    def __post_init__(self) -> None:
        if self.full_layers < 0:
            object.__setattr__(self, "full_layers", self.layers)
