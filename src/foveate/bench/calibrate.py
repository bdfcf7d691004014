"""What this machine reaches, measured in seconds: products, attention, reading, single values, overhead of a block.

Rates are those of the faster quarter of the repeats: what else the machine does while it is measured hardly counts, and
the best of all would promise too much.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench.device import Device, calibration_file
from foveate.errors import InputError

if TYPE_CHECKING:
    import torch

PRODUCTS = (
    (16, 64, 64),
    (64, 64, 128),
    (64, 128, 512),
    (256, 128, 512),
    (256, 512, 512),
    (512, 1024, 1024),
    (768, 1024, 4096),
    (1536, 1024, 4096),
)
"""(rows, inputs, outputs) of the linear layers that are timed, small ones first."""
LENGTHS = (64, 256, 768, 1536)
"""Tokens of the attentions that are timed, with 14 heads of 64."""
READ = 1 << 28
"""Bytes of the weights of one reading, more than caches hold."""


def calibrate(device: str = "auto", *, seconds: float = 0.15, advance: Callable[[], None] | None = None) -> Device:
    """This machine's rates by dtype. device: of torch. seconds: for each of some fifty measurements; a GPU's queue is
    drained around each. advance: called after each measurement. Raises UnsupportedError for a device there is not."""
    import torch

    from foveate.bench.timing import machine
    from foveate.vlm import _device

    where = _device(device)
    dtypes = ["float32", "bfloat16"] + (["float16"] if where.type == "cuda" else [])
    meter = _Meter(where, seconds, advance or (lambda: None))
    found: dict[str, dict[str, Any]] = {name: {} for name in ("gemm", "attention", "attention_full")}
    stream, bandwidth, activation, block, call = ({} for _ in range(5))
    with torch.inference_mode():
        for name in dtypes:
            dtype = getattr(torch, name)
            found["gemm"][name] = _curve(meter.product(m, i, o, dtype) for m, i, o in PRODUCTS)
            found["attention"][name] = _curve(meter.attention(n, dtype, True) for n in LENGTHS)
            found["attention_full"][name] = _curve(meter.attention(n, dtype, False) for n in LENGTHS)
            bandwidth[name], stream[name] = meter.reading(dtype), meter.values(dtype)
            activation[name] = meter.activation(dtype)
            for kind, make in (("tower", _small_tower), ("llm", _small_llm)):
                block[f"{kind} {name}"], call[f"{kind} {name}"] = meter.blocks(make, dtype)
    about, versions = machine()
    label = f"{about['gpu'] if where.type == 'cuda' else about['cpu']}"
    threads = "" if where.type == "cuda" else f", {about['threads']} threads"
    return Device(
        "this-machine",
        f"this machine ({label}{threads})",
        {name: max(rate for _, rate in points) for name, points in found["gemm"].items()},
        bandwidth,
        {"flops": 1.0, "bandwidth": 1.0},
        f"measured {time.strftime('%Y-%m-%d %H:%M')}, torch {versions['torch']}, load {about['load']:g} a core",
        stream=stream,
        activation=activation,
        block_ms=block,
        call_ms=call,
        **found,
    )


def measurements(cuda: bool = False) -> int:
    """How often `calibrate` calls `advance`."""
    return (3 if cuda else 2) * (len(PRODUCTS) + 2 * len(LENGTHS) + 3 + 4)


def store(device: Device, path: Path | None = None) -> Path:
    """Write the rates where `devices` finds them; returns the file. Raises InputError when that cannot be written."""
    path = path or calibration_file()
    row = {key: value for key, value in vars(device).items() if key != "name"}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours") from None
    return path


def _curve(points: Any) -> list[list[float]]:
    """[[FLOPs, FLOP/s], ...], ascending."""
    return sorted([float(flop), flop / spent] for flop, spent in points)


class _Meter:
    """Times single operations on one device."""

    def __init__(self, where: torch.device, seconds: float, advance: Callable[[], None]) -> None:
        self.where, self.seconds, self.advance = where, seconds, advance

    def seconds_of(self, run: Callable[[], Any]) -> float:
        """Seconds of `run` at the faster quartile, short ones taken several at a time."""
        self._timed(run, 1)
        once = self._timed(run, 1)
        inside = max(1, int(0.01 / max(once, 1e-7)))
        times, end = [], time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(times) < 4:
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

    def product(self, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[int, float]:
        """(FLOPs, seconds) of a linear layer."""
        import torch.nn.functional as F

        x, weight = self._noise(rows, inputs, dtype=dtype), self._noise(outputs, inputs, dtype=dtype)
        return 2 * rows * inputs * outputs, self.seconds_of(lambda: F.linear(x, weight))

    def attention(self, tokens: int, dtype: torch.dtype, causal: bool) -> tuple[int, float]:
        """(FLOPs, seconds) of an attention; of a causal one the pairs that count."""
        import torch.nn.functional as F

        q, k, v = (self._noise(1, 14, tokens, 64, dtype=dtype) for _ in range(3))
        pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
        spent = self.seconds_of(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        return 4 * 14 * 64 * pairs, spent

    def reading(self, dtype: torch.dtype) -> float:
        """Bytes per second of weights that one token passes through."""
        import torch.nn.functional as F

        outputs = READ // dtype.itemsize // 1024
        few = max(1, outputs // 256)  # random numbers take longer to make than to read
        x, weight = self._noise(1, 1024, dtype=dtype), self._noise(few, 1024, dtype=dtype).repeat(outputs // few, 1)
        return weight.nbytes / self.seconds_of(lambda: F.linear(x, weight))

    def values(self, dtype: torch.dtype) -> float:
        """Bytes per second that a product of single values reads and writes, at the size of an MLP's activations."""
        x, y = (self._noise(1024, 4096, dtype=dtype) for _ in range(2))
        return 3 * x.nbytes / self.seconds_of(lambda: x * y)

    def activation(self, dtype: torch.dtype) -> float:
        """Values per second of an activation function, at the size of an MLP's activations."""
        import torch.nn.functional as F

        x = self._noise(1024, 4096, dtype=dtype)
        return x.numel() / self.seconds_of(lambda: F.gelu(x, approximate="tanh"))

    def blocks(self, make: Callable[..., Callable[[], Any]], dtype: torch.dtype) -> tuple[float, float]:
        """Milliseconds that a block takes however small it is, and that a pass does.

        The smallest models of 2 and of 10 layers tell both: the slope, and what is left at no layer.
        """
        short, long = (self.seconds_of(make(layers, self.where, dtype)) * 1e3 for layers in (2, 10))
        block = max(0.0, (long - short) / 8)
        return block, max(0.0, short - 2 * block)


def _small_llm(layers: int, where: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """A pass of one new token through a language model of hardly any width, with a cache."""
    import torch
    from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Qwen2ForCausalLM(config).to(where, dtype).eval()
    token = torch.zeros(1, 1, dtype=torch.int64, device=where)

    def run() -> Any:
        cache = DynamicCache(config=config)
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    return run


def _small_tower(layers: int, where: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """A pass of four patches through a tower of hardly any width."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        vision_use_head=False,
    )
    model = SiglipVisionModel(config).to(where, dtype).eval()
    pixels = torch.zeros(1, 3, 8, 8, device=where, dtype=dtype)
    return lambda: model(pixel_values=pixels).last_hidden_state
