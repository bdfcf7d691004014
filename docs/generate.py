"""Write what the docs take from the code, between `<!-- generated:NAME -->` and `<!-- /generated -->`.

    python docs/generate.py            rewrite the files
    python docs/generate.py --check    exit 1 when a file is stale, and name it

Names: `help VERB` (the --help text), `file PATH` (a file of the repository), `fields MODULE:CLASS` (a table of a
dataclass's fields, from the strings below them), `flags VERB` (a table of a verb's options), `skills`, `kinds`,
`methods`, `presets`, `curriculum RECIPE`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

from tables import report_changes, rewrite, table  # noqa: E402

WIDTH = 100


def help_text(verb: str) -> str:
    """The --help of a verb ("" is the command itself), as a code block."""
    from foveate.cli import main as foveate

    before, out = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(out):
            foveate([*verb.split(), "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return f"```text\n{out.getvalue().strip()}\n```"


def flags(verb: str) -> str:
    """A table of the options of a verb, from its parser: with the value that each takes, its group and its help."""
    from foveate.cli import build_parser

    (verbs,) = (action for action in build_parser([verb])._actions if isinstance(action, argparse._SubParsersAction))
    rows = []
    for group in verbs.choices[verb]._action_groups:
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
                continue
            name = ", ".join(action.option_strings) or action.dest
            value = f" {action.metavar or action.dest.upper()}" if action.option_strings and action.nargs != 0 else ""
            listed = f"one of {', '.join(map(str, action.choices))}" if action.choices else ""
            about = (action.help or listed).replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
            rows.append([f"`{name}{value}`", group.title or "", about])
    return _left(["option", "group", ""], rows)


def file_text(path: str) -> str:
    """A file of the repository as a code block."""
    language = {".py": "python", ".yaml": "yaml"}.get(Path(path).suffix, "text")
    return f"```{language}\n{(ROOT / path).read_text(encoding='utf-8').strip()}\n```"


def fields(target: str) -> str:
    """A table of the fields of "module:Class": name, type, default, and the string literal that follows the field."""
    module, _, name = target.partition(":")
    cls = getattr(importlib.import_module(module), name)
    (body,) = (node for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef))
    about: dict[str, str] = {}
    types: dict[str, str] = {}
    previous = None
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            previous = node.target.id
            types[previous] = ast.unparse(node.annotation)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and previous:
            about[previous] = " ".join(str(node.value.value).split())
            previous = None
        else:
            previous = None
    rows = []
    for field in dataclasses.fields(cls):
        text = about.get(field.name, "").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        rows.append([f"`{field.name}`", f"`{types[field.name]}`".replace("|", "\\|"), _default(field), text])
    return _left(["key", "type", "default", ""], rows)


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value!r}`".replace("|", "\\|")


def _left(head: list[str], rows: list[list[str]]) -> str:
    return table(head, rows).replace("---:", "---")


def skills(_: str) -> str:
    """What the drawn world scores, with an example of each."""
    from foveate import world

    rows = []
    for skill in world.SKILLS:
        ((_, question),) = world.evaluation_questions(skill, 1, split="validation", seed=1)
        asked = " / ".join(f"{q} **{a}**" for q, a in question.turns)
        kinds = ", ".join(f"`{kind}`" for kind in world.kinds_of(skill))
        media = "clip" if skill in world.CLIP_SKILLS else "two pictures" if skill == "compare" else "picture"
        rows.append([f"`{skill}`", media, kinds, f"{world.chance(skill):.3f}", asked])
    return _left(["skill", "about", "drawn in", "chance", "an example"], rows)


def kinds(_: str) -> str:
    """The kinds of scenes, with the first sentence of their generators' docstrings."""
    from foveate.world import KINDS
    from foveate.world.kinds import _KINDS

    rows = [[f"`{kind}`", _first(_KINDS.get(kind).__doc__)] for kind in KINDS]
    return _left(["kind", ""], rows)


def methods(_: str) -> str:
    """Every registered method."""
    from foveate.recipe import methods as registered

    rows = []
    for row in registered():
        name = f"[`{row['name']}`](methods/{row['name']}.md)"
        signals = ", ".join(f"`{s}`" for s in row["signals"]).replace("|", "` or `")
        rows.append([name, row["socket"], ", ".join(row["sites"]), signals, row["status"], row["summary"]])
    return _left(["method", "socket", "site", "signals", "status", ""], rows)


def presets(_: str) -> str:
    """The architecture presets: parameters counted on a model without memory, tokens by the geometry of plans."""
    from foveate.data.tiling import image_layout
    from foveate.nvila.initialise import empty_model
    from foveate.nvila.presets import PRESETS

    rows = []
    for name in PRESETS.names():
        config = PRESETS.get(name).config()
        model, spec = empty_model(config), config.spec
        parts = [
            sum(p.numel() for p in part.parameters()) for part in (model.vision_tower, model.mm_projector, model.llm)
        ]
        tokens = []
        for size in ((448, 448), (1920, 1080)):
            units, height, width = image_layout(*size, spec).grid
            tokens.append(str(units * height * width))
        rows.append([f"`{name}`", f"`{spec.mode}`", f"`{config.projector_type}`", *map(_count, parts), *tokens])
    head = ["preset", "mode", "projector", "tower", "projector", "language model", "tokens of 448x448", "of 1920x1080"]
    return table(head, rows)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def curriculum(name: str) -> str:
    """The stages of a training recipe."""
    from foveate.train.config import load_recipe

    rows = []
    for stage in load_recipe(name).stages:
        total = sum(stage.mixture.values())
        shares = {source.removeprefix("world/"): 100 * w / total for source, w in stage.mixture.items()}
        mixture = ", ".join(f"{source} {'< 1' if share < 1 else f'{share:.0f}'} %" for source, share in shares.items())
        trains = "all" if stage.train == ("*",) else ", ".join(stage.train)
        low = f"{100 * stage.low_resolution:.0f} %"
        rows.append(
            [stage.name, str(stage.steps), str(stage.batch_size), trains, ", ".join(stage.losses), low, mixture]
        )
    return _left(["stage", "steps", "batch", "trains", "losses", "at one scale", "mixture"], rows)


def _first(text: str | None) -> str:
    return re.split(r"(?<=[.;])\s", " ".join((text or "").split()))[0].rstrip(";.")


BLOCKS: dict[str, Callable[[str], str]] = {
    "help": help_text,
    "file": file_text,
    "fields": fields,
    "flags": flags,
    "skills": skills,
    "kinds": kinds,
    "methods": methods,
    "presets": presets,
    "curriculum": curriculum,
}


def make(name: str) -> str:
    """The Markdown of one block."""
    kind, _, rest = name.partition(" ")
    if kind not in BLOCKS:
        raise SystemExit(f"unknown block {name!r}; known: {', '.join(BLOCKS)}")
    return BLOCKS[kind](rest)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    check = parser.parse_args(argv).check
    return report_changes(rewrite("generated", make, check=check), check, "docs/generate.py")


if __name__ == "__main__":
    sys.exit(main())
