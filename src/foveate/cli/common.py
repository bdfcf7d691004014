"""What several verbs share: options, loading, tables, JSON, and outputs that appear whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.disk import plain_errors, umask
from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.vlm import VLM

DEFAULT_MODEL = "nano"
_MAKE_ROOM = "make room and run the same command again"


def add_verb(subparsers: Any, name: str, model: bool = False, **kwargs: Any) -> argparse.ArgumentParser:
    """The parser of a verb with `--json`, its help line taken from the table of verbs. model: it may name one."""
    from foveate.cli import VERBS

    text = VERBS[name]
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **kwargs)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    if model:
        parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="folder or preset (default: nano)")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--dtype, --device and --attn."""
    group = parser.add_argument_group("model")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument(
        "--attn", default=None, help="attention backend of transformers: sdpa, eager, ... (default: sdpa)"
    )


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """--recipe and --reduce."""
    group = parser.add_argument_group("methods")
    group.add_argument("--recipe", metavar="R", help='text or file, for example "uniform(keep=0.5) + rtn(bits=4)"')
    group.add_argument(
        "--reduce", metavar="R", help='token reductions of the requests, for example "fastervlm(keep=0.5)", or none'
    )


def positive_int(text: str) -> int:
    """An integer of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def load_model(args: argparse.Namespace, name: str | None = None) -> VLM:
    """The model that `args` names, with its recipe applied. Raises CheckpointError, UnknownNameError, RecipeError."""
    import foveate

    name = name or getattr(args, "model", None) or DEFAULT_MODEL
    vlm = foveate.load(name, dtype=args.dtype, device=args.device, attn=args.attn)
    recipe = parse_recipe(getattr(args, "recipe", None))
    return recipe.apply(vlm) if recipe else vlm


def parse_recipe(text: str | None) -> Any:
    """A Recipe of a text, or of a JSON or YAML file that holds one, or None. Raises RecipeError, InputError."""
    if not text:
        return None
    from foveate.recipe import Recipe

    path = Path(text)
    if not path.is_file() and path.suffix in (".yaml", ".yml", ".json") and "(" not in text:
        raise InputError(f"no recipe file {text}; check the path, or give the recipe as text")
    if not path.suffix or not path.is_file():
        return Recipe.parse(text)
    import yaml  # reads JSON too

    try:
        return Recipe.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"recipe file {path} cannot be read: {error}") from error


def parse_reduce(text: str | None) -> Any:
    """A Recipe of the reductions that `text` names ("none": of nothing), or None. Raises RecipeError, and InputError
    for a method of another socket."""
    recipe = parse_recipe(text)
    wrong = next((method for method in recipe or () if method.socket != "reduce"), None)
    if wrong:
        raise InputError(f"--reduce takes token reductions, and {wrong.name} is a {wrong.socket} method; use --recipe")
    return recipe


def print_json(data: Any) -> None:
    """One JSON object on stdout. NaN is refused: it is not JSON."""
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, left: int = 1
) -> None:
    """Columns aligned in plain text: the first `left` ones to the left, the others to the right."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    if title:
        print(title)
    for number, row in enumerate(cells):
        parts = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(parts).rstrip())
        if number == 0:
            print("  ".join("─" * width for width in widths))


def bar(share: float, mark: float | None = None, width: int = 20) -> str:
    """`share` (0 to 1) drawn in blocks; `mark` (chance) is the dot that a share above it covers."""
    filled = round(max(0.0, min(1.0, share)) * width)
    cells = ["█"] * filled + [" "] * (width - filled)
    if mark is not None:
        at = min(width - 1, int(mark * width))
        cells[at] = "▌" if at < filled else "·"
    return "".join(cells)


def human(number: float, unit: str = "") -> str:
    """1234567 -> "1.23 M". Powers of 1000."""
    for prefix in ("", " k", " M", " G", " T", " P"):
        if abs(number) < 1000 or prefix == " P":
            text = f"{number:.0f}" if prefix == "" and float(number).is_integer() else f"{number:.3g}"
            return f"{text}{prefix}{unit}" if prefix or not unit else f"{text} {unit}"
        number /= 1000
    raise AssertionError("unreachable")


def check_new(path: str | Path, option: str) -> Path:
    """`path` when nothing stands there yet and its parent can be made. Raises InputError naming the option."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{option} {path} already exists; choose another name or remove it")
    return path


def check_picture(path: str | Path, option: str) -> None:
    """Raises InputError, naming the option, when pictures cannot be written under this name."""
    from PIL import Image

    Image.init()
    suffix = Path(path).suffix.lower()
    if Image.EXTENSION.get(suffix) not in Image.SAVE:
        raise InputError(f"{option} {path}: {suffix or 'no suffix'} is no picture format; use .png or .jpg")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A temporary path of the same folder and suffix that takes the place of `path` when the block succeeds."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        with plain_errors(path, path.parent, _MAKE_ROOM):
            yield temporary
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path, option: str = "-o") -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block succeeds, and vanishes when it fails."""
    path = check_new(path, option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        with plain_errors(path, path.parent, _MAKE_ROOM):
            yield temporary
            temporary.chmod(0o777 & ~umask())
            if path.exists():
                path.rmdir()  # empty: checked above
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
