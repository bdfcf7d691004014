"""The reduce socket: from signals and a layout to the visual tokens that stay.

A method says where it acts (`sites`, or `steps` when it acts in several places), what it must be told (`signals`), who
shares a budget (`scope`) and what becomes of positions and separators; hooks, batches and the cache are the runtime's.
`select` is a pure function over tensors: it sees the features of one request, never a model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from foveate.adapters.decoder import check_layers
from foveate.adapters.shape import INSIDE, SITES, Shape, steps_of
from foveate.errors import RecipeError, UnsupportedError
from foveate.method import Method, signal_for

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter
    from foveate.adapters.layout import VisualLayout
    from foveate.vlm import VLM

LLM_SIGNALS = (
    "request_key",
    "last_attention",
    "text_attention",
    "mean_text_attention",
    "visual_attention",
    "next_last_attention",
    "next_text_attention",
    "next_visual_attention",
    "last_value_attention",
    "hidden",
    "text_hidden",
    "keys",
    "values",
    "next_keys",
    "next_values",
    "text_input",
    "visual_input",
    "text_prior",
    "entered",
    "length",
)
"""What a step inside the language model can be told; `foveate.llm_signals` says what each is."""


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
            return features.index_select(0, self.keep.to(features.device))  # of whole rows, much faster than []
        weights = self.weights.to(features.device, torch.float32)
        if features.device.type == "cpu" and weights.layout == torch.strided:
            weights = weights.to_sparse()  # nearly all are 0: a dense product costs ten times more
        return (weights @ features.float()).to(features.dtype)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, column, value) [E] of the weights, on the CPU, rows ascending."""
        weights = self.weights.cpu().to_sparse().coalesce()
        return *weights.indices(), weights.values()

    def sizes(self, size: Tensor) -> Tensor:
        """[K] original tokens that each merged token stands for. size: [N] those of the tokens before."""
        row, column, _ = self.entries()
        return size.new_zeros(len(self.keep)).index_add_(0, row, size[column])

    def changes(self, n: int) -> bool:
        """Whether anything happens to `n` features at all."""
        return self.weights is not None or not torch.equal(self.keep.cpu(), torch.arange(n))


@dataclass(frozen=True)
class Compute:
    """What one decoder layer leaves out for the N visual tokens of a request, which all stay.

    window: [N, N] bool, which visual tokens a visual token attends to instead of the earlier ones; None: as ever.
    seen: [H] bool, heads in which visual keys still count; elsewhere their attention is set to zero after the softmax.
    written: [H] bool, heads whose output at visual tokens counts. channels: the share of the MLP's inner channels that
    visual tokens use, the first ones.
    """

    window: Tensor | None = None
    seen: Tensor | None = None
    written: Tensor | None = None
    channels: float = 1.0


Select = Callable[[dict[str, Tensor], "VisualLayout"], Any]
"""(signals, layout) -> Reduction (at site "compute": Compute)."""


@dataclass(frozen=True)
class Step:
    """One place where a method acts on a request.

    site: one of SITES. select: the method there; N is the number of tokens that are left when the step comes, and the
    layout is narrowed to them. At site "compute" it returns a `Compute` for layer `layer`. count(n, total): tokens that
    stay of a group of n; total: at site "encoder" the tokens of this view before the first block, inside the language
    model the features that were to enter it, elsewhere n. layer: encoder block or decoder layer; at site "llm" tokens
    leave at the input of decoder layer `layer`. where: at site "encoder", at the block's output, or between its
    attention and MLP.
    position: "keep" leaves tokens at their positions, "renumber" closes the gaps. newline: what becomes of separators
    once something was dropped: all stay ("keep"), all go ("drop"), or those stay that end a row of which something
    is left ("row").
    """

    site: str
    select: Select
    count: Callable[[int, int], int]
    layer: int = 0
    signals: tuple[str, ...] = ()
    scope: Literal["view", "media", "request"] = "request"
    position: Literal["keep", "renumber"] = "keep"
    newline: Literal["keep", "drop", "row"] = "keep"
    where: Literal["output", "mid"] = "output"


@dataclass(frozen=True)
class Reducer(Method):
    """Keeps `keep` of the tokens of each group.

    keep: a fraction in (0, 1] when it is a float, rounded half up and at least one token; a number of tokens per group
    when it is an integer (groups that are smaller stay whole). So 1.0 keeps everything and 1 keeps one token per group.
    A method that acts in several places says in its own docstring what `keep` is a fraction of. Class attributes beside
    Method's:

    sites: where a method of one step may act, the preferred one first. scope: who shares a budget, as
    `VisualLayout.groups`. position, newline: as in `Step`. exact: how many tokens stay is known before anything runs;
    else `count` is what is expected.
    """

    keep: float | int

    socket: ClassVar[str] = "reduce"
    sites: ClassVar[tuple[str, ...]] = ("post_projector",)
    scope: ClassVar[Literal["view", "media", "request"]] = "view"
    position: ClassVar[Literal["keep", "renumber"]] = "renumber"
    newline: ClassVar[Literal["keep", "drop", "row"]] = "keep"
    exact: ClassVar[bool] = True

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

    @abstractmethod
    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        """What stays of N features. signals: name -> [N] or [N, ...] on one device. layout: N tokens, no separators."""

    def steps(self, shape: Shape) -> tuple[Step, ...]:
        """Where this method acts on a model of this shape, in order. The default is one step, `select`.

        Called once for each request, so what the steps of one call share belongs to that request. Raises
        UnsupportedError when the model serves none of `sites`, RecipeError for a layer that it does not have.
        """
        site = next((site for site in self.sites if site in shape.sites), None)
        if site is None:
            raise UnsupportedError(shape.unserved(self.name, self.sites))
        return (self.step(site, self.select),)

    def step(self, site: str, select: Select, **changes: object) -> Step:
        """A `Step` with this method's signals, scope, count and policies, but for `changes`."""
        values: dict[str, object] = {
            "signals": self.signals,
            "scope": self.scope,
            "position": self.position,
            "newline": self.newline,
            "count": lambda n, total: self.count(n),
        }
        return Step(site, select, **{**values, **changes})  # type: ignore[arg-type]

    def check(self, vlm: VLM) -> None:
        super().check(vlm)
        adapter = vlm.adapter
        for step in self.steps(adapter.shape):
            if step.site not in adapter.sites:
                raise UnsupportedError(adapter.shape.unserved(self.name, (step.site,)))
            if step.site == "encoder" and not 0 <= step.layer < adapter.num_blocks:
                raise RecipeError(
                    f"{self.name} acts in block {step.layer} of the encoder; this one uses {adapter.num_blocks}, so "
                    f"0 to {adapter.num_blocks - 1} are possible"
                )
            if step.site in INSIDE:
                check_layers(adapter.layers, adapter.text_config, self.name)
                first = 0 if step.site == "compute" else 1
                if not first <= step.layer < len(adapter.layers):
                    raise RecipeError(
                        f"{self.name} acts before layer {step.layer} of the language model; this one has "
                        f"{len(adapter.layers)} layers, so 1 to {len(adapter.layers) - 1} are possible"
                    )
            for need in step.signals:
                known = need in LLM_SIGNALS if step.site in INSIDE else signal_for(need, adapter.offers)
                if not known:
                    raise UnsupportedError(
                        f"{self.name} needs {need.replace('|', ' or ')}, which the {adapter.family!r} adapter does not "
                        f"offer{adapter.reason(need)}; try {_instead(adapter, self.name)}"
                    )


def _instead(adapter: Adapter, name: str) -> str:
    """Methods that need less than `name`, for an error that says what a model cannot tell."""
    from foveate.registry import METHODS

    near = next((other for other in ("visionzip", "fastervlm") if other != name and other in METHODS), None)
    more = f", or {near!r}, which takes received attention" if near and adapter.offers("received_attention") else ""
    return f"'uniform', which needs no signal{more}"


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


def layer_index(value: float | int, depth: int, method: str, name: str = "layer") -> int:
    """The layer that a parameter means: an integer is an index, a float a fraction of the `depth` layers.

    Both lie in 1 .. depth - 1, a fraction is rounded and clamped there. Raises RecipeError for an index outside.
    """
    if depth < 2:
        raise UnsupportedError(
            f"{method} drops tokens between layers of the language model, and this one has {depth}; use a method at "
            f"site 'post_projector', such as 'uniform' or 'divprune'"
        )
    if isinstance(value, int):
        if not 1 <= value < depth:
            raise RecipeError(
                f"{method}: {name} is {value}; this model has {depth} layers, give 1 to {depth - 1}, or a fraction of "
                f"the depth such as 0.25"
            )
        return value
    if not 0 < value < 1:
        raise RecipeError(f"{method}: {name} is {value}; a fraction of the depth lies between 0 and 1")
    return min(depth - 1, max(1, int(value * depth + 0.5)))


def distinct(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Of stages that fall on one layer of a shallow model only the last."""
    return tuple({(step.site, step.layer): step for step in steps}.values())


class Tokens(NamedTuple):
    """How many visual tokens of a request are left, everywhere on its way.

    blocks: tokens of each view that attention, and that the MLP, of each encoder block sees; () where none leave there.
    connected: tokens that pass the connector, one by one; None where it takes whole views. layers: tokens that each
    decoder layer sees.
    """

    blocks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    connected: int | None
    layers: tuple[int, ...]


def tokens_left(reducers: Sequence[Reducer], groups: Sequence[Sequence[int]], shape: Shape) -> Tokens:
    """Visual tokens at every place of a prefill, known before anything runs.

    groups: for each picture or clip the sizes of its encoded views in tokens, separators not counted. Exact for
    methods that are; when a method shares a budget over several views and another one follows that does not, the
    views are taken to lose tokens evenly.
    """
    first = sizes = [list(media) for media in groups]
    steps = steps_of(reducers, shape)
    at: dict[str, list[Step]] = {site: [step for step in steps if step.site == site] for site in SITES}
    blocks = []
    for block in range(shape.blocks if at["encoder"] else 0):
        here, entered = [step for step in at["encoder"] if step.layer == block], sizes
        for step in here:  # view by view, whoever shares a budget elsewhere
            sizes = [
                [step.count(n, total) if n else 0 for n, total in zip(*media)]
                for media in zip(sizes, first, strict=True)
            ]
        fed = sizes if any(step.where == "mid" for step in here) else entered
        blocks.append((tuple(chain.from_iterable(entered)), tuple(chain.from_iterable(fed))))
    for step in at["post_encoder"]:
        sizes = _after(step, sizes, None)
    connected = sum(map(sum, sizes)) if at["encoder"] or at["post_encoder"] else None
    for step in at["post_projector"]:
        sizes = _after(step, sizes, None)
    total = sum(map(sum, sizes))
    layers = []
    for layer in range(shape.layers):
        for step in at["llm"]:
            if step.layer == layer:
                sizes = _after(step, sizes, total)
        layers.append(sum(map(sum, sizes)))
    return Tokens(tuple(blocks), connected, tuple(layers))


def tokens_per_layer(reducers: Sequence[Reducer], groups: Sequence[Sequence[int]], shape: Shape) -> list[int]:
    """Visual tokens that each decoder layer sees in a prefill, of `tokens_left`."""
    return list(tokens_left(reducers, groups, shape).layers)


def _after(step: Step, sizes: list[list[int]], total: int | None) -> list[list[int]]:
    """Tokens of each view after a step behind the encoder. total: None before the language model, where each group is
    its own."""

    def count(n: int) -> int:
        return step.count(n, n if total is None else total) if n else 0

    if step.scope == "view":
        return [[count(size) for size in media] for media in sizes]
    if step.scope == "media":
        return [_shares(media, count(sum(media))) for media in sizes]
    flat = _shares([sum(media) for media in sizes], count(sum(map(sum, sizes))))
    return [_shares(media, share) for media, share in zip(sizes, flat)]


def _shares(sizes: list[int], kept: int) -> list[int]:
    """`kept` tokens spread over views of these sizes in proportion; the sum is exact."""
    whole, ends, seen = sum(sizes), [0], 0
    for size in sizes:
        seen += size
        ends.append(kept * seen // whole if whole else 0)
    return [after - before for before, after in pairwise(ends)]


def evenly(count: int, n: int) -> Tensor:
    """`count` of `n` places, each in the middle of an equal share. Returns [count] int64, strictly ascending."""
    return ((2 * torch.arange(count) + 1) * n).div(2 * max(count, 1), rounding_mode="floor")
