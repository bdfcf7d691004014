"""Write the tables of README and docs from benchmarks/results, between `<!-- table:NAME -->` and `<!-- /table -->`.

    python benchmarks/tables.py            rewrite the files
    python benchmarks/tables.py --check    exit 1 when a file is stale, and name it

Nothing is typed by hand: a figure whose file is missing leaves a line that says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tables_cost import compress_cost, plan_check, speed
from tables_text import RESULTS, Row, accuracy, conditions, load, missing, signed, table, with_interval

ROOT = Path(__file__).resolve().parents[1]
MARGIN, GOOD, WANTED = 0.3, 0.85, 8
"""A skill passes at chance + MARGIN; at least WANTED skills are meant to reach GOOD."""
REAL_NOTES = {
    "easy-vqa": "drawn shapes, trained on its train split",
    "nlvr": "human sentences about rendered pictures, trained on a part of its dev split",
    "flickr8k-match": "real photos, never trained on",
}


def documents(root: Path = ROOT) -> list[Path]:
    """README.md, CONTRIBUTING.md and every page of docs/."""
    top = [root / "README.md", root / "CONTRIBUTING.md"]
    return [file for file in [*top, *sorted((root / "docs").rglob("*.md"))] if file.is_file()]


def rewrite(kind: str, make: Callable[[str], str], root: Path = ROOT, check: bool = False) -> list[Path]:
    """Replace every block `<!-- kind:NAME -->...<!-- /kind -->` by make(NAME); returns the files that changed.

    check: write nothing. Raises SystemExit naming the file for a block without an end.
    """
    pattern = re.compile(rf"^(<!-- {kind}:(.+?) -->\n)(.*?)(^<!-- /{kind} -->)", re.M | re.S)
    changed = []
    for file in documents(root):
        text = file.read_text(encoding="utf-8")
        opened = len(re.findall(rf"^<!-- {kind}:.+? -->$", text, re.M))
        if opened != len(pattern.findall(text)):
            raise SystemExit(f"{file.relative_to(root)}: {opened} blocks of {kind!r}, not all of them closed")
        new = pattern.sub(lambda m: f"{m[1]}{make(m[2]).strip()}\n{m[4]}", text)
        if new != text:
            changed.append(file)
            if not check:
                file.write_text(new, encoding="utf-8")
    return changed


# ---- nano


def nano_quality(report: Row | None) -> str:
    """Every skill of the drawn world: accuracy with its interval, chance, and what one scale or few frames leave."""
    if report is None:
        return missing("nano_quality")
    tasks = report["high_resolution"]["tasks"]
    poor = {**report.get("one_scale", {}).get("tasks", {})}
    few = report.get("few_frames", {})
    rows = []
    for name, row in tasks.items():
        skill = name.removeprefix("world/")
        less, label = poor.get(name), "one scale"
        if name in few.get("tasks", {}):
            less, label = few["tasks"][name], f"{few.get('num_frames', 'few')} frames"
        shown = [f"{less['accuracy']:.2f} ({label})", signed(row["accuracy"] - less["accuracy"])] if less else ["", ""]
        mark = "" if row["accuracy"] >= row["chance"] + MARGIN else " ✗"
        rows.append([f"`{skill}`{mark}", str(row["n"]), accuracy(row), f"{row['chance']:.3f}", *shown])
    head = ["skill", "n", "accuracy [95 %]", "chance", "with less to see", "difference"]
    good = sum(row["accuracy"] >= GOOD for row in tasks.values())
    passed = sum(row["accuracy"] >= row["chance"] + MARGIN for row in tasks.values())
    summary = (
        f"{passed} of {len(tasks)} skills are at least {MARGIN} above chance (✗: not), "
        f"{good} are at {GOOD} or better; the mean is {report['high_resolution']['mean']:.2f}."
    )
    return f"{table(head, rows)}\n\n{summary}\n\n{conditions(report)}"


def nano_real(report: Row | None) -> str:
    """The sets that were not drawn by us."""
    if report is None or "real" not in report:
        return missing("nano_quality") if report is None else "*Not taken yet: the real sets were not at hand.*"
    rows = []
    for name, row in report["real"]["tasks"].items():
        majority = f"{row['majority']:.2f}" if "majority" in row else ""
        rows.append(
            [f"`{name}`", str(row["n"]), accuracy(row), f"{row['chance']:.2f}", majority, REAL_NOTES.get(name, "")]
        )
    head = ["set", "n", "accuracy [95 %]", "chance", "majority", "what it is"]
    return f"{table(head, rows)}\n\n{conditions(report)}"


def nano_limits(report: Row | None) -> str:
    """The skills below the bar, as one item of a list of limits."""
    if report is None:
        return "- Skills below the bar: *not taken yet; `benchmarks/results/nano_quality.json` is missing.*"
    tasks = report["high_resolution"]["tasks"]
    below = [
        f"`{name.removeprefix('world/')}` ({row['accuracy']:.2f}, chance {row['chance']:.2f})"
        for name, row in tasks.items()
        if row["accuracy"] < row["chance"] + MARGIN
    ]
    good = sum(row["accuracy"] >= GOOD for row in tasks.values())
    bar = f"the bar of {MARGIN} above chance"
    lines = [
        f"- Skills of `nano` below {bar}: {', '.join(below)}." if below else f"- No skill of `nano` is below {bar}."
    ]
    if good < WANTED:
        lines.append(f"- {good} skills of `nano` reach {GOOD}; {WANTED} were wanted.")
    middling = [
        n.removeprefix("world/")
        for n, r in tasks.items()
        if r["accuracy"] - r["chance"] >= MARGIN and r["accuracy"] < 0.7
    ]
    if middling:
        names = ", ".join(f"`{name}`" for name in middling)
        lines.append(f"- Above the bar, but wrong in more than three cases of ten: {names}.")
    return "\n".join(lines)


# ---- methods


def methods_grid(report: Row | None) -> str:
    """Every reduction over kept fractions: points against dense, and whether it differs from random tokens."""
    if report is None:
        return missing("methods")
    grid: dict[str, dict[str, Row]] = {}
    for recipe, result in report["recipes"].items():
        name, _, rest = recipe.partition("(keep=")
        name += " in the language model" if "layer=" in rest else ""
        if rest and "+" not in recipe:
            grid.setdefault(name, {})[rest.partition(",")[0].strip(")")] = result
    keeps = sorted({keep for row in grid.values() for keep in row}, key=float, reverse=True)
    always, never, worse = [], [], []
    rows = []
    for name, row in sorted(grid.items(), key=lambda item: -sum(r["paired"]["value"] for r in item[1].values())):
        cells = []
        for keep in keeps:
            delta, rival = (row[keep].get(key) for key in ("paired", "against_random")) if keep in row else (None, None)
            mark = " ▲" if rival and rival["low"] > 0 else " ▼" if rival and rival["high"] < 0 else ""
            cells.append(f"{100 * delta['value']:+.1f}{mark}".replace("-", "−") if delta else "")
        rivals = [found for result in row.values() if (found := result.get("against_random"))]
        if rivals:
            always += [name] if all(r["low"] > 0 for r in rivals) else []
            never += [name] if not any(r["low"] > 0 for r in rivals) else []
            worse += [name] if any(r["high"] < 0 for r in rivals) else []
        word, _, where = name.partition(" ")
        rows.append([f"[`{word}`](methods/{word}.md) {where}".strip(), *cells])

    def listed(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in names) or "none"

    said = (
        f"Better than random tokens beyond noise at every budget: {listed(always)}. At no budget: {listed(never)}. "
        f"Worse than random beyond noise at some budget: {listed(worse)}."
    )
    dense = report["dense"]
    about = (
        f"Points of mean accuracy against dense ({dense['mean']:.3f}, {len(dense['tasks'])} tasks of "
        f"{report.get('limit', '?')} questions). ▲ better, ▼ worse than random tokens at the same fraction and place, "
        f"the 95 % interval of the paired difference being away from zero."
    )
    head = ["method", *(f"keep {keep}" for keep in keeps)]
    return f"{about}\n\n{table(head, rows)}\n\n{said}\n\n{conditions(report)}"


def method(name: str, report: Row | None) -> str:
    """What each setting of a method (of all, for "") keeps of nano's accuracy, and the skills that fall most."""
    if report is None:
        return missing("methods")
    dense = report["dense"]
    rows = []
    for recipe, result in report["recipes"].items():
        if name and (recipe.partition("(")[0].strip() != name or "+" in recipe):
            continue
        falls = {task: row["accuracy"] - dense["tasks"][task]["accuracy"] for task, row in result["tasks"].items()}
        worst = sorted(falls, key=falls.__getitem__)[:3]
        shown = ", ".join(f"{task.removeprefix('world/')} {signed(falls[task])}" for task in worst if falls[task] < 0)
        paired = [with_interval(result.get(key)) for key in ("paired", "against_random")]
        flops = f"{result['flops']:.2f}x" if "flops" in result else ""
        rows.append([f"`{recipe}`", flops, f"{result['mean']:.3f}", *paired, shown or "none falls"])
    if not rows:
        return f"*Not taken yet: `benchmarks/results/methods.json` holds no recipe of `{name}`.*"
    head = ["recipe", "FLOPs", "mean accuracy", "against dense [95 %]", "against random tokens [95 %]", "falls most"]
    if not any(row[4] for row in rows):
        head, rows = [*head[:4], head[5]], [[*row[:4], row[5]] for row in rows]
    lines = (
        f"Dense: {dense['mean']:.3f}, mean over {len(dense['tasks'])} tasks of {report.get('limit', '?')} questions."
    )
    return f"{table(head, rows)}\n\n{lines}\n\n{conditions(report)}"


def weights(name: str, report: Row | None) -> str:
    """What each setting of a weight method (of all, for "") keeps: nano's accuracy, the stories model's perplexity."""
    if report is None:
        return missing("weights")
    parts = []
    nano, stories = report["nano"], report["stories"]
    rows = [
        [f"`{row['recipe']}`", f"{row['mean']:.3f}", with_interval(row["paired"]), f"{row['bytes'] / 1e6:.2f}"]
        for row in nano["rows"]
        if name in ("", row["method"])
    ]
    if rows:
        parts.append(table(["on nano", "mean accuracy", "against dense [95 %]", "MB"], rows))
        parts.append(f"Dense: {nano['dense']['mean']:.3f}, {nano['limit']} questions a skill.")
    rows = [
        [f"`{row['recipe']}`", row["calib"], f"{row['perplexity']:.2f}", f"{row['perplexity'] / stories['dense']:.2f}"]
        for row in stories["rows"]
        if name in ("", row["method"])
    ]
    if rows:
        parts.append(table(["on the stories model", "calibration", "perplexity", "ratio to dense"], rows))
        parts.append(f"Dense: {stories['dense']:.2f} on {stories['tokens']} tokens.")
    if not rows and not parts:
        return f"*Not taken yet: `benchmarks/results/weights.json` holds no recipe of `{name}`.*"
    return "\n\n".join([*parts, conditions(report)])


def cache(name: str, report: Row | None) -> str:
    """What each setting of a cache method (of all, for "") keeps when the pictures are read back from the cache."""
    if report is None:
        return missing("cache")
    parts = []
    nano, stories = report["nano"], report.get("stories")
    rows = [
        [f"`{row['recipe']}`", f"{row['mean']:.3f}", with_interval(row["paired"]), f"{row['ratio']:.2f}"]
        for row in nano["rows"]
        if name in ("", row["method"])
    ]
    if rows:
        parts.append(table(["on nano", "mean accuracy", "against dense [95 %]", "bytes to dense, float32"], rows))
        parts.append(
            f"Dense: {nano['dense']:.3f}, {nano['limit']} questions a skill, {nano['tokens']:.0f} cached tokens."
        )
    rows = [
        [f"`{row['recipe']}`", f"{row['perplexity']:.2f}", f"{row['perplexity'] / stories['dense']:.3f}"]
        for row in (stories["rows"] if stories else [])
        if name in ("", row["method"])
    ]
    if rows:
        parts.append(table(["on the stories model", "perplexity", "ratio to dense"], rows))
        parts.append(f"Dense: {stories['dense']:.2f} on {stories['tokens']} tokens, {stories['step']} at a time.")
    if not parts:
        return f"*Not taken yet: `benchmarks/results/cache.json` holds no recipe of `{name}`.*"
    return "\n\n".join([*parts, conditions(report)])


def search(report: Row | None) -> str:
    """How much of the true front each strategy finds, beside random search with as many evaluations."""
    if report is None:
        return missing("search")
    rows = []
    for name, row in sorted(report["runs"].items(), key=lambda item: -item[1]["median"]):
        against = "" if name == "random" else f"{row['p_against_random']:.4f}"
        spread = f"{row['low']:.4f} … {row['high']:.4f}"
        rows.append([f"`{name}`", f"{row['median']:.4f}", spread, f"{row['first_five']:.4f}", against])
    head = [
        "strategy",
        "share of hypervolume, median",
        "lowest … highest",
        "first five seeds",
        "sign test against random",
    ]
    seeds = len(next(iter(report["runs"].values()))["values"])
    lines = (
        f"{report['evaluations']} of {report['recipes']} recipes evaluated on {report['questions']} questions, "
        f"{seeds} seeds."
    )
    return f"{table(head, rows)}\n\n{lines}\n\n{conditions(report)}"


def optimize(name: str, report: Row | None) -> str:
    """The text that one run of the main command printed, with its time."""
    if report is None or name not in report["runs"]:
        return f"*Not taken yet: `python benchmarks/optimize.py --only {name}`.*"
    from foveate.optimize.result import text

    run = report["runs"][name]
    return (
        f"```text\n$ foveate optimize {run['arguments']}\n{text(run['report'])}\n```\n\n"
        f"{run['tried']} of {run['space']['weighed']} recipes weighed were tried; {run['seconds']:.0f} s in all, "
        f"{run['cpu_seconds']:.0f} s of processor time.\n\n"
        f"{conditions(report)}"
    )


TABLES: dict[str, tuple[str, Callable[[Row | None], str]]] = {
    "methods": ("methods", methods_grid),
    "nano_quality": ("nano_quality", nano_quality),
    "search": ("search", search),
    "nano_real": ("nano_quality", nano_real),
    "nano_limits": ("nano_quality", nano_limits),
    "plan_check": ("plan_check", plan_check),
    "compress_cost": ("compress_cost", compress_cost),
}


def make(name: str, results: Path = RESULTS) -> str:
    """The Markdown of the table `name`."""
    if name.startswith("methods_"):
        return method(name.partition("_")[2], load("methods", results))
    if name == "weights" or name.startswith("weights_"):
        return weights(name.partition("_")[2], load("weights", results))
    if name == "cache" or name.startswith("cache_"):
        return cache(name.partition("_")[2], load("cache", results))
    if name == "speed" or name.startswith("speed_"):
        return speed(name.partition("_")[2], load("speed", results))
    if name.startswith("optimize_"):
        return optimize(name.partition("_")[2], load("optimize", results))
    if name not in TABLES:
        known = [
            *TABLES,
            *(f"{kind}{rest}" for kind in ("weights", "cache", "speed") for rest in ("", "_<name>")),
            "methods_<name>",
            "optimize_<run>",
        ]
        raise SystemExit(f"unknown table {name!r}; known: {', '.join(known)}")
    file, build = TABLES[name]
    return build(load(file, results))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    check = parser.parse_args(argv).check
    return report_changes(rewrite("table", make, check=check), check, "benchmarks/tables.py")


def report_changes(changed: list[Path], check: bool, command: str) -> int:
    """Say which files changed or are stale; the exit code."""
    for file in changed:
        print(f"{file.relative_to(ROOT)}: " + (f"stale; run python {command}" if check else "rewritten"))
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
