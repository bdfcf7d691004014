"""`foveate bench MODEL`: time per stage of two recipes, interleaved, with intervals and an A/A run."""

from __future__ import annotations

import argparse
from typing import Any

from foveate.cli.common import (
    DEFAULT_MODEL,
    add_method_options,
    add_model_options,
    add_verb,
    parse_recipe,
    positive_int,
    print_json,
    print_table,
)
from foveate.cli.plan import size


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "bench")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="folder or preset (default: nano)")
    parser.add_argument("--against", metavar="R", help="recipe to compare with (default: the model as it is)")
    parser.add_argument(
        "--images", type=size, default=(448, 448), metavar="WxH", help="size of the pictures (default: 448x448)"
    )
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
    add_method_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    recipe, against, reduce = parse_recipe(args.recipe), parse_recipe(args.against), parse_recipe(args.reduce)
    if reduce:
        recipe = recipe + reduce if recipe else reduce

    import foveate
    from foveate.bench.requests import bench
    from foveate.progress import progress

    vlm = foveate.load(
        args.model, dtype=args.dtype, device=args.device, attn=args.attn, random_weights=args.random_weights
    )
    with progress("bench", 2 * args.pairs, quiet=False) as bar:
        result = bench(
            vlm,
            recipe=recipe,
            against=against,
            size=args.images,
            prompt=args.prompt,
            new_tokens=args.new_tokens,
            pairs=args.pairs,
            threads=args.threads,
            seed=args.seed,
            on_pair=bar.advance,
        )
    print_json(result) if args.json else show(result)
    return 0


def show(result: dict[str, Any]) -> None:
    """The rows as a table, with everything a time must not travel without."""
    device, versions, run = result["device"], result["versions"], result["run"]
    where = device["gpu"] if run["device"].startswith("cuda") else f"{device['cpu']}, {device['threads']} threads"
    print(f"{where}, {run['dtype']}, torch {versions['torch']}")
    print(
        f"{run['model']}: A = {run['recipe'] or 'as it is'}, B = {run['against'] or 'as it is'}; pictures of "
        f"{run['size'][0]}x{run['size'][1]}, {run['new_tokens']} new tokens\n"
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
    if run["noisy"]:
        print("the machine was never quiet: these times hold less than their intervals say")
