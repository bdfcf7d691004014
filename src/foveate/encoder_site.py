"""Visual tokens that leave or merge between the blocks of the vision encoder, view by view.

For towers of plain attention blocks whose connector makes each token of its own patches: of one, or of a cell of them
that is joined (InternVL, SmolVLM). The patches of a token leave together; two tokens that merge do so patch by patch,
each with the one at its place in the other cell. CLS and patches of padding pass all blocks and are never offered to a
method. Views that have kept equally many states run together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.adapters.base import Encoded
from foveate.adapters.layout import VisualLayout
from foveate.adapters.tower import AVERAGED, OF_PATCHES, PER_VIEW, Asked, Attention, States, asked, capture, measure
from foveate.clock import charge
from foveate.method import signal_for

if TYPE_CHECKING:
    from foveate.data.execute import Inputs
    from foveate.data.plan import Plan
    from foveate.reduce.base import Reduction, Step

Groups = list[list[int]]
"""Views that have equally many states, by their numbers."""


@dataclass
class Views:
    """The encoded views of one request, one after the other, so that tokens of all of them leave at once.

    hidden: states [R, C], `lengths[v]` of view v, of which the first `first` are CLS. places: [n, r] rows of `hidden`
    where each token's patches are; numbers: [n] which of the request's features it is; layout: where it comes from;
    owner: [n] its view. signals: what steps after the encoder are told, [n, ...] each, or [V, ...] those of CLS itself.
    """

    hidden: Tensor
    lengths: list[int]
    first: int
    places: Tensor
    numbers: Tensor
    layout: VisualLayout
    owner: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict)

    def run(self, block: Callable[[Tensor], Tensor]) -> Groups:
        """Change the states by `block` [m, T, C] -> [m, T', C], a group of m views at a time; returns the groups."""
        lengths = sorted(set(self.lengths))
        groups = [[view for view, own in enumerate(self.lengths) if own == length] for length in lengths]
        if len(groups) == 1:
            stacked = [self.hidden.unflatten(0, (-1, lengths[0]))]
        else:
            parts = self.hidden.split(self.lengths)
            stacked = [torch.stack([parts[view] for view in group]) for group in groups]
        self.hidden = in_order(map(block, stacked), groups)
        return groups

    def rows(self, without_cls: bool = False) -> Tensor:
        """[n, r] rows of each token's patches among all states, or among those that are not CLS."""
        if not (self.first and without_cls):
            return self.places
        return self.places - self.first * (self.owner + 1)[:, None]

    def leave(self, reduction: Reduction) -> Tensor | None:
        """Let tokens go, or merge; those that stay are in the order of their places. Returns [K] which stay, or None
        when nothing changes."""
        if not reduction.changes(len(self.places)):
            return None
        stands = reduction.keep.cpu()
        chosen = torch.zeros(len(self.places), dtype=torch.bool)
        chosen[stands] = True
        keep, before, size = chosen.nonzero()[:, 0], self.hidden, self.layout.size
        places = self.places.index_select(0, keep)
        stays = torch.ones(len(before), dtype=torch.bool)
        stays[self.places] = False
        stays[places] = True
        self.hidden = before.index_select(0, stays.nonzero()[:, 0].to(before.device))
        self.layout = self.layout[keep]
        places = (stays.cumsum(0) - 1)[places]
        if reduction.weights is not None:
            row, column, share = reduction.entries()
            row = stands[row]
            # a block merges few tokens: those that stand for themselves alone are not computed anew
            merged = torch.zeros_like(chosen)
            merged[row[(column != row) | (share != 1)]] = True
            several = merged[row]
            column, share, target = column[several], share[several], (merged.cumsum(0) - 1)[row[several]]
            merged = merged[keep]
            where = self.places.index_select(0, column).flatten().to(before.device)
            cells = before.index_select(0, where).unflatten(0, (len(column), -1)).float()  # [m, r, C]
            cells *= share[:, None, None].to(cells.device)
            means = cells.new_zeros(int(merged.sum()), *cells.shape[1:]).index_add_(0, target.to(cells.device), cells)
            self.hidden[places[merged].to(before.device)] = means.to(before.dtype)
            sizes = size.new_zeros(len(means)).index_add_(0, target, size[column])
            self.layout = replace(self.layout, size=self.layout.size.masked_scatter(merged, sizes))
        gone = torch.bincount(self.owner[~chosen], minlength=len(self.lengths)) * self.places.shape[1]
        self.lengths = [length - less for length, less in zip(self.lengths, gone.tolist())]
        self.places, self.numbers, self.owner = places, self.numbers[keep], self.owner[keep]
        self.signals = narrowed(self.signals, keep)
        return keep


def encode_reduced(
    adapter: Any, inputs: Inputs, plan: Plan, steps: Sequence[Step], signals: Collection[str] = ()
) -> Encoded:
    """The features [K, r * C] of one request as `connect` takes them, after `steps` between the encoder's blocks.

    signals: what steps after the encoder need. `Encoded.layout` says which tokens are left, ascending.
    """
    if not plan.media:
        return adapter.encode([inputs], [plan])[0]
    hidden = adapter.tower_embed(inputs, plan)
    count, length, _ = hidden.shape
    index, first = adapter.view_index(plan), int(adapter.has_cls)
    order = (index[:, 0] * length + index[:, 1]).argsort()
    view, cell = index[order].unbind(dim=1)
    views = Views(
        hidden.flatten(0, 1),
        [length] * count,
        first,
        adapter.cells[cell] + first + length * view[:, None],
        order,
        adapter.layout(plan).features()[order],
        view,
    )
    wanted = asked(signals, adapter.signals, adapter.num_blocks)
    for number, block in enumerate(adapter.blocks):
        here = [step for step in steps if step.layer == number]
        _run(adapter, block, views, here, [ask for ask in wanted if ask.block == number])
    views.run(adapter.tower_finish)
    order = views.numbers.argsort()
    features = views.hidden[views.rows(without_cls=True)[order].to(hidden.device)].flatten(1)
    return Encoded(features, narrowed(views.signals, order), layout=views.layout[order])


def _run(adapter: Any, block: Any, views: Views, steps: Sequence[Step], wanted: Sequence[Asked]) -> None:
    """One block for all views, and what leaves in it."""
    steps = sorted(steps, key=lambda step: step.where != "mid")
    needs = [[name for need in step.signals if (name := signal_for(need, adapter.offers))] for step in steps]
    mid = sum(step.where == "mid" for step in steps)
    facts = adapter.attention_of(block)
    watched = {"q": facts.q, "k": facts.k, "v": facts.v} if any(needs) or wanted else {}
    with capture(watched) as seen:
        groups = views.run(lambda hidden: adapter.attend(block, hidden) if mid else adapter.run_block(block, hidden))
    states = [States(*found, hidden=None) for found in zip(*seen.values())]
    told: dict[str, Tensor] = {}

    def signal(kind: str, averaged: bool) -> Tensor:
        return _signal(kind, averaged, views, states, groups, facts)

    def act(number: int) -> None:
        nonlocal told
        with charge("select"):
            now = {name: told[name] if name in told else signal("hidden", False) for name in needs[number]}
            keep = views.leave(steps[number].select(now, views.layout))
            told = {name: told[name] for later in needs[number + 1 :] for name in later if name in told}
            told = told if keep is None else narrowed(told, keep)

    with charge("select"):
        kinds = {name: _kind(name) for own in needs for name in own}
        told = {name: signal(kind, kind in AVERAGED) for name, kind in kinds.items() if kind != "hidden"}
        views.signals |= {ask.name: signal(ask.kind, ask.averaged) for ask in wanted if ask.kind != "hidden"}
    for number in range(mid):
        act(number)
    if mid:
        views.run(lambda hidden: adapter.feed(block, hidden))
    for number in range(mid, len(steps)):
        act(number)
    with charge("select"):
        views.signals |= {ask.name: signal("hidden", False) for ask in wanted if ask.kind == "hidden"}


def _signal(
    kind: str, averaged: bool, views: Views, states: Sequence[States], groups: Groups, facts: Attention
) -> Tensor:
    """A signal, float32, of a block whose queries, keys and values were caught as `states` of each group of views."""
    if kind == "hidden":
        return _mean(views.hidden, views.rows()).float()
    if kind in OF_PATCHES:
        return _mean(in_order([getattr(own, OF_PATCHES[kind]) for own in states], groups), views.rows()).float()
    found = [measure(kind, own, facts.heads, facts.scale, bool(views.first)) for own in states]
    if kind in PER_VIEW:
        return in_order([value[:, None] for value in found], groups)
    value = _mean(in_order(found, groups), views.rows(without_cls=True))
    return value.mean(dim=-1) if averaged else value


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    """Means [n, ...] of the rows [n, r] of values [R, ...], in their dtype."""
    rows = rows.to(values.device)
    if rows.shape[1] == 1:
        return values.index_select(0, rows[:, 0])
    return F.embedding_bag(rows, values.flatten(1), mode="mean").unflatten(1, values.shape[1:])


def in_order(parts: Iterable[Tensor], groups: Groups) -> Tensor:
    """Values [m, T, ...] of groups of views -> [sum of T, ...], one view after the other."""
    if len(groups) == 1:
        return next(iter(parts)).flatten(0, 1)
    found = {view: value for part, group in zip(parts, groups) for view, value in zip(group, part)}
    return torch.cat([found[view] for view in sorted(found)])


def narrowed(signals: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """Signals of the tokens that stay; those of CLS itself are of views."""
    return {
        name: value if _kind(name) in PER_VIEW else value.index_select(0, keep.to(value.device))
        for name, value in signals.items()
    }


def _kind(name: str) -> str:
    return name.partition("@")[0]
