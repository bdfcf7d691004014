"""What `nano` can do: each skill of the drawn world at high and low resolution, and the real sets, with 95 % intervals.

    python benchmarks/nano_quality.py --limit 512 --out benchmarks/results/nano_quality.json [--data DIR]

Rows of the real sets need their folder (--data or FOVEATE_DATA). Seeds are fresh: nothing here was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import run_header, write_json

import foveate
from foveate.tasks.evaluate import evaluate
from foveate.world import CLIP_SKILLS, SKILLS

FEW_FRAMES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--limit", type=int, default=512, help="questions per task")
    parser.add_argument("--seed", type=int, default=20261120)
    parser.add_argument("--data", type=Path, help="folder with easy-vqa, nlvr and flickr8k-224")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nano_quality.json"))
    args = parser.parse_args()

    vlm = foveate.load(args.model)
    world = [f"world/{skill}" for skill in SKILLS]
    stills = [f"world/{skill}" for skill in SKILLS if skill not in CLIP_SKILLS]
    common = {"seed": args.seed, "limit": args.limit}
    report = run_header() | {"model": args.model, "seed": args.seed, "limit": args.limit}
    report["high_resolution"] = evaluate(vlm, world, **common)
    report["one_scale"] = evaluate(vlm.with_spec(mode="resize"), stills, **common)
    report["few_frames"] = evaluate(vlm.with_spec(num_frames=FEW_FRAMES), ["world/needle"], **common)
    report["few_frames"]["num_frames"] = FEW_FRAMES
    if args.data:
        real = ["easy-vqa", "nlvr", "flickr8k-match"]
        report["real"] = evaluate(vlm, real, seed=args.seed, limit=None, data_dir=args.data)
    write_json(args.out, report)


if __name__ == "__main__":
    main()
