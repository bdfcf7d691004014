"""`foveate plan --calibrate`: what this machine reaches, measured in under a minute and kept for later plans.

Linear layers and attentions of growing size, because a small one reaches a fraction of the rate of a large one; the
bandwidth of matrices that one token passes through, small ones and ones that fit no cache; operations on single values
at the size of an MLP's activations; an activation function; what layers and caches of recipes take more than dense
ones; and what a request to a very small model takes beyond all this, which is overhead. Each is the time at the faster
quartile: other users of the machine only ever slow it down.

Weights hold repeated rows, since random numbers take long to make; what they hold changes no time. Denormal numbers
would, and zeros might on machines that skip them: none are used. Activations of layers that run one after another lie
in caches now and then; measured alone they come from memory, so small models are predicted a little too slow.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench.device import Device, calibration_file
from foveate.bench.meter import Meter
from foveate.bench.overhead import DEPTHS, held, with_overhead
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
READINGS = ((64, 64), (128, 320), (896, 128), (896, 896), (1024, 4096), (1024, 131072))
"""(inputs, outputs) of the linear layers that one token passes through."""
LENGTHS = (64, 256, 768, 1536)
"""Tokens of the attentions that are timed."""
WEIGHTS = ("rtn(bits=2)", "rtn(bits=3)", "rtn(bits=4)", "rtn(bits=8)", "smoothquant", "fp8_weights")
"""Recipes whose layers are timed: one for each kind."""
CACHES = ("int8", "fp8", "kivi(bits=2)", "kivi(bits=4)")
"""Recipes whose cache layers are timed."""
CACHED = (256, 1280)
"""Tokens of those caches."""
UNPACKED = (1024, 4096)
"""(inputs, outputs) of those layers."""


def calibrate(device: str = "auto", *, seconds: float = 0.15, advance: Callable[[], None] | None = None) -> Device:
    """This machine's rates by dtype. device: of torch. seconds: for each of some hundred measurements; a GPU's queue is
    drained around each. advance: called after each measurement. Raises UnsupportedError for a device there is not."""
    import torch

    from foveate.machine import machine
    from foveate.vlm import _device

    where = _device(device)
    meter = Meter(where, seconds, advance or (lambda: None))
    names = _dtypes(where.type == "cuda")
    process = 0.0 if where.type == "cuda" else held(where, [getattr(torch, name) for name in names])
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        for kind, value in _rates(meter, getattr(torch, name)).items():
            own = {name: value} if kind not in ("unpacking", "caching") else value
            found.setdefault(kind, {}).update(own)
    about, versions = machine()
    label = f"{about['gpu'] if where.type == 'cuda' else about['cpu']}"
    threads = "" if where.type == "cuda" else f", {about['threads']} threads"
    made = Device(
        "this-machine",
        f"this machine ({label}{threads})",
        {name: max(rate for _, rate in points) for name, points in found["gemm"].items()},
        {name: max(rate for _, rate in points) for name, points in found["reading"].items()},
        {"flops": 1.0, "bandwidth": 1.0},
        f"measured {time.strftime('%Y-%m-%d %H:%M')}, torch {versions['torch']}, load {about['load']:g} a core",
        process=process,
        **found,
    )
    for name in names:
        made = with_overhead(made, meter, getattr(torch, name), (*WEIGHTS, *CACHES))
    return made


def _dtypes(cuda: bool) -> list[str]:
    return ["float32", "bfloat16"] + (["float16"] if cuda else [])


def measurements(cuda: bool = False) -> int:
    """How often `calibrate` calls `advance`."""
    one = len(PRODUCTS) + 3 * len(LENGTHS) + len(READINGS) + 2 + 3 * len(WEIGHTS) + 5 * len(CACHES) + len(DEPTHS) + 1
    return len(_dtypes(cuda)) * one


def _rates(meter: Meter, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of a `Device` for one dtype."""
    import torch

    from foveate.bench.roofline import cache_kind
    from foveate.recipe import Recipe

    name = str(dtype).removeprefix("torch.")
    with torch.inference_mode():
        found = {
            "gemm": sorted(meter.product(*size, dtype) for size in PRODUCTS),
            "reading": sorted(meter.reading(*size, dtype) for size in READINGS),
            "attention": [meter.attention(tokens, dtype, True) for tokens in LENGTHS],
            "attention_full": [meter.attention(tokens, dtype, False) for tokens in LENGTHS],
            "attention_one": [meter.query(tokens, dtype) for tokens in LENGTHS],
            "stream": meter.values(dtype),
            "activation": meter.activation(dtype),
        }
        layers = [meter.unpacking(Recipe.parse(text).of("weights")[0], dtype, *UNPACKED) for text in WEIGHTS]
        caches = [Recipe.parse(text).of("cache")[0] for text in CACHES]
        found["unpacking"] = {f"{kind} {name}": rate for kind, rate in layers}
        found["caching"] = {f"{cache_kind(one)} {name}": meter.caching(one, dtype, CACHED) for one in caches}
    return found


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
