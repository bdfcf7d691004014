"""`foveate bench MODEL`: time per stage of two recipes, interleaved, with intervals and an A/A run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from foveate.cli.common import (
    add_method_options,
    add_model_options,
    add_verb,
    human,
    parse_recipe,
    parse_reduce,
    positive_int,
    print_json,
    print_table,
)
from foveate.cli.plan import size
from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.bench.requests import Load
    from foveate.vlm import VLM


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "bench", model=True)
    parser.add_argument("--against", metavar="R", help="recipe to compare with (default: the model as it is)")
    parser.add_argument(
        "--images", type=size, default=(448, 448), metavar="WxH", help="size of the pictures (default: 448x448)"
    )
    parser.add_argument("--frames", type=positive_int, metavar="N", help="ask about clips of N such pictures")
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="requests at once (default: 1)")
    parser.add_argument("--prompt", default="What is in the picture?", metavar="TEXT")
    parser.add_argument(
        "--new-tokens", type=positive_int, default=16, metavar="N", help="tokens of every answer (default: 16)"
    )
    parser.add_argument(
        "--pairs", type=positive_int, default=30, metavar="N", help="pairs of timed units (default: 30)"
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="threads of torch (default: torch's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and of the order within pairs")
    parser.add_argument("--random-weights", action="store_true", help="build the preset with random numbers")
    parser.add_argument(
        "--memory", action="store_true", help="also measure the peak memory of both sides, in processes of their own"
    )
    parser.add_argument(
        "--break-even", action="store_true", help="also find the number of visual tokens from which on the recipe pays"
    )
    add_method_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from foveate.recipe import Recipe

    recipe, against, reduce = parse_recipe(args.recipe), parse_recipe(args.against), parse_reduce(args.reduce)
    if reduce is not None:
        recipe = (recipe.without("reduce") if recipe else Recipe()) + reduce
    if args.break_even and (not recipe or against):
        raise InputError("--break-even compares a recipe with the model as it is; give --recipe or --reduce alone")
    if args.memory and (args.frames or args.batch > 1):
        raise InputError("--memory is measured for one request of one picture; leave --frames and --batch out")

    import foveate
    from foveate.bench.requests import Load, bench
    from foveate.progress import progress

    load = Load(args.images, args.frames, args.batch, args.prompt, args.new_tokens)
    vlm = foveate.load(
        args.model, dtype=args.dtype, device=args.device, attn=args.attn, random_weights=args.random_weights
    )
    with progress("bench", 2 * args.pairs) as bar:
        result = bench(
            vlm,
            recipe=recipe,
            against=against,
            load=load,
            pairs=args.pairs,
            threads=args.threads,
            seed=args.seed,
            on_pair=bar.advance,
        )
    if args.break_even:
        result["break_even"] = crossing_of(vlm, recipe, load, args)
    if args.memory:
        result["memory"] = memory_of(vlm, [recipe, against], load, args)
    print_json(result) if args.json else show(result)
    return 0


def crossing_of(vlm: VLM, recipe: Any, load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """Where the recipe begins to pay, see `bench.breakeven`."""
    from foveate.bench.breakeven import break_even
    from foveate.bench.requests import torch_threads
    from foveate.progress import progress

    with progress("break-even", None) as bar, torch_threads(args.threads):
        return break_even(vlm, recipe, load, pairs=max(2, args.pairs // 3), seed=args.seed, on_pair=bar.advance)


def memory_of(vlm: VLM, recipes: list[Any], load: Load, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak memory of both sides in bytes, see `bench.memory`."""
    from foveate.bench.memory import Job, peak
    from foveate.progress import track

    jobs = {
        side: Job(
            model=args.model,
            recipe=recipe.text() if recipe else "",
            dtype=str(vlm.dtype).removeprefix("torch."),
            device=str(vlm.device),
            random_weights=args.random_weights,
            sizes=(load.size,),
            prompt=load.prompt,
            new_tokens=load.new_tokens,
            threads=args.threads,
        )
        for side, recipe in zip("ab", recipes)
    }
    return {side: peak(job) for side, job in track(jobs.items(), "memory")}


def show(result: dict[str, Any]) -> None:
    """The rows as a table, with everything a time must not travel without."""
    device, versions, run = result["device"], result["versions"], result["run"]
    where = device["gpu"] if run["device"].startswith("cuda") else f"{device['cpu']}, {device['threads']} threads"
    print(f"{where}, {run['dtype']}, torch {versions['torch']}")
    media = f"clips of {run['frames']} pictures" if run["frames"] else "pictures"
    print(
        f"{run['model']}: A = {run['recipe'] or 'as it is'}, B = {run['against'] or 'as it is'}; {media} of "
        f"{run['size'][0]}x{run['size'][1]}, batch {run['batch']}, {run['new_tokens']} new tokens\n"
    )
    columns = ["stage", "A ms", "B ms", "A / B", "95 % interval", "B / B", ""]
    rows = []
    for row in result["rows"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        spread = "-" if row["ratio"] is None else f"{row['low']:.3f} – {row['high']:.3f}"
        itself = "-" if row["aa_low"] is None else f"{row['aa_low']:.3f} – {row['aa_high']:.3f}"
        verdict = ("faster" if row["ratio"] < 1 else "slower") if row["real"] else ""
        rows.append([row["stage"], f"{row['a_ms']:.2f}", f"{row['b_ms']:.2f}", ratio, spread, itself, verdict])
    print_table(columns, rows)
    tokens = run["tokens"]
    kept = f"A {tokens['a']['kept']}, B {tokens['b']['kept']} of {tokens['b']['visual']}"
    print(f"\nvisual tokens {kept}; {run['pairs']} pairs,")
    print(f"each of {run['repeats']} requests, {run['discarded']} discarded because the machine was busy")
    if "break_even" in result:
        print(f"the recipe {result['break_even']['text']}")
    if "memory" in result:
        peaks = {side: human(found["peak"], "B") for side, found in result["memory"].items()}
        print(f"peak memory of one request, weights among it: A {peaks['a']}, B {peaks['b']}")
    if run["noisy"]:
        print("the machine was never quiet: these times hold less than their intervals say")
