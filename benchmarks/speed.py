"""What every reduction costs and saves on a model of published shape: selection, prefill, time to the first token.

    python benchmarks/speed.py --preset llava-onevision-0.5b --dtype bfloat16 --out benchmarks/results/speed.json

A round runs the dense request twice (the second tells the noise) and every recipe once, in random order; ratios are
taken inside a round. The tower runs once for each set of signals that methods ask for, and its features are used in all
rounds: its own time is the same for all, and what signals cost is charged to the methods that ask for them. Rounds of a
busy machine are dropped whole and counted. Weights are random, so what is chosen has no meaning, what it costs has.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import run_header, write_json
from curves import bars

import foveate
from foveate.adapters.shape import INSIDE, steps_of
from foveate.adapters.tower import CLS_SIGNALS, PATCH_SIGNALS
from foveate.bench import cost
from foveate.bench.breakeven import Point, crossing
from foveate.bench.memory import Job, peak
from foveate.bench.requests import Load
from foveate.bench.timing import busy_machine, load_average, stolen, ticks
from foveate.clock import OPENING, Clock
from foveate.data.sample import media_parts
from foveate.errors import FoveateError
from foveate.method import signal_for
from foveate.progress import progress
from foveate.recipe import Recipe
from foveate.registry import METHODS
from foveate.runtime import encode, generate, request_key, select, stop_of, text_embeddings
from foveate.tasks.stats import median_interval

SEED = 20261127
PROMPT = "What is written on the sign above the door, and how many people stand under it?"
PEAKS = ("", "uniform(keep=0.25)", "fastv(keep=0.25)", "visionzip(keep=0.25)")


def loads(text: str) -> list[Load]:
    """ "384x384,4f" -> one picture of that size; a clip of four frames."""
    found = []
    for part in text.split(","):
        if part.endswith("f"):
            found.append(Load((384, 384), int(part[:-1]), prompt=PROMPT, new_tokens=1))
        else:
            width, height = map(int, part.split("x"))
            found.append(Load((width, height), prompt=PROMPT, new_tokens=1))
    return found


class Bench:
    """One model and one request."""

    def __init__(self, vlm: foveate.VLM, load: Load) -> None:
        self.vlm, self.adapter = vlm, vlm.adapter
        content = [*media_parts(load.media(SEED)[:1]), {"type": "text", "text": load.prompt}]
        clock = Clock(vlm.device, extra=(OPENING,))
        with clock.stage("preprocess"):
            self.plan = vlm.plan([{"role": "user", "content": content}], num_frames=load.frames)
            self.inputs = vlm.prepare(self.plan)
        self.before = clock.ms[OPENING] + clock.ms["preprocess"]
        self.tower: list[float] = []
        self.known: dict[Any, tuple[Any, float]] = {}
        self.visual = len(self.adapter.layout(self.plan).features())
        self.encoded(())
        self.text = self.plan.num_tokens - self.visual

    def encoded(self, steps: tuple[Any, ...]) -> tuple[Any, float, float | None]:
        """(features with the signals that steps ask for, the milliseconds that those took, and those of the tower where
        tokens leave inside it). Made once, but for a tower that tokens leave."""
        inside = any(step.site == "encoder" for step in steps)
        outside = [step for step in steps if step.site not in INSIDE]
        names = {signal_for(need, self.adapter.offers) for step in outside for need in step.signals}
        tower = sorted(name for name in names if name and name.partition("@")[0] in (*PATCH_SIGNALS, *CLS_SIGNALS))
        key = (stop_of(steps), *tower)
        if key not in self.known or inside:
            clock = Clock(self.vlm.device)
            with clock.stage("encode"):
                (part,) = encode(self.adapter, [self.plan], [self.inputs], [steps])
            self.known[key] = (part, clock.ms["select"], clock.ms["encode"] if inside else None)
            if not inside:
                self.tower.append(clock.ms["encode"])
        part, signals, spent = self.known[key]
        free = {
            "features": part.features,
            "text_embeddings": text_embeddings(self.adapter, self.plan),
            "request_key": torch.tensor(request_key(self.inputs)),
        }
        part = replace(part, signals={**free, **part.signals})
        return part, signals, spent

    def once(self, reducers: tuple[Any, ...]) -> tuple[dict[str, float], Any]:
        """Milliseconds of one request by stage, and the row that ran."""
        steps = steps_of(reducers, self.adapter.shape)
        part, signals, tower = self.encoded(steps)
        clock = Clock(self.vlm.device)
        with clock.stage("select"):
            row = select(self.adapter, self.plan, part, steps)
        outside = clock.ms["select"]
        generate(self.adapter, [row], self.vlm.new_cache(), max_new_tokens=1, stop=(), clock=clock)
        ms = {"signals": signals, "outside": outside, "inside": clock.ms["select"] - outside}
        ms["tower"] = float(np.median(self.tower)) if tower is None else tower
        return ms | {"select": signals + clock.ms["select"], "prefill": clock.ms["prefill"]}, row


def recipes(vlm: foveate.VLM, keeps: list[float], only: list[str] | None) -> dict[str, tuple[Any, ...]]:
    """The reducers of every registered method that this model serves, by recipe."""
    found, refused = {}, {}
    for name in METHODS.names():
        if getattr(METHODS.get(name), "socket", "") != "reduce" or (only and name not in only):
            continue
        for keep in keeps:
            try:
                small = Recipe.parse(f"{name}(keep={keep})").apply(vlm, quiet=True)
            except FoveateError as error:
                refused[name] = str(error)
                break
            found[small.recipe.text()] = small.reducers()
    for name, reason in refused.items():
        print(f"left out: {name}: {reason}")
    return found


def measured(
    vlm: foveate.VLM, load: Load, methods: dict[str, tuple[Any, ...]], rounds: int, bar: Any
) -> dict[str, Any]:
    """All recipes on one request: {"visual", "text", "dense", "rows"}."""
    bench = Bench(vlm, load)
    rng = random.Random(SEED)
    sides: dict[str, tuple[Any, ...]] = {"dense": (), "again": (), **methods}
    kept: list[dict[str, dict[str, float]]] = []
    dropped: list[dict[str, dict[str, float]]] = []
    rows: dict[str, Any] = {}
    failed: dict[str, str] = {}
    bench.once(())
    for name in methods:  # what signals cost is measured before the rounds, which then hold nothing but requests
        try:
            bench.encoded(steps_of(methods[name], vlm.adapter.shape))
        except FoveateError as error:
            failed[name] = str(error)
    for _ in range(rounds):
        order = [name for name in sides if name not in failed]
        rng.shuffle(order)
        times: dict[str, dict[str, float]] = {}
        before = ticks()
        for name in order:
            try:
                times[name], rows[name] = bench.once(sides[name])
            except FoveateError as error:
                failed[name] = str(error)
            bar.advance(now=f"{bench.visual} tokens, {name}")
        (dropped if busy_machine(load_average(), stolen(before, ticks())) else kept).append(times)
    noisy = len(kept) < max(1, rounds // 2)
    used = kept + dropped if noisy else kept
    tower = float(np.median(bench.tower))
    dense = float(np.median([times["dense"]["prefill"] for times in used]))
    shape = cost.ModelShape.from_config(vlm.model.config, vlm.spec)
    request = cost.Request.from_plan(bench.plan, shape)
    work = cost.flops(shape, request)
    out = []
    for name in methods:
        if name in failed:
            out.append({"recipe": name, "failed": failed[name]})
            continue
        times = [one[name] for one in used]
        row = rows[name]
        layers = tuple(row.per_layer)
        less = cost.flops(shape, replace(request, kept=layers[-1], per_layer=layers, text=row.text))
        after = [t["select"] + t["prefill"] for t in times]
        ratio = interval([a / one["dense"]["prefill"] for a, one in zip(after, used)])
        share = less["prefill"] / work["prefill"]
        before_llm = bench.before + tower
        first = [bench.before + t["tower"] + a for t, a in zip(times, after)]
        ttft = interval([t / (before_llm + one["dense"]["prefill"]) for t, one in zip(first, used)])
        predicted = (before_llm + dense * share) / (before_llm + dense)
        selection = interval([t["select"] / one["dense"]["prefill"] for t, one in zip(times, used)])
        out.append(
            {
                "recipe": name,
                "visual": row.visual,
                "per_layer": list(layers),
                "select_ms": median(times, "select"),
                "signals_ms": median(times, "signals"),
                "prefill_ms": median(times, "prefill"),
                "selection_share": selection,
                "prefill_ratio": interval([t["prefill"] / one["dense"]["prefill"] for t, one in zip(times, used)]),
                "llm_ratio": ratio,
                "prefill_flops": share,
                "ttft_ratio": ttft,
                "ttft_predicted": predicted,
                "ttft_over_predicted": ttft["value"] / predicted,
            }
        )
    return {
        "size": list(load.size),
        "frames": load.frames,
        "visual": bench.visual,
        "text": bench.text,
        "views": sum(len(item.views) for item in bench.plan.media),
        "rounds": len(used),
        "discarded": 0 if noisy else len(dropped),
        "noisy": noisy,
        "dense": {"preprocess_ms": bench.before, "tower_ms": tower, "prefill_ms": dense},
        "again": interval([one["again"]["prefill"] / one["dense"]["prefill"] for one in used]),
        "rows": out,
    }


def interval(values: list[float]) -> dict[str, float]:
    """Median with a 95 % bootstrap interval, in the logarithm."""
    found = median_interval(np.log(values), seed=SEED)
    return {name: float(np.exp(value)) for name, value in found._asdict().items()}


def median(times: list[dict[str, float]], name: str) -> float:
    return float(np.median([one[name] for one in times]))


def break_evens(sizes: list[dict[str, Any]]) -> dict[str, Any]:
    """For each recipe the visual tokens from which on it pays, by its ratio of select and prefill at every size."""
    points: dict[str, list[Point]] = {}
    for size in sizes:
        for row in size["rows"]:
            if "llm_ratio" in row:
                ratio = row["llm_ratio"]
                points.setdefault(row["recipe"], []).append(
                    Point(size["visual"], ratio["value"], ratio["low"], ratio["high"])
                )
    return {name: crossing(found) for name, found in points.items()}


def plot(run: dict[str, Any]) -> str:
    """An SVG of the time to the first token at the smallest fraction kept, of the last run of the size with most
    recipes."""
    sizes = {(tuple(one["size"]), one["frames"]): one for one in run["sizes"]}.values()
    size = max(sizes, key=lambda one: (len(one["rows"]), one["visual"]))
    dense = size["dense"]
    before = dense["preprocess_ms"] + dense["tower_ms"]
    fixed = before / (before + dense["prefill_ms"])
    rows = [row for row in size["rows"] if "failed" not in row and row["recipe"].endswith(f"keep={least_keep(size)})")]
    shown = []
    for row in rows:
        counted = any(tokens < row["visual"] for tokens in row["per_layer"])  # counts do not know masks in layers
        shown.append((row["recipe"], row["ttft_ratio"]["value"], fixed, row["ttft_predicted"] if counted else None))
    axis = f"time to first token / dense, {size['visual']} visual tokens; red: to the end of the tower"
    return bars(sorted(shown, key=lambda one: one[1]), axis, mark="FLOPs predict")


def least_keep(size: dict[str, Any]) -> str:
    return min(row["recipe"].partition("keep=")[2].rstrip(")").partition(",")[0] for row in size["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llava-onevision-0.5b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sizes", default="1f,4f,384x384", help="pictures (WxH) and clips (Nf)")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--add", action="store_true", help="keep what the file holds of other sizes and presets")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--plot", type=Path, help="draw what the file holds into this SVG, and measure nothing")
    args = parser.parse_args()

    if args.plot:
        args.plot.write_text(plot(json.loads(args.out.read_text())["runs"][0]) + "\n")
        return
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    vlm = foveate.load(args.preset, random_weights=True, dtype=args.dtype, device="cpu")
    methods = recipes(vlm, args.keep, args.methods)
    asked = loads(args.sizes)
    run: dict[str, Any] = {"preset": args.preset, "dtype": args.dtype, "threads": args.threads, "sizes": []}
    earlier: list[dict[str, Any]] = []
    if args.add and args.out.is_file():
        for known in json.loads(args.out.read_text())["runs"]:
            if (known["preset"], known["dtype"]) == (args.preset, args.dtype):
                run = known
            else:
                earlier.append(known)
    with progress("speed", len(asked) * args.rounds * (len(methods) + 2)) as bar, torch.inference_mode():
        for load in asked:
            found = measured(vlm, load, methods, args.rounds, bar)
            others = [one for one in run["sizes"] if (one["size"], one["frames"]) != (found["size"], found["frames"])]
            run["sizes"] = sorted([*others, found], key=lambda one: one["visual"])
            run["break_even"] = break_evens(run["sizes"])
            run["seconds"] = round(run.get("seconds", 0.0) + time.monotonic() - started, 1)
            started = time.monotonic()
            write_json(args.out, run_header() | {"seed": SEED, "runs": [*earlier, run]})
    if not args.no_memory:
        picture = next((load for load in reversed(asked) if not load.frames), None)
        del vlm
        common = {"dtype": args.dtype, "device": "cpu", "random_weights": True, "threads": args.threads}
        run["memory"] = []
        for recipe in PEAKS if picture else ():
            job = Job(model=args.preset, recipe=recipe, sizes=(picture.size,), prompt=PROMPT, new_tokens=1, **common)
            run["memory"].append({"recipe": recipe, "size": list(picture.size), **peak(job)})
        write_json(args.out, run_header() | {"seed": SEED, "runs": [*earlier, run]})


if __name__ == "__main__":
    main()
