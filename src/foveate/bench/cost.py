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
    cache             2·layers·K·h·bytes for each token (keys and values)
Weights and caches of a recipe are not formulas: a method builds its layer without values, and that is measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from foveate.bench.device import Device
from foveate.bench.roofline import stage_ms
from foveate.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from foveate.adapters.sizes import Sizes
    from foveate.data.plan import MediaPlan, Plan
    from foveate.data.spec import PreprocessSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
CLIP = (1280, 720)
"""(width, height) of a clip of which only the number of frames is known."""
STAGES = ("tower", "connector", "selection", "prefill", "decode")


@dataclass(frozen=True)
class ModelShape:
    """Every number of a model that a cost depends on. Made by `from_config`; nothing is loaded."""

    patches: int
    """Patches of one view."""
    patch_inputs: int
    """Values of one patch: channels x patch x patch."""
    vision_layers: int
    """Layers that run: those after the selected hidden state are not computed."""
    vision_width: int
    vision_mlp: int
    connector: tuple[tuple[int, int], ...]
    """(inputs, outputs) of the connector's linear layers."""
    view_tokens: int
    """Tokens of one view after the connector."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocab: int
    tied: bool = False
    sizes: Sizes | None = None
    """What else a family of transformers says of its tower and connector; None: NVILA."""
    sites: tuple[str, ...] = ()
    """Where the family lets reducers act; empty: anywhere."""

    @classmethod
    def from_config(cls, config: Any, spec: PreprocessSpec) -> ModelShape:
        """From a config of any family and its preprocessing."""
        from foveate.adapters import ADAPTERS

        text, kind = config.get_text_config(), ADAPTERS.get(config.model_type)
        heads = text.num_attention_heads
        if hasattr(config, "num_vision_layers"):
            vision, sizes = config.vision_config, None
            tower: dict[str, Any] = {
                "patch_inputs": getattr(vision, "num_channels", 3) * spec.patch_size**2,
                "vision_layers": config.num_vision_layers,
                "vision_width": vision.hidden_size,
                "vision_mlp": vision.intermediate_size,
                "connector": connector_linears(config.projector_type, config.mm_hidden, text.hidden_size),
            }
        else:
            sizes = kind.sizes(config)
            tower = {
                "patch_inputs": sizes.patch_inputs,
                "vision_layers": sizes.layers,
                "vision_width": sizes.width,
                "vision_mlp": sizes.mlp,
                "connector": sizes.connector,
            }
        return cls(
            **tower,
            sizes=sizes,
            sites=kind.sites,
            patches=spec.side**2,
            view_tokens=spec.token_side**2,
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp=text.intermediate_size,
            vocab=text.vocab_size,
            tied=bool(getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False)),
        )

    @property
    def tower_params(self) -> int:
        """Matrix weights of the tower's layers that run."""
        return self.patch_inputs * self.vision_width + self.vision_layers * self.tower_layer_params

    @property
    def tower_layer_params(self) -> int:
        """Matrix weights of one layer of the tower."""
        return 4 * self.vision_width**2 + self.mlp_matrices * self.vision_width * self.vision_mlp

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP of the tower: 3 where it is gated."""
        return self.sizes.mlp_matrices if self.sizes else 2

    @property
    def connector_params(self) -> int:
        """Matrix weights of the connector."""
        return sum(inputs * outputs for inputs, outputs in self.connector)

    @property
    def layer_params(self) -> int:
        """Matrix weights of one layer of the language model."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return 2 * self.width * queries + 2 * self.width * keys + 3 * self.width * self.mlp

    @property
    def head_params(self) -> int:
        """Matrix weights of the output head."""
        return self.width * self.vocab

    def linears(self) -> dict[str, list[tuple[int, int, int]]]:
        """(inputs, outputs, how many) of the linear layers of each part; the output head is not among them."""
        v, m, d = self.vision_width, self.vision_mlp, self.width
        queries, keys, n = self.heads * self.head_size, self.kv_heads * self.head_size, self.layers
        k = self.vision_layers
        return {
            "vision_tower": [(v, v, 4 * k), (v, m, (self.mlp_matrices - 1) * k), (m, v, k)],
            "mm_projector": [(inputs, outputs, 1) for inputs, outputs in self.connector],
            "llm": [(d, queries, n), (d, keys, 2 * n), (queries, d, n), (d, self.mlp, 2 * n), (self.mlp, d, n)],
        }


@dataclass(frozen=True)
class Request:
    """What one request asks for, in counts: `views` through the tower, `connector_rows` tokens through the connector.

    text: tokens that are no visual features (separators among them). visual: features before reduction; kept: after.
    groups: per picture or clip the sizes of its encoded views in tokens, which reducers share their budgets over.
    per_layer: visual tokens that each decoder layer sees, where that differs; kept is then what the last one sees.
    new: answer tokens. grids: (rows, columns) of patches of each view, where they differ from the model's usual ones.
    """

    views: int = 0
    connector_rows: int = 0
    text: int = 0
    visual: int = 0
    kept: int = 0
    groups: tuple[tuple[int, ...], ...] = ()
    new: int = 1
    per_layer: tuple[int, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_plan(cls, plan: Plan, shape: ModelShape, *, new: int = 1) -> Request:
        """Counts of a plan, all visual tokens kept."""
        media = [cls.of_media(item, shape, plan.spec) for item in plan.media]
        visual = sum(part.visual for part in media)
        return cls.join(media, text=plan.num_tokens - visual, new=new)

    @classmethod
    def of_media(cls, media: MediaPlan, shape: ModelShape, spec: PreprocessSpec) -> Request:
        """Counts of one picture or clip; its separators are `text`."""
        if shape.sizes is not None:
            return cls._of_family(media, shape.sizes, spec)
        if media.kind == "video":
            groups = tuple(level.rows * level.cols for level in media.levels for _ in range(level.units))
            # Pooling over time comes after the connector, which therefore sees every frame of a clip.
            rows = len(media.views) * shape.view_tokens
        else:
            units, height, width = media.grid
            rows = units * height * width
            groups = (shape.view_tokens,) * (rows // shape.view_tokens)
        visual = sum(groups)
        return cls(len(media.views), rows, media.num_tokens - visual, visual, visual, (groups,))

    @classmethod
    def _of_family(cls, media: MediaPlan, sizes: Sizes, spec: PreprocessSpec) -> Request:
        from foveate.adapters.layouts import view_sizes

        width, height = media.view_size
        views = len(media.views) // (spec.temporal_patch if media.kind == "video" else 1)
        rows, cols = height // spec.patch_size, width // spec.patch_size
        groups = view_sizes(media, spec)
        visual = sum(groups)
        connected = visual if sizes.gathers else views * rows * cols // sizes.joined
        grids = ((rows, cols),) * views
        return cls(views, connected, media.num_tokens - visual, visual, visual, (groups,), grids=grids)

    @classmethod
    def join(cls, media: Sequence[Request], *, text: int, new: int = 1) -> Request:
        """One request of several pictures and clips. text: all tokens that are no visual features."""
        visual = sum(part.visual for part in media)
        return cls(
            views=sum(part.views for part in media),
            connector_rows=sum(part.connector_rows for part in media),
            text=text,
            visual=visual,
            kept=visual,
            groups=tuple(group for part in media for group in part.groups),
            new=new,
            grids=tuple(grid for part in media for grid in part.grids),
        )

    @property
    def prompt(self) -> int:
        """Tokens that the language model reads."""
        return self.text + max([self.kept, *self.per_layer])

    @property
    def cached(self) -> float:
        """Tokens of the prompt that the cache holds, mean over the decoder layers."""
        layers = self.per_layer or (self.kept,)
        return self.text + sum(layers) / len(layers)


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
    patches, rows = tower_rows(shape, request)
    work = 2 * shape.patch_inputs * shape.vision_width * patches
    work += 2 * shape.vision_layers * shape.tower_layer_params * rows
    return float(work + 4 * shape.vision_width * attended(shape, request))


def tower_rows(shape: ModelShape, request: Request) -> tuple[int, int]:
    """(patches, rows of the linear layers, CLS among them) of all views."""
    views = [rows * cols for rows, cols in request.grids] or [shape.patches] * request.views
    return sum(views), sum(views) + (shape.sizes.cls if shape.sizes else 0) * len(views)


def attended(shape: ModelShape, request: Request) -> int:
    """Pairs of rows that attend to each other, over all layers and views of the tower."""
    sizes = shape.sizes
    cls = sizes.cls if sizes else 0
    whole = sum((rows * cols + cls) ** 2 for rows, cols in request.grids) or request.views * (shape.patches + cls) ** 2
    if sizes is None or not sizes.window:
        return shape.vision_layers * whole
    edge = sizes.window
    windows = sum(_squares(rows, edge) * _squares(cols, edge) for rows, cols in request.grids)
    return sizes.full_layers * whole + (sizes.layers - sizes.full_layers) * windows


def _squares(length: int, edge: int) -> int:
    """Sum of the squared lengths of the pieces that a side of `length` is cut into, `edge` each but the last."""
    return length // edge * edge**2 + (length % edge) ** 2


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
    from torch import nn

    from foveate.weights.base import module_bytes

    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    method.check_layer(f"{part} {inputs} -> {outputs}", linear)
    return module_bytes(method.empty(linear))


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


def activation_bytes(shape: ModelShape, request: Request, dtype: str = "bfloat16") -> float:
    """Bytes of intermediate results at the worst moment of one request, beside weights and cache.

    Of the stages that run one after the other the largest counts: in the tower all views at once, in the prefill the
    whole prompt. Alive at the worst moment of a block are its input and residual, and, in the MLP, what goes in, both
    wide results of a gated MLP, and what comes out. The pixels are float32 on their way in.
    """
    size = bytes_of(dtype)
    _, rows = tower_rows(shape, request)
    tower = rows * (3 * shape.vision_width + 2 * shape.vision_mlp) * size
    pixels = rows * shape.patch_inputs * (4 + size)
    wide = max([shape.width, *(outputs for _, outputs in shape.connector)])
    connector = request.connector_rows * 2 * wide * size + rows * shape.vision_width * size
    prefill = request.prompt * (4 * shape.width + 3 * shape.mlp) * size
    return float(max(tower + pixels, connector, prefill))


def request_of_sizes(
    spec: PreprocessSpec,
    shape: ModelShape,
    *,
    images: Sequence[tuple[int, int]] = (),
    frames: int | None = None,
    text: int = 0,
    new: int = 1,
) -> Request:
    """The counts of a request of pictures of these (width, height), or of one clip of `frames` frames, without pixels.

    text: tokens of the prompt's text; the separators of the media are added. Sizes follow the same geometry as
    `foveate.data.plan`, each separator, and each mark or word around views, counted as one token. A clip is taken to
    be `CLIP` pixels large where that matters.
    """
    if spec.family:
        return _family_request(spec, shape, images, frames, text, new)
    from foveate.data.tiling import image_layout

    parts: list[Request] = []
    for width, height in images:
        _check_size(width, height, spec)
        layout = image_layout(width, height, spec, tiled=len(images) == 1)
        units, rows, cols = layout.grid
        visual = units * rows * cols
        groups = (shape.view_tokens,) * (visual // shape.view_tokens)
        # A picture ends in one separator; tiles of mode "dynamic" have one each, and a line feed of text.
        ends = 2 * units if spec.mode == "dynamic" and len(images) == 1 else 1
        parts.append(Request(len(layout.views), visual, ends, visual, visual, (groups,)))
    if frames:
        levels = spec.video_pool or ((1, 1, 1),)
        side = spec.token_side
        groups = tuple(  # a last group that is not full counts as one
            -(-side // rows) * -(-side // cols) for time, rows, cols in levels for _ in range(-(-frames // time))
        )
        visual = sum(groups)
        parts.append(Request(frames, frames * shape.view_tokens, len(groups), visual, visual, (groups,)))
    return Request.join(parts, text=text + sum(part.text for part in parts), new=new)


def _family_request(
    spec: PreprocessSpec,
    shape: ModelShape,
    images: Sequence[tuple[int, int]],
    frames: int | None,
    text: int,
    new: int,
) -> Request:
    from foveate.data.plan import family_clip, family_image
    from foveate.data.video import VideoInfo

    for width, height in images:
        _check_size(width, height, spec)
    media = [family_image(size, spec, len(images) == 1) for size in images]
    if frames:
        media.append(family_clip(VideoInfo(CLIP, frames, 0.0), spec, frames))
    for item in media:
        around = item.marker.replace(spec.image_token, "")
        around = around.replace(spec.video_token, "") if spec.video_token else around
        text += len(re.findall(r"<[^<>\s]*>|\n+|[^\s<>]+", around))
    parts = [Request.of_media(item, shape, spec) for item in media]
    return Request.join(parts, text=text + sum(part.text for part in parts), new=new)


def _check_size(width: int, height: int, spec: PreprocessSpec) -> None:
    if width * height > spec.max_pixels:
        raise InputError(f"a picture of {width}x{height} has {width * height} pixels, the limit is {spec.max_pixels}")
    if max(width, height) > spec.max_aspect * min(width, height):
        raise InputError(f"a picture of {width}x{height} is longer than {spec.max_aspect:g} times its width")


def connector_linears(kind: str, channels: int, width: int) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the linear layers of a connector of the NVILA family. Raises UnknownNameError."""
    c, d = channels, width
    chains = {
        "identity": (),
        "linear": (c, d),
        "mlp_downsample": (4 * c, d, d),
        "mlp_downsample_2x2_fix": (4 * c, d, d),
        "mlp_downsample_3x3_fix": (9 * c, 3 * c, d, d),
        "mlp_downsample_3x3_s2": (9 * c, 3 * c, c, c // 3, d, d),
        "mlp_downsample_3x3_s2_new": (9 * c, 4 * c, 2 * c, c, c // 3, d, d),
    }
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        chain: tuple[int, ...] = (c, *[d] * int(match[1]))
    elif kind in chains:
        chain = chains[kind]
    else:
        raise UnknownNameError(f"unknown connector {kind!r}: known: {', '.join(chains)}, mlp<k>x_gelu")
    return tuple(pairwise(chain))


def bytes_of(dtype: Any) -> int:
    """Bytes of one value of a dtype given by name or as torch.dtype."""
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise InputError(f"dtype {name!r} is not one of {', '.join(BYTES)}")
    return BYTES[name]


def estimate(
    shape: ModelShape,
    request: Request,
    device: Device,
    *,
    dtype: str = "bfloat16",
    effect: Effect | None = None,
    stored: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Everything that `foveate plan --json` prints: {"tokens", "flops", "bytes", "ms"}, each by stage.

    effect: what a recipe changes. stored: measured weight bytes (of `weights` form) instead of the formula's.
    """
    effect = effect or Effect()
    request = effect.apply(request, shape)
    stored = stored or weights(shape, dtype, effect.weights)
    kv = kv_bytes(shape, dtype, effect.cache)
    work = flops(shape, request, selection=effect.selection_flops(shape, request))
    moved = bytes_moved(shape, request, stored, kv)
    activations = activation_bytes(shape, request, dtype)
    times = stage_ms(shape, request, device, dtype, work, moved)
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
            "peak": sum(stored.values()) + kv * (request.cached + request.new) + activations,
            "read_prefill": moved["prefill"],
            "read_decode": moved["decode"],
        },
        "ms": {**times, "ttft": first, "total": first + times["decode"] * (request.new - 1)},
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

    def apply(self, request: Request, shape: ModelShape) -> Request:
        """The request with the tokens that stay in each decoder layer; exact for methods whose budget is."""
        if not self.reducers:
            return request
        from foveate.reduce.base import tokens_per_layer

        layers = tokens_per_layer(self.reducers, request.groups, _site_shape(shape))
        same = len(set(layers)) == 1
        return replace(request, kept=layers[-1], per_layer=() if same else tuple(layers))

    def selection_flops(self, shape: ModelShape, request: Request) -> float:
        """What it costs to tell the methods what they ask for, in products that the model does not make anyway.

        In the tower: query-key products of one layer, when a method asks for received attention, because fast attention
        kernels do not return their map. In the language model: queries of the rows that are asked for, their products
        with all keys, and for signals named "next_..." the keys as well. All text counts as rows of text. request: as
        `apply` returns it.
        """
        needed = any("received_attention" in need for reducer in self.reducers for need in reducer.signals)
        layer = attended(shape, request) / max(1, shape.vision_layers)
        tower = 2 * shape.vision_width * layer if needed else 0.0
        layers = request.per_layer or (request.kept,) * shape.layers
        from foveate.adapters.shape import steps_of

        steps = [step for step in steps_of(self.reducers, _site_shape(shape)) if step.site == "llm"]
        return float(tower + sum(_row_flops(shape, step, request.text, layers[step.layer - 1]) for step in steps))


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
