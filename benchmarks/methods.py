"""What every token reduction keeps of nano's accuracy: each on the same questions as dense and as random selection.

    python benchmarks/methods.py --limit 32 --data DIR --out benchmarks/results/methods.json

Every registered reduction that fits the model is asked at each kept fraction. Where a method's tokens leave inside the
language model, so do those of its random baseline: layers that see everything carry much of the picture on.
Differences are paired, question by question: the mean over tasks of each task's difference, with a bootstrap interval;
so is every task by itself. The file is written after each recipe, and a run that was stopped goes on where it was when
--resume is given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import run_header, write_json
from curves import heat

import foveate
from foveate.optimize.samples import Split, splits
from foveate.optimize.workbench import ModelWorkbench
from foveate.progress import track
from foveate.recipe import Recipe
from foveate.registry import METHODS
from foveate.tasks.base import find_tasks
from foveate.tasks.stats import paired_bootstrap, wilson

KEEPS = (0.75, 0.5, 0.25, 0.1)
OTHERS = ("rtn(bits=8)", "rtn(bits=4)", "rtn(bits=3)", "int8", "uniform(keep=0.5) + rtn(bits=4) + int8")
REAL = ("easy-vqa", "nlvr")
BASELINE = "random"


def recipes(bench: ModelWorkbench) -> list[str]:
    """Every reduction that fits the model at each kept fraction, the baseline first; then the other sockets."""
    fitting = [method.name for method in bench.methods if method.socket == "reduce"]
    names = sorted(fitting, key=lambda name: (name != BASELINE, name))
    found = []
    for keep in KEEPS:
        for name in names:
            method = METHODS.get(name)
            if "keep" in method.parameters():
                found.append(method.from_params({"keep": keep}).text())
        found.append(METHODS.get(BASELINE).from_params({"keep": keep, "layer": 1}).text())
    return [*found, *OTHERS]


def baseline(recipe: str, bench: ModelWorkbench) -> str | None:
    """Random tokens at the same fraction, leaving where the method's first tokens leave; None where none do."""
    method = Recipe.parse(recipe).methods[0]
    if "+" in recipe or method.socket != "reduce" or method.name == BASELINE:
        return None
    first = method.steps(bench.vlm.adapter.shape)[0]
    if first.site == "compute":
        return None
    layer = {"layer": first.layer} if first.site == "llm" else {}
    return METHODS.get(BASELINE).from_params({"keep": method.keep, **layer}).text()


def delta(first: np.ndarray, second: np.ndarray, groups: list[str]) -> dict[str, float]:
    """Mean difference first - second with its interval, rounded to what means something."""
    found = paired_bootstrap(first, second, groups=groups)
    return {name: round(value, 4) for name, value in found._asdict().items()}


def row(scores: np.ndarray, dense: np.ndarray, random: np.ndarray | None, tasks: list[str]) -> dict[str, Any]:
    """One recipe: mean over tasks, and each task, against dense and against random tokens at the same budget."""
    names = np.asarray(tasks)
    by_task: dict[str, Any] = {}
    for name in dict.fromkeys(tasks):
        mine = names == name
        n, right = int(mine.sum()), float(scores[mine].sum())
        low, high = wilson(right, n)
        by_task[name] = {
            "n": n,
            "accuracy": round(right / n, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "against_dense": delta(scores[mine], dense[mine], [name] * n),
        }
        if random is not None:
            by_task[name]["against_random"] = delta(scores[mine], random[mine], [name] * n)
    found = {"mean": round(float(np.mean([r["accuracy"] for r in by_task.values()])), 4), "tasks": by_task}
    found["paired"] = delta(scores, dense, tasks)
    if random is not None:
        found["against_random"] = delta(scores, random, tasks)
    return found


def plots(report: dict[str, Any], folder: Path) -> None:
    """What stays against dense, and what is won over random tokens, for every method and kept fraction."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [f"keep {keep:g}" for keep in KEEPS]
    for key, title in (("paired", "points against dense"), ("against_random", "points against random tokens")):
        rows: dict[str, list[float | None]] = {}
        for recipe, result in report["recipes"].items():
            name, _, rest = recipe.partition("(keep=")
            name += " in the LLM" if "layer=" in rest else ""
            if rest and "+" not in recipe and (found := result.get(key)):
                keep = KEEPS.index(float(rest.partition(",")[0].strip(")")))
                rows.setdefault(name, [None] * len(KEEPS))[keep] = 100 * found["value"]
        ranked = dict(sorted(rows.items(), key=lambda item: -sum(value or 0.0 for value in item[1][1:3])))
        file = folder / f"methods_{key}.svg"
        file.write_text(heat(ranked, columns, title=f"nano, mean over tasks: {title}"), encoding="utf-8")
        print(f"wrote {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--limit", type=int, default=32, help="questions per task")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--data", type=Path, help="folder with easy-vqa and nlvr, which are then asked as well")
    parser.add_argument("--only", action="append", help="methods to run (again), default all")
    parser.add_argument("--resume", action="store_true", help="keep the recipes that --out already holds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/methods.json"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder of the plots")
    args = parser.parse_args()

    vlm = foveate.load(args.model)
    tasks, _ = find_tasks(["world", *(REAL if args.data else ())], args.data)
    asked = splits(tasks, choose=1, prove=args.limit, seed=args.seed, data_dir=args.data)[1]
    bench = ModelWorkbench(vlm, asked, Split(), data="", quiet=True)
    n, groups = len(bench.choose), bench.choose.tasks
    report = run_header() | {"model": args.model, "seed": args.seed, "limit": args.limit}
    old = json.loads(args.out.read_text())["recipes"] if args.resume and args.out.is_file() else {}
    dense = bench.scores("", "choose", n)
    report["dense"] = row(dense, dense, None, groups)
    report["refused"] = dict(sorted(bench.refused.items()))
    report["recipes"] = {}
    for recipe in track(recipes(bench), "recipes"):
        name = recipe.partition("(")[0]
        if recipe in old and name not in (args.only or ()):
            report["recipes"][recipe] = old[recipe]
        elif not args.only or name in args.only:
            rival = baseline(recipe, bench)
            random = bench.scores(rival, "choose", n) if rival else None
            cost = bench.cost(recipe)
            report["recipes"][recipe] = row(bench.scores(recipe, "choose", n), dense, random, groups) | {
                "baseline": rival,
                "flops": round(cost.flops / bench.cost("").flops, 4),
                "tokens": round(cost.tokens / bench.cost("").tokens, 4),
            }
        write_json(args.out, report)
    plots(report, args.images)


if __name__ == "__main__":
    main()
