"""The calibrator: samples stream through a model part by part and block by block, and methods change each block.

One pass in bounded memory: of all samples only the hidden states before the current block exist (in memory, or with a
state folder on disk), and one block computes at a time. The statistics that all methods ask for are taken together.
A crash is resumed at the block where it happened, if there is a state folder.

Blocks are called as the model's own forward would call them: their arguments (masks, rotary tables, windows) are
recorded once with blocks that hand their input through, so no family's code is repeated here. What a model adds between
two blocks (deep visual features, for instance) is recorded too.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.errors import InputError, RecipeError, UnsupportedError
from foveate.progress import progress
from foveate.weights.base import PARTS, CalibratedMethod, WeightMethod, linear_layers
from foveate.weights.recording import Call, record_calls
from foveate.weights.samples import Example, draw_examples, source_hash, token_weights
from foveate.weights.state import State
from foveate.weights.statistics import Statistics

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter
    from foveate.vlm import VLM

_log = logging.getLogger("foveate")


class Block:
    """One block of a part while it is being compressed: its layers, their statistics, the samples in front of it.

    statistics: by name of the layer; None for a layer that no sample reaches.
    """

    def __init__(self, stream: Stream, index: int) -> None:
        self.stream, self.index, self.part = stream, index, stream.part
        self.name, self._owner, self._attribute = stream.places[index]
        self.module: nn.Module = getattr(self._owner, self._attribute)
        self.statistics: dict[str, Statistics | None] = {}
        self.survey: dict[int, Any] = stream.surveys
        self.original = {name: getattr(owner, leaf) for name, owner, leaf in self._layers()}
        """The linear layers as they were before any method of the recipe."""
        for name, linear in self.original.items():
            if not bool(torch.isfinite(linear.weight).all()):
                raise InputError(
                    f"{self.full_name(name)} has NaN or infinite weights, so nothing can be made of it; "
                    "use a checkpoint without"
                )

    @property
    def calls(self) -> list[Call]:
        return self.stream.calls

    def _layers(self, kinds: tuple[type, ...] = (nn.Linear,)) -> Iterator[tuple[str, nn.Module, str]]:
        if type(self.module) in kinds:
            yield "", self._owner, self._attribute
        else:
            yield from linear_layers(self.module, self.stream.stop, kinds)

    def linears(self, method: WeightMethod) -> dict[str, nn.Linear]:
        """The layers that `method` takes, by their name in the block."""
        found = self._layers(method.takes)
        return {name: getattr(owner, leaf) for name, owner, leaf in found if leaf not in method.skip}

    def full_name(self, name: str) -> str:
        """The layer's name for messages."""
        return ".".join(piece for piece in (self.part, self.name, name) if piece)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in the place of the layer `name`."""
        if not name:
            setattr(self._owner, self._attribute, module)
            self.module = module
            return
        owner, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(owner) if owner else self.module, leaf, module)

    def survey_of(self, method: WeightMethod) -> Any:
        """What `method.survey` found."""
        return self.survey.get(self.stream.methods.index(method))

    def hidden(self, call: int) -> Tensor:
        """[..., T, D] the input of this block for one call, on the device of the block."""
        return self.stream.hidden(call)

    def run(self, call: int, hidden: Tensor | None = None) -> Tensor:
        """The block's output for one call."""
        args, kwargs = self.calls[call].arguments[self.index]
        if hidden is None and not self.stream.chained:
            return self.module(*args, **kwargs)
        out = self.module(self.hidden(call) if hidden is None else hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def collect(self, kinds: Collection[str], names: Collection[str] | None = None) -> Iterator[tuple[int, Tensor]]:
        """Run all samples, yielding (call, output), while statistics of the layers (all, or `names`) are taken."""
        layers = {name: module for name, module in self._current() if names is None or name in names}
        found: dict[str, Statistics] = {name: Statistics(kinds) for name in layers} if kinds else {}
        weights: Tensor | None = None

        def hook(name: str) -> Any:
            def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                x = args[0]
                fits = weights is not None and x.dim() > 1 and x.shape[-2] == len(weights)
                found[name].add(x, weights if fits else None)

            return add

        handles = [module.register_forward_hook(hook(name)) for name, module in layers.items() if kinds]
        try:
            for number, call in enumerate(self.calls):
                weights = token_weights(call.modality, self.stream.tokens)
                out = self.run(number)
                if not bool(torch.isfinite(out).all()):
                    raise InputError(
                        f"{self.part} block {self.index} ({self.name}) gives NaN or infinite activations for "
                        f"calibration sample {call.example}; leave that sample out, or load the model in float32"
                    )
                yield number, out
        finally:
            for handle in handles:
                handle.remove()
        for name, statistics in found.items():
            ran = statistics.tokens > 0
            if ran and not statistics.finite():
                raise InputError(
                    f"{self.full_name(name)} gets NaN or infinite activations from calibration; load it in float32"
                )
            self.statistics[name] = statistics if ran else None

    def refresh(self, kinds: Collection[str], names: Collection[str]) -> None:
        """Take the statistics of some layers anew, with the block as it is now."""
        for _ in self.collect(kinds, names):
            pass

    def _current(self) -> list[tuple[str, nn.Module]]:
        return [(name, self.module.get_submodule(name) if name else self.module) for name in self.original]

    @torch.no_grad()
    def record(
        self, modules: dict[str, nn.Module], dense: bool = False
    ) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]]:
        """(args, kwargs, output) of each call of each of `modules` while all samples pass; one entry per sample.

        dense: samples as the dense blocks before would hand them over (where a method is `distort`).
        """
        seen: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]] = {name: [] for name in modules}

        def hook(name: str) -> Any:
            def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                seen[name].append((args, kwargs, output[0] if isinstance(output, tuple) else output))

            return keep

        handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
        try:
            for number in range(len(self.calls)):
                self.run(number, self.stream.dense_hidden(number) if dense else None)
        finally:
            for handle in handles:
                handle.remove()
        return seen


class Stream:
    """One part of a model with the samples on their way through it.

    places: (name, owner, attribute) of each block. chained: the output of a block is the input of the next (false for
    the projector, which is one block with its own arguments).
    """

    def __init__(
        self, vlm: VLM, part: str, methods: Sequence[WeightMethod], examples: list[Example], state: State | None
    ) -> None:
        self.adapter: Adapter = vlm.adapter
        self.part, self.methods, self.examples, self.state = part, list(methods), examples, state
        parts = vlm.adapter.parts()
        self.stop = {id(module) for name, module in parts.items() if name != part}
        self.root = parts[part]
        places, self.chained = _places(vlm.adapter, part)
        self.places = [p for p in places if p[2].isdigit() or any(p[2] not in m.skip for m in methods)]
        self.groups: dict[Any, Any] = {}
        """Scale groups that were found in a block of the same form (see `foveate.weights.structure`)."""
        self.twice = any(getattr(m, "distort", False) for m in methods)
        """Whether what dense blocks would give is kept beside what compressed ones do: under the calls' numbers from
        the number of calls on."""
        self.tokens = next((m.tokens for m in methods if isinstance(m, CalibratedMethod)), "all")
        self.surveys: dict[int, Any] = {}
        self.calls: list[Call] = []
        self._hidden: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        return next(self.root.parameters()).device

    def hidden(self, call: int) -> Tensor:
        found = self.state.hidden(self.part, call) if self.state else self._hidden[call]
        return found.to(self.device)

    def dense_hidden(self, call: int) -> Tensor:
        """As `hidden`, had no block before been changed."""
        return self.hidden(len(self.calls) + call) if self.twice else self.hidden(call)

    @torch.no_grad()
    def start(self) -> None:
        """Record how the samples reach the blocks."""
        blocks = [m for m in (getattr(owner, leaf) for _, owner, leaf in self.places) if type(m) is not nn.Linear]
        self.calls, first = record_calls(self.adapter, self.part, blocks, self.examples, self.chained)
        if not self.calls:
            raise InputError(
                f"no calibration sample passes through {self.part}; give calib= data with pictures or clips"
                if self.part != "llm"
                else "there is no calibration sample for the language model"
            )
        if self.chained and (self.state is None or self.state.next_block(self.part) == 0):
            self._keep(first * 2 if self.twice else first, 0)

    def _keep(self, hidden: list[Tensor], index: int) -> None:
        if self.state:
            for call, tensor in enumerate(hidden):
                self.state.put_hidden(self.part, index, call, tensor)
            self.state.advance(self.part, index)
        else:
            self._hidden = hidden

    @torch.no_grad()
    def dense(self, kinds: Collection[str]) -> Iterator[Block]:
        """Every block that runs, with its statistics, unchanged: what surveys look at."""
        state, self.state, kept = self.state, None, self._hidden
        if self.chained:
            held = [state.hidden(self.part, call) for call in range(len(self.calls))] if state else kept
            self._hidden = list(held)
        try:
            for index in range(len(self.calls[0].arguments)):
                block = Block(self, index)
                for call, out in block.collect(kinds):
                    if self.chained:
                        self._hidden[call] = self._added(call, index + 1, out)
                yield block
        finally:
            self.state, self._hidden = state, kept

    def advance(self, call: int, index: int, hidden: Tensor) -> Tensor:
        """The input of block `index` + 1 for one call, from that of block `index`."""
        _, owner, attribute = self.places[index]
        args, kwargs = self.calls[call].arguments[index]
        out = getattr(owner, attribute)(hidden, *args, **kwargs)
        return self._added(call, index + 1, out[0] if isinstance(out, tuple) else out)

    def example(self, call: Call) -> Example:
        """The sample that a call belongs to."""
        return next(example for example in self.examples if example.number == call.example)

    def _added(self, call: int, index: int, hidden: Tensor) -> Tensor:
        extra = self.calls[call].added.get(index)
        return hidden if extra is None else hidden + extra.to(hidden)

    def run(self, quiet: bool = False) -> None:
        """Let the methods change every block in turn."""
        first = self.state.next_block(self.part) if self.state else 0
        for index in range(first):
            self._restore(index)
        if first == len(self.places):
            return
        self.start()
        if first:
            _log.warning("resuming at block %d of %d of %s", first, len(self.places), self.part)
            self.surveys = self.state.surveys(self.part) if self.state else {}
        else:
            self._survey()
        kinds = {kind for m in self.methods if isinstance(m, CalibratedMethod) for kind in m.kinds}
        sequential = self.twice or any(m.sequential for m in self.methods if isinstance(m, CalibratedMethod))
        ran, idle = len(self.calls[0].arguments), 0
        with progress(f"compress {self.part}: block", len(self.places), quiet=quiet) as bar:
            for index in range(first, len(self.places)):
                bar.update(index, samples=len(self.calls))
                block = Block(self, index)
                following: list[Tensor] = []
                if index < ran:
                    following = self._step(block, kinds, sequential, index + 1 == ran)
                else:  # what the model never runs (layers behind the one that is read): nothing is known of it
                    idle += len(block.original)
                    self._compress(block)
                if self.state:
                    self.state.put_block(self.part, index, block.module)
                self._keep(following, index + 1)
        if idle:
            _log.warning("%s: %d linear layers are never reached; they were treated without data", self.part, idle)

    def _survey(self) -> None:
        for number, method in enumerate(self.methods):
            if isinstance(method, CalibratedMethod) and (found := method.survey(self)) is not None:
                self.surveys[number] = found
        if self.state:
            self.state.put_surveys(self.part, self.surveys)

    def _step(self, block: Block, kinds: set[str], sequential: bool, last: bool) -> list[Tensor]:
        """Collect, compress; the inputs of the next block."""
        going = self.chained and not last
        dense: list[Tensor] = []
        for _, out in block.collect(kinds):
            if going and not sequential:
                dense.append(out)
        calls, beside = range(len(self.calls)), []
        if going and self.twice:
            with torch.no_grad():
                beside = [block.run(number, self.dense_hidden(number)) for number in calls]
        self._compress(block)
        if not going:
            return []
        if sequential:
            with torch.no_grad():
                dense = [block.run(number) for number in calls]
        return [self._added(call, block.index + 1, out) for outs in (dense, beside) for call, out in enumerate(outs)]

    def _compress(self, block: Block) -> None:
        for method in self.methods:
            with torch.no_grad():
                method.compress_(block)

    def _restore(self, index: int) -> None:
        block = Block(self, index)
        for method in self.methods:
            for name, linear in block.linears(method).items():
                block.replace(name, method.empty_for(block.full_name(name), linear))
        assert self.state is not None
        self.state.load_block(self.part, index, block.module)


def compress_(
    vlm: VLM, methods: Sequence[WeightMethod], *, state: str | Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Let `methods` change `vlm`, whose modules must be its own (tensors may be shared); what was seen, as JSON.

    state: a folder from which a run that was killed is resumed; removed at the end. Raises RecipeError (methods on one
    part that want different calibration data), InputError (data, NaN activations), UnsupportedError (a Hessian that
    cannot be factored), CheckpointError (the state folder cannot be written).
    """
    chosen = {part: [m for m in methods if part in m.parts] for part in PARTS}
    sources = {part: _source(found) for part, found in chosen.items()}
    manifest = {part: _manifest(source) for part, source in sources.items() if source}
    saved = State(state, _key(vlm, methods, manifest)) if state and manifest else None
    drawn: dict[tuple[Any, ...], list[Example]] = {}
    for part, found in chosen.items():
        source = sources[part]
        if not found:
            continue
        if source is None:
            _convert(vlm, part, found)
            continue
        try:
            if source not in drawn:
                drawn[source] = draw_examples(vlm, *source[:4])
            Stream(vlm, part, found, drawn[source], saved).run(quiet)
        except (InputError, RecipeError, UnsupportedError):  # another try takes other data, another recipe or model
            if saved:
                saved.clear()
            raise
    if saved:
        saved.clear()
    return manifest


def _convert(vlm: VLM, part: str, methods: Sequence[WeightMethod]) -> None:
    """Methods that need no data, layer by layer."""
    stream = Stream(vlm, part, methods, [], None)
    for index in range(len(stream.places)):
        stream._compress(Block(stream, index))


def _source(methods: Sequence[WeightMethod]) -> tuple[Any, ...] | None:
    """The calibration data of one part, or None when no method needs any."""
    wanting = [m for m in methods if isinstance(m, CalibratedMethod) and m.needs_data]
    for method in wanting[1:]:
        if method.source != wanting[0].source:
            raise RecipeError(
                f"{wanting[0].name} and {method.name} share a part but want different calibration data; "
                "give both the same calib, samples, seqlen, seed and tokens"
            )
    return wanting[0].source if wanting else None


def _manifest(source: tuple[Any, ...]) -> dict[str, Any]:
    calib, samples, seqlen, seed, tokens = source
    return {
        "source": calib,
        "content": source_hash(calib),
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "tokens": tokens,
    }


def _key(vlm: VLM, methods: Sequence[WeightMethod], manifest: dict[str, Any]) -> dict[str, Any]:
    """What a state must agree on: the recipe, the data, and the weights (a sample of each tensor)."""
    total = 0.0
    for tensor in vlm.model.state_dict().values():
        flat = tensor.flatten()
        total += float(flat[:: max(1, flat.numel() // 64)].double().sum())
    return {"recipe": [m.to_dict() for m in methods], "data": manifest, "weights": repr(total), "before": vlm.name}


def _places(adapter: Adapter, part: str) -> tuple[list[tuple[str, nn.Module, str]], bool]:
    """(name, owner, attribute) of a part's blocks and of linear layers outside them; whether blocks are a chain."""
    parts = adapter.parts()
    root = parts[part]
    others = {id(module) for name, module in parts.items() if name != part}
    stack = {"llm": lambda: adapter.layers, "vision_tower": lambda: _stack(adapter, root)}.get(part, lambda: None)()
    if stack is None:
        owner, attribute = _owner(adapter.model, root)
        return [("", owner, attribute)], False
    prefix = next((name for name, module in root.named_modules() if module is stack), "")
    places: list[tuple[str, nn.Module, str]] = [(f"{prefix}.{i}".strip("."), stack, str(i)) for i in range(len(stack))]
    loose = linear_layers(root, others | {id(stack)})
    return places + [(name, owner, leaf) for name, owner, leaf in loose], True


def _stack(adapter: Adapter, tower: nn.Module) -> nn.ModuleList:
    """The module list of the tower's blocks."""
    first = adapter.blocks[0]
    return next(m for m in tower.modules() if isinstance(m, nn.ModuleList) and any(child is first for child in m))


def _owner(model: nn.Module, wanted: nn.Module) -> tuple[nn.Module, str]:
    for module in model.modules():
        for attribute, child in module.named_children():
            if child is wanted:
                return module, attribute
    raise AssertionError("a part is not inside its model")
