"""What compressing costs and brings: minutes, peak memory, and prefill and decoding before and after.

    python benchmarks/compress_cost.py --preset llava-onevision-0.5b
    python benchmarks/compress_cost.py --preset llava-onevision-7b --device cuda --recipe "awq(bits=4, group=128)"

The preset has a published shape and random weights: what is measured is cost, never quality. Peak memory is that of the
whole process (on CUDA: of the device) while the recipe is applied, the dense model included.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from common import run_header, write_json

import foveate
from foveate.bench.requests import draw_pictures, timed_request
from foveate.bench.timing import compare
from foveate.effect import effect
from foveate.recipe import Recipe
from foveate.weights.kernels import accelerate_

ROOT = Path(__file__).resolve().parents[1]


def peak_bytes(device: torch.device) -> int:
    """The largest memory so far: of the device, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llava-onevision-0.5b")
    parser.add_argument("--recipe", default="smoothquant(parts=[vision_tower], samples=4) + gptq(bits=4, samples=4)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", type=int, default=384, help="side of the picture that is timed")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs, 0 for none")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compress_cost.json")
    args = parser.parse_args()

    dense = foveate.load(args.preset, random_weights=True, dtype=args.dtype, device=args.device)
    before = peak_bytes(dense.device)
    start = time.monotonic()
    small = Recipe.parse(args.recipe).apply(dense, quiet=True)
    report = run_header() | {
        "preset": args.preset,
        "recipe": args.recipe,
        "dtype": args.dtype,
        "seconds": round(time.monotonic() - start, 1),
        "peak_bytes": {"dense": before, "compressing": peak_bytes(dense.device)},
        "effect": effect(dense, small).to_dict(),
        "kernels": accelerate_(small),
    }
    if args.pairs:
        pictures = draw_pictures((args.size, args.size), 0)
        (a, tokens), (b, _) = (timed_request(vlm, pictures, "What is this?", args.new_tokens) for vlm in (small, dense))
        rows, run = compare(a, b, pairs=args.pairs, warmup=1, min_seconds=0.0, aa=False)
        stages = {row.stage: row for row in rows}
        report |= {"tokens": tokens, "run": run, "ratios": {}}
        for stage in ("encode", "prefill", "decode"):
            row = stages[stage]
            report["ratios"][stage] = {
                "small_ms": row.a_ms,
                "dense_ms": row.b_ms,
                "ratio": row.ratio,
                "low": row.low,
                "high": row.high,
            }
    write_json(args.out, report)


if __name__ == "__main__":
    main()
