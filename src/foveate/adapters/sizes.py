"""`Sizes`: the numbers of a vision tower and its connector that costs depend on, read off a config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What encoding one patch costs. The language model's numbers are in its own config.

    layers: tower blocks that run. window: where not 0, a patch attends to those of its window, of `window` x `window`
    patches, except in `full_layers` blocks, where to its whole view. mlp_matrices: 2, or 3 where the MLP is gated.
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
    full_layers: int = 0
    window: int = 0
    gathers: bool = False
