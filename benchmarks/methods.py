"""What every method keeps of nano's accuracy: each recipe on the same questions as dense, and as random selection.

    python benchmarks/methods.py --limit 96 --out benchmarks/results/methods.json

Differences are paired: the mean over skills of each skill's difference, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import run_header, write_json

import foveate
from foveate.progress import track
from foveate.recipe import Recipe
from foveate.tasks.evaluate import Record, evaluate
from foveate.tasks.stats import paired_bootstrap

KEEPS = (0.75, 0.5, 0.25, 0.1)
SELECTORS = ("random", "uniform", "fastervlm")
OTHERS = ("rtn(bits=8)", "rtn(bits=4)", "rtn(bits=3)", "int8", "uniform(keep=0.5) + rtn(bits=4) + int8")


def compare(first: list[Record], second: list[Record]) -> dict[str, Any]:
    """Mean difference first - second over tasks, of records of the same questions in the same order."""
    if [(r.task, r.id) for r in first] != [(r.task, r.id) for r in second]:
        raise ValueError("the two runs did not answer the same questions")
    a, b = [r.correct for r in first], [r.correct for r in second]
    return paired_bootstrap(a, b, groups=[r.task for r in first])._asdict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--limit", type=int, default=96, help="questions per skill")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/methods.json"))
    args = parser.parse_args()

    vlm = foveate.load(args.model)
    recipes = [f"{name}(keep={keep})" for keep in KEEPS for name in SELECTORS] + list(OTHERS)
    runs: dict[str, list[Record]] = {}
    report = run_header() | {"model": args.model, "seed": args.seed, "limit": args.limit, "recipes": {}}
    for recipe in track(["", *recipes], "recipes"):
        runs[recipe] = []
        model = Recipe.parse(recipe).apply(vlm) if recipe else vlm
        result = evaluate(
            model, ["world"], seed=args.seed, limit=args.limit, records=runs[recipe], progress=False, batch_size=64
        )
        if not recipe:
            report["dense"] = result
            continue
        result["paired"] = compare(runs[recipe], runs[""])
        budget = recipe.partition("(")[2]
        if recipe.startswith(SELECTORS[1:]) and (rival := f"random({budget}") in runs:
            result["against_random"] = compare(runs[recipe], runs[rival])
        report["recipes"][recipe] = result
    write_json(args.out, report)


if __name__ == "__main__":
    main()
