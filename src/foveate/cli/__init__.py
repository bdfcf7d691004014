"""The command `foveate`: one module a verb. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done; 2 a mistake of the user, said in one line; 130 interrupted. Anything else keeps its traceback,
because it is a mistake of ours. Nothing here imports torch: a verb does so when it needs a model.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from foveate.errors import FoveateError

VERBS = {
    "ask": "ask one question about pictures and clips",
    "chat": "talk about pictures and clips, turn by turn",
    "eval": "measure accuracy per task, with intervals and chance",
    "optimize": "search the cheapest model within a quality budget",
    "compress": "apply a recipe to a model and save it",
    "train": "train a model from a recipe file",
    "plan": "tokens, FLOPs, bytes and estimated time, before any weight is loaded",
    "bench": "measure time per stage, two models interleaved",
    "methods": "list what a recipe can be made of",
    "convert": "rewrite a checkpoint in another layout",
    "world": "draw pictures and clips with known answers",
}
"""Every verb and its help line. `x` lives in `foveate.cli.x`, which has add_parser(subparsers) and run(args)."""


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, like every other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. argv: arguments without the program's name; default sys.argv[1:]."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser(arguments).parse_args(arguments)
        code = args.run(args) or 0
        sys.stdout.flush()
        return int(code)
    except SystemExit as stop:  # argparse: --help, --version, or a usage error it has already said
        return stop.code if isinstance(stop.code, int) else 2
    except FoveateError as error:
        print(f"foveate: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("foveate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again while closing stdout: give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser(argv: Sequence[str] = ()) -> Parser:
    """The parser. Only the verb named in `argv` has its options: the other verb modules are not imported."""
    parser = Parser(
        prog="foveate",
        description="Visual language models that are cheap at every stage of their life: scale, then compress.",
        epilog="Each command has its own help: foveate ask --help",
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, dest="command", parser_class=Parser)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for verb, text in VERBS.items():
        if verb == asked:
            module = import_module(f"foveate.cli.{verb}")
            module.add_parser(subparsers)
            subparsers.choices[verb].set_defaults(run=module.run)
        else:
            subparsers.add_parser(verb, help=text, add_help=False)
    return parser


class _Version(argparse.Action):
    """Prints the version when asked for, so that nothing is looked up otherwise."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: object) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=str(kwargs.get("help")))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from foveate import __version__

        print(f"foveate {__version__}")
        parser.exit()
