"""`report.html`: one file without script, network or fonts from elsewhere, made of the dictionary of `report.json`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from foveate.optimize.budget import AXES, MEASURED, amount, points
from foveate.optimize.charts import plots, shares, whisker

Row = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A picture for the report: PNG bytes and what is to be seen in it."""

    png: bytes
    caption: str


def render(report: Row, pictures: Sequence[Picture] = ()) -> str:
    """The whole page. report: the dictionary written to report.json (see `foveate.optimize.result`)."""
    sections = [
        _head(report),
        _tiles(report),
        _section("front", "Quality against cost", FRONT_TEXT, plots(report), _front(report)),
        _nearest(report),
        _section("shares", "Where the cost is", "", shares(report)),
        _proof(report),
        _skills(report),
        _timing(report),
        _pictures(pictures),
        _tried(report),
        _never(report),
        _section("conditions", "Conditions", "", _conditions(report)),
    ]
    style = resources.files("foveate.optimize").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report['model'])} on a budget</title><style>{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


FRONT_TEXT = (
    "Each point is one recipe, with the 95 % interval of its paired difference to dense on the same samples; the "
    "vertical scale is a square root. The shaded corner meets the budget."
)
SKILL_TEXT = (
    "A mean hides what breaks first. A skill is marked when its whole interval lies below zero, or when it loses more "
    "than the allowed loss and may lose twice as much."
)


def _section(name: str, title: str, text: str, *parts: str) -> str:
    body = "".join(parts)
    about = f'<p class="muted">{escape(text)}</p>' if text else ""
    return f'<h2 id="{name}">{escape(title)}</h2>{about}{body}' if body else ""


Cell = tuple[str, str]
"""(class of the cell, its HTML)."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str | Cell]], marked: Sequence[bool] = ()) -> str:
    """A table; a column is left-aligned when its heading starts with "<". marked: rows to bring out."""
    left = [title.startswith("<") for title in head]

    def cell(tag: str, content: str | Cell, to_left: bool) -> str:
        extra, body = content if isinstance(content, tuple) else ("", content)
        classes = " ".join(word for word in ("l" if to_left else "", extra) if word)
        return f'<{tag} class="{classes}">{body}</{tag}>' if classes else f"<{tag}>{body}</{tag}>"

    titles = "".join(cell("th", escape(title.lstrip("<")), flag) for title, flag in zip(head, left))
    lines = []
    for index, row in enumerate(rows):
        chosen = ' class="chosen"' if index < len(marked) and marked[index] else ""
        lines.append(f"<tr{chosen}>{''.join(cell('td', c, flag) for c, flag in zip(row, left))}</tr>")
    top = f"<thead><tr>{titles}</tr></thead>" if any(title.lstrip("<") for title in head) else ""
    return f'<div class="scroll"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def _code(text: str) -> str:
    return f"<code>{escape(text or 'dense')}</code>"


COSTS = ("FLOPs", "bytes", "tokens")
DELTA = ("difference", "95 %")


def _costs(row: Row, report: Row) -> list[str]:
    dense = report["dense"]["cost"]
    return [f"{row[axis] / dense[axis]:.2f}x" if dense[axis] else "–" for axis in ("flops", "bytes", "tokens")]


def _delta(row: Row, mean: str = "mean_delta") -> list[str]:
    if row[mean] is None:
        return ["–", "–"]
    return [points(row[mean], True), f"{100 * row['low']:+.1f} … {100 * row['high']:+.1f}"]


def _head(report: Row) -> str:
    recipe = f'<p class="recipe">{_code(report["recipe"])}</p>' if report["recipe"] else ""
    state = "verdict" if report["met"] else "verdict no"
    return (
        f"<header><h1>{escape(report['model'])} on a budget</h1>"
        f'<p class="muted">{escape(report["budget_text"])}. Data: {escape(report["data"])}.</p></header>'
        f'<div class="{state}" id="verdict">{recipe}<p>{escape(report["verdict"])}</p></div>'
    )


def _tiles(report: Row) -> str:
    cost, quality, tiles = report["cost"], report["quality"], []
    dense = report["dense"]["cost"]
    for axis in AXES if cost else ():
        key = f"{axis}_ms" if axis in ("ttft", "tpot") else axis
        if cost.get(key) is not None and dense.get(key):
            detail = f"{amount(axis, dense[key])} → {amount(axis, cost[key])}"
            tiles.append((AXES[axis], f"{cost[key] / dense[key]:.2f}x", detail))
    if quality:
        where = "held-back samples" if quality["held_back"] else "samples of the choice"
        detail = f"95 % {100 * quality['low']:+.1f} to {100 * quality['high']:+.1f}, {quality['n']} {where}"
        tiles.append(("accuracy against dense", points(quality["mean_delta"], True), detail))
    body = "".join(
        f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(detail)}</span></div>'
        for label, value, detail in tiles
    )
    return f'<div class="tiles">{body}</div>' if body else ""


def _front(report: Row) -> str:
    rows = [
        [row["tag"], _code(row["recipe"]), *_costs(row, report), *_delta(row), str(row["n"])] for row in report["front"]
    ]
    head = ["<", "<recipe", *COSTS, *DELTA, "samples"]
    return _table(head, rows, [row["status"] == "chosen" for row in report["front"]])


def _nearest(report: Row) -> str:
    if report["recipe"] is not None or not report["nearest"]:
        return ""
    rows = [[_code(row["recipe"]), *_costs(row, report), *_delta(row)] for row in report["nearest"]]
    return _section("nearest", "Nearest to the budget", "", _table(["<recipe", *COSTS, *DELTA], rows))


def _proof(report: Row) -> str:
    if not report["compare"]:
        return ""
    rows = []
    for row in report["compare"]:
        dense = row["role"] == "dense"
        recipe, delta = ("–", ["–", "–"]) if dense else (_code(row["recipe"]), _delta(row))
        rows.append([escape(row["role"]), recipe, f"{row['accuracy']:.3f}", *delta, *_costs(row, report)])
    table = _table(
        ["<", "<recipe", "accuracy", *DELTA, *COSTS], rows, [r["role"] == "chosen" for r in report["compare"]]
    )
    return _section("proof", "Proof on held-back samples", report["proof_text"], table)


def _skills(report: Row) -> str:
    skills = (report["quality"] or {}).get("skills") or {}
    reach = max([0.05, *(abs(row[key]) for row in skills.values() for key in ("low", "high"))])
    rows = []
    for name, row in skills.items():
        accuracy = [f"{row['dense']:.3f}", f"{row['accuracy']:.3f}"]
        note = f'<span class="warn">{escape(row["warning"])}</span>' if row["warning"] else ""
        rows.append([escape(name), *accuracy, *_delta(row, "delta"), ("bar", whisker(row, reach)), str(row["n"]), note])
    head = ["<skill", "dense", "chosen", *DELTA, "", "samples", "<"]
    return _section("skills", "Skill by skill", SKILL_TEXT, _table(head, rows)) if rows else ""


def _timing(report: Row) -> str:
    rows = [
        [
            _code(row["recipe"]),
            f"{row['dense_ms']:.1f} ms",
            f"{row['ms']:.1f} ms",
            f"{row['ratio']:.2f}x",
            f"{row['low']:.2f} … {row['high']:.2f}",
            str(row["pairs"]),
        ]
        for row in report["timing"]
    ]
    table = _table(["<recipe", "dense", "recipe", "ratio", "95 %", "pairs"], rows) if rows else ""
    where = next((f" Timed on {row['on']}." for row in report["timing"] if row.get("on")), "")
    return _section("time", "Time to first token, measured", report["timing_text"] + where, table)


def _pictures(pictures: Sequence[Picture]) -> str:
    figures = [
        f'<figure><img alt="{escape(p.caption)}" src="data:image/png;base64,{base64.b64encode(p.png).decode()}">'
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in pictures
    ]
    body = f'<div class="pictures">{"".join(figures)}</div>' if figures else ""
    text = "Covered squares are visual tokens that were dropped."
    return _section("pictures", "What the language model still sees", text, body)


def _tried(report: Row) -> str:
    rows = [row for row in report["trials"] if row["status"] == "rejected"]
    run = sum(row["n"] > 0 for row in report["trials"])
    cut = "" if report["space"]["cut"] is None else " Time ran out before all that was planned was tried."
    text = f"{run} recipes answered questions; {len(rows)} of them were rejected.{cut}"
    table = _reasons(rows, report) if rows else " "
    return _section("rejected", "Tried and rejected", text, table)


def _never(report: Row) -> str:
    """What was left out before anything ran: how many recipes, by which limit, examples, and methods with reasons."""
    space, refused = report["space"], report["refused"]
    reasons = [
        f"{count} {'take' if axis in MEASURED else 'break the limit of'} {AXES[axis]}"
        + (" that saves less than half of what is asked, by estimate" if axis in MEASURED else "")
        for axis, count in space["dropped_by"].items()
    ]
    text = (
        f"The space holds {space['recipes']} combinations. The cost of {space['weighed']} was counted, and "
        f"{space['dropped']} were never run" + (f": {'; '.join(reasons)}." if reasons else ".")
    )
    rows = [row for row in report["trials"] if row["status"] == "pruned"]
    parts = []
    if rows:
        title = f"Examples: {len(rows)} that come nearest"
        parts.append(f"<details><summary>{title}</summary>{_reasons(rows, report)}</details>")
    if refused:
        table = _table(["<method", "<why not"], [[_code(n), ("wrap", escape(why))] for n, why in refused.items()])
        parts.append(f"<details><summary>{len(refused)} methods were not searched</summary>{table}</details>")
    return _section("pruned", "Left out before running", text, "".join(parts) or " ")


def _reasons(rows: Sequence[Row], report: Row) -> str:
    shown = [[_code(row["recipe"]), *_costs(row, report), ("wrap", escape(row["reason"]))] for row in rows]
    return _table(["<recipe", *COSTS, "<why not"], shown)


def _conditions(report: Row) -> str:
    rows = [[escape(str(key)), ("wrap", escape(str(value)))] for key, value in report["conditions"].items()]
    return _table(["<", "<"], rows)
