"""A few lines of SVG: shapes with escaped attributes, and the plot of quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ACCENT, INK, MUTED, LINE, SOFT, WARN = "#0b7285", "#1c2733", "#667482", "#d9dfe5", "#a9b4bf", "#9a3412"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Svg:
    """Collects shapes; `text()` gives the element. Attribute names use `_` for `-`."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._body: list[str] = []

    def add(self, tag: str, text: str | None = None, title: str | None = None, **attributes: object) -> None:
        """One element with optional text inside, and a title that browsers show on hovering."""
        parts = " ".join(f'{name.replace("_", "-")}="{escape(_short(v))}"' for name, v in attributes.items())
        inner = (f"<title>{escape(title)}</title>" if title else "") + (escape(text) if text is not None else "")
        self._body.append(f"<{tag} {parts}>{inner}</{tag}>" if inner else f"<{tag} {parts}/>")

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str = LINE, **attributes: object) -> None:
        """A straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, **attributes)

    def label_at(
        self, x: float, y: float, text: str, size: float = 12, fill: str = MUTED, **attributes: object
    ) -> None:
        """A line of text."""
        self.add("text", text, x=x, y=y, font_size=size, fill=fill, **attributes)

    def text(self) -> str:
        """The whole element. It scales with the page."""
        return (
            f'<svg viewBox="0 0 {_short(self.width)} {_short(self.height)}" role="img" '
            f'aria-label="{escape(self.label)}" font-family="{escape(FONT)}">{"".join(self._body)}</svg>'
        )


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Mark:
    """One recipe in the plot. cost: relative to dense; quality, low, high: difference to dense in points.

    kind: "dense", "chosen", "front", "naive" or "tried". tag: a short name drawn beside the mark, or nothing.
    """

    cost: float
    quality: float
    low: float
    high: float
    kind: str
    tag: str = ""
    title: str = ""


TICKS = (40, 20, 10, 5, 2, 1, 0, -1, -2, -5, -10, -20, -40, -80)


def pareto_plot(
    marks: Sequence[Mark], *, axis: str, limit: float | None, max_loss: float, width: int = 560, height: int = 380
) -> str:
    """An SVG of quality against cost.

    axis: name of the cost. limit: largest relative cost allowed, None without such a limit. max_loss: points. Quality
    is drawn on a square-root scale, so that one point can be told from none although a bad recipe loses fifty.
    """
    left, right, top, bottom = 58, width - 18, 22, height - 46
    low = min([-2.0 * max_loss, -1.0, *(m.low for m in marks)])
    high = max([1.0, *(m.high for m in marks)])
    far = max([1.04, *(m.cost * 1.04 for m in marks)])
    root_low, root_high = _root(low * 1.05), _root(high * 1.15)

    def x(cost: float) -> float:
        return left + (right - left) * cost / far

    def y(quality: float) -> float:
        return bottom - (bottom - top) * (_root(quality) - root_low) / (root_high - root_low)

    svg = Svg(width, height, f"Difference of accuracy to dense against {axis}")
    _axes(svg, axis, (left, right, top, bottom), x, y, far, (low * 1.05, high * 1.15))
    if limit is not None and limit <= far:
        svg.add("rect", x=left, y=top, width=x(limit) - left, height=y(-max_loss) - top, fill=ACCENT, opacity=0.06)
        svg.line(x(limit), top, x(limit), bottom, ACCENT, stroke_dasharray="5 4")
        svg.label_at(x(limit) + 5, top + 11, f"budget {limit:.2g}x", 11, ACCENT)
    svg.line(left, y(-max_loss), right, y(-max_loss), ACCENT, stroke_dasharray="5 4")
    svg.label_at(right, y(-max_loss) + 13, f"loss {max_loss:g} pt", 11, ACCENT, text_anchor="end")
    line = sorted((m.cost, -m.quality) for m in marks if m.kind in ("front", "chosen", "dense"))
    best, path = float("-inf"), []
    for cost, minus in line:  # on this one axis only what no cheaper recipe beats belongs to the line
        if -minus > best:
            best = -minus
            path.append(f"{_short(x(cost))},{_short(y(best))}")
    if len(path) > 1:
        svg.add("polyline", points=" ".join(path), fill="none", stroke=INK, stroke_width=1.2, opacity=0.45)
    order = {"tried": 0, "naive": 1, "front": 2, "dense": 3, "chosen": 4}
    for mark in sorted(marks, key=lambda m: order[m.kind]):
        _mark(svg, mark, x(mark.cost), y(mark.quality), y(mark.low), y(mark.high))
    # What a tag must not cover: the marks that count, then the tags already placed. (x, y, half width).
    taken = [(x(m.cost), y(m.quality), 7.0) for m in marks if m.kind != "tried"]
    for mark in sorted(marks, key=lambda m: -order[m.kind]):
        if mark.tag:
            _tag(svg, mark, x(mark.cost), y(mark.quality), taken, (left, right, top, bottom))
    return svg.text()


def _root(value: float) -> float:
    return (1 if value >= 0 else -1) * abs(value) ** 0.5


def _axes(svg: Svg, axis: str, box: tuple, x, y, far: float, span: tuple[float, float]) -> None:
    left, right, top, bottom = box
    last = 1e9
    for tick in TICKS:
        if span[0] <= tick <= span[1] and abs(y(tick) - last) >= 15:
            last = y(tick)
            svg.line(left, last, right, last, INK if tick == 0 else LINE, stroke_width=1 if tick else 1.2)
            svg.label_at(left - 8, last + 4, f"{tick:+d}" if tick else "0", 11, text_anchor="end")
    for step in range(0, int(far * 4) + 1):
        svg.line(x(step / 4), bottom, x(step / 4), bottom + 4, MUTED)
        svg.label_at(x(step / 4), bottom + 17, f"{step / 4:g}x", 11, text_anchor="middle")
    svg.line(left, bottom, right, bottom, MUTED)
    svg.label_at((left + right) / 2, bottom + 38, f"{axis}, relative to dense", 12, INK, text_anchor="middle")
    middle = (top + bottom) / 2
    svg.label_at(
        16, middle, "accuracy − dense (points)", 12, INK, text_anchor="middle", transform=f"rotate(-90 16 {middle:.1f})"
    )


def _mark(svg: Svg, mark: Mark, x: float, y: float, low: float, high: float) -> None:
    strong = mark.kind == "chosen"
    colour = {"chosen": ACCENT, "dense": INK, "front": INK, "naive": MUTED, "tried": SOFT}[mark.kind]
    if mark.kind != "dense":
        opacity = {"chosen": 1.0, "front": 0.7, "naive": 0.7}.get(mark.kind, 0.35)
        svg.line(x, low, x, high, colour, stroke_width=2 if strong else 1.2, opacity=opacity)
    if mark.kind == "dense":
        svg.add("rect", title=mark.title, x=x - 5, y=y - 5, width=10, height=10, fill=INK)
    elif mark.kind == "naive":
        path = f"M{x:.1f} {y - 6:.1f} l6 6 l-6 6 l-6 -6 z"
        svg.add("path", title=mark.title, d=path, fill="#fff", stroke=colour, stroke_width=1.6)
    else:
        radius = {"chosen": 7.5, "front": 4.5}.get(mark.kind, 3)
        if strong:
            svg.add("circle", cx=x, cy=y, r=12, fill=ACCENT, opacity=0.18)
        svg.add("circle", title=mark.title, cx=x, cy=y, r=radius, fill=colour, stroke="#fff", stroke_width=1.2)


def _tag(svg: Svg, mark: Mark, x: float, y: float, taken: list[tuple[float, float, float]], box: tuple) -> None:
    """Draw the tag at the first free place around the mark; where there is none, hovering still shows the title."""
    left, right, top, bottom = box
    half = 3.6 * len(mark.tag)
    beside = [(x + side * (12 + half), y + down) for down in (4, -9, 17, -24, 32) for side in (1, -1)]
    for place in [*beside, (x, y - 14), (x, y + 22), (x, y - 30), (x, y + 38)]:
        inside = left + half < place[0] < right - half and top + 8 < place[1] < bottom
        # A tag is drawn on its baseline, so its middle is four pixels higher.
        if inside and all(abs(place[0] - a) > half + w or abs(place[1] - 4 - b) > 11 for a, b, w in taken):
            break
    else:
        return
    taken.append((place[0], place[1] - 4, half))
    strong = mark.kind in ("chosen", "dense")
    colour = ACCENT if mark.kind == "chosen" else INK if mark.kind != "naive" else MUTED
    svg.label_at(*place, mark.tag, 12, colour, text_anchor="middle", font_weight=600 if strong else 400)
