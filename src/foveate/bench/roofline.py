"""Predicted milliseconds of every stage on a machine.

With a data sheet's rates: the longer of computing and reading (Williams et al., CACM 52(4), 2009). On a calibrated
machine each part of a stage is put at the rate that parts of its size reach there:

    linear layers    2·T·in·out / rate of such a product; for one token, bytes of the weights / rate of reading them
    attention        4·width·pairs / rate of an attention over so many tokens, with one rate for a single query
    single values    bytes that norms, rotary embedding, residuals and gates read and write / stream rate
    activation       values of the MLP's activation function / rate of such values
    cache            bytes of a layer's cache, read and written anew for each token / stream rate
    a recipe         weights / rate of making them from what is stored; cached values / rate of reading, or writing them
    overhead         blocks · what a block takes however small it is, and once what a stage does

Values that pass through memory, per token and layer (D width, Q and K of queries and keys, M of the MLP), counted in
the layers of transformers: language model 26·D + 10·(Q + K) + 3·M (root mean square norms are taken in steps, the gate
is a product), tower 12·D; and M values pass the activation function.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foveate.bench.counts import tower_blocks, tower_rows
from foveate.bench.shape import bytes_of

if TYPE_CHECKING:
    from foveate.bench.counts import Request
    from foveate.bench.device import Device
    from foveate.bench.shape import ModelShape


@dataclass(frozen=True)
class Kinds:
    """What a recipe is made of, as far as times depend on it. weights: the kind of layer of each part; cache: that of
    the cache; chooses: whether tokens are chosen."""

    weights: dict[str, str] = field(default_factory=dict)
    cache: str = ""
    chooses: bool = False

    @property
    def llm(self) -> tuple[str, str]:
        """The kinds in the language model."""
        return self.weights.get("llm", ""), self.cache


def layer_kind(layer: Any) -> str:
    """What a linear layer is stored as, for rates: its class and its bits; "" for a plain one."""
    from torch import nn

    return "" if type(layer) is nn.Linear else f"{type(layer).__name__} {getattr(layer, 'bits', '')}".rstrip()


def cache_kind(method: Any) -> str:
    """What a cache is stored as, for rates: its method and its bits."""
    return f"{method.name} {getattr(method, 'bits', '')}".rstrip()


def stage_ms(
    shape: ModelShape,
    request: Request,
    device: Device,
    dtype: str,
    work: dict[str, float],
    moved: dict[str, float],
    kinds: Kinds | None = None,
) -> dict[str, float]:
    """Milliseconds by stage of `cost.STAGES`. request: after the recipe. work, moved: FLOPs and bytes of each stage."""
    if not device.gemm:
        return {stage: device.ms(flop, moved[stage], dtype) for stage, flop in work.items()}
    device.compute_ms(0.0, dtype)  # raises for a dtype that was not measured
    machine = _Machine(shape, device, dtype, kinds or Kinds())
    return {
        "tower": machine.tower(request),
        "connector": machine.linears("mm_projector", request.connector_rows),
        "selection": machine.selection(work["selection"]),
        "prefill": machine.prefill(request),
        "decode": machine.decode(request),
    }


class _Machine:
    """The parts of a model on a calibrated machine."""

    def __init__(self, shape: ModelShape, device: Device, dtype: str, kinds: Kinds) -> None:
        self.shape, self.device, self.dtype, self.size = shape, device, dtype, bytes_of(dtype)
        self.layers, self.kinds = shape.linears(), kinds
        self.queries, self.keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size

    def linears(self, part: str, rows: int, of: float = 1, fed: int | None = None) -> float:
        """All linear layers of a part for so many rows, of its `of` layers one. fed: rows of those of the tower's MLP,
        where they are others."""
        if not rows:
            return 0.0
        layers, kind = self.layers[part], self.kinds.weights.get(part, "")
        made = self.device.unpacking_ms(kind, sum(n * i * o for i, o, n in layers), self.dtype)
        each = [rows] + [rows if fed is None else fed] * (len(layers) - 1)
        return (sum(n * self.product(count, i, o) for count, (i, o, n) in zip(each, layers)) + made) / of

    def product(self, rows: int, inputs: int, outputs: int) -> float:
        if rows == 1:
            return self.device.curve_ms("reading", inputs * outputs * self.size, self.dtype)
        return self.device.curve_ms("gemm", 2.0 * rows * inputs * outputs, self.dtype)

    def attention(self, kind: str, width: int, tokens: float, pairs: float) -> float:
        return self.device.curve_ms(kind, 4.0 * width * pairs, self.dtype, at=tokens)

    def tower(self, request: Request) -> float:
        if not request.views:
            return 0.0
        shape = self.shape
        block, call = self.device.overhead_ms("tower", self.dtype, [self.kinds.weights.get("vision_tower", "")])
        patches, _ = tower_rows(shape, request)
        total = self.product(patches, shape.patch_inputs, shape.vision_width)
        for count, rows, pairs, fed in tower_blocks(shape, request):
            mean = pairs / max(1, count * request.views)
            each = self.attention("attention_full", shape.vision_width, mean**0.5, mean)
            values = self.device.stream_ms(6.0 * (rows + fed) * shape.vision_width * self.size, self.dtype)
            values += self.device.activation_ms(fed * shape.vision_mlp, self.dtype)
            total += self.linears("vision_tower", rows, shape.vision_layers / max(1, count), fed)
            total += count * (request.views * each + values + block)
        return total + call

    def selection(self, flop: float) -> float:
        """Handing over the prompt, and what methods ask for."""
        _, call = self.device.overhead_ms("choose" if self.kinds.chooses else "select", self.dtype)
        return call + (self.device.curve_ms("gemm", flop, self.dtype) if flop else 0.0)

    def lengths(self, request: Request) -> list[int]:
        """Tokens that each layer of the language model sees."""
        return [request.text + visual for visual in request.per_layer or (request.kept,) * self.shape.layers]

    def prefill(self, request: Request) -> float:
        shape = self.shape
        block, total = self.device.overhead_ms("prefill", self.dtype, self.kinds.llm)
        lengths = self.lengths(request)
        for length in set(lengths):
            values = length * (26 * shape.width + 10 * (self.queries + self.keys) + 3 * shape.mlp) * self.size
            layer = self.linears("llm", length, shape.layers) + self.device.stream_ms(values, self.dtype)
            layer += self.device.activation_ms(length * shape.mlp, self.dtype)
            layer += self.attention("attention", self.queries, length, length * (length + 1) / 2)
            layer += self.device.caching_ms(self.kinds.cache, self.dtype, written=2 * self.keys * length)
            total += lengths.count(length) * (layer + block)
        return total + self.product(1, shape.width, shape.vocab)

    def decode(self, request: Request) -> float:
        shape = self.shape
        block, total = self.device.overhead_ms("decode", self.dtype, self.kinds.llm)
        total += self.linears("llm", 1) + shape.layers * block
        lengths = self.lengths(request)
        for length in set(lengths):
            values = 2 * self.keys * length
            layer = self.attention("attention_one", self.queries, length, length + 1)
            if self.device.knows_cache(self.kinds.cache, self.dtype):
                layer += self.device.caching_ms(self.kinds.cache, self.dtype, read=values)
            else:
                layer += self.device.stream_ms(2.0 * values * self.size, self.dtype)
            total += lengths.count(length) * layer
        return total + self.product(1, shape.width, shape.vocab)


def table(device: Device) -> list[list[Any]]:
    """(what, dtype, rate, unit) of a calibrated machine, for people: the best rate of each curve."""
    rows: list[list[Any]] = []
    for name in device.gemm:
        rows.append(["matrix products", name, max(rate for _, rate in device.gemm[name]), "FLOP/s"])
        rows.append(["attention", name, max(rate for _, rate in device.attention[name]), "FLOP/s"])
        rows.append(["attention of one query", name, max(rate for _, rate in device.attention_one[name]), "FLOP/s"])
        rows.append(["reading weights", name, max(rate for _, rate in device.reading[name]), "B/s"])
        rows.append(["single values", name, device.stream[name], "B/s"])
        rows.append(["activation", name, device.activation[name], "values/s"])
    return rows
