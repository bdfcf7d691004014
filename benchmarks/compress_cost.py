"""What compressing costs and brings: minutes, peak memory and bytes, then prefill and decoding beside the dense model.

    python benchmarks/compress_cost.py
    python benchmarks/compress_cost.py --preset llava-onevision-7b --device cuda --recipe "awq(bits=4, group=128)"

The preset has a published shape and random weights: what is measured is cost, never quality. It is saved once. Each
recipe then gets a process of its own that does what `foveate compress` does: load the folder, apply, save; its peak is
that of the whole process, Python and libraries included (on CUDA: of the device). Another process loads the dense and
the small folder and times both in turns, in random order within a pair. `--dense` keeps the saved preset for later
runs; rows that are already in `--out`, of the same model and machine, stay beside those of the recipes that are named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import run_header, write_json

import foveate
from foveate.bench.memory import watched
from foveate.bench.requests import Load, timed_request
from foveate.bench.timing import compare
from foveate.effect import effect
from foveate.recipe import Recipe
from foveate.weights.kernels import accelerate_

ROOT = Path(__file__).resolve().parents[1]
RECIPES = (
    "smoothquant(parts=[vision_tower], samples=2) + awq(bits=4, group=128, samples=2)",
    "smoothquant(parts=[vision_tower], samples=4) + gptq(bits=4, group=128, samples=4)",
    "rtn(bits=4, group=128) + kivi(bits=2)",
)
"""NVILA's deployment line, the same with second-order rounding, and one that needs no data with a small cache."""
STAGES = ("tower", "prefill", "decode", "ttft")


def build(args: argparse.Namespace) -> None:
    """Save the preset with random weights."""
    foveate.load(args.preset, random_weights=True, dtype=args.dtype, device="cpu").save(args.dense)


def squeeze(args: argparse.Namespace) -> dict[str, Any]:
    """Load, apply one recipe and save: seconds of each, peak bytes, what became of the weights."""
    cuda = args.device.startswith("cuda")
    with watched() as memory:
        clock = [time.monotonic()]
        dense = foveate.load(args.dense, dtype=args.dtype, device=args.device)
        clock.append(time.monotonic())
        small = Recipe.parse(args.recipe[0]).apply(dense, quiet=True)
        clock.append(time.monotonic())
        small.save(args.small)
        clock.append(time.monotonic())
    seconds = [round(after - before, 1) for before, after in pairwise(clock)]
    return {
        "seconds": dict(zip(("load", "apply", "save"), seconds)),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_bytes": torch.cuda.max_memory_allocated(args.device) if cuda else memory["peak"],
        "before_bytes": 0 if cuda else memory["before"],
        "saved_bytes": [
            sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (args.dense, args.small)
        ],
        "effect": effect(dense, small).to_dict(),
    }


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Stages of a request to the small model over those of the dense one, in turns."""
    small, dense = (foveate.load(folder, dtype=args.dtype, device=args.device) for folder in (args.small, args.dense))
    kernels = accelerate_(small)
    load = Load((args.size, args.size), new_tokens=args.new_tokens, prompt="What is this?")
    (a, tokens), (b, _) = (timed_request(vlm, load) for vlm in (small, dense))
    rows, run = compare(a, b, pairs=args.pairs, warmup=1, min_seconds=0.0)
    kept = ("a_ms", "b_ms", "ratio", "low", "high", "aa_low", "aa_high", "real")
    stages = {row.stage: {key: row.to_dict()[key] for key in kept} for row in rows if row.stage in STAGES}
    return {"kernels": kernels, "tokens": tokens, "new_tokens": args.new_tokens, "run": run, "stages": stages}


def child(step: str, args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """One step in a process of its own."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in {**vars(args), **changes}.items()}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, __file__, "--step", step, json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--step"]:
        given = json.loads(sys.argv[3])
        given |= {key: Path(given[key]) for key in ("dense", "small") if given.get(key)}
        step = {"build": build, "squeeze": squeeze, "timed": timed}[sys.argv[2]]
        print(json.dumps(step(argparse.Namespace(**given)) or {}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llava-onevision-0.5b")
    parser.add_argument("--recipe", action="append", help="repeatable; default: the three of this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", type=int, default=384, help="side of the picture that is timed")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs, 0 for none")
    parser.add_argument("--dense", type=Path, help="keep the dense model in this folder, or take it from there")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compress_cost.json")
    args = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args.dense = args.dense or scratch / "dense"
        if not args.dense.is_dir():
            child("build", args)
        where = {"preset": args.preset, "dtype": args.dtype, "where": args.device, "size": args.size}
        report = run_header() | where
        old = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
        same = all(old.get(key) == report[key] for key in (*where, "device", "versions"))
        report["recipes"] = old["recipes"] if same else {}
        for text in args.recipe or RECIPES:
            small = scratch / "small"
            row = child("squeeze", args, recipe=[text], small=small)
            if args.pairs:
                row |= child("timed", args, recipe=[text], small=small)
            report["recipes"][text] = row
            write_json(args.out, report)


if __name__ == "__main__":
    main()
