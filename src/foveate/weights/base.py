"""The weights socket: which linear layers a method takes, how they are replaced, and what it saves.

Methods work on modules that `Recipe.apply` has copied; tensors stay shared with the dense model. So a method never
writes into a tensor: it puts a new layer in the place of an old one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from foveate.errors import RecipeError, UnsupportedError
from foveate.method import Method, nearest

if TYPE_CHECKING:
    from foveate.vlm import VLM
    from foveate.weights.calibrate import Block, Stream

PARTS = ("vision_tower", "mm_projector", "llm")
"""In the order in which data passes through them."""
ORDER = ("sparsity", "storage", "adapter")
"""What methods change, in the order in which a recipe names them for one part: prune, quantize, mend."""


@dataclass(frozen=True)
class WeightMethod(Method):
    """A method that replaces linear layers.

    parts: which parts of the model: any of "llm", "vision_tower", "mm_projector". The language model's head and all
    embeddings stay dense. exclusive: one of ORDER; two methods with the same word may not take the same part.
    """

    parts: tuple[str, ...] = ("llm",)

    socket: ClassVar[str] = "weights"
    exclusive: ClassVar[str] = "storage"
    skip: ClassVar[tuple[str, ...]] = ("lm_head",)
    takes: ClassVar[tuple[type, ...]] = (nn.Linear,)
    """Kinds of layers that are replaced, exactly these."""

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
            others = {id(module) for name, module in parts.items() if name != part}
            for name, owner, attribute in linear_layers(parts[part], others, self.takes):
                if attribute not in self.skip:
                    yield f"{part}.{name}", owner, attribute

    @abstractmethod
    def check_layer(self, name: str, linear: nn.Linear) -> None:
        """Raise RecipeError, naming the layer, if it cannot be converted."""

    @abstractmethod
    def convert(self, linear: nn.Linear) -> nn.Module:
        """The cheaper layer, without calibration."""

    @abstractmethod
    def empty(self, linear: nn.Linear) -> nn.Module:
        """A layer of the same form as `convert` gives, without values: a checkpoint's tensors are read into it."""

    def empty_for(self, name: str, linear: nn.Module) -> nn.Module:
        """As `empty`, for methods that treat layers by their names."""
        return self.empty(linear)

    def compress_(self, block: Block) -> None:
        """Replace the layers of one block (see `foveate.weights.calibrate`)."""
        for name, linear in block.linears(self).items():
            block.replace(name, self.convert(linear))

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        parts = vlm.adapter.parts()
        for part in self.parts:
            if part not in parts:
                raise UnsupportedError(
                    f"{self.name}: this model has no part {part!r}; it has {', '.join(parts)}, so give parts=[...]"
                )
        for name, owner, attribute in self.targets(parts):
            self.check_layer(name, getattr(owner, attribute))

    def prepare_(self, parts: dict[str, nn.Module]) -> None:
        """Put empty layers in place, in a model whose weights are still to be read."""
        for name, owner, attribute in self.targets(parts):
            self.check_layer(name, getattr(owner, attribute))
            setattr(owner, attribute, self.empty_for(name, getattr(owner, attribute)))


@dataclass(frozen=True)
class CalibratedMethod(WeightMethod):
    """A weight method that looks at what flows through the layers.

    calib: where samples come from: "auto" (the drawn world), "random" (uniform token ids), or a file: .txt for text, or
    any data set that `foveate train` reads. samples: how many. seqlen: tokens of one text sample. seed: which ones.
    tokens: which tokens count: "all", "text", "vision", or "balanced" (both kinds with the same total weight).
    sequential: later blocks see what the blocks before them have become; false: what they were.
    """

    calib: str = "auto"
    samples: int = 32
    seqlen: int = 512
    seed: int = 0
    tokens: Literal["all", "text", "vision", "balanced"] = "all"
    sequential: bool = True

    needs_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ()
    """The statistics wanted of each layer: `foveate.weights.statistics.KINDS`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "seqlen"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; it must be at least 1")

    @property
    def source(self) -> tuple[str, int, int, int, str]:
        """What decides which calibration data is seen: methods on one part must agree on it."""
        return self.calib, self.samples, self.seqlen, self.seed, self.tokens

    def survey(self, stream: Stream) -> Any:
        """What must be known of the whole dense part before its first block changes, as plain JSON; None: nothing."""
        return None

    def convert(self, linear: nn.Linear) -> nn.Module:
        raise AssertionError(f"{self.name} needs calibration")


@dataclass(frozen=True)
class Pruner(CalibratedMethod):
    """A method that sets weights to zero: dense tensors with zeros, the same size, no speed of its own.

    sparsity: the share of weights that goes. pattern: "N:M" instead: of every M neighbours in a row N stay.
    """

    sparsity: float = 0.5
    pattern: str = ""

    exclusive: ClassVar[str] = "sparsity"
    shown: ClassVar[tuple[str, ...]] = ("sparsity",)
    space: ClassVar[dict[str, tuple[float, ...]]] = {"sparsity": (0.3, 0.5, 0.7)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise RecipeError(f"{self.name}: sparsity is {self.sparsity}; it must be at least 0 and below 1")
        if self.pattern:
            drop, of = self.drop_of  # raises when malformed
            object.__setattr__(self, "sparsity", drop / of)

    @property
    def drop_of(self) -> tuple[int, int]:
        """(dropped, out of) of the pattern; (0, 0) without one."""
        if not self.pattern:
            return 0, 0
        stay, _, of = self.pattern.partition(":")
        if not (stay.isdigit() and of.isdigit() and 0 < int(stay) < int(of)):
            raise RecipeError(f"{self.name}: pattern is {self.pattern!r}; write how many stay of how many, like '2:4'")
        return int(of) - int(stay), int(of)

    def share(self, name: str) -> float:
        """What goes of the weights of the layer of this full name."""
        return self.sparsity

    def zeros(self, parts: dict[str, nn.Module]) -> int:
        """How many weights of a model's parts become zero, but for rounding in each layer."""
        layers = ((name, getattr(owner, attribute).weight) for name, owner, attribute in self.targets(parts))
        return sum(round(self.share(name) * weight.numel()) for name, weight in layers)

    def check_layer(self, name: str, linear: nn.Linear) -> None:
        _, of = self.drop_of
        if of and linear.in_features % of:
            raise RecipeError(
                f"{self.name}: layer {name} has {linear.in_features} inputs, which pattern {self.pattern} does not "
                f"divide; use a pattern of {math.gcd(linear.in_features, 16)} neighbours, or sparsity="
            )

    def empty(self, linear: nn.Linear) -> nn.Module:
        return linear


def linear_layers(
    root: nn.Module,
    stop: set[int] = frozenset(),  # type: ignore[assignment]
    kinds: tuple[type, ...] = (nn.Linear,),
) -> Iterator[tuple[str, nn.Module, str]]:
    """(name in `root`, owner, attribute) of each layer of these kinds; modules with an id in `stop` are left out."""

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
        for attribute, child in list(module.named_children()):
            if id(child) in stop:
                continue
            if type(child) in kinds:
                yield prefix + attribute, module, attribute
            else:
                yield from walk(child, f"{prefix}{attribute}.")

    yield from walk(root, "")


def with_weight(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer like `linear` with another weight (and bias); its own tensors are not touched."""
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)
    if bias is not None:
        bias = nn.Parameter(bias.to(linear.weight), requires_grad=False)
    made.bias = linear.bias if bias is None else bias
    return made.train(linear.training)


def module_bytes(module: nn.Module) -> int:
    """Bytes of the tensors that a checkpoint of `module` holds; one tensor under two names counts once."""
    seen: dict[int, int] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor):
            seen[id(tensor)] = tensor.nbytes
    return sum(seen.values())
