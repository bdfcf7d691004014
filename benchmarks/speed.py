"""What every reduction costs and saves on models of published shape: selection, prefill, time to the first token.

    taskset -c 0 python benchmarks/speed.py                         the whole table, about 25 minutes on a quiet core
    python benchmarks/speed.py --presets smolvlm-256m:1f,1024x768 --minutes 5 --resume

A round runs every recipe once, in random order, and a dense request before and after each few of them. Ratios are to
the mean of the two dense requests around; those against each other tell the noise. The tower that nothing leaves runs
once at the head of each round: its time is the same for all that do not change it, and each of its signals is charged
to the methods that ask for it. Rounds of a busy machine are dropped whole and counted. Weights are random, so what is
chosen has no meaning, what it costs has. Each size gets an equal share of the minutes that are left; what does not fit
is left out and named in the file, and `--resume` takes what the file does not hold yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import run_header, write_json
from curves import bars
from tables_cost import BEYOND, SELECTION, counted

import foveate
from foveate.adapters.base import COMMON_SIGNALS
from foveate.adapters.shape import INSIDE, steps_of
from foveate.bench import cost
from foveate.bench.breakeven import Point, crossing
from foveate.bench.memory import Job, peak
from foveate.bench.requests import Load
from foveate.bench.timing import busy_machine, stolen, ticks
from foveate.clock import OPENING, Clock
from foveate.data.sample import media_parts
from foveate.errors import FoveateError
from foveate.machine import load_average
from foveate.method import signal_for
from foveate.progress import progress
from foveate.recipe import Recipe
from foveate.registry import METHODS
from foveate.runtime import encode, generate, request_key, select, stop_of, text_embeddings
from foveate.tasks.stats import median_interval

SEED = 20261127
PROMPT = "What is written on the sign above the door, and how many people stand under it?"
PEAKS = ("", "uniform(keep=0.25)", "fastv(keep=0.25)", "visionzip(keep=0.25)")
TABLE = (
    "smolvlm-256m:1f,1024x768",
    "internvl2.5-1b:448x448,768x384",
    "llava-onevision-0.5b:1f,4f,768x384",
    "nvila-lite-2b:384x64",
)
"""Presets and sizes of the committed table: one small size for the break-even point, one or more of 700 to 3,000 visual
tokens, cheap ones first, so that the time they leave over goes to the others."""
NEAR = 13
"""Recipes between two dense requests."""


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
    """One model and one request. signals: those of the tower that the recipes to come ask for."""

    def __init__(self, vlm: foveate.VLM, load: Load, signals: set[str]) -> None:
        self.vlm, self.adapter = vlm, vlm.adapter
        content = [*media_parts(load.media(SEED)[:1]), {"type": "text", "text": load.prompt}]
        clock = Clock(vlm.device, extra=(OPENING,))
        with clock.stage("preprocess"):
            self.plan = vlm.plan([{"role": "user", "content": content}], num_frames=load.frames)
            self.inputs = vlm.prepare(self.plan)
        self.before = {"decode_image_ms": clock.ms[OPENING], "preprocess_ms": clock.ms["preprocess"]}
        self.visual = len(self.adapter.layout(self.plan).features())
        self.text = self.plan.num_tokens - self.visual
        self.wanted = signals
        self.known = {"post_projector": self.time_tower()}

    def time_tower(self) -> Any:
        """Features and signals of the tower that nothing leaves. Requests to come count the time that they took."""
        clock = Clock(self.vlm.device)
        with clock.stage("encode"):
            (part,) = self.adapter.encode([self.inputs], [self.plan], self.wanted)
        self.towers, self.spent = {"post_projector": clock.ms["encode"]}, clock.parts
        return part

    def encoded(self, steps: tuple[Any, ...]) -> tuple[Any, float, float]:
        """(features with signals, the milliseconds that those which steps ask for took, and those of the tower).
        Made once, but for a tower that tokens leave."""
        stop = stop_of(steps)
        if stop == "encoder":
            clock = Clock(self.vlm.device)
            with clock.stage("encode"):
                (part,) = encode(self.adapter, [self.plan], [self.inputs], [steps])
            return part, clock.ms["select"], clock.ms["encode"]
        if stop not in self.towers:
            clock = Clock(self.vlm.device)
            with clock.stage("encode"):
                (self.known[stop],) = self.adapter.encode([self.inputs], [self.plan], self.wanted, stop=stop)
            self.towers[stop] = clock.ms["encode"]
        part = self.known[stop]
        free = {
            "features": part.features,
            "text_embeddings": text_embeddings(self.adapter, self.plan),
            "request_key": torch.tensor(request_key(self.inputs)),
        }
        spent = sum(self.spent.get(name, 0.0) for name in tower_signals(self.adapter, steps))
        return replace(part, signals={**free, **part.signals}), spent, self.towers[stop]

    def once(self, reducers: tuple[Any, ...]) -> tuple[dict[str, float], Any]:
        """Milliseconds of one request by stage, and the row that ran."""
        steps = steps_of(reducers, self.adapter.shape)
        part, signals, tower = self.encoded(steps)
        clock = Clock(self.vlm.device)
        with clock.stage("select"):
            row = select(self.adapter, self.plan, part, steps)
        generate(self.adapter, [row], self.vlm.new_cache(), max_new_tokens=1, stop=(), clock=clock)
        ms = {"signals": signals, "tower": tower + clock.ms["encode"], "select": signals + clock.ms["select"]}
        return ms | {"prefill": clock.ms["prefill"]}, row


def tower_signals(adapter: Any, steps: tuple[Any, ...]) -> set[str]:
    """Names of the tower's signals that steps behind it ask for."""
    outside = [step for step in steps if step.site not in (*INSIDE, "encoder")]
    names = {signal_for(need, adapter.offers) for step in outside for need in step.signals}
    return {name for name in names if name and name not in COMMON_SIGNALS}


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
    vlm: foveate.VLM, load: Load, methods: dict[str, tuple[Any, ...]], rounds: int, end: float
) -> dict[str, Any]:
    """All recipes on one request: {"visual", "text", "dense", "rows"}. end: of `time.monotonic`, when no further round
    begins; one there is always."""
    shape = vlm.adapter.shape
    wanted = (tower_signals(vlm.adapter, steps_of(reducers, shape)) for reducers in methods.values())
    bench = Bench(vlm, load, set().union(*wanted))
    rng = random.Random(SEED)
    kept: list[dict[str, dict[str, float]]] = []
    dropped: list[dict[str, dict[str, float]]] = []
    rows: dict[str, Any] = {}
    failed: dict[str, str] = {}
    again: list[float] = []
    bench.once(())
    gc.collect()
    gc.disable()
    longest = 0.0
    with progress("speed", rounds * len(methods)) as bar:
        for number in range(rounds):
            began, before = time.monotonic(), ticks()
            if number and began + longest > end:
                break
            order = [name for name in methods if name not in failed]
            rng.shuffle(order)
            times: dict[str, dict[str, float]] = {}
            bench.time_tower()
            tower = bench.towers["post_projector"]
            dense = bench.once(())[0]["prefill"]
            for start in range(0, len(order), NEAR):
                near = order[start : start + NEAR]
                for name in near:
                    try:
                        times[name], rows[name] = bench.once(methods[name])
                    except FoveateError as error:
                        failed[name] = str(error)
                    bar.advance(now=f"{vlm.name}, {bench.visual} tokens, {name}")
                following = bench.once(())[0]["prefill"]
                again.append(following / dense)
                for name in set(near) & set(times):
                    times[name] |= {"dense": (dense + following) / 2, "dense_tower": tower}
                dense = following
            (dropped if busy_machine(load_average(), stolen(before, ticks())) else kept).append(times)
            gc.collect()
            longest = max(longest, time.monotonic() - began)
    gc.enable()
    noisy = len(kept) < max(1, (len(kept) + len(dropped)) // 2)
    used = kept + dropped if noisy else kept
    every = [t for times in used for t in times.values()]
    out = [
        {"recipe": name, "failed": failed[name]}
        if name in failed
        else {"recipe": name, **costs(bench, reducers, rows[name], [times[name] for times in used])}
        for name, reducers in methods.items()
    ]
    return {
        "size": list(load.size),
        "frames": load.frames,
        "visual": bench.visual,
        "text": bench.text,
        "views": sum(len(item.views) for item in bench.plan.media),
        "rounds": len(used),
        "discarded": 0 if noisy else len(dropped),
        "noisy": noisy,
        "dense": {**bench.before, "tower_ms": median(every, "dense_tower"), "prefill_ms": median(every, "dense")},
        "signals": {name: round(spent, 3) for name, spent in sorted(bench.spent.items())},
        "again": interval(again),
        "rows": out,
    }


def costs(bench: Bench, reducers: tuple[Any, ...], row: Any, times: list[dict[str, float]]) -> dict[str, Any]:
    """What a recipe cost and saved, of the times of all rounds, against what its FLOPs predict."""
    shape = cost.ModelShape.from_config(bench.vlm.model.config, bench.vlm.spec)
    request = cost.Request.from_plan(bench.plan, shape)
    layers = tuple(row.per_layer)
    small = replace(cost.Effect(reducers).apply(request, shape), kept=layers[-1], per_layer=layers, text=row.text)
    less, whole = cost.flops(shape, small), cost.flops(shape, request)
    share = less["prefill"] / whole["prefill"]
    tower = (less["tower"] + less["connector"]) / (whole["tower"] + whole["connector"])
    opened = sum(bench.before.values())
    whole_tower, dense = median(times, "dense_tower"), median(times, "dense")
    after = [t["select"] + t["prefill"] for t in times]
    ttft = interval(
        [(opened + t["tower"] + a) / (opened + t["dense_tower"] + t["dense"]) for t, a in zip(times, after)]
    )
    predicted = (opened + whole_tower * tower + dense * share) / (opened + whole_tower + dense)
    return {
        "visual": row.visual,
        "per_layer": list(layers),
        "select_ms": median(times, "select"),
        "signals_ms": median(times, "signals"),
        "tower_ms": median(times, "tower"),
        "prefill_ms": median(times, "prefill"),
        "selection_share": interval([t["select"] / t["dense"] for t in times]),
        "prefill_ratio": interval([t["prefill"] / t["dense"] for t in times]),
        "llm_ratio": interval([a / t["dense"] for t, a in zip(times, after)]),
        "tower_flops": tower,
        "prefill_flops": share,
        "ttft_ratio": ttft,
        "ttft_predicted": predicted,
        "ttft_over_predicted": ttft["value"] / predicted,
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


def plot(runs: list[dict[str, Any]]) -> str:
    """An SVG of the time to the first token at the smallest fraction kept, of the largest size with most recipes."""
    sizes = [size for run in runs for size in run["sizes"]]
    size = max(sizes, key=lambda one: (len(one["rows"]), one["visual"]))
    dense = size["dense"]
    whole = dense["preprocess_ms"] + dense["tower_ms"] + dense["prefill_ms"]
    rows = [row for row in size["rows"] if "failed" not in row and row["recipe"].endswith(f"keep={least_keep(size)})")]
    shown = []
    for row in rows:
        predicted = row["ttft_predicted"] if counted(row) else None
        encoded = (dense["preprocess_ms"] + row["tower_ms"]) / whole
        shown.append((row["recipe"], row["ttft_ratio"]["value"], encoded, predicted))
    axis = f"time to first token / dense, {size['visual']} visual tokens; red: to the end of the tower"
    return bars(sorted(shown, key=lambda one: one[1]), axis, mark="FLOPs predict")


def least_keep(size: dict[str, Any]) -> str:
    return min(row["recipe"].partition("keep=")[2].rstrip(")").partition(",")[0] for row in size["rows"])


def told(size: dict[str, Any], pays: dict[str, Any]) -> str:
    """The lines that say of one size what misses its target, and from how many tokens on each recipe pays."""
    lines = []
    for row in size["rows"]:
        if "failed" in row:
            lines.append(f"  {row['recipe']}: {row['failed']}")
            continue
        share, over = row["selection_share"]["value"], row["ttft_over_predicted"] - 1
        missed = [f"selection above {SELECTION:.0%}"] * (share > SELECTION)
        missed += [f"TTFT beyond {BEYOND:.0%}"] * (counted(row) and abs(over) > BEYOND)
        lines.append(
            f"  {row['recipe']}: selection {share:.1%}, TTFT {row['ttft_ratio']['value']:.3f} of dense ({over:+.1%} "
            f"over FLOPs); {pays[row['recipe']]['text']}{'; MISSED: ' + ', '.join(missed) if missed else ''}"
        )
    return "\n".join(lines)


def resumed(path: Path) -> dict[str, Any]:
    """What the file holds: {"runs", "skipped"}."""
    held = json.loads(path.read_text()) if path.is_file() else {}
    return {"runs": held.get("runs", []), "skipped": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets", nargs="+", default=TABLE, metavar="NAME:SIZES", help="sizes: WxH pictures, Nf clips"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25])
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=2, help="at most")
    parser.add_argument("--minutes", type=float, default=25.0, help="what does not fit is left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", default="llava-onevision-0.5b:384x384", metavar="NAME:SIZE", help="'' for none")
    parser.add_argument("--resume", action="store_true", help="keep what the file holds, and take the rest")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--plot", type=Path, help="draw what the file holds into this SVG, and measure nothing")
    args = parser.parse_args()

    if args.plot:
        args.plot.write_text(plot(json.loads(args.out.read_text())["runs"]) + "\n")
        return
    torch.set_num_threads(args.threads)
    end = time.monotonic() + 60 * args.minutes
    report = resumed(args.out) if args.resume else {"runs": [], "skipped": []}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    header = {"seed": SEED, "minutes": args.minutes, "allowed_cores": cores}
    todo = []
    for text in args.presets:
        name, _, sizes = text.partition(":")
        run = run_of(report, name, args.dtype, args.threads)
        held = [(one["size"], one["frames"]) for one in run["sizes"]]
        todo += [(run, load) for load in loads(sizes or "384x384") if (list(load.size), load.frames) not in held]
    if args.memory:
        name, _, size = args.memory.partition(":")
        run = run_of(report, name, args.dtype, args.threads)
        if "memory" not in run:
            run["memory"] = memory(run, loads(size)[0], end)
            write_json(args.out, run_header() | header | report)
    vlm, methods, least = None, {}, 0.0
    for done, (run, load) in enumerate(todo):
        began = time.monotonic()
        if began + least > end:  # one round takes no less than it took of the size before
            report["skipped"].append({"preset": run["preset"], "size": list(load.size), "frames": load.frames})
            continue
        if vlm is None or vlm.name != run["preset"]:
            vlm = None  # never two models at a time
            vlm = foveate.load(run["preset"], random_weights=True, dtype=args.dtype, device="cpu")
            methods = recipes(vlm, args.keep, args.methods)
        with torch.inference_mode():
            found = measured(vlm, load, methods, args.rounds, began + (end - began) / (len(todo) - done))
        run["sizes"] = sorted([*run["sizes"], found], key=lambda one: one["visual"])
        run["break_even"] = break_evens(run["sizes"])
        seconds = time.monotonic() - began
        least = seconds / (found["rounds"] + found["discarded"])
        run["seconds"] = round(run.get("seconds", 0.0) + seconds, 1)
        print(f"{run['preset']}, {found['visual']} visual tokens, {found['rounds']} rounds, {seconds:.0f} s")
        print(told(found, run["break_even"]))
        write_json(args.out, run_header() | header | report)
    write_json(args.out, run_header() | header | report)
    for one in report["skipped"]:
        print(f"left out for want of time: {one}")


def memory(run: dict[str, Any], load: Load, end: float) -> list[dict[str, Any]]:
    """Peak memory of a request with each of PEAKS, each in a process of its own; none begins after `end`."""
    common = {"dtype": run["dtype"], "device": "cpu", "random_weights": True, "threads": run["threads"]}
    found = []
    for recipe in PEAKS:
        if time.monotonic() < end:
            job = Job(model=run["preset"], recipe=recipe, sizes=(load.size,), prompt=PROMPT, new_tokens=1, **common)
            found.append({"recipe": recipe, "size": list(load.size), **peak(job)})
    return found


def run_of(report: dict[str, Any], preset: str, dtype: str, threads: int) -> dict[str, Any]:
    """The run of a preset in the report, put there where there is none."""
    for run in report["runs"]:
        if (run["preset"], run["dtype"], run["threads"]) == (preset, dtype, threads):
            return run
    run = {"preset": preset, "dtype": dtype, "threads": threads, "sizes": [], "break_even": {}}
    report["runs"].append(run)
    return run


if __name__ == "__main__":
    main()
