"""The weights socket: which linear layers a method takes, how they are replaced, and what it saves.

`apply_` works in place on modules that `Recipe.apply` has copied; dense tensors that no method touches stay shared.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from foveate.errors import RecipeError
from foveate.method import Method, nearest

if TYPE_CHECKING:
    from foveate.vlm import VLM

PARTS = ("vision_tower", "mm_projector", "llm")


@dataclass(frozen=True)
class WeightMethod(Method):
    """A method that replaces linear layers.

    parts: which parts of the model: any of "llm", "vision_tower", "mm_projector". The language model's head and all
    embeddings stay dense. exclusive: methods with the same word may not take the same part (two storage formats).
    """

    parts: tuple[str, ...] = ("llm",)

    socket: ClassVar[str] = "weights"
    exclusive: ClassVar[str] = "storage"
    skip: ClassVar[tuple[str, ...]] = ("lm_head",)

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            object.__setattr__(self, "parts", (self.parts,))
        super().__post_init__()
        for part in self.parts:
            if part not in PARTS:
                raise RecipeError(f"{self.name}: unknown part {part!r}{nearest(part, PARTS)}")
        if not self.parts:
            raise RecipeError(f"{self.name}: parts is empty; give any of {', '.join(PARTS)}")

    def targets(self, parts: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str]]:
        """(full name, owner, attribute) of each linear layer that this method takes."""
        for part in self.parts:
            for name, module in list(parts[part].named_modules()):
                for attribute, child in list(module.named_children()):
                    full = ".".join(piece for piece in (part, name, attribute) if piece)
                    if type(child) is nn.Linear and attribute not in self.skip:
                        yield full, module, attribute

    @abstractmethod
    def check_layer(self, name: str, linear: nn.Linear) -> None:
        """Raise RecipeError, naming the layer, if it cannot be converted."""

    @abstractmethod
    def convert(self, linear: nn.Linear) -> nn.Module:
        """The cheaper layer."""

    @abstractmethod
    def empty(self, linear: nn.Linear) -> nn.Module:
        """A layer of the same form as `convert` gives, without values: a checkpoint's tensors are read into it."""

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        for name, owner, attribute in self.targets(vlm.adapter.parts()):
            self.check_layer(name, getattr(owner, attribute))

    def apply_(self, vlm: VLM) -> None:
        """Replace the layers of `vlm`, in place, one at a time."""
        for _, owner, attribute in self.targets(vlm.adapter.parts()):
            setattr(owner, attribute, self.convert(getattr(owner, attribute)))

    def prepare_(self, parts: dict[str, nn.Module]) -> None:
        """Put empty layers in place, in a model whose weights are still to be read."""
        for name, owner, attribute in self.targets(parts):
            self.check_layer(name, getattr(owner, attribute))
            setattr(owner, attribute, self.empty(getattr(owner, attribute)))


def module_bytes(module: nn.Module) -> int:
    """Bytes of the tensors that a checkpoint of `module` holds; one tensor under two names counts once."""
    seen: dict[int, int] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor):
            seen[id(tensor)] = tensor.nbytes
    return sum(seen.values())
