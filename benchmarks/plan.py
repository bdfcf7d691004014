"""Predicted against measured: memory and time of a request, over presets and recipes, on this machine calibrated.

    python benchmarks/plan.py --out benchmarks/results/plan_check.json

Each preset has random weights and the published shape. The machine is calibrated first, in the same process. Times are
medians of the stages of `foveate bench`, memory is the peak of a process of its own. Weight methods are left out: their
kernels have rates of their own, which a calibration does not know.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import run_header, write_json

import foveate
from foveate.bench import cost
from foveate.bench.calibrate import calibrate, measurements
from foveate.bench.memory import Job, peak
from foveate.bench.requests import Load, timed_request
from foveate.bench.timing import busy_machine, load_average, stolen, ticks
from foveate.data.sample import media_parts
from foveate.progress import progress
from foveate.recipe import Recipe

Case = tuple[str, str, tuple[int, int], int]
CASES: tuple[Case, ...] = (
    ("nano", "float32", (448, 448), 9),
    ("nano", "bfloat16", (448, 448), 9),
    ("smolvlm-256m", "bfloat16", (512, 512), 1),
    ("llava-onevision-0.5b", "bfloat16", (384, 384), 1),
    ("internvl2.5-1b", "bfloat16", (448, 448), 1),
)
"""(preset, dtype, size of the picture, repeats)."""
RECIPES = ("", "uniform(keep=0.25)", "fastv(keep=0.25)")
PROMPT = "What is written on the sign above the door, and how many people stand under it?"
NEW = 4


def predicted(vlm: foveate.VLM, device: Any, load: Load, recipe: str) -> dict[str, Any]:
    """What `foveate plan` says of this request."""
    content = [*media_parts(load.media(0)[:1]), {"type": "text", "text": load.prompt}]
    plan = vlm.plan([{"role": "user", "content": content}])
    shape = cost.ModelShape.from_config(vlm.model.config, vlm.spec)
    request = cost.Request.from_plan(plan, shape, new=load.new_tokens)
    effect = cost.Effect.of(Recipe.parse(recipe)) if recipe else cost.Effect()
    dtype = str(vlm.dtype).removeprefix("torch.")
    return cost.estimate(shape, request, device, dtype=dtype, effect=effect)


def measured(vlm: foveate.VLM, load: Load, repeats: int) -> dict[str, Any]:
    """Median milliseconds by stage of quiet repeats, with how many there were."""
    run, tokens = timed_request(vlm, load)
    kept, dropped = [], []
    for index in range(repeats):
        before = ticks()
        ms = run(index)
        (dropped if busy_machine(load_average(), stolen(before, ticks())) else kept).append(ms)
    noisy = len(kept) < max(1, repeats // 2)
    used = kept + dropped if noisy else kept
    ms = {stage: float(np.median([one[stage] for one in used])) for stage in used[0]}
    spread = {stage: float(np.ptp([one[stage] for one in used]) / max(1e-9, ms[stage])) for stage in ms}
    return {"ms": ms, "spread": spread, "repeats": len(used), "noisy": noisy, "tokens": tokens}


def compared(guess: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
    """Each stage's predicted and measured milliseconds; ttft without opening and cutting the picture."""
    ms = guess["ms"]
    parts = {"tower": ms["tower"] + ms["connector"], "prefill": ms["prefill"], "decode": ms["decode"]}
    parts["ttft"] = ms["ttft"]
    took = dict(real["ms"])
    took["ttft"] = took["tower"] + took["select"] + took["prefill"]
    return {
        name: {"predicted": value, "measured": took[name], "ratio": value / took[name]} for name, value in parts.items()
    }


def times(cases: list[Case], threads: int) -> Iterator[dict[str, Any]]:
    """What to write, growing: the calibrated machine, and a row for each preset and recipe."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    with progress("calibrate", measurements()) as bar:
        device = calibrate("cpu", advance=bar.advance)
    report = run_header() | {"machine": vars(device), "calibration_s": time.monotonic() - started, "rows": []}
    with progress("plan", len(cases) * len(RECIPES)) as bar:
        for preset, dtype, size, repeats in cases:
            vlm = foveate.load(preset, random_weights=True, dtype=dtype, device="cpu")
            load = Load(size, prompt=PROMPT, new_tokens=NEW)
            for recipe in RECIPES:
                small = Recipe.parse(recipe).apply(vlm, quiet=True) if recipe else vlm
                guess, real = predicted(vlm, device, load, recipe), measured(small, load, repeats)
                row = {"preset": preset, "dtype": dtype, "size": list(size), "recipe": recipe, **real}
                row |= {"stages": compared(guess, real), "bytes": guess["bytes"], "predicted_tokens": guess["tokens"]}
                report["rows"].append(row)
                report["seconds"] = round(time.monotonic() - started, 1)
                bar.advance(now=f"{preset} {recipe}")
                yield report
            del vlm, small


def peaks(cases: list[Case], threads: int) -> Iterator[dict[str, Any]]:
    """What to write, growing: peak bytes of each preset and recipe, by `key`."""
    found: dict[str, Any] = {}
    for preset, dtype, size, _ in cases:
        for recipe in RECIPES:
            job = Job(preset, recipe, dtype, "cpu", True, (size,), PROMPT, new_tokens=NEW, threads=threads)
            found[key(preset, dtype, recipe)] = peak(job)
            yield {"peaks": found}


def key(preset: str, dtype: str, recipe: str) -> str:
    return f"{preset} {dtype} {recipe}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("times", "peaks"), help="measure these, and keep the others of the file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_check.json"))
    args = parser.parse_args()

    cases = [case for case in CASES if not args.presets or case[0] in args.presets]
    for part in (times, peaks):
        if args.only in (None, part.__name__):
            for found in part(cases, args.threads):
                known = json.loads(args.out.read_text()) if args.out.is_file() else {}
                write_json(args.out, known | found)


if __name__ == "__main__":
    main()
