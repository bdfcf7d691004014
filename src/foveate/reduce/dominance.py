"""How much the language model looks at the picture: MDI and AEI of every layer, on any adapter and under any recipe.

Source: "When language overrules", arXiv 2508.10552. With A_T and A_O the attention that text and visual tokens receive
from the tokens of the answer, and |T| and |O| how many there are:

    MDI   = (A_T / |T|) / (A_O / |O|)                       1: balanced; above: text dominates
    AEI_X = (A_X / (A_T + A_O)) / (|X| / (|T| + |O|))       what a kind gets over its share of the tokens

The answer is generated first, then read in one pass with the prompt, in which every layer is watched; nothing leaves
that the recipe would not drop. Separators between visual tokens count as text. The paper says nothing of the prompt's
template and system text: all of it is text here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.reduce.base import Reduction, Step
from foveate.runtime import Clock, open_batch

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.vlm import VLM, Request

Sight = Callable[[int, dict[str, Tensor], "VisualLayout"], None]


@dataclass(frozen=True)
class Dominance:
    """One decoder layer: text and visual tokens that it sees, and the measures."""

    layer: int
    text: int
    visual: int
    mdi: float
    aei_text: float
    aei_visual: float


@torch.inference_mode()
def watch(vlm: VLM, request: Request, names: Sequence[str], see: Sight, answer: Sequence[int] = ()) -> None:
    """Run a prompt, and an answer after it, and let `see(layer, signals, layout)` look at every decoder layer.

    names: signals of `foveate.llm_signals`; attention in them is that of the layer itself. The steps of the request's
    own reductions happen as ever. Raises InputError for a request without a picture.
    """
    plan = vlm.plan(request.to_messages(), num_frames=request.num_frames)
    (row,) = vlm._rows([plan], [vlm.prepare(plan)], [vlm.reducers(request.reduce)], Clock(vlm.device))
    if not row.kept:
        raise InputError("there is no visual token to look at; the request holds text only")
    following = row.next_position + torch.arange(len(answer))
    row.input_ids = torch.cat([row.input_ids, torch.tensor(list(answer), dtype=torch.int64)])
    row.positions = torch.cat([row.positions, following.expand(*row.positions.shape[:-1], -1)], dim=-1)
    row.next_position += len(answer)
    own = {step.layer: step for step in row.steps if step.site == "llm"}
    others = tuple(step for step in row.steps if step.site != "llm")
    watched = (_watching(layer, own.get(layer), names, see) for layer in range(1, len(vlm.adapter.layers) + 1))
    row.steps = (*watched, *others)
    open_batch(vlm.adapter, [row], vlm.new_cache(), Clock(vlm.device)).prefill()


def _watching(layer: int, own: Step | None, names: Sequence[str], see: Sight) -> Step:
    """A step that looks at layer - 1, and then does what the request's own step there does."""

    def select(signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        see(layer - 1, signals, layout)
        return own.select(signals, layout) if own else Reduction(torch.arange(len(layout)))

    if own is None:
        return Step("llm", select, count=lambda n, total: n, layer=layer, signals=tuple(names))
    return replace(own, select=select, signals=tuple(dict.fromkeys([*own.signals, *names])))


def dominance(vlm: VLM, request: Request, max_new_tokens: int = 16) -> list[Dominance]:
    """MDI and AEI of every decoder layer while `request` is answered."""
    ids = vlm.respond(request, max_new_tokens).ids
    answer = [
        token for token in ids if token not in vlm.adapter.placeholders
    ]  # only models that were not trained say so
    found: list[Dominance] = []

    def see(layer: int, signals: dict[str, Tensor], layout: VisualLayout) -> None:
        rows = signals["text_attention"][:, -max(1, len(answer)) :]  # the answer's tokens, or the prompt's last one
        visual = float(rows.sum(dim=2).mean())
        text = int(signals["length"]) - len(layout)
        found.append(measures(layer, text, len(layout), 1 - visual, visual))

    watch(vlm, request, ("text_attention", "length"), see, answer)
    return found


def measures(layer: int, text: int, visual: int, to_text: float, to_visual: float) -> Dominance:
    """The measures of one layer from token counts and attention masses."""
    everything, tiny = to_text + to_visual, 1e-12
    aei_text = (to_text / everything) / (text / (text + visual))
    aei_visual = (to_visual / everything) / (visual / (text + visual))
    return Dominance(layer, text, visual, aei_text / max(aei_visual, tiny), aei_text, aei_visual)


def stages(layers: Sequence[Dominance]) -> dict[str, Dominance]:
    """Means over the early, middle and late third of the layers."""
    third = max(1, len(layers) // 3)
    parts = {"early": layers[:third], "middle": layers[third:-third] or layers, "late": layers[-third:]}
    return {name: _mean(part) for name, part in parts.items()}


def _mean(part: Sequence[Dominance]) -> Dominance:
    def mean(name: str) -> Any:
        return sum(getattr(layer, name) for layer in part) / len(part)

    values = {name: mean(name) for name in ("mdi", "aei_text", "aei_visual")}
    return Dominance(part[0].layer, round(mean("text")), round(mean("visual")), **values)


def masses(vlm: VLM, request: Request) -> Tensor:
    """[layers, 3]: attention of visual queries on visual keys, of visual queries on text keys, and of the text after
    the picture on visual keys, as shares of the queries' attention, mean over heads and queries."""
    found: list[Tensor] = []

    def see(layer: int, signals: dict[str, Tensor], layout: VisualLayout) -> None:
        inside = signals["visual_attention"].sum(dim=1).mean().cpu()
        found.append(torch.stack([inside, 1 - inside, signals["text_attention"].sum(dim=2).mean().cpu()]))

    watch(vlm, request, ("visual_attention", "text_attention"), see)
    return torch.stack(found)


def head_ratios(vlm: VLM, request: Request) -> Tensor:
    """[layers, H]: attention of the text after the picture to visual keys over that to text keys, for YOPO's votes."""
    found: list[Tensor] = []

    def see(layer: int, signals: dict[str, Tensor], layout: VisualLayout) -> None:
        visual = signals["text_attention"].sum(dim=2).mean(dim=1).cpu()
        found.append(visual / (1 - visual).clamp_min(1e-12))

    watch(vlm, request, ("text_attention",), see)
    return torch.stack(found)
