"""The language model run layer by layer, for batches in which tokens leave on the way.

Rows may follow different methods and lose different numbers of tokens at different layers. After each layer at which
something left, the rows are padded on the left anew, so that every layer has a mask, positions and a cache of its own
length; a decoding step uses those of each layer. Nothing is hooked and nothing is stored on the model: a layer is
called as its model calls it, and the cache that is passed in shows the keys that its attention used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.adapters.decoder import Recorder, Rotary, attention_mask, thinned
from foveate.errors import UnsupportedError
from foveate.llm_signals import LayerView
from foveate.rows import Row, pad, places

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter
    from foveate.adapters.layout import VisualLayout
    from foveate.clock import Clock
    from foveate.reduce.base import Step


@dataclass
class Stage:
    """What the layers from `first` on see, until the next stage.

    real: [B, T] bool, False where a cached column is padding; None when none is. position: of the next token, [B, 1] or
    [3, B, 1]. start: [B] the first real column of each row. columns: for each row the columns of its visual tokens;
    origin: their numbers in the request; layouts: where they come from. thin: what layers leave out, see `_thin`.
    """

    first: int
    real: Tensor | None
    position: Tensor
    start: list[int]
    columns: list[Tensor]
    origin: list[Tensor]
    layouts: list[VisualLayout]
    thin: list[list[tuple[int, Any]]] | None = None

    def grow(self) -> None:
        """One more column, real in every row."""
        if self.real is not None:
            self.real = torch.cat([self.real, self.real.new_ones(len(self.real), 1)], dim=1)

    def shrink(self, index: Tensor) -> None:
        """Only these rows stay."""
        self.real = None if self.real is None else self.real[index]
        self.position = self.position[..., index, :]
        kept = index.tolist()
        self.start, self.columns = [self.start[i] for i in kept], [self.columns[i] for i in kept]
        self.origin, self.layouts = [self.origin[i] for i in kept], [self.layouts[i] for i in kept]
        self.thin = None if self.thin is None else [self.thin[i] for i in kept]

    def without(self, hidden: list[Tensor | None], width: int, device: torch.device) -> Tensor:
        """Real columns [B, width] but for the visual tokens whose numbers are `hidden` in their rows."""
        real = (
            torch.ones(len(hidden), width, dtype=torch.bool, device=device) if self.real is None else self.real.clone()
        )
        for b, numbers in enumerate(hidden):
            if numbers is not None:
                real[b, self.columns[b][torch.isin(self.origin[b], numbers)].to(device)] = False
        return real


class Ragged:
    """A batch of requests in one cache. `prefill` once, then `decode` token by token; `alive` tells whose rows they
    are."""

    def __init__(self, adapter: Adapter, rows: Sequence[Row], cache: Any, clock: Clock) -> None:
        self.adapter, self.cache, self.clock = adapter, cache, clock
        self.rows = list(rows)
        self.alive = list(range(len(rows)))
        self.entered = [row.kept for row in rows]
        self.stages: list[Stage] = []
        self._config, self._model = adapter.text_config, adapter.text_model

    # ---- the prompt

    def prefill(self) -> Tensor:
        """Next-token logits [B, V] float32. Raises UnsupportedError for a cache that looks at the prompt."""
        if hasattr(self.cache, "see_prompt"):
            raise UnsupportedError(
                "this cache protects tokens of the prompt for all layers alike, so none may leave inside the language "
                "model; give it protect=0.0, or reduce tokens before the language model"
            )
        rows, device = self.rows, self.adapter.model.device
        ids, mask, positions, newlines = pad(rows, self.adapter)
        features = torch.cat([row.features for row in rows if row.kept] or [rows[0].features[:0]])
        where = None if newlines is None else newlines.to(device)
        hidden = self.adapter.embed(ids.to(device), features, newlines=where)["inputs_embeds"]
        asked = {name for row in rows for step in row.steps for name in step.signals}
        inputs = [self._inputs(row, hidden[b], asked) for b, row in enumerate(rows)]
        steps = [{step.layer: step for step in row.steps if step.site == "llm"} for row in rows]
        recorder = Recorder(self.cache, {layer - 1 for own in steps for layer in own})
        rotary, allowed = self._open(0, hidden, None if mask is None else mask.bool().to(device), positions.to(device))
        entered = hidden
        for index in range(len(self.adapter.layers)):
            if any(index in own for own in steps):
                with self.clock.stage("select"):
                    found = self._leave(index, entered, hidden, rotary, recorder, [s.get(index) for s in steps], inputs)
                if found is not None:
                    hidden, real, positions = found
                    rotary, allowed = self._open(index, hidden, real, positions)
            entered = hidden
            hidden = self._layer(index, hidden, allowed, rotary, recorder, self.stages[-1])
            hidden = self._add_deep(index, hidden)
            for row in rows:
                row.per_layer.append(row.kept)
        end = len(self.adapter.layers)
        if any(end in own for own in steps):  # whoever only watches may see the last layer too
            self._leave(end, entered, hidden, rotary, recorder, [s.get(end) for s in steps], inputs)
        return self.adapter.head(hidden[:, -1])

    def _inputs(self, row: Row, hidden: Tensor, asked: set[str]) -> dict[str, Tensor]:
        """Signals of a row that are known at layer 0."""
        own = hidden[len(hidden) - len(row) :]
        found = {"entered": torch.tensor(row.kept)}
        if row.key is not None:
            found["request_key"] = row.key
        if "visual_input" in asked:
            found["visual_input"] = own[row.where.to(own.device)].float()
        if "text_input" in asked:
            found["text_input"] = own[row.text_after().to(own.device)].float()
        return found

    def _open(self, first: int, hidden: Tensor, real: Tensor | None, positions: Tensor) -> tuple[Rotary, Any]:
        """A new stage: its rotary embedding and mask."""
        length, device = hidden.shape[1], hidden.device
        following = torch.tensor([row.next_position for row in self.rows], device=device)[:, None]
        self.stages.append(
            Stage(
                first,
                real,
                following.expand(*positions.shape[:-1], 1),
                [length - len(row) for row in self.rows],
                [length - len(row) + row.where for row in self.rows],
                [row.origin for row in self.rows],
                [row.layout for row in self.rows],
            )
        )
        return self._model.rotary_emb(hidden, positions), self._mask(real, length, hidden)

    def _leave(
        self,
        index: int,
        entered: Tensor,
        hidden: Tensor,
        rotary: Rotary,
        recorder: Recorder,
        steps: list[Step | None],
        inputs: list[dict[str, Tensor]],
    ) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """Let tokens leave before layer `index`: the new states [B, L', D], real columns and positions, or None when
        every row stays as it is."""
        keys, values = recorder.seen.pop(index - 1)
        length, device = hidden.shape[1], hidden.device
        states: list[Tensor] = []
        changed = False
        for b, (row, step) in enumerate(zip(self.rows, steps)):
            start = length - len(row)
            own = hidden[b, start:]
            if step is not None and row.kept:
                seen = (rotary[0][b, start:], rotary[1][b, start:])
                view = LayerView(
                    before=self.adapter.layers[index - 1],
                    layer=self.adapter.layers[min(index, len(self.adapter.layers) - 1)],
                    entered=entered[b, start:],
                    rotary=seen,
                    keys=keys[b, :, start:],
                    values=values[b, :, start:],
                    hidden=own,
                    visual=row.where.to(device),
                    text=row.text_after().to(device),
                    given=inputs[b],
                )
                reduction = step.select(view.signals(step.signals), row.layout)
                if reduction.changes(row.kept):
                    changed = True
                    visual = reduction.apply(own[view.visual]) if reduction.weights is not None else None
                    row.deep = [reduction.apply(part) for part in row.deep]
                    own = own.index_select(0, row.take(reduction, step).to(device))
                    if visual is not None:
                        own[row.where.to(device)] = visual.to(own.dtype)
            states.append(own)
        if not changed:
            return None
        longest = max(map(len, states))
        new = hidden.new_zeros(len(states), longest, hidden.shape[2])
        for b, own in enumerate(states):
            new[b, longest - len(own) :] = own
        real, positions = places(self.rows)
        return new, None if real is None else real.to(device), positions.to(device)

    def _add_deep(self, index: int, hidden: Tensor) -> Tensor:
        """What some families add at the visual tokens to the output of their first layers."""
        if not any(index < len(row.deep) for row in self.rows):
            return hidden
        hidden = hidden.clone()
        for b, (row, columns) in enumerate(zip(self.rows, self.stages[-1].columns)):
            if index < len(row.deep):
                hidden[b, columns.to(hidden.device)] += row.deep[index].to(hidden)
        return hidden

    # ---- the answer

    def decode(self, token: Tensor) -> Tensor:
        """Logits [B, V] after one more token in each row, [B]."""
        hidden = self.adapter.embed(token[:, None], self.rows[0].features[:0])["inputs_embeds"]
        layers = self.adapter.layers
        steps = [{step.layer: step for step in row.steps if step.site == "cache"} for row in self.rows]
        cache = Recorder(self.cache, {layer - 1 for own in steps for layer in own})
        unseen: list[Tensor | None] = [None] * len(self.rows)
        entered = hidden
        seen_at, seen_rotary = self.stages[0], None
        for stage, end in zip(self.stages, [*(stage.first for stage in self.stages[1:]), len(layers)]):
            stage.grow()
            rotary = self._model.rotary_emb(hidden, stage.position)
            allowed = self._step_mask(stage, unseen, hidden, stage.first)
            for index in range(stage.first, end):
                if any(index in own for own in steps):
                    at = [own.get(index) for own in steps]
                    self._look(index, at, entered, hidden, seen_rotary, seen_at, cache, unseen)
                    allowed = self._step_mask(stage, unseen, hidden, index)
                entered, seen_at, seen_rotary = hidden, stage, rotary
                hidden = self._layer(index, hidden, allowed, rotary, cache, stage)
            stage.position = stage.position + 1
        return self.adapter.head(hidden[:, -1])

    def _look(
        self,
        index: int,
        steps: list[Step | None],
        entered: Tensor,
        hidden: Tensor,
        rotary: Any,
        stage: Stage,
        cache: Recorder,
        unseen: list[Tensor | None],
    ) -> None:
        """Let the steps at layer `index` choose what the layers from it on attend to in this decoding step."""
        keys, values = cache.seen.pop(index - 1)
        for b, step in enumerate(steps):
            if step is None or not len(stage.origin[b]):
                continue
            start, last = stage.start[b], keys.shape[2] - 1
            view = LayerView(
                before=self.adapter.layers[index - 1],
                layer=self.adapter.layers[index],
                entered=entered[b],
                rotary=(rotary[0][b], rotary[1][b]),
                keys=keys[b, :, start:],
                values=values[b, :, start:],
                hidden=hidden[b],
                visual=stage.columns[b].to(hidden.device) - start,
                text=torch.zeros(0, dtype=torch.int64),
                given={"entered": torch.tensor(self.entered[b]), "length": torch.tensor(last + 1 - start)},
                place=last - start,
            )
            reduction = step.select(view.signals(step.signals), stage.layouts[b])
            gone = torch.ones(len(stage.origin[b]), dtype=torch.bool)
            gone[reduction.keep.cpu()] = False
            unseen[b] = stage.origin[b][gone] if bool(gone.any()) else None

    def _step_mask(self, stage: Stage, unseen: list[Tensor | None], hidden: Tensor, layer: int) -> Any:
        """The mask of one decoding step from `layer` on, which has not seen the new token yet."""
        if all(numbers is None for numbers in unseen):
            return self._mask(stage.real, 1, hidden)
        width = self.cache.layers[layer].get_seq_length() + 1
        return self._mask(stage.without(unseen, width, hidden.device), 1, hidden)

    def shrink(self, going: list[int]) -> None:
        """Only these rows go on."""
        index = torch.tensor(going, device=self.adapter.model.device)
        self.cache.batch_select_indices(index)
        self.alive = [self.alive[i] for i in going]
        self.rows = [self.rows[i] for i in going]
        self.entered = [self.entered[i] for i in going]
        for stage in self.stages:
            stage.shrink(index)

    # ---- both

    def _mask(self, real: Tensor | None, new: int, hidden: Tensor) -> Any:
        return attention_mask(real, new, self._config, hidden.dtype, hidden.device)

    def _layer(self, index: int, hidden: Tensor, mask: Any, rotary: Rotary, cache: Any, stage: Stage) -> Tensor:
        layer: Any = self.adapter.layers[index]
        thin = [next((t for at, t in own if at == index), None) for own in self._thin(stage)]
        if any(part is not None for part in thin):
            return thinned(layer, hidden, stage.real, rotary, cache, index, thin, stage.columns)
        # Position ids are left out: flash attention would take gaps in them for packed sequences.
        out = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=True)
        return out[0] if isinstance(out, tuple) else out

    def _thin(self, stage: Stage) -> list[list[tuple[int, Any]]]:
        """For each row (layer, what it leaves out) of its steps at site "compute"; made once a stage."""
        if stage.thin is None:
            stage.thin = [
                [(step.layer, step.select({}, layout)) for step in row.steps if step.site == "compute" and len(layout)]
                for row, layout in zip(self.rows, stage.layouts)
            ]
        return stage.thin
