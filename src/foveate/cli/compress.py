"""`foveate compress MODEL --recipe R -o OUT`: apply a recipe, print its effect, save the model."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from foveate.cli.common import (
    add_model_options,
    add_verb,
    check_new,
    human,
    load_model,
    parse_recipe,
    positive_int,
    print_json,
    print_table,
)
from foveate.errors import InputError


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "compress")
    parser.add_argument("model", help="folder or preset")
    parser.add_argument("--recipe", required=True, metavar="R", help='text or file, for example "rtn(bits=4) + int8"')
    parser.add_argument("-o", "--out", metavar="OUT", help="folder of the new model; must not exist yet")
    parser.add_argument(
        "--format",
        default="foveate",
        choices=("foveate", "compressed-tensors"),
        help="how quantized layers are stored; compressed-tensors loads in plain transformers too (default: foveate)",
    )
    group = parser.add_argument_group("calibration (for all methods of the recipe that leave it at its default)")
    group.add_argument("--calib", metavar="SOURCE", help="auto, random, a text, or a file or folder of samples")
    group.add_argument("--samples", type=positive_int, metavar="N", help="how many samples")
    group.add_argument("--seqlen", type=positive_int, metavar="N", help="tokens of one text sample")
    study = parser.add_argument_group("study: save nothing, compare sources of calibration data")
    study.add_argument("--study", nargs="+", metavar="SOURCE", help="sources to compare, as for --calib")
    study.add_argument("--text", metavar="FILE", help="measure perplexity on this text (default: the drawn world)")
    study.add_argument("--limit", type=positive_int, metavar="N", help="questions a skill, or documents of --text")
    study.add_argument("--seeds", type=positive_int, default=3, metavar="N", help="draws of each source (default: 3)")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    if not args.recipe.strip():
        raise InputError("--recipe is empty; give methods, for example 'rtn(bits=4) + int8'")
    if args.study:
        return _study(args)
    if not args.out:
        raise InputError("give -o OUT, the folder of the new model")
    out = check_new(args.out, "-o")
    recipe = _calibrated(parse_recipe(args.recipe), args)
    args.recipe = None  # applied here, so that both sides can be measured
    before = load_model(args)

    from foveate.effect import effect

    # a run that is killed leaves its state beside the output; the same command goes on from there
    state = out.with_name(f".{out.name}.calibration")
    after = recipe.apply(before, quiet=True, state=state, progress=True)
    found = effect(before, after)
    if args.format == "foveate":
        after.save(out)
    else:
        from foveate.weights.export import save

        save(after, out)
    disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if args.json:
        print_json({"model": str(out), "disk": disk, "format": args.format, **found.to_dict()})
    else:
        print(found.text())
        print(f"{out}: {human(disk, 'B')} on disk")
        print(f"try it: {_try(after, out)}", file=sys.stderr)
    return 0


def _study(args: argparse.Namespace) -> int:
    """One recipe with several sources of calibration data, and several draws of each."""
    from foveate.tasks.calibration import study
    from foveate.tasks.perplexity import text_file

    if args.out:
        raise InputError("--study saves no model; leave out -o, or leave out --study")
    recipe = _calibrated(parse_recipe(args.recipe), args)
    documents = text_file(args.text) if args.text else None
    args.recipe = None
    vlm = load_model(args)
    if documents is None and "vision_tower" not in vlm.adapter.parts():
        raise InputError("this model sees no pictures; give --text FILE to measure perplexity on")
    seeds = range(args.seeds)
    found = study(vlm, recipe, args.study, documents=documents, limit=args.limit, seeds=seeds, quiet=False)
    if args.json:
        print_json({"model": vlm.name, **found})
        return 0
    rows = [[row["source"], f"{row['mean']:.3f}", f"{row['spread']:.3f}"] for row in found["rows"]]
    title = f"{vlm.name} with {found['recipe']}: {found['measure']}, dense {found['dense']:.3f}\n"
    print_table(["source", f"mean of {len(found['seeds'])}", "spread"], rows, title=title)
    return 0


def _calibrated(recipe: Any, args: argparse.Namespace) -> Any:
    """The recipe with --calib, --samples and --seqlen in the methods that do not say it themselves."""
    from foveate.recipe import Recipe

    given = {name: value for name in ("calib", "samples", "seqlen") if (value := getattr(args, name)) is not None}
    if not given:
        return recipe
    methods = []
    for method in recipe:
        defaults = method.parameters()
        changes = {n: v for n, v in given.items() if n in defaults and getattr(method, n) == defaults[n]}
        methods.append(dataclasses.replace(method, **changes) if changes else method)
    if not any("calib" in method.parameters() for method in methods):
        raise InputError(f"--{next(iter(given))} was given, but no method of {recipe.text()!r} looks at data")
    return Recipe(tuple(methods))


def _try(vlm: Any, out: Path) -> str:
    if "vision_tower" in vlm.adapter.parts():
        return f"foveate ask --model {out} picture.png 'What is this?'"
    return f"foveate eval {out} --text FILE"
