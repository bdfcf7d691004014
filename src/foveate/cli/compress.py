"""`foveate compress MODEL --recipe R -o OUT`: apply a recipe, print its effect, save the model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from foveate.cli.common import (
    add_model_options,
    add_verb,
    check_new,
    human,
    load_model,
    parse_recipe,
    print_json,
)


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "compress")
    parser.add_argument("model", help="folder or preset")
    parser.add_argument("--recipe", required=True, metavar="R", help='text or file, for example "rtn(bits=4) + int8"')
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="folder of the new model; must not exist yet")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    out = check_new(args.out, "-o")
    recipe = parse_recipe(args.recipe)
    args.recipe = None  # applied here, so that both sides can be measured
    before = load_model(args)

    from foveate.effect import effect

    after = recipe.apply(before, quiet=True)
    found = effect(before, after)
    after.save(out)
    disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if args.json:
        print_json({"model": str(out), "disk": disk, **found.to_dict()})
    else:
        print(found.text())
        print(f"{out}: {human(disk, 'B')} on disk")
        print(f"try it: foveate ask --model {out} picture.png 'What is this?'", file=sys.stderr)
    return 0
