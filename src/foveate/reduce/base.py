"""The reduce socket: from signals and a layout to the visual tokens that stay.

A method says where it acts (`sites`), what it must be told (`signals`), who shares a budget (`scope`) and what becomes
of positions; hooks, batches, separators and the cache are the runtime's. `select` is a pure function over tensors: it
sees the features of one request, never a model.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from foveate.errors import RecipeError, UnsupportedError
from foveate.method import Method, signal_for

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.vlm import VLM

SITES = ("compose", "encoder", "post_encoder", "post_projector", "packed", "llm", "cache")
"""Where a reducer may act, in the order in which a request passes: while composing views, inside the encoder, after it,
after the connector, with the text, inside the language model, in the cache while decoding."""


@dataclass(frozen=True)
class Reduction:
    """What becomes of the N visual features of a request.

    keep: [K] int64, the features that stay, in their new order; a merged token stands at the place of `keep[k]`.
    weights: None when pruning, else [K, N] (dense or sparse): output token k is `weights[k] @ features`.
    """

    keep: Tensor
    weights: Tensor | None = None

    def apply(self, features: Tensor) -> Tensor:
        """[N, D] -> [K, D]. Keeping all in order returns the same numbers bit for bit."""
        if self.weights is None:
            return features[self.keep.to(features.device)]
        return (self.weights.to(features.device, features.dtype) @ features).to(features.dtype)


@dataclass(frozen=True)
class Reducer(Method):
    """Keeps `keep` of the tokens of each group.

    keep: a fraction in (0, 1] when it is a float, rounded half up and at least one token; a number of tokens per group
    when it is an integer (groups that are smaller stay whole). So 1.0 keeps everything and 1 keeps one token per group.
    Separators are not counted and always stay. Class attributes beside Method's:

    scope: who shares a budget, as `VisualLayout.groups`. position: "keep" leaves the tokens at their original
    positions, "renumber" closes the gaps.
    """

    keep: float | int

    socket: ClassVar[str] = "reduce"
    sites: ClassVar[tuple[str, ...]] = ("post_projector",)
    scope: ClassVar[Literal["view", "media", "request"]] = "view"
    position: ClassVar[Literal["keep", "renumber"]] = "renumber"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, int) and self.keep < 1:
            raise RecipeError(f"{self.name}: keep is {self.keep} tokens; give at least 1, or a fraction such as 0.5")
        if isinstance(self.keep, float) and not 0 < self.keep <= 1:
            raise RecipeError(f"{self.name}: keep is {self.keep}; a fraction must be above 0 and at most 1.0")

    def count(self, n: int) -> int:
        """Tokens that stay of a group of `n`."""
        if isinstance(self.keep, int):
            return min(self.keep, n)
        return min(n, max(1, int(self.keep * n + 0.5)))

    def budget(self, layout: VisualLayout) -> int:
        """Tokens that stay of a layout without separators: known before anything is computed."""
        return sum(self.count(len(group)) for group in layout.groups(self.scope))

    @abstractmethod
    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        """What stays of N features. signals: name -> [N] or [N, ...] on one device. layout: N tokens, no separators."""

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        site = next((site for site in self.sites if site not in vlm.adapter.sites), None)
        if site:
            raise UnsupportedError(
                f"{self.name} acts at site {site!r}, which the {vlm.adapter.family!r} adapter does not serve; "
                f"it serves {', '.join(vlm.adapter.sites)}"
            )
        for need in self.signals:
            if signal_for(need, vlm.adapter.signals) is None:
                raise UnsupportedError(
                    f"{self.name} needs {need.replace('|', ' or ')}, which the {vlm.adapter.family!r} adapter does not "
                    f"offer; try 'uniform', which needs no signal"
                )


@dataclass(frozen=True)
class Scorer(Reducer):
    """A reducer that keeps the highest scores of each group, in sequence order; ties go to the earlier token."""

    @abstractmethod
    def score(self, signals: dict[str, Tensor], layout: VisualLayout) -> Tensor:
        """[N] scores, higher stays."""

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        score = self.score(signals, layout).float().cpu()
        groups = layout.groups(self.scope)
        kept = [group[top_k(score[group], self.count(len(group)))] for group in groups]
        return Reduction(in_order(kept))


def top_k(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest of [..., N], ascending; among equals the earlier one stays. Returns [..., k] int64."""
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values


def in_order(kept: list[Tensor]) -> Tensor:
    """The groups' kept indices as one ascending [K] int64 tensor."""
    return torch.cat(kept).sort().values if kept else torch.zeros(0, dtype=torch.int64)


def evenly(count: int, n: int) -> Tensor:
    """`count` of `n` places, each in the middle of an equal share. Returns [count] int64, strictly ascending."""
    return ((2 * torch.arange(count) + 1) * n).div(2 * max(count, 1), rounding_mode="floor")
