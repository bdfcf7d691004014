"""`foveate methods [NAME]`: what a recipe can be made of, or one method with its parameters and needs."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from foveate.cli.common import add_verb, print_json, print_table
from foveate.errors import RecipeError

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
    """A row of `foveate methods --json` with "parameters" ({name: default}), "required" (their names), "about",
    "limits" (lines) and "families" (names).

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
    more = {"about": inspect.getdoc(method) or "", "limits": limits(method), "families": families(method)}
    return {**row, "parameters": parameters, "required": required, **more}


def limits(method: Any) -> list[str]:
    """What a reduction does not do, in words; none for other sockets."""
    if method.socket != "reduce":
        return []
    found = []
    if "clip" in method.summary:
        found.append("made for clips: a picture is a clip of one frame")
    if method.exact is False:
        found.append("how many tokens stay is known only when the request is seen")
    try:
        method(keep=1)
    except RecipeError:
        found.append("keep is a fraction, not a number of tokens")
    options = [need.split("|") for need in method.signals if need.startswith("cls_")]
    if instead := sorted({name.partition("@")[0] for names in options for name in names if name[:4] != "cls_"}):
        found.append(f"on a tower without CLS, {' and '.join(instead)} takes the place of what CLS tells")
    if method.sites[0] in ("encoder", "post_encoder"):
        found.append(f"acts at {method.sites[0]} where the family allows it, else at the next place that is named")
    return found


def families(method: Any) -> list[str]:
    """The families that a method works on, as far as its class can tell; reductions need one that sees."""
    from foveate.adapters import ADAPTERS
    from foveate.adapters.text import TextAdapter

    if method.adapters != ("*",):
        return list(method.adapters)
    classes = [ADAPTERS.get(name) for name in ADAPTERS]
    blind = method.socket == "reduce"
    return sorted({cls.family for cls in classes if not (blind and issubclass(cls, TextAdapter))})


def show(row: dict[str, Any]) -> None:
    """One method in words."""
    from foveate.method import format_value

    print(f"{row['name']} ({row['socket']}, {row['status']}): {row['summary']}\n")
    print(f"{row['about']}\n")
    if row["sites"]:
        print(f"acts: {', '.join(row['sites'])}")
    if row["signals"]:
        print(f"needs: {', '.join(' or '.join(need.split('|')) for need in row['signals'])}")
    every = "all: " if row["adapters"] == ["*"] else ""
    print(f"families: {every}{', '.join(row['families'])}")
    for limit in row["limits"]:
        print(f"limit: {limit}")
    rows = [
        [key, "must be given" if key in row["required"] else format_value(value)]
        for key, value in row["parameters"].items()
    ]
    if rows:
        print()
        print_table(["parameter", "default"], rows, left=2)
