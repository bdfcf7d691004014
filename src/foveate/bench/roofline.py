"""Predicted milliseconds of every stage on a machine.

With a data sheet's rates: the longer of computing and reading (Williams et al., CACM 52(4), 2009). On a calibrated
machine each part of a stage is put at the rate that parts of its size reach there:

    linear layers    max(2·T·in·out / rate of such a product, bytes of the weights / bandwidth)
    attention        4·width·pairs / rate of such an attention
    single values    bytes that norms, rotary embedding, residuals and gates read and write / stream rate
    activation       values of the MLP's activation function / rate of such values
    overhead         blocks · what a block takes however small it is, and once what a pass does

Values that pass through memory, per token and layer (D width, Q and K of queries and keys, M of the MLP), counted in
the layers of transformers: language model 26·D + 10·(Q + K) + 3·M (root mean square norms are taken in steps, the gate
is a product), tower 12·D; and M values pass the activation function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.bench.cost import ModelShape, Request
    from foveate.bench.device import Device

Linears = list[tuple[int, int, int]]


def stage_ms(
    shape: ModelShape,
    request: Request,
    device: Device,
    dtype: str,
    work: dict[str, float],
    moved: dict[str, float],
) -> dict[str, float]:
    """Milliseconds by stage of `cost.STAGES`. request: after the recipe. work, moved: FLOPs and bytes of each stage."""
    if not device.gemm:
        return {stage: device.ms(flop, moved[stage], dtype) for stage, flop in work.items()}
    machine = _Machine(shape, device, dtype)
    return {
        "tower": machine.tower(request),
        "connector": machine.linears("mm_projector", request.connector_rows),
        "selection": device.curve_ms("gemm", work["selection"], dtype) if work["selection"] else 0.0,
        "prefill": machine.prefill(request),
        "decode": machine.decode(request, moved["decode"]),
    }


class _Machine:
    """The parts of a model on a calibrated machine."""

    def __init__(self, shape: ModelShape, device: Device, dtype: str) -> None:
        from foveate.bench.cost import bytes_of

        self.shape, self.device, self.dtype, self.size = shape, device, dtype, bytes_of(dtype)
        self.layers = shape.linears()

    def linears(self, part: str, rows: int, of: int = 1) -> float:
        """All linear layers of a part for so many rows, of its `of` layers one."""
        if not rows:
            return 0.0
        return sum(n * self.product(rows, inputs, outputs) for inputs, outputs, n in self.layers[part]) / of

    def product(self, rows: int, inputs: int, outputs: int) -> float:
        compute = self.device.curve_ms("gemm", 2.0 * rows * inputs * outputs, self.dtype)
        read = self.device.read_ms(inputs * outputs * self.size, self.dtype)
        return read if rows == 1 else max(compute, read)

    def tower(self, request: Request) -> float:
        from foveate.bench.cost import attended, tower_rows

        if not request.views:
            return 0.0
        shape = self.shape
        block, call = self.device.overhead_ms("tower", self.dtype)
        patches, rows = tower_rows(shape, request)
        pairs = attended(shape, request) / max(1, shape.vision_layers * request.views)
        each = self.device.curve_ms("attention_full", 4.0 * shape.vision_width * pairs, self.dtype)
        values = self.device.stream_ms(12.0 * rows * shape.vision_width * self.size, self.dtype)
        values += self.device.activation_ms(rows * shape.vision_mlp, self.dtype)
        return (
            self.product(patches, shape.patch_inputs, shape.vision_width)
            + self.linears("vision_tower", rows)
            + shape.vision_layers * (request.views * each + values + block)
            + call
        )

    def prefill(self, request: Request) -> float:
        shape = self.shape
        block, total = self.device.overhead_ms("llm", self.dtype)
        lengths = [request.text + visual for visual in request.per_layer or (request.kept,) * shape.layers]
        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        for length in set(lengths):
            values = length * (26 * shape.width + 10 * (queries + keys) + 3 * shape.mlp) * self.size
            layer = self.linears("llm", length, shape.layers) + self.device.stream_ms(values, self.dtype)
            layer += self.device.activation_ms(length * shape.mlp, self.dtype)
            layer += self.device.curve_ms("attention", 2.0 * queries * length * (length + 1), self.dtype)
            total += lengths.count(length) * (layer + block)
        return total + self.product(1, shape.width, shape.vocab)

    def decode(self, request: Request, moved: float) -> float:
        shape = self.shape
        read = self.device.read_ms(moved, self.dtype)
        block, call = self.device.overhead_ms("llm", self.dtype)
        return read + shape.layers * block + call


def table(device: Device) -> list[list[Any]]:
    """(what, dtype, rate) of a calibrated machine, for people: the best rate of each curve."""
    rows: list[list[Any]] = []
    for name in device.gemm:
        rows.append(["matrix products", name, max(rate for _, rate in device.gemm[name]), "FLOP/s"])
        rows.append(["attention", name, max(rate for _, rate in device.attention[name]), "FLOP/s"])
        rows.append(["reading weights", name, device.bandwidth[name], "B/s"])
        rows.append(["single values", name, device.stream[name], "B/s"])
        rows.append(["activation", name, device.activation[name], "values/s"])
    return rows
