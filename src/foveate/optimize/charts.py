"""The drawings of the report, from the dictionary of report.json: quality against cost, shares of it, whiskers."""

from __future__ import annotations

from html import escape
from typing import Any

from foveate.optimize.budget import AXES, amount
from foveate.optimize.svg import ACCENT, INK, MUTED, WARN, Mark, Svg, pareto_plot

NAIVE = ("random tokens", "uniform int4")
"""Roles of the proof that are drawn as naive choices."""
LEGEND = {
    "chosen": "chosen",
    "dense": "dense",
    "front": "Pareto front",
    "naive": "naive choice of the same size",
    "tried": "tried",
}
TINTS = {
    "tower": ("vision tower", 0.95),
    "connector": ("connector", 0.65),
    "selection": ("selection", 0.5),
    "prefill": ("prefill", 0.4),
    "decode": ("decode", 0.15),
    "weights": ("weights", 0.95),
    "cache": ("cache", 0.4),
}
"""Parts of a cost: the words for them, and the opacity of the one colour."""
PARTS = {"flops": ("tower", "connector", "selection", "prefill", "decode"), "bytes": ("weights", "cache")}


def marks(report: dict[str, Any], axis: str) -> list[Mark]:
    """The points of the plot on one cost axis; the letters are those of the table of the front."""
    dense = report["dense"]["cost"][axis] or 1.0
    found = [Mark(1.0, 0.0, 0.0, 0.0, "dense", "dense", "dense: the model as it was given")]
    letters = {row["recipe"]: row["tag"] for row in report["front"]}
    for row in report["trials"]:
        if row["mean_delta"] is not None:
            kind = "chosen" if row["status"] == "chosen" else "front" if row["recipe"] in letters else "tried"
            found.append(
                _point(row, dense, axis, kind, "chosen" if kind == "chosen" else letters.get(row["recipe"], ""))
            )
    found += [_point(row, dense, axis, "naive", row["role"]) for row in report["compare"] if row["role"] in NAIVE]
    return found


def _point(row: dict[str, Any], dense: float, axis: str, kind: str, tag: str) -> Mark:
    mean, low, high = (100 * row[key] for key in ("mean_delta", "low", "high"))
    about = f"{row['recipe']}: {mean:+.1f} pt [{low:+.1f}, {high:+.1f}], {row['n']} samples"
    return Mark(row[axis] / dense, mean, low, high, kind, tag, about)


def plots(report: dict[str, Any]) -> str:
    """Quality against FLOPs and bytes (and tokens, when they are limited) side by side, and the legend."""
    found = []
    for axis in ("flops", "bytes", *(["tokens"] if "tokens" in report["limits"] else [])):
        limit, max_loss = report["limits"].get(axis), 100 * report["budget"]["max_loss"]
        found.append(pareto_plot(marks(report, axis), axis=AXES[axis], limit=limit, max_loss=max_loss))
    figures = "".join(f"<figure>{plot}</figure>" for plot in found)
    legend = "".join(f"<span>{_swatch(kind)}{escape(text)}</span>" for kind, text in LEGEND.items())
    return f'<div class="plots">{figures}</div><div class="legend">{legend}</div>'


def _swatch(kind: str) -> str:
    svg = Svg(16, 16, kind)
    if kind == "dense":
        svg.add("rect", x=3, y=3, width=10, height=10, fill=INK)
    elif kind == "naive":
        svg.add("path", d="M8 2 l6 6 l-6 6 l-6 -6 z", fill="#fff", stroke=MUTED, stroke_width=1.6)
    else:
        radius = {"chosen": 7, "front": 4.5}.get(kind, 3)
        colour, opacity = (ACCENT if kind == "chosen" else INK), (0.4 if kind == "tried" else 1)
        svg.add("circle", cx=8, cy=8, r=radius, fill=colour, opacity=opacity)
    return svg.text()


def shares(report: dict[str, Any]) -> str:
    """Where FLOPs and bytes go, dense above chosen: what a method cannot reach is seen at once."""
    rows = {"dense": report["dense"]["parts"]}
    if report["cost"]:
        rows["chosen"] = report["cost"]["parts"]
    if not rows["dense"]:
        return ""
    figures = (f"<figure>{_stacks(axis, report['dense']['cost'][axis], rows)}</figure>" for axis in PARTS)
    return f'<div class="plots">{"".join(figures)}</div>'


def _stacks(axis: str, whole: float, rows: dict[str, dict[str, float]]) -> str:
    svg = Svg(560, 34 * len(rows) + 26, f"Shares of {AXES[axis]}")
    for place, (label, parts) in enumerate(rows.items()):
        left, top = 62.0, 34 * place
        svg.label_at(54, top + 19, label, 12, INK, text_anchor="end")
        for name in PARTS[axis]:
            words, tint = TINTS[name]
            width = 480 * parts.get(name, 0.0) / whole
            if width > 0:
                box = {"x": left, "y": top + 3, "width": width, "height": 24}
                about = f"{words}: {amount(axis, parts[name])}"
                svg.add("rect", title=about, fill=ACCENT, fill_opacity=tint, stroke="#fff", **box)
            if width > 64:
                text = f"{words} {100 * parts[name] / whole:.0f} %" if width > 110 else words
                svg.label_at(left + 7, top + 19, text, 11, "#fff" if tint > 0.6 else INK)
            left += width
    svg.label_at(62, 34 * len(rows) + 16, f"{AXES[axis]}, as a share of dense ({amount(axis, whole)})", 11)
    return svg.text()


def whisker(row: dict[str, Any], reach: float) -> str:
    """The interval of one skill around the line of no difference; reach: the difference at the edge."""
    svg = Svg(170, 20, "difference")

    def x(value: float) -> float:
        return 85 + 80 * value / reach

    colour = WARN if row["warning"] else ACCENT
    svg.line(85, 2, 85, 18, MUTED)
    svg.line(x(row["low"]), 10, x(row["high"]), 10, colour, stroke_width=2, opacity=0.6)
    svg.add("circle", cx=x(row["delta"]), cy=10, r=4, fill=colour)
    return svg.text()
