"""The dictionary of `report.json` (and `--json`), the text on the terminal, and the folder written at the end.

    {"version", "model", "data", "recipe", "met", "verdict",
     "quality": {"mean_delta", "low", "high", "n", "held_back", "skills"}, "cost": {"flops", "bytes", "tokens",
     "ttft_ms"}, "front": [{"tag", "recipe", costs, "mean_delta", "low", "high", "n", "status"}], "dense", "budget",
     "limits", "binding", "nearest", "compare", "timing", "trials", "refused", "space", "interrupted",
     "seconds", "conditions"}

Differences of accuracy are fractions (0.01 = one point), times milliseconds; `limits` are relative to dense.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import string
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foveate.disk import umask
from foveate.errors import InputError
from foveate.optimize.budget import AXES, amount, points
from foveate.optimize.report import Picture, render
from foveate.optimize.run import Outcome, cost_dict
from foveate.optimize.search import Trial, front
from foveate.optimize.study import FILE as STUDY

VERSION = 1
TIMING_TEXT = (
    "Recipe and dense in turns on the same inputs (interleaved pairs, random order within a pair): median of "
    "the pairs' ratios with a bootstrap interval. A ratio whose interval holds 1 is no gain."
)
FILES = ("report.json", "report.html")


def to_report(found: Outcome, *, model: str, data: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """The outcome as plain JSON types, without NaN."""
    winner, dense = found.winner, found.dense
    quality: dict[str, Any] = {}
    delta = found.proof or (winner.delta if winner else None)
    if winner and delta:
        quality = {**delta.to_dict(), "held_back": found.proof is not None, "skills": found.skills}
    limits = {}
    for limit in found.budget.limits:
        bound, base = limit.bound(dense), dense.get(limit.axis)
        limits[limit.axis] = bound / base if bound and base else None
    prove_n = found.proof.n if found.proof else 0
    return {
        "version": VERSION,
        "model": model,
        "data": data,
        "recipe": winner.recipe if winner else None,
        "met": found.met,
        "verdict": found.verdict,
        "interrupted": found.interrupted,
        "budget": found.budget.to_dict(),
        "budget_text": found.budget.text(),
        "limits": limits,
        "quality": quality,
        "cost": {**cost_dict(winner.cost), "parts": winner.cost.parts} if winner else {},
        "dense": {"cost": cost_dict(dense), "parts": dense.parts},
        "front": _front(found),
        "compare": found.compare,
        "proof_text": f"{prove_n} samples that no recipe was chosen on; all rows answer the same questions.",
        "timing": found.timing,
        "timing_text": TIMING_TEXT,
        "binding": found.binding,
        "nearest": [_trial_row(trial) for trial in found.nearest],
        "trials": [_trial_row(trial) for trial in found.trials],
        "refused": found.refused,
        "space": {
            "recipes": found.space,
            "weighed": found.weighed,
            "dropped": sum(found.dropped_by.values()),
            "dropped_by": found.dropped_by,
            "cut": found.cut,
        },
        "seconds": round(found.seconds, 1),
        "conditions": conditions,
    }


def _trial_row(trial: Trial) -> dict[str, Any]:
    delta = trial.delta.to_dict() if trial.delta else {"mean_delta": None, "low": None, "high": None, "n": 0}
    return {"recipe": trial.recipe, **cost_dict(trial.cost), **delta, "status": trial.status, "reason": trial.reason}


def _front(found: Outcome) -> list[dict[str, Any]]:
    """The recipes that were measured and that nothing beats, cheapest first; dense is the last word on quality."""
    run = sorted(
        (t for t in found.trials if t.delta), key=lambda t: t is not found.winner
    )  # the winner stands for equals
    dense = {
        "recipe": "",
        **cost_dict(found.dense),
        "mean_delta": 0.0,
        "low": 0.0,
        "high": 0.0,
        "status": "dense",
        "reason": "",
    }
    rows = [_trial_row(trial) for trial in run] + [{**dense, "n": max([0, *(t.delta.n for t in run if t.delta)])}]
    axes = ["flops", "bytes"] + [limit.axis for limit in found.budget.limits if limit.axis == "tokens"]
    best = front([[row[axis] for axis in axes] for row in rows], [row["mean_delta"] for row in rows])
    base = found.dense
    order = sorted(best, key=lambda i: rows[i]["flops"] / base.flops * rows[i]["bytes"] / base.bytes)
    tags = list(string.ascii_uppercase) + [f"{a}{b}" for a in string.ascii_uppercase for b in string.ascii_uppercase]
    return [{"tag": tags[place], **rows[i]} for place, i in enumerate(order)]


def text(report: dict[str, Any]) -> str:
    """What the terminal shows: the front, the proof, the skills that fall, the verdict."""
    dense = report["dense"]["cost"]

    def costs(row: dict[str, Any]) -> list[str]:
        shown = [f"{row[a] / dense[a]:.2f}x" if dense[a] else "–" for a in ("flops", "bytes", "tokens")]
        measured = row["ttft_ms"] and dense["ttft_ms"]
        return [*shown, f"{row['ttft_ms'] / dense['ttft_ms']:.2f}x" if measured else "–"]

    def delta(row: dict[str, Any]) -> list[str]:
        return [points(row["mean_delta"], True), f"{100 * row['low']:+.1f} … {100 * row['high']:+.1f}"]

    lines = [f"{report['model']}: {report['budget_text']}", ""]
    chosen = report["recipe"]
    rows = [["Pareto front", "FLOPs", "bytes", "tokens", "TTFT", "accuracy", "95 % interval", "n"]]
    for row in report["front"]:
        mark = "→ " if row["status"] == "chosen" else "  "
        rows.append([mark + (row["recipe"] or "dense"), *costs(row), *delta(row), str(row["n"])])
    lines += [*_table(rows), ""]
    if report["compare"]:
        rows = [
            [
                "Proof on held-back samples",
                "FLOPs",
                "bytes",
                "tokens",
                "TTFT",
                "accuracy",
                "difference",
                "95 % interval",
            ]
        ]
        for row in report["compare"]:
            name = row["role"] + (f": {row['recipe']}" if row["recipe"] else "")
            last = ["", ""] if row["role"] == "dense" else delta(row)
            rows.append([name, *costs(row), f"{row['accuracy']:.3f}", *last])
        lines += [*_table(rows), ""]
    lines += _times(report["timing"])
    lines += _warnings((report["quality"] or {}).get("skills") or {})
    if chosen is None and report["nearest"]:
        lines.append("Nearest:")
        for row in report["nearest"]:
            limited = [axis for axis in report["limits"] if axis not in ("flops", "bytes")]
            shown = [_amount(axis, row, dense) for axis in ("flops", "bytes", *limited)]
            lines.append(f"  {row['recipe']}: {', '.join(filter(None, shown))}, accuracy {' '.join(delta(row))}")
        lines.append("")
    lines.append(report["verdict"])
    return "\n".join(lines)


def _amount(axis: str, row: dict[str, Any], dense: dict[str, Any]) -> str:
    """A cost in words and against dense, "" when it is not known."""
    key = f"{axis}_ms" if axis in ("ttft", "tpot") else axis
    if row[key] is None or not dense[key]:
        return ""
    return f"{AXES[axis]} {amount(axis, row[key])} ({row[key] / dense[key]:.2f}x)"


def _times(timing: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each recipe that was timed."""
    lines = []
    for row in timing:
        said = [f"to first token {_ratio(row)}", *([f"per token {_ratio(row['tpot'])}"] if row.get("tpot") else [])]
        where = f" on {row['on']}" if row.get("on") else ""
        lines.append(f"time of {row['recipe']}{where}: {', '.join(said)} in {row['pairs']} pairs")
    return [*lines, ""] if lines else []


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}] of {amount('ttft', row['dense_ms'])}"


def _warnings(skills: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each skill that falls, or one for all when they are many."""
    falling = {name: row for name, row in skills.items() if row["warning"]}
    if len(falling) > 4:
        worst = sorted(falling, key=lambda name: falling[name]["delta"])
        shown = ", ".join(f"{name} {points(falling[name]['delta'], True)}" for name in worst[:4])
        return [f"warning: {len(falling)} of {len(skills)} skills fall: {shown} ... (all in the report)", ""]
    lines = [
        f"warning: {name} {row['warning']} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        for name, row in falling.items()
    ]
    return [*lines, ""] if lines else []


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    shown = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    return [shown[0], "─" * (sum(widths) + 2 * (len(widths) - 1)), *shown[1:]]


def check_out(out: Path) -> None:
    """Raise InputError unless `out` is free, empty, or an earlier result of this command (which is then replaced), or
    the log of one that did not end."""
    if not out.exists():
        return
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        if FILES[0] in names or all(name.startswith(STUDY) for name in names):  # a result, or the log of a search
            return
    raise InputError(f"-o {out} already exists and is no earlier result of foveate optimize; choose another name")


def write(
    out: Path, report: dict[str, Any], pictures: Sequence[Picture], save: Callable[[Path], None] | None = None
) -> None:
    """Write the folder `out` whole or not at all: the model (by `save`, when there is one) and both reports.

    The log of the search that lies in `out` comes along.
    Raises InputError when the disk is full or the place cannot be written.
    """
    check_out(out)
    out = out.absolute()
    aside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; give another place with -o") from error
    try:
        if save:
            save(temporary)
        content = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (temporary / FILES[0]).write_text(content, encoding="utf-8")
        (temporary / FILES[1]).write_text(render(report, pictures), encoding="utf-8")
        if (out / STUDY).is_file():
            shutil.copy2(out / STUDY, temporary / STUDY)
        temporary.chmod(0o777 & ~umask())
        if out.exists():  # a rename cannot replace a full folder: the old result steps aside until the new one stands
            aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent)) / "old"
            out.rename(aside)
        temporary.rename(out)
    except OSError as error:
        if aside and aside.exists() and not out.exists():
            aside.rename(out)
        raise InputError(f"cannot write {out}: {error.strerror or error}; give another place with -o") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside:
            with contextlib.suppress(OSError):
                shutil.rmtree(aside.parent)
