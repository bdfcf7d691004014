"""Predicted against measured: memory and time of a request, over presets and recipes, on this machine calibrated.

    python benchmarks/plan.py --out benchmarks/results/plan_check.json

Each preset has random weights and the published shape. The machine is calibrated first, in the same process, and once
more at the end: what its rates changed by in between is written down, because no plan can be better than that. Times
are medians of the stages of `foveate bench`, memory is the peak of a process of its own.

For figures to publish, on one core that nothing else uses (some 14 minutes, 6 GB):

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/plan.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import run_header, write_json

import foveate
from foveate.bench import cost
from foveate.bench.calibrate import calibrate, measurements
from foveate.bench.device import Device
from foveate.bench.memory import Job, peak
from foveate.bench.requests import Load, timed_request
from foveate.bench.roofline import table
from foveate.bench.timing import busy_machine, stolen, ticks
from foveate.data.sample import media_parts
from foveate.machine import load_average
from foveate.progress import progress
from foveate.recipe import Recipe

DENSE, REDUCED = ("",), ("uniform(keep=0.25)", "fastv(keep=0.25)")
STORED = ("rtn(bits=8)", "rtn(bits=4)", "int8", "kivi(bits=4)")
RECIPES = (*DENSE, *REDUCED, *STORED)


@dataclass(frozen=True)
class Case:
    """What is asked of a preset. frames: a clip of so many pictures of `size` (width, height) instead of one picture.
    held: the recipes whose memory is measured."""

    preset: str
    dtype: str
    size: tuple[int, int]
    frames: int | None = None
    repeats: int = 1
    recipes: tuple[str, ...] = RECIPES
    held: tuple[str, ...] = ("", "rtn(bits=4)")

    def load(self) -> Load:
        return Load(self.size, self.frames, prompt=PROMPT, new_tokens=NEW)

    def label(self) -> dict[str, Any]:
        """What a row says of its case."""
        return {"preset": self.preset, "dtype": self.dtype, "size": list(self.size), "frames": self.frames}


CASES = (
    Case("nano", "float32", (448, 448), repeats=30),
    Case("nano", "bfloat16", (448, 448), repeats=30),
    Case("smolvlm-256m", "bfloat16", (512, 512), frames=1, repeats=2),
    Case("llava-onevision-0.5b", "bfloat16", (384, 384), recipes=(*DENSE, *REDUCED), held=(*DENSE, *REDUCED[:1])),
    Case("internvl2.5-1b", "bfloat16", (448, 448)),
    Case("nvila-lite-2b", "bfloat16", (448, 448), recipes=("", "fastv(keep=0.25)", *STORED[1:]), held=DENSE),
)
PROMPT = "What is written on the sign above the door, and how many people stand under it?"
NEW = 4


def predicted(vlm: foveate.VLM, device: Any, load: Load, recipe: str) -> dict[str, Any]:
    """What `foveate plan` says of this request."""
    content = [*media_parts(load.media(0)[:1]), {"type": "text", "text": load.prompt}]
    plan = vlm.plan([{"role": "user", "content": content}], num_frames=load.frames)
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


def calibrated(what: str, seconds: float = 0.15) -> Device:
    with progress(what, measurements()) as bar:
        return calibrate("cpu", seconds=seconds, advance=bar.advance)


def drift(first: Device, last: Device) -> dict[str, float]:
    """What the best rates of the second calibration are, as multiples of the first."""
    rates = {name: table(device) for name, device in (("first", first), ("last", last))}
    return {f"{a[0]} {a[1]}": round(b[2] / a[2], 3) for a, b in zip(rates["first"], rates["last"])}


def times(cases: list[Case], threads: int) -> Iterator[dict[str, Any]]:
    """What to write, growing: the calibrated machine, and a row for each preset and recipe."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    device = calibrated("calibrate")
    report = run_header() | {"machine": vars(device), "calibration_s": round(time.monotonic() - started, 1), "rows": []}
    with progress("plan", sum(len(case.recipes) for case in cases)) as bar:
        for case in cases:
            vlm = foveate.load(case.preset, random_weights=True, dtype=case.dtype, device="cpu")
            for recipe in case.recipes:
                small = Recipe.parse(recipe).apply(vlm, quiet=True) if recipe else vlm
                guess, real = predicted(vlm, device, case.load(), recipe), measured(small, case.load(), case.repeats)
                row = case.label() | {"recipe": recipe, **real, "stages": compared(guess, real)}
                row |= {"bytes": guess["bytes"], "predicted_tokens": guess["tokens"], "unmeasured": guess["unmeasured"]}
                report["rows"].append(row)
                report["seconds"] = round(time.monotonic() - started, 1)
                bar.advance(now=f"{case.preset} {recipe}")
                yield report
                del small
            del vlm
    report["drift"] = drift(device, calibrated("calibrate again", 0.05))
    report["seconds"] = round(time.monotonic() - started, 1)
    yield report


def peaks(cases: list[Case], threads: int) -> Iterator[dict[str, Any]]:
    """What to write, growing: peak bytes of each preset and recipe, by `key`."""
    found: dict[str, Any] = {}
    started = time.monotonic()
    with progress("memory", sum(len(case.held) for case in cases)) as bar:
        for case in cases:
            for recipe in case.held:
                job = Job(
                    case.preset,
                    recipe,
                    case.dtype,
                    "cpu",
                    True,
                    (case.size,),
                    PROMPT,
                    new_tokens=NEW,
                    threads=threads,
                    frames=case.frames,
                )
                found[key(case.preset, case.dtype, recipe)] = peak(job)
                bar.advance(now=f"{case.preset} {recipe}")
                yield {"peaks": found, "peaks_s": round(time.monotonic() - started, 1)}


def key(preset: str, dtype: str, recipe: str) -> str:
    return f"{preset} {dtype} {recipe}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("times", "peaks"), help="measure these, and keep the others of the file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_check.json"))
    args = parser.parse_args()

    cases = [case for case in CASES if not args.presets or case.preset in args.presets]
    for part in (times, peaks):
        if args.only in (None, part.__name__):
            for found in part(cases, args.threads):
                known = json.loads(args.out.read_text()) if args.out.is_file() else {}
                write_json(args.out, known | found)


if __name__ == "__main__":
    main()
