"""Exact costs before anything runs: FLOPs, bytes and tokens of every stage, from a model's shape and a request.

A FLOP is one multiplication or addition of a matrix product, convolution or attention (2·m·n·k for a product), which
is what `torch.utils.flop_counter` counts; norms and activations, well under a percent, are left out by both. Bytes are
what has to be read at least once: weights and cache. Activations are left out, so byte counts are lower bounds.

Formulas, per layer (T tokens, width D, H heads and K key-value heads of size h, MLP width M, vocabulary V):
    projections       2·T·D·(H·h)·2 + 2·T·D·(K·h)·2         Vaswani et al. 2017; grouped queries: arXiv 2305.13245
    attention         4·H·h·(pairs), pairs = T² in the tower, T·(T + 1)/2 in a causal prefill, T + 1 for one new token
    MLP               2·T·D·M·2 in the tower, ·3 in the language model (gated: arXiv 2002.05202)
    head              2·D·V, for the last token only
    patch embedding   2·T·(3·patch²)·D                       arXiv 2010.11929
    connector         2·in·out of each linear layer, for each token of every view    NVILA, arXiv 2412.04468
                      (for each that is left where tokens leave before it)
    cache             2·layers·K·h·bytes for each token (keys and values)
T is that of each layer, and in the tower of each half of a block, where tokens leave on the way. Weights and caches of
a recipe are not formulas: a method builds its layer without values, and that is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from foveate.bench.counts import Request, tower_blocks, tower_rows
from foveate.bench.device import Device
from foveate.bench.roofline import Kinds, cache_kind, layer_kind, stage_ms
from foveate.bench.shape import ModelShape, bytes_of
from foveate.method import signal_for

STAGES = ("tower", "connector", "selection", "prefill", "decode")


def flops(shape: ModelShape, request: Request, *, causal: bool = True, selection: float = 0.0) -> dict[str, float]:
    """FLOPs by stage; "decode" is one new token after the prompt. causal=False counts masked pairs too, as a kernel
    without skipping executes (and as torch's counter counts)."""
    attention, linear = 4 * shape.heads * shape.head_size, 2 * shape.layer_params
    lengths = [request.text + visual for visual in request.per_layer or (request.kept,) * shape.layers]
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
    return {
        "tower": tower_flops(shape, request),
        "connector": float(2 * shape.connector_params * request.connector_rows),
        "selection": float(selection),
        "prefill": float(linear * sum(lengths) + attention * pairs + 2 * shape.head_params),
        "decode": float(linear * len(lengths) + attention * (sum(lengths) + len(lengths)) + 2 * shape.head_params),
    }


def tower_flops(shape: ModelShape, request: Request) -> float:
    """FLOPs of the tower: patch embedding, the linear layers of every row, CLS among them, and attention by view."""
    patches, _ = tower_rows(shape, request)
    width, mlp = shape.vision_width, shape.mlp_matrices * shape.vision_mlp
    work = 2 * shape.patch_inputs * width * patches
    for block in tower_blocks(shape, request):
        work += 2 * block.count * width * (4 * width * block.rows + mlp * block.fed) + 4 * width * block.pairs
    return float(work)


def weights(shape: ModelShape, dtype: str = "bfloat16", methods: Sequence[Any] = ()) -> dict[str, float]:
    """Bytes of the matrix weights that each stage reads: {"tower", "connector", "embedding", "llm"}.

    methods: of the weights socket; the layers of their parts are counted as they would be stored, scales included, by
    building them without values. Head and embeddings stay in `dtype`. Raises RecipeError when a layer does not fit.
    """
    size = bytes_of(dtype)
    linears = shape.linears()
    stored = {part: float(size * sum(i * o * n for i, o, n in layers)) for part, layers in linears.items()}
    for method in methods:
        for part in method.parts:
            stored[part] = float(sum(n * _stored_bytes(method, part, i, o) for i, o, n in linears[part]))
    head = float(shape.head_params * size)
    return {
        "tower": stored["vision_tower"] + shape.patch_inputs * shape.vision_width * size,
        "connector": stored["mm_projector"],
        "embedding": 0.0 if shape.tied else head,
        "llm": stored["llm"] + head,
    }


def _stored_bytes(method: Any, part: str, inputs: int, outputs: int) -> int:
    """Bytes of one linear layer under a weights method."""
    from foveate.weights.base import module_bytes

    return module_bytes(_made(method, part, inputs, outputs))


def _made(method: Any, part: str, inputs: int, outputs: int) -> Any:
    """The layer that a weights method puts in the place of a linear one, without values. Raises RecipeError."""
    from torch import nn

    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    method.check_layer(f"{part} {inputs} -> {outputs}", linear)
    return method.empty(linear)


def kv_bytes(shape: ModelShape, dtype: str = "bfloat16", method: Any = None) -> float:
    """Cache bytes of one token of one request: all layers, keys and values. method: of the cache socket; its own layer
    is filled and measured, scales and windows included."""
    if method is None:
        return float(2 * shape.layers * shape.kv_heads * shape.head_size * bytes_of(dtype))
    from types import SimpleNamespace

    import torch

    from foveate.cache.base import bytes_per_token

    cache = SimpleNamespace(layers=method.layers(shape.layers))
    return bytes_per_token(cache, shape.kv_heads, shape.head_size, getattr(torch, dtype))


def bytes_moved(shape: ModelShape, request: Request, stored: dict[str, float], kv: float) -> dict[str, float]:
    """Bytes that each stage reads or writes at least: its weights once, and the cache. stored: of `weights`; kv: bytes
    of one cached token, of `kv_bytes`."""
    used = float(request.views > 0)
    return {
        "tower": stored["tower"] * used,
        "connector": stored["connector"] * used,
        "selection": 0.0,
        "prefill": stored["llm"] + kv * request.cached,
        "decode": stored["llm"] + kv * (request.cached + 1),
    }


def activation_bytes(shape: ModelShape, request: Request, dtype: str = "bfloat16", kinds: Kinds | None = None) -> float:
    """Bytes of intermediate results at the worst moment of one request, beside weights and cache.

    Of the stages that run one after the other the largest counts: in the tower all views at once, whole as they enter
    it, in the prefill the whole prompt. Alive at the worst moment of a block are its input and residual, and, in the
    MLP, what goes in, both wide results of a gated MLP, and what comes out. The pixels are float32 on their way in.
    Where a recipe stores a part as another kind of layer, its largest weight is made anew, from one byte each in three
    steps.
    """
    size = bytes_of(dtype)
    _, rows = tower_rows(shape, request)
    tower = rows * (3 * shape.vision_width + 2 * shape.vision_mlp) * size
    pixels = rows * shape.patch_inputs * (4 + size)
    wide = max([shape.width, *(outputs for _, outputs in shape.connector)])
    left = tower_blocks(shape, request)[-1].fed
    connector = request.connector_rows * 2 * wide * size + left * shape.vision_width * size
    prefill = request.prompt * (4 * shape.width + 3 * shape.mlp) * size
    made = {
        part: max(i * o for i, o, _ in shape.linears()[part]) * (1 + 3 * size)
        for part, kind in (kinds.weights.items() if kinds else ())
        if kind
    }
    tower, connector = tower + pixels + made.get("vision_tower", 0), connector + made.get("mm_projector", 0)
    return float(max(tower, connector, prefill + made.get("llm", 0)))


def estimate(
    shape: ModelShape,
    request: Request,
    device: Device,
    *,
    dtype: str = "bfloat16",
    effect: Effect | None = None,
    stored: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Everything that `foveate plan --json` prints: {"tokens", "flops", "bytes", "ms"}, each by stage, and
    "unmeasured": kinds of layers and caches whose times are those of dense ones.

    effect: what a recipe changes. stored: measured weight bytes (of `weights` form) instead of the formula's.
    """
    effect = effect or Effect()
    request = effect.apply(request, shape)
    stored = stored or weights(shape, dtype, effect.weights)
    kv = kv_bytes(shape, dtype, effect.cache)
    work = flops(shape, request, selection=effect.selection_flops(shape, request))
    moved = bytes_moved(shape, request, stored, kv)
    kinds = effect.kinds(shape)
    activations = activation_bytes(shape, request, dtype, kinds)
    times = stage_ms(shape, request, device, dtype, work, moved, kinds)
    peak = sum(stored.values()) + kv * (request.cached + request.new) + activations
    first = sum(times[stage] for stage in STAGES[:-1])
    return {
        "tokens": {
            "text": request.text,
            "visual": request.visual,
            "kept": request.kept,
            "per_layer": list(request.per_layer or (request.kept,) * shape.layers),
            "prompt": request.prompt,
            "views": request.views,
        },
        "flops": {**work, "ttft": sum(work[stage] for stage in STAGES[:-1])},
        "bytes": {
            "weights": sum(stored.values()),
            "kv_per_token": kv,
            "kv": kv * (request.cached + request.new),
            "activations": activations,
            "peak": peak,
            "process": peak + device.process if device.process else None,
            "read_prefill": moved["prefill"],
            "read_decode": moved["decode"],
        },
        "ms": {**times, "ttft": first, "total": first + times["decode"] * (request.new - 1)},
        "unmeasured": device.unmeasured(kinds, dtype),
    }


@dataclass(frozen=True)
class Effect:
    """What a recipe changes about the cost of a request. reducers: in the order in which they act; weights: methods of
    that socket; cache: the one cache method, or None."""

    reducers: tuple[Any, ...] = ()
    weights: tuple[Any, ...] = ()
    cache: Any = None

    @classmethod
    def of(cls, recipe: Any) -> Effect:
        """The effect of a Recipe, or of None."""
        if not recipe:
            return cls()
        return cls(recipe.of("reduce"), recipe.of("weights"), next(iter(recipe.of("cache")), None))

    def kinds(self, shape: ModelShape) -> Kinds:
        """What the recipe stores weights and cache as."""
        linears = shape.linears()
        found = {
            part: layer_kind(_made(method, part, *linears[part][0][:2]))
            for method in self.weights
            for part in method.parts
            if linears[part]
        }
        return Kinds(found, cache_kind(self.cache) if self.cache else "", bool(self.reducers))

    def apply(self, request: Request, shape: ModelShape) -> Request:
        """The request with the tokens that stay in the tower, for the connector and in each decoder layer; exact for
        methods whose budget is."""
        if not self.reducers:
            return request
        from foveate.reduce.base import tokens_left

        blocks, connected, layers = tokens_left(self.reducers, request.groups, _site_shape(shape))
        return replace(
            request,
            connector_rows=request.connector_rows if connected is None else connected,
            kept=layers[-1],
            per_layer=() if len(set(layers)) == 1 else layers,
            per_block=blocks,
        )

    def selection_flops(self, shape: ModelShape, request: Request) -> float:
        """What it costs to tell the methods what they ask for, in products that the model does not make anyway.

        In the tower: query-key products of a block (of the last, where tokens leave in between) for each received
        attention that is asked for, because fast attention kernels do not return their map. Products of keys of one
        head's width, by which tokens are matched, are under half a percent of a block and left out. In the language
        model: queries of the rows that are asked for, their products with all keys, and for signals named "next_..."
        the keys as well. All text counts as rows of text. request: as `apply` returns it.
        """
        from foveate.adapters.shape import INSIDE, steps_of

        site = _site_shape(shape)
        steps = steps_of(self.reducers, site)
        needs = {need for step in steps if step.site not in INSIDE for need in step.signals}
        told = {signal_for(need, lambda name: site.cls or not name.startswith("cls_")) or "" for need in needs}
        maps = sum(name.startswith("received_attention") for name in told)
        last = tower_blocks(shape, request)[-1]
        layers = request.per_layer or (request.kept,) * shape.layers
        inside = (step for step in steps if step.site == "llm")
        rows = sum(_row_flops(shape, step, request.text, layers[step.layer - 1]) for step in inside)
        return float(2 * shape.vision_width * maps * last.pairs / max(1, last.count) + rows)


def _site_shape(shape: ModelShape) -> Any:
    from foveate.adapters.shape import Shape

    more: dict[str, Any] = {"sites": shape.sites} if shape.sites else {}
    if shape.sizes is not None:
        more |= {"cls": bool(shape.sizes.cls), "heads": shape.sizes.heads}
    return Shape(shape.vision_layers, shape.layers, text_heads=shape.heads, **more)


def _row_flops(shape: ModelShape, step: Any, text: int, visual: int) -> float:
    """FLOPs of the signals of a step inside the language model, where `text` and `visual` tokens meet."""
    queries, prompt = shape.heads * shape.head_size, text + visual
    keys = 2 * prompt * shape.width * shape.kv_heads * shape.head_size
    rows = {"last": 1, "text": text, "visual": visual}
    total = float(keys) if any(name.startswith("next_") for name in step.signals) else 0.0
    for name in step.signals:
        count = rows.get(name.removeprefix("next_").removesuffix("_attention"), 0) * name.endswith("_attention")
        total += count * (2 * shape.width * queries + 2 * queries * prompt)
    return total
