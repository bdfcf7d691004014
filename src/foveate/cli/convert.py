"""`foveate convert SRC DST --layout L`: the same weights in another published layout."""

from __future__ import annotations

import argparse
from typing import Any

from foveate.cli.common import add_verb, check_new, print_json

LAYOUTS = ("foveate", "three-folder", "flat")


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "convert")
    parser.add_argument("source", metavar="SRC", help="checkpoint in any layout, or nano")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument(
        "--layout",
        required=True,
        choices=LAYOUTS,
        help="foveate: ours; three-folder: llm/ vision_tower/ mm_projector/; flat: the -hf form",
    )


def run(args: argparse.Namespace) -> int:
    from foveate.disk import plain_errors
    from foveate.nvila.checkpoint import convert
    from foveate.vlm import find_folder

    source = find_folder(args.source)
    target = check_new(args.target, "DST")
    with plain_errors(target, target, "nothing was changed"):
        folder = convert(source, target, layout=args.layout)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    if args.json:
        print_json({"model": args.target, "layout": args.layout, "files": files})
    else:
        print(f"{args.target}: {args.layout} layout, {len(files)} files")
    return 0
