"""Peak memory of one request, measured: the allocator's peak on a GPU, resident memory of a fresh process on a CPU.

A process that did other things holds memory of theirs, so on a CPU the request runs in a process of its own. What
Python, torch and transformers take is subtracted: it is resident after a small model has answered once. The peak is
reset after loading (Linux: /proc/self/clear_refs), so loading and answering are told apart.

    python -m foveate.bench.memory '{"model": "nano", "recipe": "rtn(bits=4)", ...}'   prints one JSON object
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.vlm import VLM


@dataclass(frozen=True)
class Job:
    """One request to measure. sizes: (width, height) of its pictures; frames: a clip of so many of them instead."""

    model: str
    recipe: str = ""
    dtype: str = "auto"
    device: str = "auto"
    random_weights: bool = False
    sizes: tuple[tuple[int, int], ...] = ((448, 448),)
    prompt: str = "What is in the picture?"
    new_tokens: int = 8
    threads: int | None = None
    frames: int | None = None


def peak(job: Job, timeout: float = 1800.0) -> dict[str, float]:
    """{"baseline", "weights", "loading", "peak", "resident"} in bytes, all but the baseline above the baseline.

    weights: tensors of the model. loading: peak while the model was made. peak: the most while a request was answered.
    resident: after loading. Raises InputError with the last line of a process that failed.
    """
    command = [sys.executable, "-m", "foveate.bench.memory", json.dumps(asdict(job))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"memory of {job.model}: the request took more than {timeout:g} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        raise InputError(f"memory of {job.model} could not be measured: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peaks(small: VLM, dense: VLM, messages: list[dict[str, Any]]) -> dict[str, float]:
    """{"value", "dense"}: peak bytes of one request with and without a recipe."""
    sizes = tuple(media.size for media in dense.plan(messages).media if media.kind == "image") or ((448, 448),)
    common = {
        "model": dense.name,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "device": str(dense.device),
        "random_weights": not _has_files(dense.name),
        "sizes": sizes,
    }
    found = [peak(Job(recipe=recipe, **common))["peak"] for recipe in (small.recipe.text(), "")]
    return {"value": found[0], "dense": found[1]}


def _has_files(name: str) -> bool:
    return name == "nano" or Path(name).expanduser().is_dir()


def run(job: Job) -> dict[str, float]:
    """Measure in this process, which should have done nothing else."""
    import numpy as np
    import torch

    import foveate
    from foveate.bench.requests import draw_pictures
    from foveate.data.sample import VideoSource
    from foveate.recipe import Recipe
    from foveate.weights.base import module_bytes

    if job.threads:
        torch.set_num_threads(job.threads)
    small = draw_pictures((64, 64), 0)[0]
    dtype = "float32" if job.dtype == "auto" else job.dtype  # kernels that a dtype brings along are of the baseline
    foveate.load("nano", device="cpu", random_weights=True, dtype=dtype).ask(small, job.prompt, max_new_tokens=2)
    with watched() as loading:
        vlm = foveate.load(job.model, dtype=job.dtype, device=job.device, random_weights=job.random_weights)
        if job.recipe:
            vlm = Recipe.parse(job.recipe).apply(vlm, quiet=True)
    baseline = loading["before"]
    trim()
    cuda = vlm.device.type == "cuda"
    held = torch.cuda.memory_allocated(vlm.device) if cuda else resident() - baseline
    pictures: list[Any] = [draw_pictures(size, seed)[0] for seed, size in enumerate(job.sizes)]
    if job.frames:
        pictures = [VideoSource(np.stack([picture] * job.frames)) for picture in pictures]
    if cuda:
        torch.cuda.reset_peak_memory_stats(vlm.device)
    with watched() as asking:
        vlm.ask(pictures, job.prompt, max_new_tokens=job.new_tokens, num_frames=job.frames)
    most = torch.cuda.max_memory_allocated(vlm.device) if cuda else asking["peak"] - baseline
    return {
        "baseline": float(baseline),
        "weights": float(module_bytes(vlm.model)),
        "loading": float(loading["peak"] - baseline),
        "peak": float(most),
        "resident": float(held),
    }


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """{"before", "peak"} resident bytes of this process: when the block began, and the most while it ran ("peak" is
    right when it has ended). The kernel's mark, or samples where that cannot be reset."""
    trim()
    _reset()
    found = dict.fromkeys(("before", "peak"), resident())
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            found["peak"] = max(found["peak"], resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        if _RESETTABLE:
            found["peak"] = max(found["peak"], _status("VmHWM"))


_RESETTABLE = False


def _reset() -> None:
    """Set the kernel's high-water mark to what is resident now."""
    global _RESETTABLE
    try:
        Path("/proc/self/clear_refs").write_text("5")
        time.sleep(0.001)
        _RESETTABLE = _status("VmHWM") < resident() * 1.02 + (4 << 20)
    except OSError:
        _RESETTABLE = False


def trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return _status("VmRSS")


def _status(key: str) -> int:
    """A field of /proc/self/status in bytes; 0 where the system has none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    given["sizes"] = tuple(tuple(size) for size in given["sizes"])
    print(json.dumps(run(Job(**given))))
