"""Whether the search finds the front: against every recipe of a small space, evaluated once.

    python benchmarks/search.py                     evaluates 249 recipes of nano (about 25,000 answers), then searches
    python benchmarks/search.py --reuse             searches again over the evaluations in the result file

Every recipe answers the same questions; its score on each is kept, a bit a question. The strategies then search that
table, whose truth is the mean over all questions, with 15 % of its evaluations. What counts is the hypervolume of
(relative cost, loss) that the found recipes dominate, as a share of that of all recipes; random search has as many
evaluations. The sign test is over seeds.
"""

from __future__ import annotations

import argparse
import base64
import statistics
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import run_header, write_json

from foveate.optimize.budget import Budget, Cost
from foveate.optimize.run import Effort, explore
from foveate.optimize.search import Interval
from foveate.optimize.space import Space
from foveate.optimize.strategies import Context, area
from foveate.progress import track
from foveate.tasks.stats import sign_test

KEEPS = (0.9, 0.7, 0.5, 0.35, 0.2, 0.1)
REDUCE = [f"{name}(keep={keep})" for name in ("uniform", "random", "fastervlm", "fastv") for keep in KEEPS]
ALL = "[llm, vision_tower, mm_projector]"
WEIGHTS = [
    f"rtn(bits=8, group=32, parts={ALL})",
    f"rtn(bits=4, group=32, parts={ALL})",
    "rtn(bits=4, group=32)",
    "rtn(bits=3, group=32)",
]
SPACE = Space([["", *REDUCE], ["", *WEIGHTS], ["", "int8"]], sockets=("reduce", "weights", "cache"))
STRATEGIES = ("surrogate", "genetic", "tpe", "nsga2", "random")
SHARE = 0.15


class Table:
    """A workbench whose scores and costs were all measured before."""

    name = data = "table"

    def __init__(self, costs: dict[str, list[float]], scores: dict[str, np.ndarray]) -> None:
        self._costs, self._scores = costs, scores
        n = len(scores[""])
        self.choose = self.prove = SimpleNamespace(tasks=["all"] * n, skills=["all"] * n)

    def cost(self, recipe: str) -> Cost:
        return Cost(*self._costs[recipe])

    def scores(self, recipe: str, split: str, n: int) -> np.ndarray:
        return self._scores[recipe][:n]

    def stage(self, title: str, questions: int) -> None: ...

    def expect(self, recipes: list[str]) -> None: ...

    def recall(self, key: str, value: int | None = None) -> int | None:
        return value

    def upgrades(self, recipe: str, most: int) -> list[str]:
        return []


def evaluate(limit: int, seed: int) -> dict[str, Any]:
    """{"costs": {recipe: [flops, bytes, tokens]}, "bits": {recipe: scores packed}, "questions"} of the whole space."""
    import random

    import foveate
    from foveate.optimize.samples import splits
    from foveate.optimize.workbench import ModelWorkbench
    from foveate.tasks.base import find_tasks

    tasks, _ = find_tasks(["world"])
    first, second = splits(tasks, choose=-(-limit // len(tasks)), prove=1, seed=seed)
    bench = ModelWorkbench(foveate.load("nano"), first, second, data="world", quiet=True)
    n = min(limit, len(bench.choose))
    costs, bits = {}, {}
    for recipe in track(["", *SPACE.recipes(10_000, random.Random(0))], "recipes"):
        cost = bench.cost(recipe)
        costs[recipe] = [cost.flops, cost.bytes, cost.tokens]
        packed = np.packbits(bench.scores(recipe, "choose", n) > 0.5)
        bits[recipe] = base64.b64encode(packed.tobytes()).decode()
    return {"questions": n, "costs": costs, "bits": bits}


def unpack(data: dict[str, Any]) -> Table:
    """The table of evaluations."""
    scores = {
        recipe: np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[: data["questions"]].astype(float)
        for recipe, text in data["bits"].items()
    }
    return Table(data["costs"], scores)


def context(table: Table, seed: int) -> Context:
    samples = len(table.choose.tasks)
    return Context(table, SPACE, Budget.parse(), table.cost(""), seed=seed, front=True, samples=samples)  # type: ignore[arg-type]


def share(table: Table, strategy: str, seed: int, evaluations: int, whole: float) -> float:
    """Hypervolume that a search finds with these evaluations, of that of all recipes."""
    made = context(table, seed)
    found = SimpleNamespace(trials=[], budget=made.budget, dense=made.dense)
    effort = Effort(strategy=strategy, recipes=evaluations, explore=made.samples, shortlist=evaluations, upgrades=0)
    explore(table, found, made, effort, seed, lambda line: None)  # type: ignore[arg-type]
    return area(found.trials, made) / whole


def hypervolume_of_all(table: Table) -> float:
    made = context(table, 0)
    dense = table.scores("", "choose", made.samples)
    trials = []
    for recipe in table._costs:
        if recipe:
            trial = made.trial(recipe)
            delta = float((table.scores(recipe, "choose", made.samples) - dense).mean())
            trial.delta = Interval(delta, delta, delta, made.samples)
            trials.append(trial)
    return area(trials, made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=96, help="questions for each recipe")
    parser.add_argument("--seed", type=int, default=20261127, help="of the questions")
    parser.add_argument("--seeds", type=int, default=10, help="searches of each strategy")
    parser.add_argument("--reuse", action="store_true", help="take the evaluations from the result file")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search.json"))
    args = parser.parse_args()

    if args.reuse:
        import json

        report = json.loads(args.out.read_text())
    else:
        report = run_header() | {"model": "nano", "seed": args.seed, **evaluate(args.limit, args.seed)}
    table = unpack(report)
    recipes = len(report["costs"]) - 1
    evaluations = round(SHARE * recipes)
    whole = hypervolume_of_all(table)
    runs = {
        strategy: [share(table, strategy, seed, evaluations, whole) for seed in track(range(args.seeds), strategy)]
        for strategy in STRATEGIES
    }
    report |= {"recipes": recipes, "evaluations": evaluations, "hypervolume": whole, "runs": {}}
    for strategy, values in runs.items():
        pairs = list(zip(values, runs["random"]))
        report["runs"][strategy] = {
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "first_five": statistics.median(values[:5]),
            "p_against_random": sign_test(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)),
            "values": values,
        }
        row = report["runs"][strategy]
        print(
            f"{strategy:10} {row['median']:.4f} [{row['low']:.4f}, {row['high']:.4f}]  p {row['p_against_random']:.4f}"
        )
    report["checksum"] = zlib.crc32("".join(report["bits"].values()).encode())
    write_json(args.out, report)


if __name__ == "__main__":
    main()
