"""`foveate methods [NAME]`: what a recipe can be made of, or one method with its parameters and needs."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from foveate.cli.common import add_verb, print_json, print_table

SOCKETS = {
    "reduce": "fewer visual tokens",
    "cache": "smaller caches",
    "weights": "smaller weights",
    "decode": "decoding",
}


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "methods")
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this method, with its parameters and needs")
    parser.add_argument("--socket", choices=tuple(SOCKETS), help="only this kind")


def run(args: argparse.Namespace) -> int:
    from foveate.recipe import methods

    if args.name:
        row = details(args.name)
        print_json(row) if args.json else show(row)
        return 0
    found = [row for row in methods() if args.socket in (None, row["socket"])]
    if args.json:
        print_json(found)
        return 0
    width = max(len(row["name"]) for row in found) if found else 0
    for socket, title in SOCKETS.items():
        rows = [row for row in found if row["socket"] == socket]
        if rows:
            print(f"{title} ({socket}, {len(rows)})")
        for row in rows:
            print(f"  {row['name']:{width}} {' ' if row['status'] == 'stable' else '*'} {row['summary']}")
    print("\n* experimental. Parameters, needs and limits of one: foveate methods fastv")
    return 0


def details(name: str) -> dict[str, Any]:
    """A row of `foveate methods --json` with "parameters" ({name: default}), "required" (their names) and "about".

    Raises UnknownNameError.
    """
    from foveate.recipe import methods
    from foveate.registry import METHODS

    method = METHODS.get(name)
    defaults = method.parameters()
    required = [key for key, value in defaults.items() if value is dataclasses.MISSING]
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    row = next(row for row in methods() if row["name"] == name)
    parameters = given | dict.fromkeys(required)
    return {**row, "parameters": parameters, "required": required, "about": inspect.getdoc(method) or ""}


def show(row: dict[str, Any]) -> None:
    """One method in words."""
    from foveate.method import format_value

    print(f"{row['name']} ({row['socket']}, {row['status']}): {row['summary']}\n")
    print(f"{row['about']}\n")
    if row["sites"]:
        print(f"acts: {', '.join(row['sites'])}")
    if row["signals"]:
        print(f"needs: {', '.join(' or '.join(need.split('|')) for need in row['signals'])}")
    every = row["adapters"] == ["*"]
    print(f"families: {'all that give what it needs' if every else ', '.join(row['adapters'])}")
    rows = [
        [key, "must be given" if key in row["required"] else format_value(value)]
        for key, value in row["parameters"].items()
    ]
    if rows:
        print()
        print_table(["parameter", "default"], rows, left=2)
