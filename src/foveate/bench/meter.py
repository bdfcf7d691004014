"""Times of single operations on one device: what `foveate plan --calibrate` is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

READ = 1 << 28
"""Bytes of the weights of the longest reading, more than caches hold."""
MOST = 1000
"""Different small matrices that are read in turn: in a model none is left in the caches when its turn comes again."""
HEADS = (14, 2, 64)
"""Query heads, key heads and their channels in the attentions and caches that are timed."""


class Meter:
    """Times single operations on one device. seconds: for each; advance: called after each."""

    def __init__(self, where: torch.device, seconds: float, advance: Callable[[], None]) -> None:
        self.where, self.seconds, self.advance = where, seconds, advance

    def seconds_of(self, run: Callable[[], Any], at_least: int = 4) -> float:
        """Seconds of `run` at the faster quartile, short ones taken several at a time."""
        self._timed(run, 1)
        once = self._timed(run, 1)
        inside = max(1, int(0.01 / max(once, 1e-7)))
        times, end = [], time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(times) < at_least:
            times.append(self._timed(run, inside) / inside)
        self.advance()
        return sorted(times)[len(times) // 4]

    def _timed(self, run: Callable[[], Any], count: int) -> float:
        self._drain()
        start = time.perf_counter()
        for _ in range(count):
            run()
        self._drain()
        return time.perf_counter() - start

    def _drain(self) -> None:
        if self.where.type == "cuda":
            import torch

            torch.cuda.synchronize(self.where)

    def _noise(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.randn(size, device=self.where).to(dtype)

    def product(self, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> list[float]:
        """[FLOPs, FLOP/s] of a linear layer."""
        import torch.nn.functional as F

        x, weight = self._noise(rows, inputs, dtype=dtype), self._noise(outputs, inputs, dtype=dtype)
        flop = 2.0 * rows * inputs * outputs
        return [flop, flop / self.seconds_of(lambda: F.linear(x, weight))]

    def attention(self, tokens: int, dtype: torch.dtype, causal: bool) -> list[float]:
        """[tokens, FLOP/s] of an attention; of a causal one the pairs that count."""
        import torch.nn.functional as F

        heads, _, width = HEADS
        q, k, v = (self._noise(1, heads, tokens, width, dtype=dtype) for _ in range(3))
        pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
        spent = self.seconds_of(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        return [tokens, 4 * heads * width * pairs / spent]

    def query(self, tokens: int, dtype: torch.dtype) -> list[float]:
        """[tokens, FLOP/s] of an attention of one query over so many tokens of a cache."""
        import torch.nn.functional as F

        heads, shared, width = HEADS
        q = self._noise(1, heads, 1, width, dtype=dtype)
        k, v = (self._noise(1, shared, tokens, width, dtype=dtype) for _ in range(2))
        spent = self.seconds_of(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
        return [tokens, 4 * heads * width * tokens / spent]

    def reading(self, inputs: int, outputs: int, dtype: torch.dtype) -> list[float]:
        """[bytes, bytes/s] of weights that one token passes through; different ones in turn, as in a model."""
        import torch.nn.functional as F

        size = inputs * outputs * dtype.itemsize
        few = min(outputs, 64)  # random numbers take longer to make than to read
        small = self._noise(few, inputs, dtype=dtype)
        copies = max(1, min(MOST, READ // size))
        weights = [small.repeat(-(-outputs // few), 1)[:outputs].clone() for _ in range(copies)]
        x = self._noise(1, inputs, dtype=dtype)

        def run() -> None:
            for weight in weights:
                F.linear(x, weight)

        return [float(size), size * copies / self.seconds_of(run)]

    def values(self, dtype: torch.dtype) -> float:
        """Bytes per second that a product of single values reads and writes, at the size of an MLP's activations."""
        x, y = (self._noise(1024, 4096, dtype=dtype) for _ in range(2))
        return 3 * x.nbytes / self.seconds_of(lambda: x * y)

    def activation(self, dtype: torch.dtype) -> float:
        """Values per second of an activation function, at the size of an MLP's activations."""
        import torch.nn.functional as F

        x = self._noise(1024, 4096, dtype=dtype)
        return x.numel() / self.seconds_of(lambda: F.gelu(x, approximate="tanh"))

    def unpacking(self, method: Any, dtype: torch.dtype, inputs: int, outputs: int) -> tuple[str, float]:
        """(kind, weights per second) that a layer of a weights method needs more than a plain one for one token."""
        import torch
        from torch import nn

        from foveate.bench.roofline import layer_kind

        plain = nn.Linear(inputs, outputs, bias=False, device=self.where, dtype=dtype)
        made = method.empty(plain)
        for held in made.buffers():
            held.zero_()
        x = torch.ones(1, inputs, device=self.where, dtype=dtype)
        extra = self.seconds_of(lambda: made(x)) - self.seconds_of(lambda: plain(x))
        return layer_kind(made), inputs * outputs / max(extra, 1e-9)

    def caching(self, method: Any, dtype: torch.dtype, lengths: tuple[int, int]) -> list[float]:
        """[values/s read, values/s written] of one layer of a cache method, told by two lengths of the cache.

        A step adds one token and reads all.
        """
        _, heads, width = HEADS
        reading, writing = [], []
        for length in lengths:
            keys, values = (self._noise(1, heads, length, width, dtype=dtype) for _ in range(2))

            def filled(keys: torch.Tensor = keys, values: torch.Tensor = values) -> Any:
                (layer,) = method.layers(1)
                if hasattr(layer, "stand_in"):  # what the layer would be told by a model
                    layer.stand_in(keys)
                layer.update(keys, values)
                return layer

            writing.append(self.seconds_of(filled))
            layer, token = filled(), keys[:, :, :1]
            reading.append(self.seconds_of(lambda layer=layer, token=token: layer.update(token, token)))
        more = 2 * heads * width * (lengths[1] - lengths[0])
        return [more / max(after - before, 1e-9) for before, after in (reading, writing)]
