"""Visual tokens that leave or merge between the blocks of the vision encoder, view by view.

For towers of plain attention blocks whose connector makes each token of its own patches: of one, or of a cell of them
that is joined (InternVL, SmolVLM). The patches of a token leave together; two tokens that merge do so patch by patch,
each with the one at its place in the other cell. CLS and patches of padding pass all blocks and are never offered to a
method. Views that have kept equally many states run together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.adapters.base import Encoded
from foveate.adapters.layout import VisualLayout
from foveate.adapters.tower import States, asked, capture, measure
from foveate.clock import charge
from foveate.method import signal_for

if TYPE_CHECKING:
    from foveate.data.execute import Inputs
    from foveate.data.plan import Plan
    from foveate.reduce.base import Reduction, Step


@dataclass
class View:
    """One encoded view: states [T, C], the places [n, r] of its tokens' patches among them, the tokens' numbers [n]
    among the request's features, where they come from, and signals of blocks that have run, [n, ...] each."""

    hidden: Tensor
    places: Tensor
    numbers: Tensor
    layout: VisualLayout
    signals: dict[str, Tensor] = field(default_factory=dict)

    def reduce(self, reduction: Reduction) -> None:
        """Let tokens go; they stay in the order of their places."""
        if not reduction.changes(len(self.places)):
            return
        keep = reduction.keep.cpu()
        cells = self.hidden[self.places.to(self.hidden.device)]  # [n, r, C]
        merged = reduction.apply(cells.flatten(1))
        stays = torch.ones(len(self.hidden), dtype=torch.bool)
        stays[self.places] = False
        stays[self.places[keep]] = True
        hidden = self.hidden.clone()
        hidden[self.places[keep].to(hidden.device)] = merged.view(-1, *cells.shape[1:])
        self.hidden = hidden[stays.to(hidden.device)]
        order = keep.argsort()
        keep = keep[order]
        size = self.layout.size
        self.layout = self.layout[keep]
        if reduction.weights is not None:
            weights = reduction.weights.to_dense() if reduction.weights.layout != torch.strided else reduction.weights
            self.layout.size.copy_(((weights != 0).float().cpu() @ size)[order])
        self.places = (stays.cumsum(0) - 1)[self.places[keep]]
        self.numbers = self.numbers[keep]
        self.signals = {name: value[keep.to(value.device)] for name, value in self.signals.items()}


def encode_reduced(
    adapter: Any, inputs: Inputs, plan: Plan, steps: Sequence[Step], signals: Collection[str] = ()
) -> Encoded:
    """The features [K, r * C] of one request as `connect` takes them, after `steps` between the encoder's blocks.

    signals: what steps after the encoder need. `Encoded.layout` says which tokens are left, ascending.
    """
    if not plan.media:
        return adapter.encode([inputs], [plan])[0]
    hidden = adapter.tower_embed(inputs, plan)
    whole = adapter.layout(plan).features()
    index = adapter.view_index(plan)
    first = 1 if adapter.has_cls else 0
    views = []
    for number, states in enumerate(hidden):
        mine = (index[:, 0] == number).nonzero().flatten()
        mine = mine[index[mine, 1].argsort()]
        views.append(View(states, adapter.cells[index[mine, 1]] + first, mine, whole[mine]))
    wanted = asked(signals, adapter.signals, adapter.num_blocks)
    for number, block in enumerate(adapter.blocks):
        here = [step for step in steps if step.layer == number]
        _run(adapter, block, views, here, [ask for ask in wanted if ask.block == number])
    order = torch.cat([view.numbers for view in views]).argsort()
    finished = [adapter.tower_finish(view.hidden[None])[0] for view in views]
    features = torch.cat([states[_rows(view, first)].flatten(1) for states, view in zip(finished, views)])
    layout = VisualLayout.join([view.layout for view in views])[order]
    found = {ask.name: torch.cat([view.signals[ask.name] for view in views]) for ask in wanted}
    where = order.to(features.device)
    return Encoded(features[where], {name: value[where] for name, value in found.items()}, layout=layout)


def _rows(view: View, first: int) -> Tensor:
    return (view.places - first).to(view.hidden.device)


def _run(adapter: Any, block: Any, views: list[View], steps: Sequence[Step], wanted: Sequence[Any]) -> None:
    """One block for all views, then what leaves in it."""
    named = {(step, name) for step in steps for need in step.signals if (name := signal_for(need, adapter.offers))}
    facts = adapter.attention_of(block)
    watched = {"q": facts.q, "k": facts.k, "v": facts.v} if named or wanted else {}
    mid = [step for step in steps if step.where == "mid"]
    for length in sorted({len(view.hidden) for view in views}):
        group = [view for view in views if len(view.hidden) == length]
        entered = torch.stack([view.hidden for view in group])
        with capture(watched) as seen:
            states = adapter.attend(block, entered) if mid else adapter.run_block(block, entered)
        for position, view in enumerate(group):
            view.hidden = states[position]
            if not watched:
                continue
            own = States(*(seen[name][0][position : position + 1] for name in "qkv"), states[position : position + 1])
            with charge("select"):
                signals = {name: _signal(adapter, name, own, view, facts) for _, name in named}
                view.signals.update({ask.name: _signal(adapter, ask.name, own, view, facts, ask) for ask in wanted})
                for step in steps:
                    told = {name: value for name, value in signals.items() if (step, name) in named}
                    view.reduce(step.select(told, view.layout))
    if mid:
        for length in sorted({len(view.hidden) for view in views}):
            group = [view for view in views if len(view.hidden) == length]
            states = adapter.feed(block, torch.stack([view.hidden for view in group]))
            for position, view in enumerate(group):
                view.hidden = states[position]


def _signal(adapter: Any, name: str, states: States, view: View, facts: Any, ask: Any = None) -> Tensor:
    """A signal of this block for the tokens of one view: [n, ...], the mean over a token's patches; or [heads * d] of
    CLS itself."""
    kind = name.partition("@")[0]
    value = measure(kind, states, facts.heads, facts.scale, adapter.has_cls)[0]
    if kind.startswith("cls_") and kind not in ("cls_attention", "cls_logits"):
        return value
    averaged = ask.averaged if ask is not None else kind in ("cls_attention", "received_attention")
    value = value[_rows(view, 1 if adapter.has_cls else 0)].mean(dim=1)
    return value.mean(dim=-1) if averaged else value
