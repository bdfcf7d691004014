"""`maskllm`: which N of M neighbouring weights stay is learned, by sampling masks that gradients can flow through.

Source: Fang et al., MaskLLM (arXiv 2409.17481), read in NVlabs/MaskLLM. Every group of M weights has a logit for each
way to keep N of them; a Gumbel softmax draws a soft mask, its temperature falls, and at the end the likeliest way
stays. Departure, for a small scale: the paper trains all masks at once against the language model's loss on 2 billion
tokens; here the masks of one block are trained against the block's own dense output on the calibration samples. A
block keeps the mask it started from where the learned one is no nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from foveate.errors import RecipeError
from foveate.weights.base import Pruner, with_weight
from foveate.weights.pruning import pattern_mask, wanda_score

if TYPE_CHECKING:
    from foveate.weights.calibrate import Block

TEMPERATURE = 4.0, 0.05
SHARPNESS = 100.0, 500.0
SPREAD = 0.01
"""Standard deviation of the first logits."""


@dataclass(frozen=True)
class MaskLLM(Pruner):
    """pattern: N:M. steps: of training for each block. rate: learning rate of the logits. prior: the mask that training
    starts from, and strength how firmly. reward: for keeping large weights, falling to 0 over the steps.
    """

    pattern: str = "2:4"
    steps: int = 200
    rate: float = 5e-4
    prior: Literal["wanda", "magnitude"] = "wanda"
    strength: float = 3.0
    reward: float = 1e-5

    name: ClassVar[str] = "maskllm"
    kinds: ClassVar[tuple[str, ...]] = ("norm",)
    shown: ClassVar[tuple[str, ...]] = ("pattern",)
    summary: ClassVar[str] = "N of M neighbouring weights stay, which is learned; size only, not speed"
    status: ClassVar[str] = "experimental"
    searched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern:
            raise RecipeError("maskllm: pattern is empty; write how many stay of how many, like '2:4'")
        if self.steps < 1 or self.rate <= 0:
            raise RecipeError(f"maskllm: steps is {self.steps} and rate {self.rate}; both must be above 0")

    def compress_(self, block: Block) -> None:
        drop, of = self.drop_of
        layers = block.linears(self)
        options = mask_options(of - drop, of)
        weights = {name: linear.weight.detach() for name, linear in layers.items()}
        first = {name: ~pattern_mask(self._score(block, name, weight), drop, of) for name, weight in weights.items()}
        masks = first
        reached = [name for name in layers if block.statistics.get(name) is not None]
        if block.calls and reached:
            targets = [block.run(number) for number in range(len(block.calls))]
            learned = first | self._learn(block, {name: weights[name] for name in reached}, first, options, targets)
            before, after = (_error(block, _masked(weights, found), targets) for found in (first, learned))
            masks = learned if after < before else first
        for name, linear in layers.items():
            block.replace(name, with_weight(linear, weights[name] * masks[name]))

    def _score(self, block: Block, name: str, weight: Tensor) -> Tensor:
        found = block.statistics.get(name)
        return weight.float().abs() if found is None or self.prior == "magnitude" else wanda_score(weight, found.norm)

    def _learn(
        self, block: Block, weights: dict[str, Tensor], first: dict[str, Tensor], options: Tensor, targets: list[Tensor]
    ) -> dict[str, Tensor]:
        """The mask [O, I] bool of each layer after training."""
        generator = torch.Generator().manual_seed(self.seed)
        options = options.to(next(iter(weights.values())).device)
        logits = {
            name: first_logits(first[name], options, self.strength, generator).requires_grad_() for name in weights
        }
        optimiser = torch.optim.Adam(logits.values(), lr=self.rate, betas=(0.9, 0.95), eps=1e-5)
        for step in range(self.steps):
            share = step / self.steps
            temperature, sharpness = (a + (b - a) * share for a, b in (TEMPERATURE, SHARPNESS))
            number = step % len(targets)
            with torch.enable_grad():
                masks = {
                    name: soft_mask(logit, options, temperature, sharpness, generator).view_as(weights[name])
                    for name, logit in logits.items()
                }
                made = _masked(weights, masks)
                out = _run(block, number, made)
                loss = (out - targets[number]).float().square().mean() / targets[number].float().square().mean()
                kept = sum(weight.float().square().sum() for weight in made.values())
                loss = loss - self.reward * (1 - share) * kept
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
        return {
            name: options[logit.detach().argmax(dim=1)].bool().view_as(weights[name]) for name, logit in logits.items()
        }


def mask_options(keep: int, of: int) -> Tensor:
    """[K, of] float32: every way to keep `keep` of `of` neighbours."""
    return torch.tensor([[float(i in chosen) for i in range(of)] for chosen in combinations(range(of), keep)])


def first_logits(mask: Tensor, options: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """[groups, K]: normal noise, and for each option its overlap with the mask [O, I] less one, as in the paper."""
    groups = mask.reshape(-1, options.shape[1]).to(options)
    noise = torch.randn(len(groups), len(options), generator=generator).to(options) * SPREAD
    return noise + (groups @ options.T - 1) * noise.std() * strength


def soft_mask(
    logits: Tensor, options: Tensor, temperature: float, sharpness: float, generator: torch.Generator
) -> Tensor:
    """[groups, of]: a mean of the options under a Gumbel softmax of the logits [groups, K]."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-10, 1 - 1e-7).to(logits)
    gumbel = -(-uniform.log()).log()
    return ((logits * sharpness + gumbel) / temperature).softmax(dim=1) @ options


def _masked(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight * masks[name].to(weight) for name, weight in weights.items()}


def _run(block: Block, number: int, weights: dict[str, Tensor]) -> Tensor:
    """The block's output for one sample with other weights."""
    args, kwargs = block.calls[number].arguments[block.index]
    named: dict[str, Any] = {f"{name}.weight" if name else "weight": weight for name, weight in weights.items()}
    inputs = (block.hidden(number), *args) if block.stream.chained else args
    out = functional_call(block.module, named, inputs, kwargs)
    return out[0] if isinstance(out, tuple) else out


def _error(block: Block, weights: dict[str, Tensor], targets: list[Tensor]) -> float:
    """Summed squared distance to the dense outputs."""
    return sum(float((_run(block, i, weights) - target).float().square().sum()) for i, target in enumerate(targets))
