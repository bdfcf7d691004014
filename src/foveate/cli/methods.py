"""`foveate methods`: what a recipe can be made of."""

from __future__ import annotations

import argparse
from typing import Any

from foveate.cli.common import add_verb, print_json, print_table


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "methods")
    parser.add_argument("--socket", choices=("reduce", "cache", "weights", "decode"), help="only this kind")


def run(args: argparse.Namespace) -> int:
    from foveate.recipe import methods

    found = [row for row in methods() if args.socket in (None, row["socket"])]
    if args.json:
        print_json(found)
    else:
        rows = [
            [row["name"], row["socket"], ", ".join(row["sites"]), ", ".join(row["signals"]), row["status"]]
            for row in found
        ]
        print_table(["method", "socket", "sites", "signals", "status"], rows, left=5)
    return 0
