"""`foveate train RECIPE`: run a training recipe, from the start or from where it was stopped."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the verb to the command's parser."""
    from foveate.train.config import shipped_recipes

    parser = subparsers.add_parser(
        "train",
        help="train a model by a recipe",
        description="Train a model by a recipe: its stages one after the other, with checkpoints from which the run "
        "goes on exactly where it was, even after a kill.",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help=f"a .yaml file, or a shipped recipe: {', '.join(shipped_recipes())}"
    )
    parser.add_argument("--output", "-o", metavar="DIR", help="folder of the run (default: runs/<name of the recipe>)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    parser.add_argument("--steps-scale", type=float, default=1.0, metavar="F", help="multiply the steps of every stage")
    parser.add_argument("--stop-after-steps", type=int, metavar="N", help="stop after N more steps, with a checkpoint")
    parser.add_argument("--data", metavar="DIR", help="folder of the named sets (default: $FOVEATE_DATA)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch, instead of the recipe's")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the verb. Returns the exit code."""
    from foveate.errors import RecipeError
    from foveate.train.config import load_recipe

    recipe = load_recipe(args.recipe)
    if args.steps_scale != 1.0:
        recipe = recipe.scaled(args.steps_scale)
    if args.output:
        recipe = dataclasses.replace(recipe, output=args.output)
    if args.threads is not None:
        recipe = dataclasses.replace(recipe, threads=args.threads)
    if args.stop_after_steps is not None and args.stop_after_steps < 1:
        raise RecipeError(f"--stop-after-steps is {args.stop_after_steps}; it must be 1 or more")
    if args.data and not Path(args.data).is_dir():
        raise RecipeError(f"--data {args.data} is not a folder")

    from foveate.train.trainer import Trainer

    result = Trainer(recipe, data_dir=args.data, quiet=args.quiet).run(args.resume, args.stop_after_steps)
    if args.json:
        print(json.dumps(result.to_dict()))
    elif result.model:
        print(
            f"done: {result.step} steps in {result.seconds:.0f} s, loss {result.loss or 0:.3f}; model in {result.model}"
        )
    else:
        print(
            f"stopped at step {result.step} of {result.total_steps}; go on with: "
            f"foveate train {args.recipe} --resume --output {result.output}"
        )
    return 0
