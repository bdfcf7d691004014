"""The docs are true: help texts, tables, links, commands and examples; and the floors of the house hold."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.adapters.layout import VisualLayout
from foveate.cli import build_parser
from foveate.cli.common import parse_reduce
from foveate.recipe import Recipe
from foveate.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "foveate"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def module(path: str) -> Any:
    """A file of the repository as a module; one copy for all tests."""
    name = f"docs_{Path(path).stem}"
    if name not in sys.modules:
        if str(ROOT / "benchmarks") not in sys.path:
            sys.path.append(str(ROOT / "benchmarks"))  # scripts import their neighbours
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- what is generated


def test_tables_are_current():
    tables = module("benchmarks/tables.py")
    assert [named(file) for file in tables.rewrite("table", tables.make, check=True)] == []


def test_generated_blocks_are_current():
    generate = module("docs/generate.py")
    # argparse words its help differently from Python 3.13 on
    old = sys.version_info < (3, 13)
    stale = {}

    def make(name: str) -> str:
        if name.startswith("help") and not old:
            return stored[name]
        return generate.make(name)

    for page in PAGES:
        pattern = r"^<!-- generated:(.+?) -->\n(.*?)^<!-- /generated -->"
        stored = dict(re.findall(pattern, page.read_text(encoding="utf-8"), re.M | re.S))
        wrong = [name for name, text in stored.items() if make(name).strip() != text.strip()]
        if wrong:
            stale[named(page)] = wrong
    assert stale == {}, "run python docs/generate.py"


def test_every_verb_is_documented():
    from foveate.cli import VERBS

    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"<!-- generated:help {verb} -->" not in text] == []


def test_every_method_has_a_page():
    here = {path.stem for path in (ROOT / "docs/methods").glob("*.md")}
    assert set(METHODS.names()) - {"norm"} <= here


# ---- tables.py


QUALITY = {
    "date": "2026-01-02",
    "device": "a machine",
    "threads": 2,
    "cores": 4,
    "versions": {"foveate": "0", "torch": "1"},
    "high_resolution": {
        "mean": 0.5,
        "tasks": {
            "world/mark": {"n": 9, "accuracy": 0.9, "low": 0.8, "high": 0.95, "chance": 0.1},
            "world/count": {"n": 9, "accuracy": 0.2, "low": 0.1, "high": 0.4, "chance": 0.143},
            "world/needle": {"n": 9, "accuracy": 0.6, "low": 0.4, "high": 0.8, "chance": 0.1},
        },
    },
    "one_scale": {"tasks": {"world/mark": {"accuracy": 0.15}}},
    "few_frames": {"num_frames": 4, "tasks": {"world/needle": {"accuracy": 0.2}}},
}


def test_quality_table_says_what_is_below_the_bar():
    tables = module("benchmarks/tables.py")
    text = tables.nano_quality(QUALITY)
    assert "| `mark` | 9 | 0.90 [0.80, 0.95] | 0.100 | 0.15 (one scale) | +0.75 |" in text
    assert "| `needle` | 9 | 0.60 [0.40, 0.80] | 0.100 | 0.20 (4 frames) | +0.40 |" in text
    assert "| `count` ✗ |" in text and "2 of 3 skills" in text and "1 are at 0.85" in text
    assert "a machine, 2 of 4 threads" in text and "torch 1" in text and "2026-01-02" in text
    limits = tables.nano_limits(QUALITY)
    assert "`count` (0.20, chance 0.14)" in limits and "`mark`" not in limits and "`needle`" in limits


def test_a_missing_file_is_said():
    tables = module("benchmarks/tables.py")
    for build in (tables.nano_quality, tables.nano_real, tables.nano_limits):
        assert "not" in build(None).lower() and "nano_quality.json" in build(None)
    assert "methods.json" in tables.method("uniform", None)


def test_costs_of_compressing_tell_noise_from_gains():
    tables = module("benchmarks/tables.py")
    assert "compress_cost.json" in tables.compress_cost(None)
    stage = {"ratio": 0.5, "low": 0.4, "high": 0.6, "real": True}
    row = {
        "seconds": {"load": 5.0, "apply": 60.0, "save": 1.0},
        "peak_bytes": 3 * 2**30,
        "saved_bytes": [1_787_000_000, 1_257_000_000],
        "run": {"pairs": 5, "noisy": True},
        "tokens": {"visual": 1458, "text": 60},
        "stages": {"tower": stage, "prefill": {**stage, "real": False}, "decode": stage},
    }
    untimed = {key: row[key] for key in ("seconds", "peak_bytes", "saved_bytes")}
    report = {"preset": "p", "dtype": "bfloat16", "where": "cpu", "recipes": {"rtn": row, "gptq": untimed}}
    text = tables.compress_cost(report)
    assert "| `rtn` | 1.1 | 3.00 | 1787 → 1257 | 0.50 [0.40, 0.60] | 0.50 [0.40, 0.60] ≈ | 0.50 [0.40, 0.60] |" in text
    assert "| `gptq` | 1.1 | 3.00 | 1787 → 1257 |  |  |  |" in text and "5 pairs, on a machine that was never" in text


def test_weight_tables_hold_accuracy_and_perplexity():
    tables = module("benchmarks/tables.py")
    assert "weights.json" in tables.weights("awq", None)
    half = {"value": -0.1, "low": -0.2, "high": -0.05}
    nano = {"method": "awq", "bits": 3, "recipe": "awq(bits=3)", "mean": 0.7, "bytes": 2_000_000, "paired": half}
    llm = {"method": "awq", "bits": 3, "recipe": "awq(bits=3)", "calib": "wikitext", "perplexity": 6.0}
    report = {
        "nano": {"dense": {"mean": 0.8}, "limit": 9, "rows": [nano]},
        "stories": {"dense": 4.0, "tokens": 99, "rows": [llm, {**llm, "method": "gptq", "recipe": "gptq(bits=3)"}]},
    }
    text = tables.weights("awq", report)
    assert "| `awq(bits=3)` | 0.700 | −0.10 [−0.20, −0.05] | 2.00 |" in text and "gptq" not in text
    assert "| `awq(bits=3)` | wikitext | 6.00 | 1.50 |" in text and "Dense: 4.00 on 99 tokens" in text
    assert "no recipe of `rtn`" in tables.weights("rtn", report)
    curves = module("benchmarks/curves.py").curves
    svg = curves({"awq": [("8", 4.1), ("3", 6.0)]}, 4.0, axis="perplexity", below="bits", logarithmic=True)
    assert svg.startswith("<svg xmlns=") and svg.count("<circle") == 2


def test_speed_tables_mark_missed_targets():
    tables = module("benchmarks/tables.py")
    assert "speed.json" in tables.speed("fastv", None) and "plan_check.json" in tables.plan_check(None)
    even = {"value": 1.0, "low": 0.98, "high": 1.02}
    row = {"visual": 784, "per_layer": [784, 196], "selection_share": {"value": 0.01}, "ttft_over_predicted": 1.02}
    row |= {"select_ms": 40.0, "signals_ms": 0.0}
    row |= {
        "recipe": "fastv(keep=0.25)",
        "ttft_ratio": {"value": 0.7, "low": 0.6, "high": 0.8},
        "ttft_predicted": 0.686,
    }
    slow = row | {"recipe": "hired(keep=0.25)", "selection_share": {"value": 0.04}, "ttft_over_predicted": 0.85}
    slow |= {"select_ms": 160.0, "signals_ms": 120.0}
    masks = row | {"recipe": "yopo(keep=0.25)", "per_layer": [784, 784]}
    pays = {"tokens": None, "points": [{"tokens": 196, "ratio": 0.8}, {"tokens": 784, "ratio": 0.6}]}
    size = {"size": [384, 384], "frames": 4, "visual": 784, "text": 100, "noisy": False, "discarded": 1, "rounds": 3}
    size |= {"dense": {"tower_ms": 9000, "prefill_ms": 4000}, "again": even}
    size["rows"] = [row, slow, masks, {"recipe": "tome(keep=0.25)", "failed": "why"}]
    run = {"preset": "p", "dtype": "bfloat16", "threads": 1, "sizes": [size]}
    run["break_even"] = {one["recipe"]: pays for one in (row, slow, masks)}
    report = {"runs": [run], "skipped": [{"preset": "q", "size": [96, 64], "frames": None}]}
    text = tables.speed("", report)
    assert "| `fastv(keep=0.25)` | 1.0% |  | 0.3% | 0.700 [0.600, 0.800] | 0.686 | +2.0% | ≤ 196 |" in text
    assert "| `hired(keep=0.25)` | 4.0% ✗ | 75% | 1.2% |" in text and "−15.0% ✗" in text and "`tome" not in text
    assert "| `yopo(keep=0.25)` | 1.0% |  | 0.3% | 0.700 [0.600, 0.800] |  |  |" in text
    assert "in 2 of 3 rows" in text and "predict in 1 of 2. Left out for want of time: `q`, 96x64." in text
    assert "a clip of 4 frames: 784 visual" in text and "3 rounds, 1 dropped" in text
    assert "hired" not in tables.speed("fastv", report) and "no recipe of `random`" in tables.speed("random", report)
    svg = module("benchmarks/curves.py").bars([("fastv", 0.7, 0.5, 0.69)], "time", mark="predicted")
    assert svg.startswith("<svg xmlns=") and svg.count("<rect") == 2

    stages = {name: {"predicted": 90.0, "measured": 100.0, "ratio": 0.9} for name in ("tower", "prefill", "decode")}
    stages["ttft"] = {"predicted": 60.0, "measured": 100.0, "ratio": 0.6}
    one = {"preset": "p", "dtype": "float32", "size": [9, 8], "recipe": "", "noisy": True, "stages": stages}
    report = {
        "rows": [one | {"bytes": {"peak": 2e6, "process": 12e6}}, one | {"recipe": "r", "bytes": {"peak": 2e6}}],
        "machine": {"source": "measured"},
        "peaks": {"p float32": {"peak": 1e6, "baseline": 9e6}},
        "drift": {"matrix products": 1.03, "activation": 0.9},
    }
    text = tables.plan_check(report)
    good = "90 / 100 (-10%)"
    assert f"| dense | {good} | {good} | {good} | 60 / 100 (-40%) ✗ | 12 / 10 (+20%) ✗ | 2 / 1 |" in text
    assert "never quiet" in text and "6 of 8 times, 0 of 1 peaks" in text and "differed by up to 10%" in text


def test_method_table_shows_paired_differences():
    tables = module("benchmarks/tables.py")
    dense = {"mean": 0.8, "tasks": {"world/mark": {"accuracy": 0.9}, "world/bar": {"accuracy": 0.7}}}
    half = {"mean": 0.65, "tasks": {"world/mark": {"accuracy": 0.5}, "world/bar": {"accuracy": 0.8}}}
    half |= {"paired": {"value": -0.15, "low": -0.2, "high": -0.1}, "flops": 0.9}
    report = {"dense": dense, "limit": 96, "recipes": {"uniform(keep=0.5)": half, "uniform(keep=0.5) + int8": half}}
    text = tables.method("uniform", report)
    assert "| `uniform(keep=0.5)` | 0.90x | 0.650 | −0.15 [−0.20, −0.10] | mark −0.40 |" in text
    assert "+ int8" not in text


def test_each_skill_is_paired_with_dense_and_with_random_tokens():
    recipes = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text(encoding="utf-8"))["recipes"]
    for recipe, result in recipes.items():
        wanted = {"against_dense", "against_random"} if result["baseline"] else {"against_dense"}
        for task in result["tasks"].values():
            assert wanted <= set(task), recipe
            assert all(task[name]["low"] <= task[name]["value"] <= task[name]["high"] for name in wanted)


def test_methods_grid_marks_what_random_tokens_do_as_well():
    tables = module("benchmarks/tables.py")
    dense = {"mean": 0.8, "tasks": {"world/mark": {"accuracy": 0.8}}}

    def row(value, rival):
        rival = rival and dict(zip(("value", "low", "high"), rival))
        return {"paired": {"value": value, "low": value - 0.1, "high": value + 0.1}, "against_random": rival}

    recipes = {
        "random(keep=0.5)": row(-0.3, None),
        "fastervlm(keep=0.5)": row(-0.1, (0.2, 0.1, 0.3)),
        "uniform(keep=0.5)": row(-0.4, (-0.1, -0.15, -0.05)),
        "fastv(keep=0.5)": row(0.0, (0.0, -0.1, 0.1)),
        "random(keep=0.5, layer=1)": row(0.0, None),
    }
    text = tables.methods_grid({"dense": dense, "limit": 9, "recipes": recipes})
    assert "| [`fastervlm`](methods/fastervlm.md) | −10.0 ▲ |" in text
    assert "| [`uniform`](methods/uniform.md) | −40.0 ▼ |" in text
    assert "| [`random`](methods/random.md) in the language model | +0.0 |" in text
    assert "at every budget: `fastervlm`. At no budget: `uniform`, `fastv`. Worse" in text or (
        "At no budget: `fastv`, `uniform`. Worse" in text
    )


def test_a_block_without_an_end_is_an_error(tmp_path):
    tables = module("benchmarks/tables.py")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("<!-- table:x -->\nold\n<!-- /table -->\n")
    assert tables.rewrite("table", lambda name: f"new {name}", tmp_path, check=True) == [page]
    assert "old" in page.read_text()
    assert tables.rewrite("table", lambda name: f"new {name}", tmp_path) == [page]
    assert page.read_text() == "<!-- table:x -->\nnew x\n<!-- /table -->\n"
    assert tables.rewrite("table", lambda name: f"new {name}", tmp_path) == []
    page.write_text("<!-- table:x -->\nold\n")
    with pytest.raises(SystemExit, match="not all of them closed"):
        tables.rewrite("table", str, tmp_path)


# ---- links and commands


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        if not where.exists() or (anchor and anchor not in headings(where)):
            broken.append(target)
    assert broken == []


def commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of every `foveate ...` in a bash block."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in re.split(r"&&|\n", block):
                words = shlex.split(line.replace(".venv/bin/foveate", "foveate"))
                if words[:1] == ["foveate"]:
                    yield named(page), line.strip()


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_commands_parse(page, line, capsys):
    argv = shlex.split(line)[1:]
    try:
        args = build_parser(argv).parse_args(argv)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    for name in ("recipe", "reduce", "against"):
        text = getattr(args, name, None)
        if text and args.command != "train" and not text.endswith(".yaml"):
            assert len(parse_reduce(text) if name == "reduce" else Recipe.parse(text))


def test_the_first_screen_holds_the_two_commands():
    screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:22]
    lines = [line for line in screen if line.startswith("python3 -m venv")]
    assert len(lines) == 2 and "foveate optimize nano" in lines[0] and lines[1].endswith("python -m pytest")


# ---- examples


def test_example_ask(nano_folder, capsys):
    module("examples/ask.py").main(str(nano_folder))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and "64 visual tokens" in out[0] and "32 visual tokens" in out[1] and "16 frames" in out[2]


def test_example_your_own_data(nano_folder, tmp_path, capsys):
    module("examples/your_own_data.py").main(str(nano_folder), str(tmp_path), count=6)
    assert "on 6 questions" in capsys.readouterr().out
    assert (tmp_path / "model" / "report.html").is_file()


def test_example_train_tiny(tmp_path, capsys):
    module("examples/train_tiny.py").main(str(tmp_path / "run"), scale=0.1)
    assert "3 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "training.json").is_file()


def test_example_new_method(nano_folder, capsys):
    module("examples/new_method.py").main(str(nano_folder))
    out = capsys.readouterr().out
    assert "32 tokens stay" in out and ", 8 tokens stay" in out
    assert Recipe.parse("norm(keep=8, largest=false)").text() == "norm(keep=8, largest=false)"


def picture_layout(rows: int, cols: int) -> VisualLayout:
    """One picture in one view of rows x cols tokens."""
    n = rows * cols
    cell, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    row, col = cell // cols, cell % cols
    return VisualLayout(zero, zero, zero - 1, row, col, row, col, zero, cell, torch.ones(n))


def test_norm_keeps_the_largest_features():
    Norm = module("examples/new_method.py").Norm
    layout = picture_layout(rows=2, cols=3)
    features = torch.tensor([[1.0], [5.0], [2.0], [5.0], [0.0], [3.0]])
    assert Norm(keep=3).select({"features": features}, layout).keep.tolist() == [1, 3, 5]
    assert Norm(keep=2, largest=False).select({"features": features}, layout).keep.tolist() == [0, 4]


def test_contributing_shows_this_test():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^   ```python\n(.*?)^   ```", text, re.M | re.S)
    body = textwrap.dedent(shown).partition("\n")[2]
    assert body in Path(__file__).read_text(encoding="utf-8")


# ---- floors

FLOORS = (
    ("registry", "errors", "disk", "machine", "progress", "clock", "method", "data", "world"),
    ("vlm", "runtime", "ragged", "rows", "encoder_site", "llm_signals", "show", "adapters", "nvila", "files"),
    ("reduce", "cache", "weights", "decode"),
    ("recipe", "recipe_text", "effect", "engine"),
    ("train", "tasks", "bench"),
    ("optimize", "serve"),
    ("cli", "__main__"),
)
"""The rooms of docs/architecture.md, from the ground up."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
UPWARDS = {("vlm", "recipe")}
"""A model carries the recipe that was applied to it: allowed inside functions."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(room, whether inside a function) of each import of this package in a file, TYPE_CHECKING blocks left out."""

    def visit(node: ast.AST, deferred: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from (found for other in child.orelse for found in visit(other, deferred))
                continue
            found: list[str] = []
            if isinstance(child, ast.Import):
                found = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found = [f"{child.module}.{alias.name}" for alias in child.names]
            for name in found:
                if name.startswith("foveate."):
                    yield name.split(".")[1], deferred
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, deferred or inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


@cache
def edges() -> dict[tuple[str, str], set[tuple[str, bool]]]:
    """{(room, imported room): {(file, inside a function)}}; names that the package itself gives are left out."""
    found: dict[tuple[str, str], set[tuple[str, bool]]] = {}
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for other, deferred in imports(path):
            if other in FLOOR and room not in ("__init__", other):
                found.setdefault((room, other), set()).add((named(path), deferred))
    return found


def test_every_room_stands_on_a_floor():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py"}
    rooms |= {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert rooms - set(FLOOR) - {"__init__"} == set()


def test_rooms_import_downwards_only():
    wrong = {
        pair: sorted(files)
        for pair, files in edges().items()
        if FLOOR[pair[0]] < FLOOR[pair[1]] and not (pair in UPWARDS and all(deferred for _, deferred in files))
    }
    assert wrong == {}


def test_rooms_of_a_floor_do_not_import_in_circles():
    beside: dict[str, set[str]] = {}
    for room, other in edges():
        if FLOOR[room] == FLOOR[other]:
            beside.setdefault(room, set()).add(other)

    def walk(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " -> ".join((*path, room))
        for other in beside.get(room, ()):
            walk(other, (*path, room))

    for room in beside:
        walk(room, ())
